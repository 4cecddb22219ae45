//! The boundary itself. Authors never name anything here.
//!
//! What is frozen is one root module of two functions. Everything that may grow crosses as JSON under a name: a manifest, a
//! config, a graph, a row, a record. Only the loss, called for every micro-batch, takes slices. So a plugin that was built
//! against 1.0.0 goes on loading while manifests, graphs and records gain fields; abi_stable refuses a root module whose
//! layout differs, and would refuse an old plugin if a field were ever added to the types below, so none ever is: a
//! wider boundary would be a second root module beside this one.
//!
//! A panic must not cross `extern "C"`. Every entry runs under [`guard`], which turns it into an error and keeps its text
//! off the terminal.

use std::cell::{Cell, RefCell};
use std::panic::{AssertUnwindSafe, PanicHookInfo, catch_unwind};
use std::sync::{Once, OnceLock};

use abi_stable::StableAbi;
use abi_stable::library::RootModule;
use abi_stable::package_version_strings;
use abi_stable::sabi_types::VersionStrings;
use abi_stable::std_types::{RResult, RSlice, RStr, RString, RVec};
use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::dataset::{DatasetFormat, Row, check_records};
use crate::loss::{
    AlignmentLoss, Answer, Example, LossBatch, LossOption, MAX_STATISTICS, Needs, Options, Totals, check_answers,
};
use crate::model::{Config, ModelFamily};
use crate::{Error, Result, bail};

/// What a library exports.
#[repr(C)]
#[derive(StableAbi)]
#[sabi(kind(Prefix(prefix_ref = PluginModule_Ref)))]
pub struct PluginModule {
    /// `call(what, item, input)`: `manifest`, `graph`, `recognises`, `records`; input and output are JSON, and an error is
    /// a JSON [`Error`].
    pub call: extern "C" fn(RStr<'_>, usize, RStr<'_>) -> RResult<RString, RString>,
    /// A loss of some examples.
    #[sabi(last_prefix_field)]
    pub eval: extern "C" fn(usize, RawLossCall<'_>) -> RResult<RawLossResult, RString>,
}

impl RootModule for PluginModule_Ref {
    abi_stable::declare_root_module_statics! {PluginModule_Ref}
    const BASE_NAME: &'static str = "dpo_plugin";
    const NAME: &'static str = "dpo_plugin";
    const VERSION_STRINGS: VersionStrings = package_version_strings!();
}

/// An answer's slices; see [`Answer`].
#[repr(C)]
#[derive(StableAbi, Clone, Copy)]
pub struct RawAnswer<'a> {
    /// Log-probs under the policy.
    pub policy: RSlice<'a, f32>,
    /// Log-probs under the reference.
    pub reference: RSlice<'a, f32>,
    /// Token weights.
    pub weights: RSlice<'a, f32>,
    /// Statistics asked for, in their order, under the policy; the rest is empty.
    pub statistics: [RSlice<'a, f32>; MAX_STATISTICS],
    /// The same under the reference.
    pub reference_statistics: [RSlice<'a, f32>; MAX_STATISTICS],
    /// Whether it was liked, or its score.
    pub label: f64,
    /// Whether no gradient flows through it.
    pub detached: bool,
}

/// An example's answers, best first; see [`Example`].
#[repr(C)]
#[derive(StableAbi, Clone, Copy)]
pub struct RawExample<'a> {
    /// Its answers.
    pub answers: RSlice<'a, RawAnswer<'a>>,
    /// Log-probs of its prompt's tokens under the policy, where they are asked for.
    pub prompt: RSlice<'a, f32>,
}

/// Sizes of the step; see [`Totals`].
#[repr(C)]
#[derive(StableAbi, Clone, Copy)]
pub struct RawTotals {
    /// Examples.
    pub examples: f64,
    /// Answers.
    pub answers: f64,
    /// Tokens of every example's best answer.
    pub best_tokens: f64,
    /// Tokens of all answers.
    pub tokens: f64,
    /// Tokens of all prompts, where they are asked for.
    pub prompt_tokens: f64,
}

/// What a loss is given; see [`LossBatch`].
#[repr(C)]
#[derive(StableAbi, Clone, Copy)]
pub struct RawLossCall<'a> {
    /// JSON object of option values.
    pub options: RStr<'a>,
    /// Examples.
    pub examples: RSlice<'a, RawExample<'a>>,
    /// Sizes of the step.
    pub totals: RawTotals,
    /// State from the last call.
    pub state: RSlice<'a, f64>,
}

/// What a loss answers.
#[repr(C)]
#[derive(StableAbi)]
pub struct RawLossResult {
    /// Loss of each example.
    pub losses: RVec<f64>,
    /// Derivative by the log-prob of each token of every answer of every example.
    pub grad: RVec<f32>,
    /// State for the next call.
    pub state: RVec<f64>,
}

/// What a library says of itself.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Manifest {
    /// Version of this crate that it was built against.
    pub api: String,
    /// Package name.
    pub package: String,
    /// Package version.
    pub version: String,
    /// Features the host must have.
    #[serde(default)]
    pub requires: Vec<String>,
    /// What it brings; kept as values, so that a kind which a host does not know costs that item alone.
    pub items: Vec<Value>,
}

/// One thing a library brings.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "lowercase", deny_unknown_fields)]
pub enum Item {
    /// A [`ModelFamily`].
    Model {
        /// Its name.
        name: String,
        /// Its line in `list`.
        summary: String,
        /// Architectures it answers for.
        claims: Vec<String>,
        /// Published checkpoints that it is known to read.
        #[serde(default, skip_serializing_if = "Vec::is_empty")]
        checkpoints: Vec<String>,
        /// A published `config.json`.
        example_config: String,
        /// Chat template for checkpoints without one.
        #[serde(default)]
        chat_template: Option<String>,
    },
    /// A [`DatasetFormat`].
    Dataset {
        /// Its name.
        name: String,
        /// Its line in `list`.
        summary: String,
        /// Rows as jsonl.
        examples: String,
    },
    /// An [`AlignmentLoss`].
    Loss {
        /// Its name.
        name: String,
        /// Its line in `list`.
        summary: String,
        /// Its formula.
        formula: String,
        /// Which other tools have it, and where they compute otherwise.
        #[serde(default)]
        peers: String,
        /// What it needs of the host.
        needs: Needs,
        /// Its options.
        options: Vec<LossOption>,
    },
}

impl Item {
    /// The item's name.
    pub fn name(&self) -> &str {
        match self {
            Item::Model { name, .. } | Item::Dataset { name, .. } | Item::Loss { name, .. } => name,
        }
    }
}

/// One implementor of an author trait.
enum Export {
    Model(Box<dyn ModelFamily>),
    Dataset(Box<dyn DatasetFormat>),
    Loss(Box<dyn AlignmentLoss>),
}

/// All implementors of a library, in the order of its `plugin!`.
pub struct Exports {
    package: &'static str,
    version: &'static str,
    requires: Vec<String>,
    items: Vec<Export>,
}

impl Exports {
    /// None yet.
    pub fn new(package: &'static str, version: &'static str) -> Exports {
        Exports { package, version, requires: Vec::new(), items: Vec::new() }
    }

    /// Adds a feature that the host must have.
    pub fn requires(&mut self, feature: &str) {
        self.requires.push(feature.into());
    }

    /// Adds a family.
    pub fn models(&mut self, family: impl ModelFamily) {
        self.items.push(Export::Model(Box::new(family)));
    }

    /// Adds a format.
    pub fn datasets(&mut self, format: impl DatasetFormat) {
        self.items.push(Export::Dataset(Box::new(format)));
    }

    /// Adds a loss.
    pub fn losses(&mut self, loss: impl AlignmentLoss) {
        self.items.push(Export::Loss(Box::new(loss)));
    }

    fn manifest(&self) -> Manifest {
        let item = |export: &Export| match export {
            Export::Model(m) => Item::Model {
                name: m.name().into(),
                summary: m.summary().into(),
                claims: texts(m.claims()),
                checkpoints: texts(m.checkpoints()),
                example_config: m.example_config().into(),
                chat_template: m.chat_template().map(str::to_owned),
            },
            Export::Dataset(d) => {
                Item::Dataset { name: d.name().into(), summary: d.summary().into(), examples: d.examples().into() }
            }
            Export::Loss(l) => Item::Loss {
                name: l.name().into(),
                summary: l.summary().into(),
                formula: l.formula().into(),
                peers: l.peers().into(),
                needs: l.needs(),
                options: l.options(),
            },
        };
        Manifest {
            api: env!("CARGO_PKG_VERSION").into(),
            package: self.package.into(),
            version: self.version.into(),
            requires: self.requires.clone(),
            items: self.items.iter().map(|e| to_value(&item(e))).collect(),
        }
    }

    fn call(&self, what: &str, item: usize, input: &str) -> Result<Value> {
        match (what, self.items.get(item)) {
            ("manifest", _) => Ok(to_value(&self.manifest())),
            ("graph", Some(Export::Model(m))) => Ok(to_value(&m.graph(&Config::parse(input)?)?)),
            ("recognises", Some(Export::Dataset(d))) => Ok(d.recognises(&row(input)?).into()),
            ("records", Some(Export::Dataset(d))) => {
                let records = d.records(&row(input)?)?;
                // Before they become text, which is many times as large.
                check_records(&records)?;
                Ok(to_value(&records))
            }
            _ => bail!("the plugin has no '{what}' for its item {item}"),
        }
    }

    fn eval(&self, item: usize, call: &RawLossCall<'_>) -> Result<RawLossResult> {
        let Some(Export::Loss(loss)) = self.items.get(item) else { return bail!("item {item} is not a loss") };
        let examples: Vec<Example<'_>> = call.examples.iter().map(example_of).collect();
        check_answers(&loss.needs(), &examples)?;
        let RawTotals { examples: count, answers, best_tokens, tokens, prompt_tokens } = call.totals;
        let batch =
            LossBatch { examples, totals: Totals { examples: count, answers, best_tokens, tokens, prompt_tokens } };
        let options = match serde_json::from_str(call.options.as_str()) {
            Ok(values) => Options(values),
            Err(e) => return bail!("loss options: {e}"),
        };
        let mut state = call.state.to_vec();
        let grad = loss.eval(&batch, &options, &mut state)?;
        Ok(RawLossResult { losses: grad.losses().to_vec().into(), grad: grad.grad().into(), state: state.into() })
    }
}

fn example_of<'a>(raw: &RawExample<'a>) -> Example<'a> {
    Example { answers: raw.answers.as_slice().iter().map(answer_of).collect(), prompt: raw.prompt.as_slice() }
}

fn answer_of<'a>(raw: &RawAnswer<'a>) -> Answer<'a> {
    Answer {
        policy: raw.policy.as_slice(),
        reference: raw.reference.as_slice(),
        weights: raw.weights.as_slice(),
        label: raw.label,
        detached: raw.detached,
        statistics: raw.statistics.map(|s| s.as_slice()),
        reference_statistics: raw.reference_statistics.map(|s| s.as_slice()),
    }
}

fn texts(list: &[&str]) -> Vec<String> {
    list.iter().map(|text| (*text).to_owned()).collect()
}

fn to_value<T: Serialize>(value: &T) -> Value {
    // Plain data with text keys always serialises.
    serde_json::to_value(value).unwrap_or(Value::Null)
}

fn row(input: &str) -> Result<Row> {
    serde_json::from_str(input).map_err(|e| Error::new(format!("a row should be an object: {e}")))
}

/// A library linked into the host, collected by `inventory`.
pub struct Linked {
    /// Its root module.
    pub module: fn() -> PluginModule_Ref,
}

inventory::collect!(Linked);

/// [`PluginModule::call`] for a library's exports.
pub fn call(
    exports: &OnceLock<Exports>,
    make: fn() -> Exports,
    what: RStr<'_>,
    item: usize,
    input: RStr<'_>,
) -> RResult<RString, RString> {
    answer(
        guard(|| exports.get_or_init(make).call(what.as_str(), item, input.as_str()))
            .map(|v| RString::from(v.to_string())),
    )
}

/// [`PluginModule::eval`] for a library's exports.
pub fn eval(
    exports: &OnceLock<Exports>,
    make: fn() -> Exports,
    item: usize,
    call: RawLossCall<'_>,
) -> RResult<RawLossResult, RString> {
    answer(guard(|| exports.get_or_init(make).eval(item, &call)))
}

fn answer<T>(result: Result<T>) -> RResult<T, RString> {
    match result {
        Ok(value) => RResult::ROk(value),
        Err(error) => RResult::RErr(RString::from(to_value(&error).to_string())),
    }
}

thread_local! {
    static GUARDED: Cell<bool> = const { Cell::new(false) };
    static PANIC: RefCell<Option<String>> = const { RefCell::new(None) };
}

/// Runs code of others; a panic becomes an error that says where it happened, and prints nothing.
pub fn guard<T>(run: impl FnOnce() -> Result<T>) -> Result<T> {
    static HOOK: Once = Once::new();
    HOOK.call_once(|| {
        let before = std::panic::take_hook();
        std::panic::set_hook(Box::new(move |info: &PanicHookInfo<'_>| {
            if !GUARDED.get() {
                return before(info);
            }
            let text = info.payload().downcast_ref::<&str>().map(|s| (*s).to_owned());
            let text = text.or_else(|| info.payload().downcast_ref::<String>().cloned()).unwrap_or_default();
            let place = info.location().map(|l| format!(" at {}:{}", l.file(), l.line())).unwrap_or_default();
            PANIC.set(Some(format!("it panicked{place}: {text}")));
        }));
    });
    let outer = GUARDED.replace(true);
    let result = catch_unwind(AssertUnwindSafe(run));
    GUARDED.set(outer);
    result.unwrap_or_else(|_| Err(Error::new(PANIC.take().unwrap_or_else(|| "it panicked".into()))))
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)] // In a test, a panic is the report.

    use serde_json::json;

    use super::*;
    use crate::dataset::Record;

    /// What an older host does not know may mean something: it is refused, not left out.
    #[test]
    fn unknown_fields_are_refused() {
        fn refuses<T: serde::de::DeserializeOwned>(sound: Value) {
            assert!(serde_json::from_value::<T>(sound.clone()).is_ok(), "{sound}");
            let mut more = sound;
            more["more"] = json!(1);
            let error = serde_json::from_value::<T>(more.clone()).err().unwrap_or_else(|| panic!("{more} is taken"));
            assert!(error.to_string().contains("unknown field `more`"), "{error}");
        }
        let needs = json!({"answers": "ranked", "reference": true, "whole_batch": false});
        let answer = json!({"text": {"plain": "4"}, "label": 1.0});
        refuses::<Manifest>(json!({"api": "1.0.0", "package": "p", "version": "1", "items": []}));
        refuses::<Item>(json!({"kind": "dataset", "name": "n", "summary": "s", "examples": ""}));
        refuses::<Needs>(needs.clone());
        refuses::<crate::dataset::RecordAnswer>(answer.clone());
        refuses::<Record>(json!({"prompt": {"plain": "2+2="}, "answers": [answer]}));
        let other = json!({"answers": "all", "reference": true, "whole_batch": false});
        assert!(serde_json::from_value::<Needs>(other).is_err());
    }

    #[test]
    fn a_manifest_says_what_it_requires() {
        let mut exports = Exports::new("p", "1");
        exports.requires("foresight");
        assert_eq!(exports.manifest().requires, ["foresight"]);
    }
}
