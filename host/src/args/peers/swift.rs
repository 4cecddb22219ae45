//! Flags of ms-swift's `swift rlhf` (and of Hugging Face's trainer, whose names it uses) as ours.

use super::flag::Flag;
use dpo_core::error::{Error, Result};
use dpo_ranks::Place;

/// Theirs and ours, where more than the spelling differs. `swift rlhf` writes snake_case.
const RENAMED: &[(&str, &str)] = &[
    ("lr", "learning-rate"),
    ("epochs", "num-epochs"),
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
    ("ddp_timeout", "progress-timeout"),
];

/// Values that are spelled otherwise.
const VALUES: &[(&str, &str, &str)] = &[
    ("dtype", "fp32", "float32"),
    ("dtype", "bf16", "bfloat16"),
    ("lr-scheduler", "constant_with_warmup", "constant"),
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
    ("packing", "examples are always packed"),
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
    ("lora_dropout", "dropout is off while aligning, as in TRL, LLaMA-Factory and ms-swift"),
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
    ("quant_bits", &["none"], QUANTIZED),
    ("quant_method", &["none"], QUANTIZED),
    ("quantization", &["none"], QUANTIZED),
    ("precompute_ref_log_probs", &["true"], "the reference is always computed first"),
    ("reference_free", &["false"], "choose a loss without a reference, such as simpo"),
];

/// Why quantised weights are refused, and what else makes a model fit.
const QUANTIZED: &str =
    "frozen weights are kept in bf16 or f32; `dpo-host plan` says what fits, --recompute and --shard-base save memory";

/// Their names that are not ours.
pub(super) fn names() -> impl Iterator<Item = &'static str> {
    let renamed = RENAMED.iter().map(|(name, _)| *name);
    renamed
        .chain(IGNORED.iter().map(|(name, _)| *name))
        .chain(FIXED.iter().map(|(name, ..)| *name))
        .chain([PER_DEVICE, ACCUMULATION])
}

/// Most pairs of a step.
const MOST_PAIRS: usize = 1 << 24;
const PER_DEVICE: &str = "per_device_train_batch_size";
const ACCUMULATION: &str = "gradient_accumulation_steps";
const GPUS: &str = "--gpus";
/// From how many processes on a machine ms-swift launches them, where no launcher has.
const PER_NODE: &str = "NPROC_PER_NODE";

/// Rewrites flags of `train`; returns what the user should know about them as well.
pub(super) fn translate(flags: Vec<Flag>) -> Result<(Vec<Flag>, Vec<String>)> {
    let (mut ours, mut notes) = (Vec::new(), Vec::new());
    let (mut per_device, mut accumulation, mut batch) = (None, None, None);
    let processes = match processes(&flags)? {
        Processes::Told(count) => count,
        Processes::ToStart(count) => {
            notes.push(format!("{PER_NODE}={count} is taken as --gpus {count}: so many processes are started"));
            ours.push(Flag { name: GPUS.to_owned(), values: vec![count.to_string()], place: None });
            count
        }
    };
    for flag in flags {
        let Some(theirs) = flag.name.strip_prefix("--").map(|f| f.replace('-', "_")) else {
            ours.push(flag);
            continue;
        };
        if let Some((_, reason)) = IGNORED.iter().find(|(n, _)| *n == theirs) {
            notes.push(format!("{} is ignored: {reason}", flag.spelled()));
            continue;
        }
        if let Some((_, accepted, reason)) = FIXED.iter().find(|(n, ..)| *n == theirs) {
            if flag.values.iter().any(|v| !accepted.contains(&v.to_lowercase().as_str())) {
                return Err(Error::input(format!("only {} is done here", accepted.join(", ")))
                    .at(flag.spelled())
                    .help(*reason));
            }
            continue;
        }
        if theirs == PER_DEVICE || theirs == ACCUMULATION {
            let number = number(&flag)?;
            *(if theirs == PER_DEVICE { &mut per_device } else { &mut accumulation }) = Some(number);
            // ms-swift accumulates up to 16 pairs over all processes where it is not told otherwise.
            let each = per_device.unwrap_or(1);
            let most = each.saturating_mul(processes);
            let times = accumulation.unwrap_or_else(|| 16_usize.div_ceil(most));
            let Some(pairs) = most.checked_mul(times).filter(|pairs| *pairs <= MOST_PAIRS) else {
                return Err(Error::input(format!(
                    "{each} x {times} x {processes} processes is more than {MOST_PAIRS} pairs a step"
                ))
                .at(flag.spelled())
                .help("16 to 64 are usual"));
            };
            batch = Some(format!(
                "--batch-size {pairs}: {PER_DEVICE} {each} x {ACCUMULATION} {times} x world size {processes}"
            ));
            ours.push(Flag { name: "--batch-size".to_owned(), values: vec![pairs.to_string()], place: flag.place });
            continue;
        }
        let renamed = RENAMED.iter().find(|(n, _)| *n == theirs);
        let name = renamed.map_or_else(|| theirs.replace('_', "-"), |(_, o)| (*o).to_owned());
        let value = |v: String| {
            let spelled = VALUES.iter().find(|(f, t, _)| *f == name && *t == v);
            spelled.map_or(v, |(.., o)| (*o).to_owned())
        };
        let values = flag.values.into_iter().map(value).collect();
        ours.push(Flag { name: format!("--{name}"), values, place: flag.place });
    }
    notes.extend(batch);
    Ok((ours, notes))
}

/// How many processes a run has, and whether somebody says so or ms-swift would start them.
enum Processes {
    Told(usize),
    ToStart(usize),
}

fn processes(flags: &[Flag]) -> Result<Processes> {
    if let Some(place) = Place::from_environment().ok().flatten() {
        return Ok(Processes::Told(place.size));
    }
    if let Some(flag) = flags.iter().rev().find(|flag| flag.name == GPUS) {
        // What is no number is refused when flags are parsed.
        return Ok(Processes::Told(flag.values.first().and_then(|v| v.parse().ok()).unwrap_or(1).max(1)));
    }
    let variable = |name: &str| match std::env::var(name).ok().filter(|v| !v.is_empty()) {
        None => Ok(1),
        Some(text) => text.parse().ok().filter(|n| *n > 0).ok_or_else(|| {
            Error::input(format!("'{text}' should be a whole number above 0")).at(name).help("or unset it: see --gpus")
        }),
    };
    // A process that a launcher has started alone starts no others.
    let (here, nodes) = match std::env::var_os("WORLD_SIZE") {
        Some(_) => (1, 1),
        None => (variable(PER_NODE)?, variable("NNODES")?),
    };
    match nodes {
        1 if here == 1 => Ok(Processes::Told(1)),
        1 => Ok(Processes::ToStart(here)),
        _ => Err(Error::input(format!("{nodes} machines, but no launcher has started this process")).at("NNODES").help(
            format!("start it on each with torchrun --no-python --nnodes {nodes} --nproc-per-node {here} and where they meet"),
        )),
    }
}

fn number(flag: &Flag) -> Result<usize> {
    let value = flag.values.first().and_then(|v| v.parse().ok()).filter(|n| *n > 0);
    value.ok_or_else(|| Error::input("should be a whole number above 0").at(flag.spelled()))
}
