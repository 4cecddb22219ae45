//! What is known by name: families, formats, losses.
//!
//! A name belongs to the package that had it first, built-in ones before all. A library of the same package may replace
//! it; another package that claims it is refused. Of several libraries of one package the first place counts, in this
//! order: `--plugin-dir`, `$DPO_PLUGIN_PATH`, the user's folder, built-in, `plugins/` beside the executable.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use abi_stable::std_types::RSlice;
use dpo_plugin_api::abi::{Item, RawExample, RawLossCall, RawLossResult, RawTotals};
use dpo_plugin_api::check::check_graph;
use dpo_plugin_api::dataset::{Record, Row as DataRow, check_records};
use dpo_plugin_api::graph::ModelGraph;
use dpo_plugin_api::loss::{LossOption, Needs};
use serde::Serialize;
use serde_json::Value;

use super::library::{Library, Origin, Shared, user_folder};
use super::unclaimed::unclaimed;
use dpo_core::error::{Error, Result};
use dpo_core::predictors::gather_predictors;

/// A model family.
pub struct Family {
    handle: Handle,
    /// Its name.
    pub name: String,
    /// Its line in `list`.
    pub summary: String,
    /// Architectures it answers for.
    pub claims: Vec<String>,
    /// Published checkpoints that it is known to read.
    pub checkpoints: Vec<String>,
    /// A published `config.json`.
    pub example_config: String,
    /// Chat template for checkpoints without one.
    pub chat_template: Option<String>,
}

/// A dataset format.
pub struct Format {
    handle: Handle,
    /// Its name.
    pub name: String,
    /// Its line in `list`.
    pub summary: String,
    /// Rows as jsonl.
    pub examples: String,
}

/// An alignment loss.
pub struct Loss {
    handle: Handle,
    /// Its name.
    pub name: String,
    /// Its line in `list`.
    pub summary: String,
    /// Its formula.
    pub formula: String,
    /// Which other tools have it, and where they compute otherwise.
    pub peers: String,
    /// What it needs of the host.
    pub needs: Needs,
    /// Its options.
    pub options: Vec<LossOption>,
}

/// An item of a library.
#[derive(Clone)]
struct Handle {
    library: Shared,
    item: usize,
}

impl Family {
    /// The package that it is of: name, version, and the hash of its file.
    pub fn package(&self) -> String {
        self.handle.library.identity()
    }

    /// The graph for the text of a `config.json`. Not yet checked against the ops of this host.
    pub fn graph(&self, config: &str) -> Result<ModelGraph> {
        self.handle.library.call_bounded("graph", self.handle.item, config)
    }

    /// The same, checked, as devices run it.
    pub fn runnable(&self, config: &str) -> Result<ModelGraph> {
        let graph = self.graph(config)?;
        check_graph(&graph)?;
        gather_predictors(graph)
    }
}

impl Format {
    /// The package that reads it: name, version, and the hash of its file.
    pub fn package(&self) -> String {
        self.handle.library.identity()
    }

    /// How surely a row is of this format.
    pub fn recognises(&self, row: &DataRow) -> Result<u8> {
        self.handle.call("recognises", &text(row))
    }

    /// The records of a row.
    pub fn records(&self, row: &DataRow) -> Result<Vec<Record>> {
        let records: Vec<Record> = self.handle.call("records", &text(row))?;
        check_records(&records)?;
        Ok(records)
    }
}

fn text(row: &DataRow) -> String {
    serde_json::to_string(row).unwrap_or_default()
}

/// Examples for a loss, as [`Loss::eval`] takes them.
pub struct LossCall<'a> {
    /// Option values as a JSON object.
    pub options: &'a str,
    /// Examples.
    pub examples: &'a [RawExample<'a>],
    /// Sizes of the step, over all micro-batches and ranks.
    pub totals: RawTotals,
    /// What the loss left in its state at its last call.
    pub state: &'a [f64],
}

/// What a loss answers, checked for its sizes.
#[derive(Debug)]
pub struct LossResult {
    /// Loss of each example; the step's loss is their sum over its examples, divided by their number. It may not be finite.
    pub losses: Vec<f64>,
    /// Derivative of an example's loss by the log-prob of each token of each of its answers.
    pub grad: Vec<f32>,
    /// State for the next call.
    pub state: Vec<f64>,
}

impl Loss {
    /// The package that computes it: name, version, and the hash of its file.
    pub fn package(&self) -> String {
        self.handle.library.identity()
    }

    /// Losses and derivatives of some examples.
    ///
    /// # Errors
    /// What the plugin refuses, a panic in it, and numbers that are not one for every example and token.
    pub fn eval(&self, call: &LossCall<'_>) -> Result<LossResult> {
        let raw = RawLossCall {
            options: call.options.into(),
            examples: RSlice::from_slice(call.examples),
            totals: call.totals,
            state: RSlice::from_slice(call.state),
        };
        let RawLossResult { losses, grad, state } =
            self.handle.library.eval(self.handle.item, raw).map_err(|e| e.at(format!("loss '{}'", self.name)))?;
        let of = |e: &RawExample<'_>| e.answers.iter().map(|a| a.policy.len()).sum::<usize>() + e.prompt.len();
        let (examples, tokens) = (call.examples.len(), call.examples.iter().map(of).sum::<usize>());
        if losses.len() != examples || grad.len() != tokens {
            let (l, g) = (losses.len(), grad.len());
            let what = format!("answered {l} losses and {g} derivatives for {examples} examples of {tokens} tokens");
            return Err(Error::run(what).at(format!("loss '{}'", self.name)));
        }
        Ok(LossResult { losses: losses.into(), grad: grad.into(), state: state.into() })
    }
}

impl Handle {
    fn call<T: serde::de::DeserializeOwned>(&self, what: &str, input: &str) -> Result<T> {
        self.library.call(what, self.item, input)
    }
}

/// A library, or one of its items, that this run goes without.
#[derive(Debug, Serialize)]
pub struct Refusal {
    /// The file, and the item where it is one of several.
    pub place: String,
    /// Why.
    pub cause: String,
}

/// A line of `dpo-host list`.
#[derive(Debug, Serialize)]
pub struct Row {
    /// `model`, `dataset` or `loss`.
    pub kind: &'static str,
    /// Name.
    pub name: String,
    /// Version of its package.
    pub version: String,
    /// Package.
    pub package: String,
    /// Architectures a family answers for; otherwise its summary.
    pub claims: String,
    /// Published checkpoints that a family is known to read.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub checkpoints: Vec<String>,
    /// `built-in` or a file.
    pub origin: String,
    /// Where the plugin that is used in place of this one comes from.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub shadowed_by: Option<String>,
}

/// Everything found at start-up.
#[derive(Default)]
pub struct Registry {
    /// Families by name.
    pub families: Vec<Family>,
    /// Formats by name.
    pub formats: Vec<Format>,
    /// Losses by name.
    pub losses: Vec<Loss>,
    /// What was refused.
    pub refusals: Vec<Refusal>,
    /// Every accepted item, used or shadowed.
    pub rows: Vec<Row>,
    /// Folders that libraries were looked for in.
    pub searched: Vec<PathBuf>,
}

/// Items come in the order of precedence; `place` says where built-in ones stand in it.
struct Candidate {
    library: Shared,
    item: usize,
    parsed: Item,
}

impl Registry {
    /// Finds plugins: `dirs` are the user's `--plugin-dir`s. Broken ones become [`Refusal`]s. With a `helper`, a program that
    /// passes its arguments behind [`COMMAND`](crate::COMMAND) to [`answer`](crate::answer), what files say of themselves and the graphs of their
    /// families are asked for in a process of their own; without, in this one.
    pub fn discover(dirs: &[PathBuf], helper: Option<&Path>) -> Registry {
        let mut registry = Registry::default();
        let mut first = dirs.to_vec();
        if let Some(path) = std::env::var_os("DPO_PLUGIN_PATH") {
            first.extend(std::env::split_paths(&path).filter(|p| !p.as_os_str().is_empty()));
        }
        for dir in first.iter().filter(|d| !d.is_dir()) {
            registry.refuse(dir.display().to_string(), "is not a folder");
        }
        first.extend(user_folder());
        let last = std::env::current_exe().ok().and_then(|exe| Some(exe.parent()?.join("plugins")));
        let mut libraries: Vec<Shared> = Vec::new();
        registry.open_all(&first, helper, &mut libraries);
        for library in Library::linked() {
            match library {
                Ok(library) => libraries.push(Arc::new(library)),
                Err(e) => registry.refuse("built-in".into(), &e.to_string()),
            }
        }
        registry.open_all(last.as_slice(), helper, &mut libraries);
        registry.searched = first.into_iter().chain(last).collect();
        let candidates = registry.candidates(&libraries);
        registry.settle(candidates);
        registry
    }

    fn refuse(&mut self, place: String, cause: &str) {
        let cause = cause.lines().map(str::trim).collect::<Vec<_>>().join("; ");
        self.refusals.push(Refusal { place, cause });
    }

    fn open_all(&mut self, dirs: &[PathBuf], helper: Option<&Path>, libraries: &mut Vec<Shared>) {
        let paths: Vec<PathBuf> = dirs.iter().flat_map(|d| shared_libraries(d)).collect();
        // At the same time: each may take a process, and a bad one all of its time.
        let opened: Vec<Result<Library>> = std::thread::scope(|scope| {
            let threads: Vec<_> = paths.iter().map(|path| scope.spawn(move || Library::open(path, helper))).collect();
            let gone = || Err(Error::run("the thread that opened it is gone"));
            threads.into_iter().map(|t| t.join().unwrap_or_else(|_| gone())).collect()
        });
        for (path, library) in paths.iter().zip(opened) {
            match library {
                Ok(library) => libraries.push(Arc::new(library)),
                Err(e) => self.refuse(path.display().to_string(), &e.to_string()),
            }
        }
    }

    /// Items that can be read. Whether a family's graph can be run shows when it is used: its code does not run before.
    fn candidates(&mut self, libraries: &[Shared]) -> Vec<Candidate> {
        let mut candidates = Vec::new();
        for library in libraries {
            for (item, value) in library.manifest.items.iter().enumerate() {
                match accept(value) {
                    Ok(parsed) => candidates.push(Candidate { library: library.clone(), item, parsed }),
                    Err(e) => {
                        let name = value.get("name").and_then(Value::as_str).unwrap_or("?");
                        self.refuse(format!("{}: {name}", library.origin), &e.to_string());
                    }
                }
            }
        }
        candidates
    }

    /// Gives every name to one candidate.
    fn settle(&mut self, candidates: Vec<Candidate>) {
        let key = |c: &Candidate| (kind_of(&c.parsed), c.parsed.name().to_owned());
        let owner_of = |c: &Candidate| {
            let same = || candidates.iter().filter(|o| key(o) == key(c));
            let owner = same().find(|o| o.library.origin == Origin::BuiltIn).or_else(|| same().next());
            owner.map(|o| (o.library.manifest.package.clone(), o.library.origin.to_string()))
        };
        let mut refused = Vec::new();
        let mut used: Vec<(&'static str, String, String)> = Vec::new();
        for candidate in &candidates {
            let manifest = &candidate.library.manifest;
            let (kind, name) = key(candidate);
            let origin = candidate.library.origin.to_string();
            let (owner, owner_origin) = owner_of(candidate).unwrap_or_default();
            if owner != manifest.package {
                let cause = format!("the {kind} name '{name}' is taken by {owner} ({owner_origin})");
                refused.push((format!("{origin}: {name}"), cause));
                continue;
            }
            let winner = used.iter().find(|(k, n, _)| *k == kind && *n == name).map(|(_, _, o)| o.clone());
            if winner.is_none() {
                used.push((kind, name.clone(), origin.clone()));
                self.insert(candidate);
            }
            let claims = match &candidate.parsed {
                Item::Model { claims, .. } => claims.join(", "),
                Item::Dataset { summary, .. } | Item::Loss { summary, .. } => summary.clone(),
            };
            let checkpoints = match &candidate.parsed {
                Item::Model { checkpoints, .. } => checkpoints.clone(),
                _ => Vec::new(),
            };
            let (version, package) = (manifest.version.clone(), manifest.package.clone());
            self.rows.push(Row { kind, name, version, package, claims, checkpoints, origin, shadowed_by: winner });
        }
        for (place, cause) in refused {
            self.refuse(place, &cause);
        }
        self.families.sort_by(|a, b| a.name.cmp(&b.name));
        self.formats.sort_by(|a, b| a.name.cmp(&b.name));
        self.losses.sort_by(|a, b| a.name.cmp(&b.name));
        let order = ["model", "dataset", "loss"];
        self.rows.sort_by_key(|r| (order.iter().position(|k| *k == r.kind), r.name.clone(), r.shadowed_by.is_some()));
    }

    fn insert(&mut self, candidate: &Candidate) {
        let handle = Handle { library: candidate.library.clone(), item: candidate.item };
        match candidate.parsed.clone() {
            Item::Model { name, summary, claims, checkpoints, example_config, chat_template } => {
                let family = Family { handle, name, summary, claims, checkpoints, example_config, chat_template };
                self.families.push(family);
            }
            Item::Dataset { name, summary, examples } => {
                self.formats.push(Format { handle, name, summary, examples });
            }
            Item::Loss { name, summary, formula, peers, needs, options } => {
                self.losses.push(Loss { handle, name, summary, formula, peers, needs, options });
            }
        }
    }

    /// The family of a name.
    pub fn family(&self, name: &str) -> Result<&Family> {
        let known = self.families.iter().map(|f| f.name.as_str());
        self.families.iter().find(|f| f.name == name).ok_or_else(|| self.unknown("plugin", name, known))
    }

    /// A name that no plugin has: the nearest one, and where plugins were looked for.
    fn unknown<'a>(&self, what: &str, name: &str, known: impl Iterator<Item = &'a str>) -> Error {
        let error = Error::unknown(what, name, known);
        let known = error.advice().unwrap_or_default().to_owned();
        let folders: Vec<String> = self.searched.iter().map(|folder| folder.display().to_string()).collect();
        let help = format!("{known}; libraries of plugins were looked for in {}", folders.join(", "));
        Error::input(error.message()).help(help)
    }

    /// The family that answers for an architecture of a `config.json`.
    pub fn family_for(&self, architecture: &str) -> Result<&Family> {
        let family = self.families.iter().find(|f| f.claims.iter().any(|c| c == architecture));
        let claims =
            || self.families.iter().flat_map(|f| f.claims.iter().map(|claim| (f.name.as_str(), claim.as_str())));
        family.ok_or_else(|| unclaimed(architecture, claims()))
    }

    /// The format of a name.
    pub fn format(&self, name: &str) -> Result<&Format> {
        let known = self.formats.iter().map(|f| f.name.as_str());
        self.formats.iter().find(|f| f.name == name).ok_or_else(|| self.unknown("dataset format", name, known))
    }

    /// The loss of a name.
    pub fn loss(&self, name: &str) -> Result<&Loss> {
        let known = self.losses.iter().map(|l| l.name.as_str());
        self.losses.iter().find(|l| l.name == name).ok_or_else(|| {
            let lower = name.to_lowercase();
            match ELSEWHERE.iter().find(|(other, _)| *other == lower) {
                Some((_, ours)) => Error::input(format!("unknown loss '{name}'")).help(*ours),
                None => self.unknown("loss", name, known),
            }
        })
    }
}

/// What papers and other tools call a loss, or a way to train, and what it is here.
const ELSEWHERE: &[(&str, &str)] = &[
    ("dpo", "DPO is --loss sigmoid"),
    ("dpo_loss", "DPO is --loss sigmoid"),
    ("cdpo", "cDPO is --loss sigmoid --label-smoothing P"),
    ("rpo", "RPO is --loss sigmoid --rpo-alpha W"),
    ("ld_dpo", "LD-DPO is --loss sigmoid --ld-alpha A"),
    ("wpo", "WPO is --loss sigmoid --use-weighting"),
    ("mpo", "MPO is --loss sigmoid bco_pair sft --loss-weights 0.8 0.2 1"),
    ("rso", "RSO is --loss hinge"),
    ("slic", "SLiC is --loss hinge"),
    ("nca", "NCA of pairs is --loss nca_pair"),
    ("exo", "EXO of pairs is --loss exo_pair"),
    ("sppo", "SPPO is --loss sppo_hard"),
    ("apo", "APO is --loss apo_zero or apo_down"),
    ("aot_pair", "it is called aot_unpaired now, as in TRL"),
    ("kto_pair", "a pair is one good and one bad answer: --loss kto learns single answers with labels"),
    ("simpo_loss", "SimPO is --loss simpo"),
    ("orpo_loss", "ORPO is --loss orpo"),
    ("nll", "the likelihood of answers is --loss sft"),
    ("nll_loss", "the likelihood of answers is --loss sft"),
    ("cross_entropy", "the likelihood of answers is --loss sft"),
    ("dpo_norm", "DPO on means over tokens, as open-instruct has it, is --loss sigmoid_norm"),
    ("odpo", "DPO with an offset by scores is --loss all_pairs --loss-option score_margin=1"),
    ("listwise", "over rankings there are --loss plackett_luce, sdpo, all_pairs and rebel"),
    ("lipo", "over rankings there are --loss plackett_luce, sdpo, all_pairs and rebel"),
    ("rdpo", "length-regularised DPO is --loss r_dpo"),
    (
        "tdpo",
        "its KL term is over the whole vocabulary under two models at once, which is not computed; --loss sigmoid and apo_zero are near",
    ),
    ("ppo", ONLINE),
    ("grpo", ONLINE),
    ("rloo", ONLINE),
];

const ONLINE: &str =
    "it learns from answers that are generated while it trains; this tool learns from answers that are there";

fn kind_of(item: &Item) -> &'static str {
    match item {
        Item::Model { .. } => "model",
        Item::Dataset { .. } => "dataset",
        Item::Loss { .. } => "loss",
    }
}

/// Reads an item and checks what can be checked before it is used.
fn accept(value: &Value) -> Result<Item> {
    let parsed: Item = serde_json::from_value(value.clone())
        .map_err(|e| Error::input(format!("this host does not know such an item: {e}")))?;
    dpo_plugin_api::check::check_name(parsed.name())?;
    if let Item::Loss { needs, .. } = &parsed {
        dpo_core::graph::check_statistics(&needs.statistics)?;
    }
    Ok(parsed)
}

/// Files in a folder that are shared libraries by name, sorted so that the outcome does not depend on the file system.
fn shared_libraries(dir: &Path) -> Vec<PathBuf> {
    let Ok(entries) = std::fs::read_dir(dir) else { return Vec::new() };
    let paths = entries.filter_map(|e| Some(e.ok()?.path()));
    let mut files: Vec<PathBuf> =
        paths.filter(|p| p.extension().is_some_and(|e| e == std::env::consts::DLL_EXTENSION)).collect();
    files.sort();
    files
}
