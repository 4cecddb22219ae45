//! Flags of ms-swift's `swift rlhf` (and of Hugging Face's trainer, whose names it uses) as ours.

use crate::error::{Error, Result};

/// Arguments in our spelling, and what the user should know about them.
pub(super) struct Translated {
    pub(super) args: Vec<String>,
    pub(super) notes: Vec<String>,
}

/// Theirs and ours, where more than the spelling differs. `swift rlhf` writes snake_case.
const RENAMED: &[(&str, &str)] = &[
    ("torch_dtype", "dtype"),
    ("num_train_epochs", "num-epochs"),
    ("loss_type", "loss"),
    ("lr_scheduler_type", "lr-scheduler"),
    ("f_divergence_type", "f-divergence"),
    ("max_grad_norm", "max-grad-norm"),
    ("target_regex", "target-modules"),
    ("data_seed", "seed"),
    ("dataset_shuffle", "shuffle"),
    ("train_dataloader_shuffle", "shuffle"),
    ("quant_method", "quantization"),
];

/// Values that are spelled otherwise.
const VALUES: &[(&str, &str, &str)] = &[
    ("dtype", "fp32", "float32"),
    ("dtype", "bf16", "bfloat16"),
    ("lr-scheduler", "constant_with_warmup", "constant"),
    ("quantization", "bnb", "nf4"),
];

/// Flags that are accepted and do nothing, with the reason.
const IGNORED: &[(&str, &str)] = &[
    ("load_from_cache_file", "rows are tokenised anew, which takes seconds"),
    ("dataloader_num_workers", "rows are tokenised before the first step"),
    ("dataloader_pin_memory", "there is no data loader"),
    ("dataset_num_proc", "tokenising uses all cores"),
    ("per_device_eval_batch_size", "micro-batches follow from memory"),
    ("attn_impl", "there is one attention"),
    ("use_liger_kernel", "the head never makes a logits tensor"),
    ("padding_free", "batches have no padding"),
    ("packing", "pairs are always packed"),
    ("logging_first_step", "the first step is always logged"),
    ("report_to", "logging.jsonl is always written"),
    ("ddp_find_unused_parameters", "every parameter of the adapter is used"),
    ("ddp_backend", "the collective follows from the device"),
    ("deepspeed", "memory is planned, not configured"),
    ("fsdp", "memory is planned, not configured"),
    ("save_only_model", "checkpoints carry what a resumed run needs"),
    ("save_strategy", "--save-steps says when"),
    ("eval_strategy", "--eval-steps says when"),
    ("optim", "the optimizer is AdamW on one flat buffer"),
    ("gradient_checkpointing_kwargs", "layers are recomputed block by block"),
    ("model_author", "it names nothing that is written"),
    ("model_name", "it names nothing that is written"),
    ("model_type", "the family follows from config.json, or --plugin"),
    ("template", "the chat template is the checkpoint's own"),
    ("use_hf", "a name without a hub is one of Hugging Face; ms::owner/name is one of ModelScope"),
    ("check_model", "the checkpoint is always checked"),
    ("add_version", "a run never overwrites another"),
    ("loss_scale", "answers are learned whole"),
    ("remove_unused_columns", "formats read the columns they know"),
    ("freeze_vit", "there is no vision tower"),
    ("freeze_aligner", "there is no vision tower"),
    ("freeze_llm", "the base weights are always frozen"),
];

/// Flags that ask for something else than what this tool does; the value it does is accepted.
const FIXED: &[(&str, &[&str], &str)] = &[
    ("rlhf_type", &["dpo"], "name the loss with --loss instead"),
    ("tuner_type", &["lora"], "only LoRA is trained"),
    ("train_type", &["lora"], "only LoRA is trained"),
    ("tuner_backend", &["peft"], "adapters are PEFT's"),
    ("bf16", &["true"], "see --dtype"),
    ("fp16", &["false"], "half precision overflows in preference training; see --dtype"),
    ("lora_bias", &["none"], "biases are frozen"),
    ("use_dora", &["false"], "only plain LoRA is trained"),
    ("init_weights", &["true"], "A is Kaiming-uniform, B zero"),
    ("streaming", &["false"], "rows are read before the first step"),
    ("quant_bits", &["4"], "see --quantization"),
    ("precompute_ref_log_probs", &["true"], "the reference is always computed first"),
    ("reference_free", &["false"], "choose a loss without a reference, such as simpo"),
];

/// Rewrites the arguments of `train`; other commands are left alone.
pub(super) fn translate(args: Vec<String>) -> Result<Translated> {
    if args.get(1).map(String::as_str) != Some("train") {
        return Ok(Translated { args, notes: Vec::new() });
    }
    let mut out = Translated { args: args[..2].to_vec(), notes: Vec::new() };
    let (mut per_device, mut accumulation) = (None, None);
    for (flag, values) in groups(&args[2..]) {
        let Some(theirs) = flag.strip_prefix("--").map(|f| f.replace('-', "_")) else {
            out.args.push(flag);
            continue;
        };
        let spelled = || if values.is_empty() { flag.clone() } else { format!("{flag} {}", values.join(" ")) };
        match theirs.as_str() {
            "per_device_train_batch_size" => per_device = Some(number(&flag, &values)?),
            "gradient_accumulation_steps" => accumulation = Some(number(&flag, &values)?),
            name => {
                if let Some((_, reason)) = IGNORED.iter().find(|(n, _)| *n == name) {
                    out.notes.push(format!("{} is ignored: {reason}", spelled()));
                    continue;
                }
                if let Some((_, accepted, reason)) = FIXED.iter().find(|(n, ..)| *n == name) {
                    if values.iter().any(|v| !accepted.contains(&v.to_lowercase().as_str())) {
                        return Err(Error::input(format!("only {} is done here", accepted.join(", ")))
                            .at(spelled())
                            .help(*reason));
                    }
                    continue;
                }
                let ours = RENAMED
                    .iter()
                    .find(|(n, _)| *n == name)
                    .map_or_else(|| name.replace('_', "-"), |(_, o)| (*o).to_owned());
                let value = |v: &String| {
                    VALUES
                        .iter()
                        .find(|(f, t, _)| *f == ours && t == v)
                        .map_or_else(|| v.clone(), |(.., o)| (*o).to_owned())
                };
                out.args.push(format!("--{ours}"));
                out.args.extend(values.iter().map(value));
            }
        }
    }
    if per_device.is_some() || accumulation.is_some() {
        // ms-swift accumulates up to 16 pairs where it is not told otherwise.
        let per_device = per_device.unwrap_or(1).max(1);
        let pairs = per_device * accumulation.unwrap_or_else(|| 16_usize.div_ceil(per_device));
        out.args.extend(["--batch-size".to_owned(), pairs.to_string()]);
    }
    Ok(out)
}

/// Flags with their values.
fn groups(args: &[String]) -> Vec<(String, Vec<String>)> {
    let mut groups: Vec<(String, Vec<String>)> = Vec::new();
    for arg in args {
        match (arg.starts_with("--"), groups.last_mut()) {
            (true, _) => match arg.split_once('=') {
                Some((flag, value)) => groups.push((flag.into(), vec![value.into()])),
                None => groups.push((arg.clone(), Vec::new())),
            },
            (false, Some((_, values))) => values.push(arg.clone()),
            (false, None) => groups.push((arg.clone(), Vec::new())),
        }
    }
    groups
}

fn number(flag: &str, values: &[String]) -> Result<usize> {
    let value = values.first().and_then(|v| v.parse().ok()).filter(|n| *n > 0);
    value.ok_or_else(|| Error::input(format!("'{}' should be a number above 0", values.join(" "))).at(flag))
}
