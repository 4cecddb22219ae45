//! Arguments of TRL's `trl dpo` (1.16): `ScriptArguments`, `DPOConfig` and `ModelConfig`, with those that 0.24 had.

use dpo_core::error::{Error, Result};

use super::combine::{self, exists, is_id};
use super::quantization::{self, Names};
use super::table::{Group, Peer, becomes, is, named, refused, same};
use super::trainer;
use super::translation::Translation;

pub(super) static PEER: Peer = Peer { name: "TRL", tables: &[TABLE, trainer::TABLE] };

const TABLE: &[Group] = &[
    same("learning_rate=1e-06 logging_steps=10"),
    is("gradient_checkpointing", "recompute"),
    becomes("model_name_or_path", "`--model`"),
    becomes("model_revision=main", "`--model NAME@REVISION`"),
    becomes("dataset_name", "`--dataset`; a name is one of Hugging Face"),
    is("test_split_size", "split-dataset-ratio"),
    is("dtype torch_dtype", "dtype"),
    same("max_length=1024 loss_weights beta=0.1 use_weighting=false rpo_alpha ld_alpha"),
    is("f_divergence_type=reverse_kl", "f-divergence"),
    becomes("loss_type=sigmoid", "`--loss`"),
    becomes("label_smoothing=0.0", "`--label-smoothing`"),
    becomes("discopop_tau=0.05", "`--loss-option discopop_tau` of `discopop`"),
    becomes("f_alpha_divergence_coef=0.5", "`--loss-option f_alpha`"),
    becomes("truncation_mode=keep_start", "`--truncation-strategy`: `right`, of `keep_end` `left`"),
    becomes("lora_r=16 lora_alpha=32", "`--lora-rank`, `--lora-alpha`"),
    is("lora_target_modules", "target-modules"),
    is("lora_target_parameters", "target-parameters"),
    same("use_rslora=false use_dora=false disable_dropout=true"),
    named("use_peft=false", "LoRA adapters are trained in any case"),
    named(
        "precompute_ref_log_probs=false precompute_ref_batch_size",
        "the reference is always computed first, and kept",
    ),
    named(
        "padding_free=false pad_to_multiple_of=auto padding_value pad_token label_pad_token_id=-100",
        "batches have no padding",
    ),
    named("dataset_num_proc", "rows are tokenised on all cores, and many of them kept for the next run"),
    named(
        "dataset_train_split=train dataset_test_split=test",
        "of a dataset with splits the training split is taken; see --val-dataset",
    ),
    named("dataset_streaming=false streaming=false", "rows are read before the first step"),
    named("attn_implementation", "there is one way to compute"),
    named("use_liger_loss=false use_logits_to_keep=false", "the head never makes a logits tensor"),
    named("activation_offloading=false", "memory is planned, not configured"),
    named("gradient_checkpointing_use_reentrant=false", "layers are recomputed block by block"),
    named("trust_remote_code=false", "no code of a checkpoint is ever run"),
    named("ignore_bias_buffers=false", "ranks exchange one flat buffer"),
    becomes("lora_dropout=0.05", "`--lora-dropout` where `--disable-dropout` is false; else dropout is off, as there"),
    named("lora_task_type=CAUSAL_LM", "only causal language models are trained"),
    becomes(
        "load_in_4bit=false load_in_8bit=false bnb_4bit_quant_type=nf4 use_bnb_nested_quant=false",
        quantization::BECOMES,
    ),
    named("bnb_4bit_quant_storage", "only of load_in_4bit"),
    named("ref_model_mixup_alpha=0.6 ref_model_sync_steps=512", "only of sync_ref_model"),
    named("base_model_attribute_name=model", "only of use_liger_loss"),
    named("dataloader_num_workers=0", "rows are tokenised before the first step: there is no data loader"),
    refused(
        "lora_modules_to_save",
        "only LoRA matrices of linear modules are trained",
        "name linear modules with --target-modules",
    ),
    refused(
        "model_init_kwargs ref_model_init_kwargs",
        "a checkpoint is read as it is",
        "say --dtype, or NAME@REVISION in --model",
    ),
    refused(
        "model_adapter_name ref_adapter_name force_use_ref_model=false",
        "adapters are folders",
        "say --init-adapter or --ref-adapter",
    ),
    refused("sync_ref_model=false", "the reference stays what it is at the start", "leave it out"),
    refused(
        "reference_free=false",
        "the loss says whether it has a reference",
        "choose one without, such as --loss simpo",
    ),
    same("router_aux_loss_coef"),
    refused(
        "dataset_config",
        "a subset by its name is not known",
        "name the folder that it is: --dataset hf::OWNER/NAME/FOLDER",
    ),
    refused("datasets", "a mixture is a list of files and names", "name them with --dataset"),
    refused(
        "max_prompt_length=512 max_completion_length",
        "prompts and answers have one length together",
        "say --max-length, and how longer ones are cut with --truncation-strategy",
    ),
    refused(
        "generate_during_eval=false",
        "no answers are generated while training",
        "ask with dpo-host chat --compare",
    ),
    refused("tools", "tools are a column of the rows", "write them there"),
];

/// What its arguments mean together.
pub(super) fn combine(t: &mut Translation) -> Result<()> {
    let losses = t.take("loss_type").map(|flag| (flag.values, flag.place));
    combine::losses(t, losses, None)?;
    let revision = t.take("model_revision").and_then(|flag| flag.values.into_iter().next()).filter(|r| r != "main");
    if let Some(mut flag) = t.take("model_name_or_path") {
        for name in flag.values.iter_mut().filter(|name| is_id(name) && !std::path::Path::new(name.as_str()).exists()) {
            *name = revision.iter().fold(name.clone(), |name, revision| format!("{name}@{revision}"));
        }
        t.push_as("model", flag);
    }
    if let Some(mut flag) = t.take("dataset_name") {
        for name in flag.values.iter_mut().filter(|name| is_id(name) && !exists(name)) {
            *name = format!("hf::{name}");
        }
        t.push_as("dataset", flag);
    }
    match t.take_value("truncation_mode") {
        _ if t.has("truncation-strategy") => {}
        (Some(mode), flag) if mode == "keep_start" || mode == "keep_end" => {
            let side = if mode == "keep_start" { "right" } else { "left" };
            t.push("truncation-strategy", [side], flag.and_then(|flag| flag.place));
        }
        (Some(mode), flag) => {
            return Err(Error::input(format!("'{mode}' should be keep_start or keep_end"))
                .at(flag.map_or(mode, |flag| flag.spelled())));
        }
        (None, _) => {}
    }
    let continued = t.has("init-adapter");
    for (theirs, ours) in [("lora_r", "lora-rank"), ("lora_alpha", "lora-alpha")] {
        let (value, flag) = t.take_value(theirs);
        match (flag, value) {
            (Some(flag), _) => t.push_as(ours, flag),
            (None, Some(default)) if !continued && !t.has(ours) => t.push(ours, [default], None),
            _ => {}
        }
    }
    if !t.has("plain-text") {
        // TRL's chat template is for conversations alone.
        t.push("plain-text", ["true"], None);
    }
    quantization::quantization(t, &QUANTIZATION)?;
    combine::output(t);
    combine::lists(t);
    combine::trainer(t)?;
    combine::batch(t)
}

const QUANTIZATION: Names = Names {
    bits: "",
    switches: ["load_in_4bit", "load_in_8bit"],
    method: "",
    kind: "bnb_4bit_quant_type",
    double: "use_bnb_nested_quant",
};
