//! From files to examples: [`source`] finds files, [`read`] reads their rows, a format plugin makes records of them,
//! [`columns`] sees that nothing of them is lost, [`shape`] makes of them what a loss takes, [`chat`] renders them, [`tokens`] gives
//! ids, [`examples`] keeps those, [`report`] says what became of everything, and [`pipeline`] leads rows through all of it.

mod bounded;
pub mod chat;
pub mod columns;
pub mod examples;
mod jinja;
mod namespace;
mod pipeline;
mod prompts;
mod python;
pub mod read;
pub mod report;
mod shape;
pub mod source;
mod tokenizer;
pub mod tokens;

use std::collections::HashSet;
use std::path::Path;

use dpo_plugin_api::graph::ModelGraph;
use dpo_plugin_api::loss::Answers;
use rand::SeedableRng;
use rand_chacha::ChaCha8Rng;

pub use chat::read_json;
pub use chat::{ChatTemplate, Rendering};
pub use columns::parse_columns;
pub use examples::Examples;
pub use prompts::{Prompt, prompts};
pub use python::strftime_now;
pub use report::Report;
pub use tokens::{ChatTokenizer, Truncation};

use columns::{Columns, refuse_missing, rename};
use dpo_core::cache;
use dpo_core::console;
use dpo_core::error::{Error, IoContext, Result};
use dpo_core::files::identity;
use dpo_core::graph::vocabulary;
use dpo_plugins::{Format, Registry};
use pipeline::Pipeline;
use read::Chunk;
use source::Source;

/// The examples that the losses of a run take.
#[derive(Clone, Debug)]
pub struct Wanted {
    /// How many answers each has.
    pub answers: Answers,
    /// The loss that says so, for messages.
    pub loss: String,
    /// Whether each has, detached, an answer to another prompt.
    pub mismatched: bool,
    /// Whether the prompt's tokens get log-probs as well.
    pub prompt: bool,
}

impl Default for Wanted {
    fn default() -> Wanted {
        Wanted { answers: Answers::Pair, loss: "sigmoid".into(), mismatched: false, prompt: false }
    }
}

impl Wanted {
    /// What reports call an example.
    fn noun(&self) -> &'static str {
        if self.answers == Answers::Pair { "pair" } else { "example" }
    }
}

/// What is asked of the data.
#[derive(Clone, Debug)]
pub struct DataOptions {
    /// `--dataset` arguments: `PATH` or `PATH#N`.
    pub paths: Vec<String>,
    /// The format's name; otherwise it is found out, file by file.
    pub format: Option<String>,
    /// What the records of the rows become.
    pub wanted: Wanted,
    /// Examples of a step: a mismatched answer is of another example of so many that follow each other.
    pub batch_size: usize,
    /// Names that formats read for the names in the files.
    pub columns: Columns,
    /// Most tokens of a prompt and an answer; `None` for what the model is made for.
    pub max_length: Option<usize>,
    /// Tokens that the model has: examples with others end everything. `None` where a tokenizer alone is at hand.
    pub vocabulary: Option<usize>,
    /// What happens to longer ones.
    pub truncation: Truncation,
    /// Whether the first bad row ends everything.
    pub strict: bool,
    /// Most rows of each source: the first ones.
    pub max_samples: Option<usize>,
    /// The system message of conversations that have none.
    pub system: Option<String>,
    /// Whether plain text stays as it is, where the checkpoint has a chat template that would make turns of it.
    pub plain_text: bool,
    /// Whether `#N` takes rows at random. Examples always come in the order of their files.
    pub shuffle: bool,
    /// For the sample.
    pub seed: u64,
}

impl DataOptions {
    /// The same for a model: rows are no longer than it takes, and have no token that it does not have.
    #[must_use]
    pub fn of_model(self, graph: &ModelGraph, positions: Option<usize>) -> DataOptions {
        let most = self.max_length.or(positions).unwrap_or(usize::MAX);
        let max_length = Some(most.min(graph.max_positions.unwrap_or(usize::MAX)));
        DataOptions { max_length, vocabulary: Some(vocabulary(graph)), ..self }
    }
}

impl DataOptions {
    fn sources(&self) -> Result<Vec<Source>> {
        if self.paths.is_empty() {
            return Err(Error::input("no data is named").at("--dataset").help("name rows with --dataset FILE"));
        }
        self.paths.iter().map(|argument| Source::parse(argument)).collect()
    }

    fn most_tokens(&self) -> usize {
        self.max_length.unwrap_or(usize::MAX)
    }
}

/// Examples to train on.
#[derive(Clone, Debug)]
pub struct Dataset {
    /// In the order of their files.
    pub examples: Examples,
    /// What became of the rows.
    pub report: Report,
}

/// Reads, converts and tokenises everything that `options` names, or finds what another run has made of the same.
///
/// # Errors
/// A source that cannot be read, rows of no known format, an example with another number of answers than is wanted, under
/// `strict` the first row that makes no example by its own fault, and data without any example.
pub fn load(options: &DataOptions, registry: &Registry, tokenizer: &ChatTokenizer) -> Result<Dataset> {
    let sources = options.sources()?;
    let name = cache_name(options, &sources, registry, tokenizer)?;
    if let Some((examples, report)) = name.as_deref().and_then(Examples::cached) {
        console::line(format!("data        tokenised before: {} {}s", examples.len(), report.noun));
        return Ok(Dataset { examples, report });
    }
    let mut pipeline = Pipeline::new(options, registry, tokenizer);
    refuse_missing(&sources, &options.columns)?;
    for source in &sources {
        let mut left = options.max_samples.unwrap_or(usize::MAX);
        for chunk in source.read(options.shuffle, options.seed)? {
            let Chunk { path, mut rows } = chunk?;
            rows.truncate(left);
            left -= rows.len();
            rename(&mut rows, &options.columns);
            if !rows.is_empty() {
                pipeline.rows(&path, rows)?;
            }
            if left == 0 {
                break;
            }
        }
    }
    pipeline.finish(name.as_deref())
}

/// The name under which examples are kept, from everything that they depend on; none where a template reads the clock.
fn cache_name(
    options: &DataOptions,
    sources: &[Source],
    registry: &Registry,
    tokenizer: &ChatTokenizer,
) -> Result<Option<String>> {
    if tokenizer.template().is_some_and(|t| t.reads_clock) {
        return Ok(None);
    }
    // A program that was built anew may make other ids under the same version.
    let mut files = std::env::current_exe().reading(Path::new("/proc/self/exe")).and_then(|exe| identity(&exe))?;
    for path in sources.iter().map(Source::files).collect::<Result<Vec<_>>>()?.concat() {
        files += &identity(&path)?;
    }
    // What does not matter is the same for all.
    let sampled = sources.iter().any(|source| source.rows.is_some());
    let same = DataOptions {
        // Files are named whole, wherever a run is started.
        paths: sources.iter().map(|source| format!("{:?}", source.rows)).collect(),
        batch_size: if options.wanted.mismatched { options.batch_size } else { 0 },
        shuffle: sampled && options.shuffle,
        seed: if sampled { options.seed } else { 0 },
        ..options.clone()
    };
    let formats: Vec<String> = registry.formats.iter().map(Format::package).collect();
    Ok(Some(cache::name(&[
        env!("CARGO_PKG_VERSION").as_bytes(),
        format!("{same:?}").as_bytes(),
        files.as_bytes(),
        formats.join("\n").as_bytes(),
        tokenizer.content().as_bytes(),
    ])))
}

/// Parts examples into those to train on and those to evaluate on: `ratio` of them, at random by `seed`, and at least one of
/// each where there are two. Both keep their order.
pub fn split(examples: &Examples, ratio: f64, seed: u64) -> (Examples, Examples) {
    let wanted = (examples.len() as f64 * ratio).round() as usize;
    let wanted = if ratio > 0.0 && examples.len() > 1 { wanted.clamp(1, examples.len() - 1) } else { 0 };
    let mut random = ChaCha8Rng::seed_from_u64(seed);
    let held: HashSet<usize> = rand::seq::index::sample(&mut random, examples.len(), wanted).into_iter().collect();
    let (val, train): (Vec<usize>, Vec<usize>) = (0..examples.len()).partition(|i| held.contains(i));
    (examples.select(&train), examples.select(&val))
}

#[cfg(test)]
impl DataOptions {
    /// Rows of a file, with nothing said of them.
    pub(crate) fn of_file(path: &str) -> DataOptions {
        DataOptions {
            paths: vec![path.to_owned()],
            format: None,
            wanted: Wanted::default(),
            batch_size: 16,
            columns: Columns::default(),
            max_length: None,
            vocabulary: None,
            truncation: Truncation::Delete,
            strict: false,
            max_samples: None,
            system: None,
            plain_text: false,
            shuffle: false,
            seed: 0,
        }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)] // In a test, a panic is the report.

    use super::*;

    /// Fewer rows than there are would be another run, and which ones are left would depend on the machine.
    #[test]
    fn a_row_whose_rendering_does_not_end_ends_the_run_and_is_named() {
        let dir = tempfile::tempdir().unwrap();
        let golden = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/trl/model/tokenizer.json");
        std::fs::copy(golden, dir.path().join("tokenizer.json")).unwrap();
        let template = "{% set n = namespace(a=['x'], b=['x']) %}{% for m in messages %}{% if 'slow' in m.content %}\
            {% for i in range(60) %}{% set n.a = [n.a, n.a] %}{% set n.b = [n.b, n.b] %}{% endfor %}{{ n.a == n.b }}\
            {% endif %}{{ m.content }}<|im_end|>{% endfor %}";
        let config = serde_json::json!({"eos_token": "<|im_end|>", "chat_template": template}).to_string();
        std::fs::write(dir.path().join("tokenizer_config.json"), config).unwrap();
        let row = |answer: &str| {
            let turns =
                serde_json::json!([{"role": "user", "content": "why?"}, {"role": "assistant", "content": answer}]);
            serde_json::json!({"messages": turns, "rejected_response": "no"}).to_string()
        };
        let path = dir.path().join("rows.jsonl");
        std::fs::write(&path, [row("ok"), row("slow"), row("so")].join("\n")).unwrap();
        let options = DataOptions::of_file(&path.display().to_string());
        let tokenizer = ChatTokenizer::open(dir.path(), None).unwrap();
        let error = load(&options, &Registry::discover(&[], None), &tokenizer).unwrap_err();
        assert_eq!(error.kind, dpo_core::error::Kind::Run);
        let expected = format!("{}:2: the chat template does not come to an end within 2 seconds", path.display());
        assert!(error.to_string().starts_with(&expected), "{error}");
    }
}
