//! The examples of a run. Rank 0 reads and tokenises the rows; the other ranks are given what it made of them.

use std::collections::HashSet;

use dpo_core::collective::ProcessGroup;
use dpo_core::console::{self, Remark};
use dpo_core::error::{Error, Result};
use dpo_core::example::Example;
use dpo_data::examples::Writer;
use dpo_data::{self as data, ChatTokenizer, Dataset, Examples, Report, Wanted};
use dpo_hub::model::Model;
use dpo_plugins::Registry;
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use crate::config::{EvalRows, TrainConfig};
use crate::evaluation::EvalSet;

/// The examples of a run.
pub(super) struct Data {
    pub(super) examples: Examples,
    pub(super) validation: Vec<EvalSet>,
    pub(super) report: Report,
}

impl Data {
    /// Reads rows for a model, and tells what there is to tell of them.
    ///
    /// # Errors
    /// Rows that cannot be used; a rank that is lost.
    pub(super) fn load(
        registry: &Registry,
        config: &TrainConfig,
        wanted: &Wanted,
        model: &Model<'_>,
        tokenizer: &ChatTokenizer,
        group: &mut dyn ProcessGroup,
    ) -> Result<Data> {
        let mut load = |paths: &[String]| {
            let rows = config.rows(paths, (&model.graph, model.positions()), wanted);
            shared(group, || data::load(&rows, registry, tokenizer))
        };
        let dataset = load(&config.dataset)?;
        console::line(format!("model       {} ({})", config.model, model.family.name));
        console::line(format!("data        {}", dataset.report.line()));
        warn_of_length(&dataset.examples, model)?;
        dataset.report.warnings().into_iter().for_each(console::warning);
        let (examples, validation) = match config.val_dataset.as_slice() {
            [] => {
                let (examples, held_out) = data::split(&dataset.examples, config.split_dataset_ratio, config.data.seed);
                let some = (!held_out.is_empty()).then(|| EvalSet::new("", held_out));
                (examples, some.into_iter().collect::<Vec<_>>())
            }
            sets => {
                let set = |set: &EvalRows| Ok(EvalSet::new(&set.name, load(&set.paths)?.examples));
                (dataset.examples, sets.iter().map(set).collect::<Result<_>>()?)
            }
        };
        for EvalSet { prefix, examples: held_out, .. } in &validation {
            let set = prefix.trim_matches('_');
            console::line(format!(
                "{set:<11} {} examples to evaluate on, {} to train on",
                held_out.len(),
                examples.len()
            ));
            warn_of_overlap(&examples, held_out)?;
        }
        if examples.is_empty() {
            return Err(Error::input("the split leaves no example to train on")
                .at("--split-dataset-ratio")
                .help("lower it, or add rows"));
        }
        Ok(Data { examples, validation, report: dataset.report })
    }
}

/// What rank 0 says of a data set.
#[derive(Serialize, Deserialize)]
struct Loaded {
    report: Report,
    /// The name of its file in the cache, where it has one.
    file: Option<String>,
    examples: usize,
}

/// A data set that rank 0 loads. Ranks that have the same cache read its file; the others are sent its examples.
fn shared(group: &mut dyn ProcessGroup, load: impl FnOnce() -> Result<Dataset>) -> Result<Dataset> {
    let mut own = None;
    let loaded = group.broadcast_from_first(|| {
        let Dataset { examples, report } = load()?;
        let file = examples.file().map(str::to_owned);
        let loaded = Loaded { report, file, examples: examples.len() };
        own = Some(examples);
        Ok(loaded)
    })?;
    if own.is_none() {
        own = loaded.file.as_deref().and_then(Examples::cached).map(|(examples, _)| examples);
    }
    if group.all_reduce_max(u64::from(own.is_none()))? > 0 {
        let mut sent = Writer::default();
        let mut next = 0;
        while next < loaded.examples {
            let (piece, then) = match (&own, group.is_first()) {
                (Some(examples), true) => examples.piece(next)?,
                _ => (Vec::new(), next),
            };
            let piece = group.broadcast(piece)?;
            next = group.all_reduce_max(then as u64)? as usize;
            if own.is_none() {
                sent.extend(&piece)?;
            }
        }
        if own.is_none() {
            own = Some(sent.finish(&loaded.report, None)?);
        }
    }
    match own {
        Some(examples) => Ok(Dataset { examples, report: loaded.report }),
        None => Err(Error::run("rank 0 has sent no examples")),
    }
}

/// A model knows nothing of positions beyond those that it was made for.
fn warn_of_length(examples: &Examples, model: &Model<'_>) -> Result<()> {
    let Some(positions) = model.positions() else { return Ok(()) };
    let (mut longer, mut longest) = (0, 0);
    for example in examples.iter() {
        let length = example?.longest();
        longer += usize::from(length > positions);
        longest = longest.max(length);
    }
    if longer > 0 {
        let what = format!(
            "{longer} of {} examples are longer than the {positions} positions that the model is made for, up to {longest} tokens",
            examples.len()
        );
        console::warning(
            Remark::from(what).help(format!("say --max-length {positions}, or extend its rope scaling in config.json")),
        );
    }
    Ok(())
}

/// An evaluation of examples that are trained on says that a model learns, not what it learned.
fn warn_of_overlap(examples: &Examples, validation: &Examples) -> Result<()> {
    let digest = |example: Result<Example>| Ok(Sha256::digest(example?.content()));
    let held_out = validation.iter().map(digest).collect::<Result<Vec<_>>>()?;
    let wanted: HashSet<_> = held_out.iter().collect();
    let mut trained = HashSet::new();
    for example in examples.iter() {
        let digest = digest(example)?;
        if wanted.contains(&digest) {
            trained.insert(digest);
        }
    }
    let shared = held_out.iter().filter(|digest| trained.contains(*digest)).count();
    if shared > 0 {
        let what = format!("{shared} of {} validation examples are trained on as well", validation.len());
        console::warning(
            Remark::from(what)
                .help("evaluate on other rows, or hold some out from training with --split-dataset-ratio 0.1"),
        );
    }
    Ok(())
}
