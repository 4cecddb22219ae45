//! What the keys of a `config.json` mean that a family did not read: nothing, or that its graph computes something else.
//!
//! A key that may change what a model computes is refused by name. One that cannot (token ids, generation, lengths, notes of
//! tokenizers and of training) never is, nor one whose value leaves out what it stands for. The rest is told. The names in the tables
//! are those of transformers' `PreTrainedConfig` and `GenerationConfig`, and of published checkpoints.

use serde_json::{Map, Value};

use crate::{Error, Result};

/// Keys that change nothing that a forward pass computes.
const HARMLESS: &[&str] = &[
    // PreTrainedConfig.
    "architectures",
    "activation_checkpointing",
    "attn_implementation",
    "auto_map",
    "base_model_pp_plan",
    "base_model_tp_plan",
    "chunk_size_feed_forward",
    // What is quantised is refused before.
    "compression_config",
    "custom_pipelines",
    "dtype",
    "experts_implementation",
    "finetuning_task",
    "gradient_checkpointing",
    "id2label",
    "is_composition",
    "is_decoder",
    "keys_to_ignore_at_inference",
    "label2id",
    "loss_type",
    "model_type",
    "name_or_path",
    "num_labels",
    "output_attentions",
    "output_hidden_states",
    "prefix",
    "problem_type",
    "pruned_heads",
    "quantization_config",
    "return_dict",
    "task_specific_params",
    "tf_legacy_loss",
    // Tied or not, the tensors in the files tell.
    "tie_word_embeddings",
    "tokenizer_class",
    "torch_dtype",
    "torchscript",
    "transformers_version",
    "use_bfloat16",
    // GenerationConfig.
    "assistant_confidence_threshold",
    "assistant_early_exit",
    "assistant_lookbehind",
    "bad_words_ids",
    "begin_suppress_tokens",
    "cache_config",
    "cache_implementation",
    "compile_config",
    "constraints",
    "continuous_batching_config",
    "disable_compile",
    "diversity_penalty",
    "do_sample",
    "dola_layers",
    "early_stopping",
    "encoder_no_repeat_ngram_size",
    "encoder_repetition_penalty",
    "epsilon_cutoff",
    "eta_cutoff",
    "exponential_decay_length_penalty",
    "force_words_ids",
    "forced_decoder_ids",
    "generation_config",
    "guidance_scale",
    "is_assistant",
    "length_penalty",
    "low_memory",
    "max_length",
    "max_matching_ngram_size",
    "max_new_tokens",
    "max_time",
    "min_length",
    "min_new_tokens",
    "min_p",
    "no_repeat_ngram_size",
    "num_assistant_tokens",
    "num_assistant_tokens_schedule",
    "num_beam_groups",
    "num_beams",
    "num_return_sequences",
    "output_logits",
    "output_scores",
    "penalty_alpha",
    "prefill_chunk_size",
    "prompt_lookup_num_tokens",
    "remove_invalid_values",
    "renormalize_logits",
    "repetition_penalty",
    "return_dict_in_generate",
    "return_legacy_cache",
    "sequence_bias",
    "stop_strings",
    "suppress_tokens",
    "target_lookbehind",
    "temperature",
    "token_healing",
    "top_h",
    "top_k",
    "top_p",
    "typical_p",
    "use_cache",
    "use_model_defaults",
    "watermarking_config",
    // How attention is computed, not what it is.
    "attention_implementation",
    "attn_impl",
    "flash_attention",
    "flash_attn",
    "fused_mlp",
    "use_flash_attention",
    "use_flash_attention_2",
    "use_flash_attn",
    "use_fused_rms_norm",
    "use_fused_rope",
    "use_memory_efficient_attention",
    "use_sdpa",
    "use_xformers",
    // Lengths. Families with frequencies that depend on a length read theirs. A window is none: a family that knows it to be without
    // effect reads it all the same.
    "context_length",
    "initial_context_length",
    "max_position_embeddings",
    "max_seq_len",
    "max_seq_length",
    "max_sequence_length",
    "max_window_layers",
    "model_max_length",
    "original_max_position_embeddings",
    "seq_length",
    // Notes of training and of those who published.
    "aux_loss_alpha",
    "datasets",
    "finetuned",
    "initializer_range",
    "is_llama_config",
    "language",
    "license",
    "model_name",
    "neftune_noise_alpha",
    // Slices in which transformers 4 computed products; 5 ignores it.
    "pretraining_tp",
    "num_nextn_predict_layers",
    "output_router_logits",
    "router_aux_loss_coef",
    "seq_aux",
    "tensor_parallel_degree",
    "transformers.js_config",
    "use_parallel_embedding",
    // Where a wrapper puts what it makes of other modalities.
    "projector_hidden_act",
    "spatial_merge_size",
];

/// Beginnings of such keys.
const HARMLESS_START: &[&str] = &[
    "_",
    "audio",
    "gradient_checkpointing_",
    "image",
    "mm_",
    "mtp_",
    "multimodal_projector",
    "speech_config",
    "tokenizer",
    "unsloth",
    "video",
    "vision",
];

/// Ends of such keys. Dropout is off while aligning, as TRL, LLaMA-Factory and ms-swift have it.
const HARMLESS_END: &[&str] =
    &["_token_id", "_token_ids", "_token_index", "_token", "dropout", "_dropout_prob", "drop", "_in_fp32"];

/// Parts of names that stand for arithmetic, with the number at which they stand for none. `null`, `false` and what is empty
/// leave out what a name stands for, too.
const ARITHMETIC: &[(&str, Option<f64>)] = &[
    ("activation", None),
    ("alibi", Some(0.0)),
    ("attention_chunk", Some(0.0)),
    ("attn_temperature", None),
    ("bidirectional", None),
    ("clip", Some(0.0)),
    ("cross_attention", Some(0.0)),
    ("encoder_decoder", None),
    ("expert", Some(0.0)),
    ("gate", None),
    ("gating", None),
    ("layer_types", None),
    ("lora_", Some(0.0)),
    ("moe_", Some(0.0)),
    ("multiplier", Some(1.0)),
    ("mup", None),
    ("norm", None),
    ("parallel_attn", None),
    ("position_embedding", None),
    ("residual", Some(1.0)),
    ("rope", Some(1.0)),
    ("rotary", Some(1.0)),
    ("scal", Some(1.0)),
    ("sink", Some(0.0)),
    ("soft_cap", Some(0.0)),
    ("softcap", Some(0.0)),
    ("window", Some(0.0)),
];

/// Flags that are on where a config does not have them: off, they change what is computed.
const ON: &[&str] =
    &["do_layer_norm_before", "is_causal", "scale_attn_weights", "use_norm", "use_residual", "use_rope", "use_rotary"];

/// Attention that sees what comes after: no family computes it, whether it reads the key or not.
const CAUSAL: &[&str] = &["is_causal", "text_config.is_causal"];

/// The keys of a config that a family did not read and that may matter.
#[derive(Debug)]
pub struct Unread {
    /// Keys that may change what the model computes.
    pub refused: Vec<UnreadKey>,
    /// Keys that nobody knows.
    pub unknown: Vec<UnreadKey>,
    why: String,
}

/// A key without a reader.
#[derive(Debug)]
pub struct UnreadKey {
    /// Where it is, as in `rope_parameters.factor`.
    pub path: String,
    value: String,
}

impl UnreadKey {
    /// Keys with their values, as messages have them.
    pub fn list(keys: &[UnreadKey]) -> String {
        keys.iter().map(|k| format!("'{}' ({})", k.path, k.value)).collect::<Vec<_>>().join(", ")
    }
}

impl Unread {
    /// Judges the keys that a family did not read. `claims` are the architectures that it answers for.
    pub fn of(config: &Map<String, Value>, unread: &[String], claims: &[impl AsRef<str>]) -> Unread {
        let own_code = own_code(config).filter(|class| !claims.iter().any(|c| c.as_ref() == class));
        let [mut refused, mut unknown] = [const { Vec::new() }; 2];
        let unread = unread.iter().map(String::as_str);
        // Also where a family reads it.
        for path in CAUSAL.iter().copied().chain(unread.filter(|path| !CAUSAL.contains(path))) {
            let Some((name, value)) = value_at(config, path) else { continue };
            let group = match meaning(path, name, value) {
                Meaning::Nothing => continue,
                Meaning::Arithmetic => &mut refused,
                Meaning::Unknown if own_code.is_some() => &mut refused,
                Meaning::Unknown => &mut unknown,
            };
            group.push(UnreadKey { path: path.to_owned(), value: brief(value) });
        }
        let why = match own_code {
            Some(class) => format!("the checkpoint has code of its own, {class}, which may read what this does not"),
            None => "that may change what the model computes".to_owned(),
        };
        Unread { refused, unknown, why }
    }

    /// Refuses keys that may change what the model computes, all at once.
    pub fn refuse(&self, family: &str) -> Result<()> {
        let (keys, are) = match self.refused.len() {
            0 => return Ok(()),
            1 => ("key", "is"),
            _ => ("keys", "are"),
        };
        let named = UnreadKey::list(&self.refused);
        Err(Error::new(format!("{keys} {named} {are} not understood by the plugin '{family}'")).help(self.why.clone()))
    }

    /// What should be told of the keys that nobody knows.
    pub fn warning(&self, family: &str) -> Option<String> {
        let named = UnreadKey::list(&self.unknown);
        let told = format!("config.json: not known to the plugin '{family}', and taken for harmless: {named}");
        (!self.unknown.is_empty()).then_some(told)
    }
}

/// What a key without a reader means.
enum Meaning {
    Nothing,
    Arithmetic,
    Unknown,
}

fn meaning(path: &str, name: &str, value: &Value) -> Meaning {
    if ON.contains(&name)
        && let Some(on) = value.as_bool()
    {
        return if on { Meaning::Nothing } else { Meaning::Arithmetic };
    }
    let harmless = HARMLESS.contains(&name)
        || HARMLESS_START.iter().any(|start| name.starts_with(start))
        || HARMLESS_END.iter().any(|end| name.ends_with(end));
    if harmless || is_off(value) {
        return Meaning::Nothing;
    }
    let (lower, number) = (path.to_lowercase(), value.as_f64());
    let mut parts = ARITHMETIC.iter().filter(|(part, _)| lower.contains(part)).peekable();
    if parts.peek().is_some() {
        let nothing = number.is_some() && parts.all(|(_, nothing)| *nothing == number);
        return if nothing { Meaning::Nothing } else { Meaning::Arithmetic };
    }
    // Whether there is a bias, the tensors in the files tell.
    if name.ends_with("bias") && value.is_boolean() { Meaning::Nothing } else { Meaning::Unknown }
}

/// Whether a value leaves out what its key stands for. Layers that are all of full attention are what they are without their list.
fn is_off(value: &Value) -> bool {
    match value {
        Value::Null | Value::Bool(false) => true,
        Value::String(text) => text.is_empty(),
        Value::Object(map) => map.is_empty(),
        Value::Array(list) => list.iter().all(|kind| kind == "full_attention"),
        _ => false,
    }
}

/// The class of the model that the checkpoint brings code for.
fn own_code(config: &Map<String, Value>) -> Option<String> {
    let map = config.get("auto_map")?.as_object()?;
    let class = ["AutoModelForCausalLM", "AutoModel"].iter().find_map(|auto| map.get(*auto)?.as_str())?;
    class.rsplit('.').next().map(str::to_owned)
}

/// The last name of a path and its value. Names may have dots.
pub fn value_at<'a>(keys: &'a Map<String, Value>, path: &'a str) -> Option<(&'a str, &'a Value)> {
    if let Some(value) = keys.get(path) {
        return Some((path, value));
    }
    path.match_indices('.').find_map(|(at, _)| value_at(keys.get(&path[..at])?.as_object()?, &path[at + 1..]))
}

/// A value as a message has it.
fn brief(value: &Value) -> String {
    let text = value.to_string();
    match text.char_indices().nth(40) {
        Some((at, _)) => format!("{}…", &text[..at]),
        None => text,
    }
}
