//! What is asked of a graph beyond that it can run, which [`dpo_plugin_api::check`] says: its vocabulary, the statistics of a loss.

use dpo_plugin_api::graph::ModelGraph;

use crate::error::{Error, Result};
use crate::logprobs::STATISTICS;

/// Refuses a statistic that this host does not compute.
pub fn check_statistics(names: &[String]) -> Result<()> {
    match names.iter().find(|n| !STATISTICS.contains(&n.as_str())) {
        Some(unknown) => Err(Error::unknown("statistic", unknown, STATISTICS)),
        None => Ok(()),
    }
}

/// How many tokens a model has: rows of its embedding, or of its projection where these are fewer.
pub fn vocabulary(graph: &ModelGraph) -> usize {
    let tables = graph.embed.nodes.iter().filter(|n| n.op == "embedding").flat_map(|n| &n.weights);
    tables.filter_map(|w| w.shape.first().copied()).fold(graph.vocab_size, usize::min)
}

/// Refuses token ids that a model of so many tokens does not have: a device would read other memory's rows for them.
pub fn refuse_foreign_tokens<'a>(ids: impl IntoIterator<Item = &'a u32>, vocabulary: usize) -> Result<()> {
    match ids.into_iter().find(|id| **id as usize >= vocabulary) {
        Some(id) => Err(Error::input(format!("token id {id} is beyond the model's vocabulary of {vocabulary}"))
            .help("the tokenizer is not this model's, or has tokens that were added to it and not to the model")),
        None => Ok(()),
    }
}
