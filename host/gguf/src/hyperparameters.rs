//! The metadata of a model, and whether llama.cpp computes from them what the graph does.

use dpo_core::console::Remark;
use dpo_core::error::{Error, Result};
use serde_json::Value as Json;

use crate::architecture::{Architecture, EmbeddingScale, Windows};
use crate::facts::Facts;
use crate::file::{Metadata, Value};
use crate::rope;

/// What is written of a model beside its weights, and what the user should know.
pub(crate) struct Hyperparameters {
    pub(crate) metadata: Metadata,
    /// Tensors that no checkpoint has, by name.
    pub(crate) tensors: Vec<(&'static str, Vec<f32>)>,
    pub(crate) remarks: Vec<Remark>,
}

/// The metadata of a model. `config` is that of the language model, where it is in a wrapper.
///
/// # Errors
/// A model of which the architecture would compute something else.
pub(crate) fn of(architecture: &Architecture, facts: &Facts, config: &Json) -> Result<Hyperparameters> {
    let stated = config.get("max_position_embeddings").and_then(Json::as_u64).map(|most| most as usize);
    let positions = stated.or(architecture.positions).ok_or_else(|| {
        Error::input("states no max_position_embeddings, which llama.cpp has to know").at("config.json")
    })?;
    let rope = rope::stated(architecture, facts, config)?;
    let mut metadata: Metadata = Vec::new();
    let mut put = |key: &str, value: Value| metadata.push((format!("{}.{key}", architecture.name), value));
    let number = |n: usize| Value::U32(n as u32);
    put("block_count", number(facts.layers));
    put("context_length", number(positions));
    put("embedding_length", number(facts.hidden));
    put("attention.head_count", number(facts.heads));
    put("attention.head_count_kv", number(facts.kv_heads));
    put("attention.key_length", number(facts.head_dim));
    put("attention.value_length", number(facts.head_dim));
    put("attention.layer_norm_rms_epsilon", Value::F32(facts.eps as f32));
    put("vocab_size", number(facts.vocabulary));
    // Where all layers have experts, a width that nothing has is stated all the same.
    let stated = config.get("intermediate_size").and_then(Json::as_u64).map(|width| width as usize);
    let inner = facts.inner.or(stated).or(facts.experts.as_ref().map(|experts| experts.inner));
    put("feed_forward_length", number(inner.unwrap_or(0)));
    if let Some(experts) = &facts.experts {
        put("expert_count", number(experts.count));
        put("expert_used_count", number(experts.used));
        put("expert_feed_forward_length", number(experts.inner));
    }
    rope.keys.into_iter().for_each(|(key, value)| put(&key, value));
    let mut remarks = rope.remarks;
    let window = facts.windows.iter().flatten().next().copied();
    if architecture.windows != Windows::None && (window.is_some() || architecture.windows == Windows::Ignored) {
        put("attention.sliding_window", number(window.unwrap_or(0)));
    }
    let is_lost = !matches!(architecture.windows, Windows::AllButEvery(_));
    if let Some(window) = window.filter(|window| is_lost && *window < positions) {
        remarks.push(Remark::from(format!(
            "llama.cpp computes this architecture without a window: texts of more than {window} tokens get other answers there"
        )));
    }
    refuse_other_windows(architecture, facts)?;
    refuse_other_rules(architecture, facts)?;
    if architecture.multipliers {
        put("attention.scale", Value::F32(facts.attention_scale as f32));
        put("residual_scale", Value::F32(facts.residual_scale as f32));
        put("logit_scale", Value::F32((1.0 / facts.logit_scale) as f32));
    }
    if architecture.embedding == EmbeddingScale::Stated {
        put("embedding_scale", Value::F32(facts.embedding_scale as f32));
    }
    for (key, softcap) in
        [("attn_logit_softcapping", facts.attention_softcap), ("final_logit_softcapping", facts.logit_softcap)]
    {
        softcap.into_iter().for_each(|cap| put(key, Value::F32(cap as f32)));
    }
    Ok(Hyperparameters { metadata, tensors: rope.tensors, remarks })
}

/// Refuses windows in other layers than those in which the architecture has them.
fn refuse_other_windows(architecture: &Architecture, facts: &Facts) -> Result<()> {
    if !matches!(architecture.windows, Windows::AllButEvery(_)) {
        return Ok(());
    }
    let first = facts.windows.iter().flatten().next();
    let is_as_there = |(layer, own): (usize, &Option<usize>)| match own {
        Some(_) => architecture.windows.has(layer) && own.as_ref() == first,
        None => !architecture.windows.has(layer),
    };
    match facts.windows.iter().enumerate().all(is_as_there) {
        true => Ok(()),
        false => Err(refused(architecture, "other layers with a window than this model")),
    }
}

/// Refuses what the architecture has no key for and does otherwise.
fn refuse_other_rules(architecture: &Architecture, facts: &Facts) -> Result<()> {
    let other = |what: String| Err(refused(architecture, &what));
    let is = |own: f64, theirs: f64| (own / theirs - 1.0).abs() < 1e-6;
    if let Some(activation) = facts.activations.iter().find(|own| *own != architecture.activation) {
        return other(format!("the activation {}, not {activation}", architecture.activation));
    }
    let embedding = match architecture.embedding {
        EmbeddingScale::None => 1.0,
        EmbeddingScale::RootOfWidth => (facts.hidden as f64).sqrt(),
        EmbeddingScale::Stated => facts.embedding_scale,
    };
    if !is(facts.embedding_scale, embedding) {
        return other(format!("an embedding times {embedding}, not times {}", facts.embedding_scale));
    }
    let wide = architecture.wide_scores_at == Some(facts.layers);
    let width = if wide { facts.hidden / facts.heads } else { facts.head_dim };
    let scale = if architecture.multipliers { facts.attention_scale } else { (width as f64).powf(-0.5) };
    if !is(facts.attention_scale, scale) {
        return other(format!("scores times {scale}, not times {}", facts.attention_scale));
    }
    let is_multiplied = !is(facts.residual_scale, 1.0) || !is(facts.logit_scale, 1.0);
    if is_multiplied && !architecture.multipliers {
        return other("no multipliers of the residual stream and of logits".into());
    }
    match (architecture.softcaps, facts.attention_softcap, facts.logit_softcap) {
        (true, Some(_), Some(_)) | (false, None, None) => {}
        (true, ..) => return other("soft caps of scores and of logits".into()),
        (false, ..) => return other("no soft caps".into()),
    }
    let turns = |layer: usize| architecture.no_rope_every.is_none_or(|every| !(layer + 1).is_multiple_of(every));
    if facts.ropes.iter().enumerate().any(|(layer, rope)| rope.is_some() != turns(layer)) {
        return other("a rotary embedding in other layers than this model".into());
    }
    match &facts.experts {
        Some(experts) if experts.scoring != architecture.scoring => {
            other(format!("experts by {}, not by {}", architecture.scoring, experts.scoring))
        }
        Some(experts) if experts.limit != architecture.limit => {
            let bound = |limit: Option<f64>| limit.map_or("nothing".into(), |limit| limit.to_string());
            other(format!("experts bounded by {}, not by {}", bound(architecture.limit), bound(experts.limit)))
        }
        Some(experts) if (experts.normalize == Some(0.0)) != (architecture.scoring == "softmax") => {
            other("scores of chosen experts divided by their sum, as this model does not".into())
        }
        _ => Ok(()),
    }
}

fn refused(architecture: &Architecture, what: &str) -> Error {
    Error::input(format!("llama.cpp's architecture '{}' has {what}", architecture.name)).at("--format gguf")
}
