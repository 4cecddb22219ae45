//! A reference that is not the adapter of the start: another checkpoint, another adapter, or both. It is on the device before the
//! model that is trained, and gone when its log-probs are known.

use std::collections::BTreeSet;

use super::config::ReferenceConfig;
use super::manifest::hex;
use super::reference::Reference;
use dpo_core::backend::{Backend, Planned, Workload};
use dpo_core::collective::ProcessGroup;
use dpo_core::console;
use dpo_core::error::{Error, Result};
use dpo_core::graph::{refuse_foreign_tokens, vocabulary};
use dpo_core::lora::Adapter;
use dpo_core::plan::MemoryOptions;
use dpo_core::storage::Quantization;
use dpo_core::weights::Checkpoint;
use dpo_data::{ChatTokenizer, Examples};
use dpo_hub::Need;
use dpo_hub::model::{self, Model};
use dpo_plugin_api::graph::ModelGraph;
use dpo_plugins::Registry;
use sha2::{Digest, Sha256};

/// A reference whose memory is planned.
pub(super) struct OwnReference {
    name: String,
    config: String,
    graph: ModelGraph,
    params: Vec<u8>,
    quantization: Option<Quantization>,
    planned: Box<dyn Planned>,
}

/// What became of it.
pub(super) struct Known {
    /// Of every set of examples.
    pub(super) references: Vec<Reference>,
    /// A text that another reference does not have.
    pub(super) content: String,
}

impl OwnReference {
    /// Checks and plans a reference for examples of a model, without its weights.
    ///
    /// # Errors
    /// A checkpoint or an adapter that cannot be used, another tokenizer, a reference that does not fit.
    pub(super) fn plan(
        registry: &Registry,
        config: &ReferenceConfig,
        (trained, model, tokenizer): (&str, &Model<'_>, &ChatTokenizer),
        (group, backend): (&mut dyn ProcessGroup, &dyn Backend),
        examples: &[&Examples],
        (workload, memory): (Workload, MemoryOptions),
    ) -> Result<OwnReference> {
        let name = config.model.as_deref().unwrap_or(trained);
        let (config_text, graph, memory) = match &config.model {
            None => (model.config.clone(), model.graph.clone(), model.memory(memory)?),
            Some(other) => {
                let folder = model::locate(other, Need::WeightsToCome).map_err(|e| e.at("--ref-model"))?;
                let other = Model::open(registry, &folder, &config.reading)?;
                other.warn();
                let own = ChatTokenizer::open(&folder, other.family.chat_template.as_deref())?;
                same_tokens(examples, tokenizer, &own).map_err(|e| e.at("--ref-model"))?;
                let memory = other.memory(memory)?;
                (other.config, other.graph, memory)
            }
        };
        for example in examples.iter().flat_map(|set| set.iter()) {
            refuse_foreign_tokens(example?.parts().flatten(), vocabulary(&graph)).map_err(|e| e.at("--ref-model"))?;
        }
        let adapter = match &config.adapter {
            Some(folder) => Adapter::load(&graph, folder)?,
            None => Adapter::idle(&graph)?,
        };
        console::line(format!(
            "reference   {name}{}",
            match &config.adapter {
                Some(folder) => format!(" with the adapter {}", folder.display()),
                None => ", without an adapter".to_owned(),
            }
        ));
        let params = if adapter.changes_nothing() {
            Vec::new()
        } else {
            adapter.params.iter().flat_map(|p| p.to_le_bytes()).collect()
        };
        let planned = backend.plan(group, graph.clone(), adapter, workload, memory)?;
        let quantization = memory.quantization;
        Ok(OwnReference { name: name.to_owned(), config: config_text, graph, params, quantization, planned })
    }

    /// Loads it, and computes the log-probs of every set of examples.
    ///
    /// # Errors
    /// A checkpoint or a device that fails; a rank that is lost.
    pub(super) fn log_probs<'a>(
        self,
        group: &mut dyn ProcessGroup,
        sets: impl Iterator<Item = &'a Examples>,
    ) -> Result<Known> {
        let folder = model::locate(&self.name, Need::Weights)?;
        let checkpoint = Checkpoint::of(&folder, &self.graph)?;
        let mut device = self.planned.load(group, &checkpoint)?;
        let identity = format!("{}{}{:?}", checkpoint.identity()?, self.config, self.quantization);
        let of = |examples: &Examples| Reference::of(group, device.as_mut(), &identity, examples);
        let references = sets.map(of).collect::<Result<_>>()?;
        let content = format!("{}{}{}", checkpoint.content()?, self.config, hex(&Sha256::digest(&self.params)));
        Ok(Known { references, content })
    }
}

/// Whether the ids of examples mean the same to both.
fn same_tokens(examples: &[&Examples], ours: &ChatTokenizer, theirs: &ChatTokenizer) -> Result<()> {
    let mut ids = BTreeSet::new();
    for example in examples.iter().flat_map(|set| set.iter()) {
        ids.extend(example?.parts().flatten().copied());
    }
    match ids.into_iter().find(|id| ours.token(*id) != theirs.token(*id)) {
        Some(id) => {
            let text = |tokenizer: &ChatTokenizer| tokenizer.token(id).unwrap_or_else(|| "no token".into());
            let (ours, theirs) = (text(ours), text(theirs));
            Err(Error::input(format!("token {id} is {ours:?} for the model and {theirs:?} for the reference"))
                .help("a reference reads the tokens of the model: it has the same tokenizer"))
        }
        None => Ok(()),
    }
}
