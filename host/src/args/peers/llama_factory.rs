//! Arguments of LLaMA-Factory (0.9.5, `src/llamafactory/hparams`), for its stages dpo and kto.

use dpo_core::error::{Error, Result};

use super::combine::{self, is_id, is_on};
use super::dataset_info;
use super::quantization::{self, Names};
use super::table::{Group, Peer, becomes, is, named, refused, same};
use super::trainer;
use super::translation::Translation;
use crate::args::flag::Flag;

pub(super) static PEER: Peer = Peer { name: "LLaMA-Factory", tables: &[TABLE, trainer::TABLE] };

const TABLE: &[Group] = &[
    becomes("model_name_or_path", "`--model`; with the variable USE_MODELSCOPE_HUB one of ModelScope"),
    becomes("model_revision=main", "`--model NAME@REVISION`"),
    becomes(
        "dataset eval_dataset dataset_dir=data",
        "`--dataset`, `--val-dataset`, with `--columns` and `--dataset-format`: what `dataset_info.json` says of them",
    ),
    is("max_samples", "max-samples"),
    is("cutoff_len=2048", "max-length"),
    is("val_size=0.0", "split-dataset-ratio"),
    is("default_system", "system"),
    becomes("disable_shuffling=false", "`--shuffle false`"),
    becomes(
        "stage=sft pref_loss=sigmoid",
        "`--loss`: of `dpo` it is `pref_loss`, without a `stage` as well; `kto` and `sft` are losses; other stages are refused",
    ),
    is("pref_beta=0.1", "beta"),
    becomes("pref_ftx=0.0", "`--rpo-alpha`, with `--loss-option nll_mean=answers`"),
    becomes("dpo_label_smoothing=0.0", "`--label-smoothing`"),
    becomes("simpo_gamma=0.5", "`--loss-option simpo_gamma` of `simpo`"),
    becomes("kto_chosen_weight=1.0", "`--loss-option desirable_weight` of `kto`"),
    becomes("kto_rejected_weight=1.0", "`--loss-option undesirable_weight` of `kto`"),
    becomes("ld_alpha", "`--ld-alpha`; here it weights the reference's tokens as well, as in TRL from 0.29"),
    is("ref_model", "ref-model"),
    is("ref_model_adapters", "ref-adapter"),
    becomes(
        "adapter_name_or_path",
        "`--init-adapter`; the reference is the model without it, unless `ref_model_adapters` says otherwise",
    ),
    becomes("lora_rank=8", "`--lora-rank`"),
    becomes("lora_alpha", "`--lora-alpha`; by default twice the rank"),
    becomes("lora_target=all", "`--target-modules`"),
    same("use_rslora=false use_dora=false loraplus_lr_ratio"),
    becomes(
        "pissa_init=false pissa_iter=16",
        "`--init-lora-weights`: `pissa_niter_N`, or `pissa` where the iterations are below 0",
    ),
    named("pissa_convert=false", "an adapter that begins with the weights is always saved as a plain one"),
    is("early_stopping_steps", "early-stopping-patience"),
    becomes("disable_gradient_checkpointing=false", "`--recompute false`"),
    refused(
        "finetuning_type=lora",
        "only LoRA adapters are trained",
        "say lora; `dpo-host merge` makes a full checkpoint of an adapter",
    ),
    becomes(
        "quantization_bit quantization_method=bnb quantization_type=nf4 double_quantization=true",
        quantization::BECOMES,
    ),
    named("ref_model_quantization_bit", "the reference's base is kept as the model's is"),
    refused("fp8=false", "matmuls are not configured", "say --quantization fp8, which keeps the base so"),
    refused("pref_bco_weight=0.0", "there is no such term", "say --loss sigmoid bco_pair --loss-weights 1 W"),
    refused(
        "create_new_adapter=false",
        "an adapter is not trained on top of another one",
        "fold it in: dpo-host merge",
    ),
    refused("additional_target module_dropout=0.0", "only LoRA matrices of linear modules are trained", "leave it out"),
    refused(
        "use_galore=false use_apollo=false use_badam=false use_adam_mini=false use_muon=false",
        "the optimizer is AdamW over the whole adapter",
        "leave it out",
    ),
    refused(
        "use_llama_pro=false mixture_of_depths shift_attn=false rope_scaling train_from_scratch=false",
        "the model is what config.json says",
        "leave it out",
    ),
    refused(
        "add_tokens add_special_tokens new_special_tokens_config resize_vocab=false",
        "the vocabulary is the checkpoint's",
        "add tokens to the checkpoint first",
    ),
    is("moe_aux_loss_coef", "router-aux-loss-coef"),
    refused(
        "use_dft_loss=false use_asft_loss=false use_eaft_loss=false train_on_prompt=false",
        "the objective is that of preferences",
        "`dpo-host list losses` lists what there is",
    ),
    refused(
        "mix_strategy=concat interleave_probs",
        "datasets are joined, not interleaved",
        "leave it out; num_samples in dataset_info.json says how many rows of each",
    ),
    refused(
        "eval_on_each_dataset=false",
        "evaluation sets are joined",
        "--val-dataset NAME=FILE names several of them",
    ),
    refused("tokenized_path", "rows are read, not tokens", "name the rows with dataset"),
    refused(
        "export_dir export_hub_model_id",
        "`train` exports nothing",
        "dpo-host merge --adapter RUN --output-dir FOLDER",
    ),
    becomes("use_swanlab=false", "`--report-to swanlab`: files for `swanlab sync`"),
    becomes("swanlab_project=llamafactory", "`--project`, with `use_swanlab`"),
    becomes("swanlab_run_name", "`--run-name`"),
    refused("use_kt=false use_mca=false use_hyper_parallel=false", "there is one way to compute", "leave it out"),
    refused("adapter_folder", "adapters are folders", "name each folder in adapter_name_or_path"),
    refused("mask_history=false", "the last answer alone is learned in any case", "leave it out"),
    // What changes nothing.
    named(
        "template tool_format enable_thinking=true preserve_thinking=false",
        "the chat template is the checkpoint's own",
    ),
    named("trust_remote_code=false", "no code of a checkpoint is ever run"),
    named("use_fast_tokenizer=true split_special_tokens=false", "the tokenizer is what tokenizer.json says"),
    named("cache_dir", "models lie where the hub's own tools put them (HF_HOME, MODELSCOPE_CACHE)"),
    named("hf_hub_token ms_hub_token om_hub_token", "tokens are those of HF_TOKEN, or of MODELSCOPE_API_TOKEN"),
    named("flash_attn=auto use_unsloth=false use_unsloth_gc=false use_v1_kernels=false", "there is one way to compute"),
    named("enable_liger_kernel=false", "the head never makes a logits tensor"),
    named("use_reentrant_gc=true", "layers are recomputed block by block"),
    named("low_cpu_mem_usage=true offload_folder=offload", "memory is planned, not configured"),
    named("pure_bf16=false upcast_layernorm=false upcast_lmhead_output=false", trainer::DTYPE),
    named("fp8_backend=auto fp8_enable_fsdp_float8_all_gather=false", "only of fp8"),
    named(
        "overwrite_cache=false preprocessing_batch_size=1000 preprocessing_num_workers data_shared_file_system=false",
        "rows are tokenised on all cores, and many of them kept for the next run",
    ),
    named("streaming=false buffer_size=16384", "rows are read before the first step"),
    named("packing neat_packing=false", "examples are always packed"),
    named("ignore_pad_token_for_loss=true", "batches have no padding"),
    becomes("lora_dropout=0.0", "`--lora-dropout` where `--disable-dropout` is false; else dropout is off, as there"),
    named("plot_loss=false", "report.html has the curves"),
    named("compute_accuracy=false print_param_status=false", "the accuracy of preferences is always logged"),
    named("include_effective_tokens_per_second=false", "tokens/s are always logged"),
    named(
        "freeze_vision_tower=true freeze_multi_modal_projector=true freeze_language_model=false",
        "there is no vision tower",
    ),
    named(
        "image_max_pixels image_min_pixels image_do_pan_and_scan=false crop_to_patches=false video_max_pixels video_min_pixels \
        video_fps=2.0 video_maxlen=128 use_audio_in_video=false audio_sampling_rate=16000 media_dir",
        "only of images, videos and sounds",
    ),
    named("ray_num_workers=1 ray_init_kwargs master_addr master_port", "ranks find each other"),
    named(
        "enable_torch_profiler=false profiler_output_dir profiler_wait_steps=1 profiler_warmup_steps=1 profiler_active_steps=1 \
        profiler_repeat=1 profiler_record_shapes=true profiler_profile_memory=true profiler_with_stack=true profile_modules",
        "`dpo-host bench` measures",
    ),
    // Of what is refused by another argument.
    named("quantization_device_map", "memory is planned, not configured"),
    named("loraplus_lr_embedding=1e-06", "only of loraplus_lr_ratio"),
    named("init_special_tokens=noise_init", "only of add_tokens"),
    named("asft_alpha=0.1 eaft_alpha=1.0", "only of use_asft_loss and use_eaft_loss"),
    named(
        "freeze_trainable_layers=2 freeze_trainable_modules=all freeze_extra_modules oft_rank=0 oft_block_size=32 oft_target=all",
        "only of other values of finetuning_type",
    ),
    named(
        "galore_target=all galore_rank=16 galore_update_interval=200 galore_scale=2.0 galore_proj_type=std \
        galore_layerwise=false apollo_target=all apollo_rank=16 apollo_update_interval=200 apollo_scale=32.0 \
        apollo_proj=random apollo_proj_type=std apollo_scale_type=channel apollo_layerwise=false apollo_scale_front=false \
        badam_mode=layer badam_start_block badam_switch_mode=ascending badam_switch_interval=50 badam_update_ratio=0.05 \
        badam_mask_mode=adjacent badam_verbose=0",
        "only of use_galore, use_apollo and use_badam",
    ),
    named(
        "reward_model reward_model_adapters reward_model_quantization_bit reward_model_type=lora ppo_buffer_size=1 ppo_epochs=4 \
        ppo_score_norm=false ppo_target=6.0 ppo_whiten_rewards=false",
        "only of stage ppo",
    ),
    named(
        "kt_weight_path kt_expert_checkpoint_path kt_use_lora_experts kt_lora_expert_num kt_lora_expert_intermediate_size \
        hyper_parallel_args",
        "only of use_kt and use_hyper_parallel",
    ),
    named(
        "swanlab_workspace swanlab_mode=cloud swanlab_api_key swanlab_logdir swanlab_lark_webhook_url swanlab_lark_secret",
        "SwanLab's files are written in the run's folder; `swanlab sync` sends them, with what it is told",
    ),
    named(
        "export_size=5 export_device=cpu export_quantization_bit export_quantization_dataset export_quantization_nsamples=128 \
        export_quantization_maxlen=1024 export_legacy_format=false",
        "only of export_dir",
    ),
    named(
        "do_sample=true temperature=0.95 top_p=0.7 top_k=50 num_beams=1 eval_num_beams max_length=1024 max_new_tokens=1024 \
        repetition_penalty=1.0 length_penalty=1.0 skip_special_tokens=true use_kv_cache=true infer_backend=hf infer_dtype=auto \
        vllm_maxlen=4096 vllm_gpu_util=0.7 vllm_enforce_eager=false vllm_max_lora_rank=32 vllm_config sglang_maxlen=4096 \
        sglang_mem_fraction=0.7 sglang_tp_size=-1 sglang_config sglang_lora_backend=triton",
        "no answers are generated while training",
    ),
];

/// What its arguments mean together.
pub(super) fn combine(t: &mut Translation) -> Result<()> {
    objective(t)?;
    let modelscope =
        std::env::var("USE_MODELSCOPE_HUB").is_ok_and(|v| ["1", "true"].contains(&v.to_lowercase().as_str()));
    let revision = t.take("model_revision").and_then(|flag| flag.values.into_iter().next()).filter(|r| r != "main");
    if let Some(mut flag) = t.take("model_name_or_path") {
        for name in flag.values.iter_mut().filter(|name| is_id(name) && !std::path::Path::new(name.as_str()).exists()) {
            if modelscope {
                *name = format!("ms::{name}");
            }
            *name = revision.iter().fold(name.clone(), |name, revision| format!("{name}@{revision}"));
        }
        t.push_as("model", flag);
    }
    dataset_info::datasets(t, modelscope)?;
    adapter(t)?;
    if !t.has("router-aux-loss-coef") {
        // Without its coefficient there is no such loss, whatever the model's config says.
        t.push("router-aux-loss-coef", ["0"], None);
    }
    if t.take("disable_shuffling").is_some_and(|flag| is_on(&flag)) {
        t.push("shuffle", ["false"], None);
    }
    if t.take("disable_gradient_checkpointing").is_some_and(|flag| is_on(&flag)) && !t.has("recompute") {
        t.push("recompute", ["false"], None);
    }
    if !t.has("truncation-strategy") {
        t.notes.push(
            "--truncation-strategy left: longer examples lose the beginning of the prompt; LLaMA-Factory cuts the ends of \
             prompt and answers"
                .into(),
        );
        t.push("truncation-strategy", ["left"], None);
    }
    quantization::quantization(t, &QUANTIZATION)?;
    combine::output(t);
    combine::trainer(t)?;
    combine::batch(t)
}

const QUANTIZATION: Names = Names {
    bits: "quantization_bit",
    switches: ["", ""],
    method: "quantization_method",
    kind: "quantization_type",
    double: "double_quantization",
};

/// `stage` and `pref_loss` as a loss.
fn objective(t: &mut Translation) -> Result<()> {
    let stage = t.take("stage");
    let kind = stage.as_ref().map_or("dpo", |flag| flag.values.first().map_or("", String::as_str));
    let (loss, flag) = t.take_value("pref_loss");
    let refuse = |why: &str, flag: &Option<Flag>, instead: &str| {
        Err(Error::input(why).at(flag.as_ref().map_or_else(String::new, Flag::spelled)).help(instead))
    };
    let place = flag.as_ref().or(stage.as_ref()).and_then(|flag| flag.place.clone());
    let loss = match (kind, loss.as_deref().unwrap_or("sigmoid")) {
        ("kto", _) => "kto",
        ("dpo", loss @ ("hinge" | "ipo")) => {
            t.notes.push(format!(
                "pref_loss {loss} is {loss}; LLaMA-Factory with TRL from 0.20 on trains sigmoid under this name"
            ));
            loss
        }
        ("dpo", loss @ ("sigmoid" | "simpo" | "orpo")) => loss,
        ("dpo", "kto_pair") => {
            return refuse("pairs have no KTO loss here", &flag, "say stage: kto, or pref_loss: sigmoid");
        }
        ("dpo", _) => return refuse("no such loss there", &flag, "say sigmoid, hinge, ipo, orpo or simpo"),
        ("sft", _) => "sft",
        ("pt", _) => {
            return refuse("it learns whole texts", &stage, "say stage: sft, whose rows are prompts with answers");
        }
        ("rm", _) => return refuse("no reward model is trained", &stage, "say stage: dpo, kto or sft"),
        ("ppo", _) => {
            return refuse(
                "it learns from answers that are generated while it trains",
                &stage,
                "say stage: dpo, kto or sft",
            );
        }
        _ => return refuse("no such stage", &stage, "say stage: dpo, kto or sft"),
    };
    // Its likelihoods are means over each answer's tokens first.
    let mut likelihood = loss == "orpo";
    let (weight, flag) = t.take_value("pref_ftx");
    if weight.and_then(|w| w.parse::<f64>().ok()) != Some(0.0)
        && let Some(flag) = flag
    {
        t.push_as("rpo-alpha", flag);
        likelihood = true;
    }
    if let Some(flag) = t.take("ld_alpha") {
        t.notes.push(format!(
            "{}: there it weights the policy's tokens alone, here the reference's as well",
            flag.spelled()
        ));
        t.push_as("ld-alpha", flag);
    }
    let named = (!t.has("loss")).then(|| (vec![loss.to_owned()], place));
    combine::losses(t, named, likelihood.then(|| "nll_mean=answers".to_owned()))
}

/// The adapter: a new one, or one to train on, which keeps its rank and alpha.
fn adapter(t: &mut Translation) -> Result<()> {
    let (rank, alpha, target) = (t.take("lora_rank"), t.take("lora_alpha"), t.take("lora_target"));
    if let Some(start) = t.take("adapter_name_or_path") {
        if start.values.iter().any(|folders| folders.contains(',')) {
            return Err(Error::input("one adapter is trained on")
                .at(start.spelled())
                .help("fold the others in: dpo-host merge"));
        }
        combine::start_from(t, start);
    } else if alpha.is_none() && !t.has("lora-alpha") {
        let twice = |flag: &Flag| flag.values.first()?.parse::<f64>().ok().map(|rank| 2.0 * rank);
        let alpha = rank.as_ref().map_or(Some(16.0), twice);
        let place = rank.as_ref().and_then(|flag| flag.place.clone());
        t.push("lora-alpha", alpha.map(|a| a.to_string()), place);
    }
    for (flag, ours) in [(rank, "lora-rank"), (alpha, "lora-alpha")] {
        if let Some(flag) = flag {
            t.push_as(ours, flag);
        }
    }
    let (pissa, iterations) = (t.take("pissa_init"), t.take_value("pissa_iter").0);
    if let Some(flag) = pissa.filter(combine::is_on) {
        let iterations = iterations.as_deref().unwrap_or("16");
        let name = if iterations.starts_with('-') { "pissa".to_owned() } else { format!("pissa_niter_{iterations}") };
        t.push("init-lora-weights", [name], flag.place);
    }
    if let Some(mut flag) = target {
        flag.values.iter_mut().filter(|v| *v == "all").for_each(|v| *v = "all-linear".into());
        t.push_as("target-modules", flag);
    }
    combine::lists(t);
    Ok(())
}
