//! What the keys of a `config.json` mean that a family did not read: nothing, or that its graph computes something else.
//!
//! A key that may change what a model computes is refused by name. One that cannot (token ids, generation, lengths, notes of
//! tokenizers and of training) never is, nor one whose value leaves out what it stands for. The rest is told. The names in the tables
//! are those of transformers' `PreTrainedConfig` and `GenerationConfig`, and of published checkpoints.

use std::path::Path;

use dpo_core::console::{self, Remark};
use dpo_core::error::{Error, Result};
use serde_json::{Map, Value};

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
    // Lengths. Families with a window, or with frequencies that depend on a length, read theirs.
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
    "sliding_window",
    "sliding_window_size",
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
/// Where a checkpoint says how its weights are quantised.
const QUANTISED: &[&str] =
    &["quantization_config", "compression_config", "text_config.quantization_config", "text_config.compression_config"];

/// What should be told of a config, if anything.
#[derive(Debug, Default)]
pub struct Remarks {
    /// Which keys the user says change nothing.
    taken: Option<Remark>,
    /// Which keys nobody knows.
    unknown: Option<Remark>,
}

impl Remarks {
    /// Tells it.
    pub fn tell(&self) {
        self.taken.iter().cloned().for_each(console::note);
        self.unknown.iter().cloned().for_each(console::warning);
    }
}

/// What a key without a reader means.
enum Meaning {
    Nothing,
    Arithmetic,
    Unknown,
}

/// Judges the keys that a family did not read, all of which are named at once. The user's word, `ignored`, stands against what
/// would be refused. What should be told comes back.
///
/// # Errors
/// Keys that may change what the model computes.
pub(super) fn judge(
    (config, unread): (&Map<String, Value>, &[String]),
    (family, claims): (&str, &[String]),
    ignored: &[String],
) -> Result<Remarks> {
    let own_code = own_code(config).filter(|class| !claims.contains(class));
    let [mut refused, mut unknown, mut taken] = [const { Vec::new() }; 3];
    let unread = unread.iter().map(String::as_str);
    // Also where a family reads it.
    for path in CAUSAL.iter().copied().chain(unread.filter(|path| !CAUSAL.contains(path))) {
        let Some((name, value)) = value_at(config, path) else { continue };
        let group = match meaning(path, name, value) {
            _ if ignored.iter().any(|i| i == path) => &mut taken,
            Meaning::Nothing => continue,
            Meaning::Arithmetic => &mut refused,
            Meaning::Unknown if own_code.is_some() => &mut refused,
            Meaning::Unknown => &mut unknown,
        };
        group.push((path, format!("'{path}' ({})", brief(value))));
    }
    let names = |keys: &[(&str, String)]| keys.iter().map(|(_, named)| named.as_str()).collect::<Vec<_>>().join(", ");
    if !refused.is_empty() {
        let why = match own_code {
            Some(class) => format!("the checkpoint has code of its own, {class}, which may read what this does not"),
            None => "that may change what the model computes".to_owned(),
        };
        let (keys, are) = if refused.len() == 1 { ("key", "is") } else { ("keys", "are") };
        let flags: Vec<String> = refused.iter().map(|(path, _)| format!("--ignore-config-key {path}")).collect();
        return Err(Error::input(format!("{keys} {} {are} not understood by the plugin '{family}'", names(&refused)))
            .help(format!("{why}; where you know that it changes nothing: {}", flags.join(" "))));
    }
    let remark = |keys: &[(&str, String)], text: String| (!keys.is_empty()).then(|| Remark::from(text + &names(keys)));
    let unknown =
        remark(&unknown, format!("config.json: not known to the plugin '{family}', and taken for harmless: "));
    Ok(Remarks {
        taken: remark(&taken, "config.json: left out of account, as --ignore-config-key says: ".into()),
        unknown: unknown.map(|remark| {
            remark.help(
                "if one of them changes what the model computes, results are wrong; --ignore-config-key NAME says that it does not",
            )
        }),
    })
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
fn value_at<'a>(keys: &'a Map<String, Value>, path: &'a str) -> Option<(&'a str, &'a Value)> {
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

/// Refuses a checkpoint whose weights are quantised, with the name of the one that it was made from, as far as its own tells.
pub(super) fn refuse_quantised(config: &Map<String, Value>, folder: Option<&Path>, ignored: &[String]) -> Result<()> {
    let stated = QUANTISED.iter().filter(|path| !ignored.iter().any(|i| i == *path));
    let Some(how) = stated.filter_map(|path| value_at(config, path)?.1.as_object()).find(|how| !how.is_empty()) else {
        return Ok(());
    };
    let load_in = ["load_in_4bit", "load_in_8bit"].map(|key| how.get(key).and_then(Value::as_bool));
    if load_in.iter().any(Option::is_some) && !load_in.contains(&Some(true)) {
        return Ok(());
    }
    let by_key = if load_in.contains(&Some(true)) { "bitsandbytes" } else { "in an unknown way" };
    let method = how.get("quant_method").and_then(Value::as_str).unwrap_or(by_key);
    let bits = how.get("bits").and_then(Value::as_u64).map(|bits| format!(", {bits} bits")).unwrap_or_default();
    let stated = config.get("_name_or_path").and_then(Value::as_str);
    let name =
        folder.and_then(name_of).into_iter().chain(stated.map(str::to_owned)).find_map(|name| unquantised(&name));
    Err(Error::input(format!("the model is quantised ({method}{bits}); bf16, f16 and f32 are trained")).help(
        match name {
            Some(name) => format!("take the model that it was made from, in bf16: {name}, by its name"),
            None => "take the model that it was made from, in bf16".to_owned(),
        },
    ))
}

/// What a model's folder says of its name: `owner/name` in the caches of hubs, else its own name.
fn name_of(folder: &Path) -> Option<String> {
    let parts = || folder.components().rev().filter_map(|part| part.as_os_str().to_str());
    let cached = parts().find_map(|part| part.strip_prefix("models--")).map(|name| name.replacen("--", "/", 1));
    cached.or_else(|| parts().next().map(|name| name.replace("___", ".")))
}

/// Ends of the names of quantised models.
const QUANTISED_NAMES: &[&str] = &[
    "-unsloth-bnb-4bit",
    "-bnb-4bit",
    "-bnb-8bit",
    "-awq",
    "-gptq",
    "-int4",
    "-int8",
    "-4bit",
    "-8bit",
    "-fp8",
    "-fp8-dynamic",
    "-fp8-block",
    "-nvfp4",
    "-mxfp4",
    "-w4a16",
    "-w8a8",
    "-w8a16",
    "-quantized.w4a16",
    "-quantized.w8a8",
    "-quantized.w8a16",
    "-hqq",
    "-aqlm",
];

/// A name without the ends that quantised models have; none if it has none of them.
fn unquantised(name: &str) -> Option<String> {
    let cut = |name: &str| {
        let lower = name.to_lowercase();
        let end = QUANTISED_NAMES.iter().filter(|end| lower.ends_with(*end)).max_by_key(|end| end.len())?;
        name.get(..name.len() - end.len()).map(str::to_owned)
    };
    let mut short = cut(name)?;
    while let Some(shorter) = cut(&short) {
        short = shorter;
    }
    Some(short)
}
