//! Arguments of ms-swift's `swift rlhf` (4.6, `swift/arguments/rlhf_args.py`), and its habits: names of ModelScope, folders v0-,
//! v1-, and losses by the type of training.

use dpo_core::error::{Error, Result};

use super::combine::{self, exists, is_id, is_on};
use super::quantization::{self, Names};
use super::table::{Group, Peer, becomes, is, named, refused, same};
use super::trainer;
use super::translation::Translation;
use crate::args::flag::Flag;

pub(super) static PEER: Peer = Peer { name: "ms-swift", tables: &[TABLE, trainer::TABLE] };

const TABLE: &[Group] = &[
    // Where its defaults are others than transformers'.
    same("learning_rate weight_decay=0.1 adam_beta2=0.95 logging_steps=5 metric_for_best_model greater_is_better"),
    is("lr_scheduler_type=cosine", "lr-scheduler"),
    is("ddp_timeout", "progress-timeout"),
    is("gradient_checkpointing", "recompute"),
    becomes(
        "per_device_train_batch_size=1 gradient_accumulation_steps",
        "`--batch-size`, together with the number of processes; by default 16 pairs over all of them",
    ),
    becomes(
        "eval_strategy eval_steps",
        "`--eval-steps`, by default `--save-steps`; `no` holds nothing out; `epoch` is refused",
    ),
    // Model and data.
    becomes(
        "model",
        "`--model`; a name without `ms::` or `hf::` is one of ModelScope, with `use_hf` one of Hugging Face",
    ),
    becomes("dataset val_dataset", "`--dataset`, `--val-dataset`: files, or names as for `model`; `#N` takes N rows"),
    becomes("model_revision", "`--model NAME@REVISION`"),
    becomes("use_hf=false", "which hub is meant by names; the variable USE_HF says the same"),
    same("split_dataset_ratio=0.0 truncation_strategy columns strict=false"),
    is("torch_dtype", "dtype"),
    is("dataset_shuffle=true train_dataloader_shuffle=true", "shuffle"),
    is("data_seed", "seed"),
    is("max_epochs", "num-epochs"),
    becomes("max_length", "`--max-length`; without it, what the model takes"),
    becomes("system", "`--system`; the content of a .txt file"),
    // The objective.
    becomes(
        "rlhf_type=dpo loss_type",
        "`--loss`: `dpo` is `sigmoid`; `kto`, `cpo`, `simpo` and `orpo` are losses; `rm`, `ppo`, `grpo` and `gkd` are refused",
    ),
    same("rpo_alpha loss_weights"),
    becomes("label_smoothing=0", "`--label-smoothing`"),
    becomes("beta", "`--beta`; by default 2 for `simpo`, 0.1 otherwise"),
    becomes("ld_alpha", "`--ld-alpha`; here it weights the reference's tokens as well, as in TRL from 0.29"),
    becomes("cpo_alpha=1.0", "`--loss-option cpo_alpha` of `cpo` and `simpo`"),
    becomes("simpo_gamma=1", "`--loss-option simpo_gamma` of `simpo`"),
    becomes("desirable_weight=1.0 undesirable_weight=1.0", "`--loss-option` of `kto`"),
    becomes("discopop_tau=0.05", "`--loss-option discopop_tau` of `discopop`"),
    becomes("ref_model ref_model_revision", "`--ref-model`"),
    becomes(
        "adapters",
        "`--init-adapter`; the reference is the model without it, unless `ref_adapters` says otherwise",
    ),
    becomes("ref_adapters", "`--ref-adapter`"),
    // LoRA.
    same("lora_rank lora_alpha use_rslora=false use_dora=false"),
    is("lorap_lr_ratio", "loraplus-lr-ratio"),
    is("init_weights=true", "init-lora-weights"),
    becomes("target_modules", "`--target-modules`"),
    is("target_regex", "target-modules"),
    is("target_parameters", "target-parameters"),
    // Output.
    same("add_version=true router_aux_loss_coef=0.0"),
    is("early_stop_interval", "early-stopping-patience"),
    refused(
        "tuner_type=lora train_type=lora",
        "only LoRA adapters are trained",
        "leave it out; `dpo-host merge` makes a full checkpoint of an adapter",
    ),
    refused("tuner_backend=peft use_swift_lora=false", "adapters are PEFT's", "leave it out"),
    becomes(
        "quant_bits quant_method load_in_4bit=false load_in_8bit=false bnb_4bit_quant_type=nf4 bnb_4bit_use_double_quant=true",
        quantization::BECOMES,
    ),
    refused(
        "modules_to_save trainable_parameters trainable_parameters_regex",
        "only LoRA matrices of linear modules are trained",
        "name linear modules with --target-modules",
    ),
    refused("lora_bias=none", "biases are frozen", "leave it out"),
    refused(
        "optimizer=|default use_galore=false lisa_activated_layers=0",
        "the optimizer is AdamW over the whole adapter",
        "leave it out",
    ),
    refused(
        "enable_dft_loss=false enable_channel_loss=false",
        "the objective has no such term",
        "`dpo-host list losses` lists what there is",
    ),
    refused(
        "external_plugins custom_register_path callbacks eval_metric local_repo_path",
        "Python is not run",
        "write a plugin (`dpo-host new`, docs/plugins.md)",
    ),
    refused("model_kwargs", "a model has no further settings", "leave it out"),
    refused(
        "rope_scaling max_model_len",
        "rope scaling and lengths are those of config.json",
        "say --max-length for shorter rows, or change config.json",
    ),
    refused("init_strategy", "all weights are the checkpoint's", "leave it out"),
    refused("sync_ref_model=false", "the reference stays what it is at the start", "leave it out"),
    refused("new_special_tokens", "the vocabulary is the checkpoint's", "add tokens to the checkpoint first"),
    refused("task_type=|causal_lm", "only causal language models are trained", "leave it out"),
    refused(
        "loss_scale=|last_round",
        "the answers are learned, each token alike; all before them is prompt",
        "leave it out",
    ),
    refused(
        "use_chat_template=|true",
        "conversations are written with the chat template",
        "give rows as text, with --plain-text",
    ),
    refused("interleave_prob", "datasets are joined, not interleaved", "say how many rows of each: FILE#N"),
    refused("cached_dataset cached_val_dataset", "rows are read, not tokens", "name the rows with --dataset"),
    refused(
        "custom_dataset_info disable_auto_column_mapping=false",
        "datasets are told by their columns",
        "name the files with --dataset, and what differs with --columns and --dataset-format",
    ),
    refused(
        "resume_only_model=false",
        "a resumed run has its optimizer, too",
        "take the weights alone with --init-adapter",
    ),
    refused("load_args=false load_data_args=false", "args.json of ms-swift is not read", "write the arguments again"),
    refused("ignore_args_error=false", "what is not understood is refused", "leave it out"),
    refused(
        "ENV",
        "a file sets no variables of the environment",
        "set them before the command: CUDA_VISIBLE_DEVICES=0 dpo-host train FILE",
    ),
    refused("use_ray=false", "processes are started by --gpus, torchrun, srun or mpirun", "leave it out"),
    refused("eval_use_evalscope=false", "benchmarks are not run while training", "merge the adapter, then run them"),
    // What changes nothing.
    named(
        "load_from_cache_file=false dataset_num_proc=1 lazy_tokenize",
        "rows are tokenised on all cores, and many of them kept for the next run",
    ),
    named("streaming=false shuffle_buffer_size=1000", "rows are read before the first step"),
    named("stopping_strategy=first_exhausted", "only of interleave_prob"),
    named(
        "download_mode=reuse_dataset_if_exists check_model=true",
        "what a hub has is fetched once and checked by its hash",
    ),
    named("val_dataset_shuffle=false", "evaluations take all examples, in their order"),
    named("remove_unused_columns=true", "formats read the columns they know"),
    named("attn_impl experts_impl device_map max_memory", "there is one way to compute, and memory is planned"),
    named("use_liger_kernel=false use_logits_to_keep", "the head never makes a logits tensor"),
    named(
        "padding_free=false padding_side=right packing=false packing_length packing_num_proc=1 packing_strategy=binpack",
        "examples are always packed, without padding",
    ),
    named(
        "sequence_parallel_size=1 ds3_gather_for_generation=true zero_hpz_partition_size deepspeed_autotp_size \
        use_flash_ckpt=false enable_npu_model_patch=true",
        "memory is planned, not configured",
    ),
    named(
        "dataloader_num_workers dataloader_persistent_workers=true",
        "rows are tokenised before the first step: there is no data loader",
    ),
    named("model_type ref_model_type", "the family follows from config.json, or --plugin"),
    named(
        "template agent_template template_backend=swift response_prefix enable_thinking preserve_thinking \
        add_non_thinking_prefix=true disable_ignore_empty_think=false",
        "the chat template is the checkpoint's own",
    ),
    named("model_name model_author", "they fill in rows of self-cognition"),
    named("is_binary_loss_scale", "answers have no weights of tokens"),
    becomes("lora_dropout=0.05", "`--lora-dropout` where `--disable-dropout` is false; else dropout is off, as there"),
    named("lora_dtype", "the adapter is kept in float32"),
    named(
        "freeze_llm=false freeze_parameters freeze_parameters_regex freeze_parameters_ratio=0.0",
        "the base weights are always frozen",
    ),
    named(
        "freeze_vit=true freeze_aligner=true vit_lr aligner_lr vit_gradient_checkpointing max_pixels norm_bbox",
        "there is no vision tower",
    ),
    named("logging_first_step=true", "the first step is always logged"),
    becomes("report_to=tensorboard", trainer::REPORT_TO),
    becomes("swanlab_project=ms-swift", "`--project`, with `report_to swanlab`"),
    becomes("swanlab_exp_name", "`--run-name`"),
    named("safe_serialization=true max_shard_size=5GB", "an adapter is one file of safetensors"),
    named(
        "create_checkpoint_symlink=false",
        "the run's folder has the adapter of the end, and `latest` finds the last checkpoint",
    ),
    named("acc_strategy=token", "accuracy is that of preferences"),
    named("per_device_eval_batch_size=1", "micro-batches follow from memory"),
    named(
        "swanlab_token swanlab_workspace swanlab_notification_method \
        swanlab_webhook_url swanlab_secret swanlab_sender_email swanlab_receiver_email swanlab_smtp_server swanlab_smtp_port \
        swanlab_email_language=zh swanlab_mode=cloud",
        "SwanLab's files are written in the run's folder; `swanlab sync` sends them, with what it is told",
    ),
    // Of what is refused by another argument.
    named("bnb_4bit_compute_dtype", trainer::DTYPE),
    named("bnb_4bit_quant_storage hqq_axis", "only of quant_bits"),
    named(
        "galore_target_modules galore_rank=128 galore_update_proj_gap=50 galore_scale=1.0 galore_proj_type=std \
        galore_optim_per_parameter=false galore_with_embedding=false galore_quantization=false galore_proj_quant=false \
        galore_proj_bits=4 galore_proj_group_size=256 galore_cos_threshold=0.4 galore_gamma_proj=2 galore_queue_size=5 \
        lisa_step_interval=20",
        "only of use_galore and lisa_activated_layers",
    ),
    named(
        "lora_ga_batch_size=2 lora_ga_iters=2 lora_ga_max_length=1024 lora_ga_direction=ArB2r lora_ga_scale=stable \
        lora_ga_stable_gamma=16",
        "only of init_weights lora-ga",
    ),
    named(
        "fourier_n_frequency=2000 fourier_scaling=300.0 boft_block_size=4 boft_block_num=0 boft_n_butterfly_factor=1 \
        boft_dropout=0.0 vera_rank=256 vera_projection_prng_key=0 vera_dropout=0.0 vera_d_initial=0.1 adapter_act=gelu \
        adapter_length=128 adalora_target_r=8 adalora_init_r=12 adalora_tinit=0 adalora_tfinal=0 adalora_deltaT=1 \
        adalora_beta1=0.85 adalora_beta2=0.85 adalora_orth_reg_weight=0.5 llamapro_num_new_blocks=4 llamapro_num_groups \
        reft_layer_key reft_layers reft_rank=4 reft_intervention_type=LoreftIntervention reft_args",
        "only of other values of tuner_type",
    ),
    named(
        "num_labels problem_type mrl_dims decision_drop_instructions=0.0 decision_subsample_options=0 \
        decision_state_as_text=0.0 decision_shuffle_fields=false",
        "only of other values of task_type",
    ),
    named("ray_exp_name device_groups", "only of use_ray"),
    named(
        "eval_dataset eval_dataset_args eval_limit eval_generation_config extra_eval_args",
        "only of eval_use_evalscope",
    ),
    named(
        "max_completion_length=512 max_new_tokens temperature=0.9 top_k top_p repetition_penalty num_beams=1 stream stop_words \
        logprobs=false top_logprobs structured_outputs_regex min_p=0.0",
        "no answers are generated while training",
    ),
    named(
        "reward_model reward_adapters reward_model_type reward_model_revision reward_template center_rewards_coefficient",
        "only of rlhf_type rm, ppo and grpo",
    ),
    named(
        "num_ppo_epochs=4 whiten_rewards=false kl_coef=0.05 cliprange=0.2 vf_coef=0.1 cliprange_value=0.2 gamma=1.0 lam=0.95 \
        num_mini_batches=1 local_rollout_forward_batch_size=64 num_sample_generations=10 response_length missing_eos_penalty",
        "only of rlhf_type ppo",
    ),
    named(
        "teacher_model teacher_adapters teacher_model_type teacher_model_revision teacher_deepspeed teacher_model_server \
        offload_teacher_model=false sft_alpha=0 lmbda=0.5 seq_kd=false gkd_logits_topk teacher_kl_coef=1.0 \
        teacher_tag_key=dataset",
        "only of rlhf_type gkd and grpo",
    ),
    named(GRPO, "only of rlhf_type grpo"),
];

/// Arguments that only GRPO reads.
const GRPO: &str = "\
    advantage_estimator=grpo advantage_reweight async_generate=false chord_enable_phi_function=false chord_mu_decay_steps \
    chord_mu_peak chord_mu_valley chord_mu_warmup_steps chord_sft_dataset chord_sft_per_device_train_batch_size \
    completion_length_limit_scope=per_round cosine_max_len cosine_max_len_value_correct=0.5 cosine_max_len_value_wrong=0.0 \
    cosine_min_len_value_correct=1.0 cosine_min_len_value_wrong=-0.5 delta dynamic_sample=false \
    enable_flattened_weight_sync=true epsilon=0.2 epsilon_high fipo_clip_high_only=true fipo_clip_range=0.2 \
    fipo_decay_rate=32.0 fipo_safety_threshold=4.0 generation_batch_size gym_env importance_sampling_level=token \
    kl_in_reward log_completions=false log_entropy=false log_rollout_offpolicy_metrics=false \
    max_resample_times=3 max_turns move_model_batches multi_turn_scheduler num_generations=8 num_generations_eval \
    num_iterations=1 off_policy_sequence_mask_delta offload_model=false offload_optimizer=false overlong_filter=false \
    real_tau=0.5 ref_model_mixup_alpha=0.6 ref_model_sync_steps=512 repetition_max_penalty=-1.0 repetition_n_grams=3 \
    reward_funcs reward_model_plugin reward_weights rlsd_lambda=0.5 rlsd_lambda_decay_steps=0 rlsd_lambda_warmup_steps=0 \
    rlsd_negative_only=false rlsd_reweight_clip_range=0.2 rollout_importance_sampling_mode \
    rollout_importance_sampling_threshold=2.0 scale_rewards sdar_gate_beta=5.0 sdar_loss_coef=0.0 sleep_level=0 \
    soft_cache_length soft_max_length steps_per_generation tau_neg=1.05 tau_pos=1.0 \
    top_entropy_quantile=1.0 use_gym_env use_vllm=false vllm_data_parallel_size=1 vllm_disable_cascade_attn=false \
    vllm_disable_custom_all_reduce=true vllm_enable_expert_parallel=false vllm_enable_lora=false \
    vllm_enable_prefix_caching=true vllm_enforce_eager=false vllm_engine_kwargs vllm_gpu_memory_utilization=0.9 \
    vllm_limit_mm_per_prompt vllm_max_lora_rank=16 vllm_max_model_len vllm_max_num_seqs vllm_mm_processor_cache_gb \
    vllm_mode vllm_pipeline_parallel_size=1 vllm_quantization vllm_reasoning_parser vllm_server_base_url \
    vllm_server_group_port vllm_server_host vllm_server_pass_dataset=false vllm_server_port=8000 vllm_server_timeout=240.0 \
    vllm_speculative_config vllm_tensor_parallel_size=1 vllm_use_async_engine wandb_log_unique_prompts";

/// As long as what the model is made for.
const ALL_IT_TAKES: &str = "auto";

/// What its arguments mean together.
pub(super) fn combine(t: &mut Translation) -> Result<()> {
    objective(t)?;
    names(t)?;
    adapters(t);
    if let Some(flag) = t.take("target_modules") {
        t.push_as("target-modules", flag);
    }
    combine::lists(t);
    combine::trainer(t)?;
    combine::batch(t)?;
    match t.take("max_length") {
        Some(flag) => t.push_as("max-length", flag),
        None if !t.has("max-length") => {
            t.notes.push(format!(
                "--max-length {ALL_IT_TAKES}: ms-swift takes examples as long as what the model is made for"
            ));
            t.push("max-length", [ALL_IT_TAKES], None);
        }
        None => {}
    }
    if let Some(mut flag) = t.take("system") {
        for text in &mut flag.values {
            *text = match text.ends_with(".txt") {
                true => dpo_core::files::read_text(std::path::Path::new(text.as_str()))?,
                false => text.replace("\\n", "\n"),
            };
        }
        t.push_as("system", flag);
    }
    quantization::quantization(t, &QUANTIZATION)?;
    output(t);
    Ok(())
}

const QUANTIZATION: Names = Names {
    bits: "quant_bits",
    switches: ["load_in_4bit", "load_in_8bit"],
    method: "quant_method",
    kind: "bnb_4bit_quant_type",
    double: "bnb_4bit_use_double_quant",
};

/// `rlhf_type` and `loss_type` as losses, beta by the type.
fn objective(t: &mut Translation) -> Result<()> {
    let (kind, flag) = t.take_value("rlhf_type");
    let kind = kind.unwrap_or_default();
    let types = t.take("loss_type");
    let place = flag.as_ref().or(types.as_ref()).and_then(|flag| flag.place.clone());
    let spelled = |flag: &Option<Flag>| flag.as_ref().map_or_else(String::new, Flag::spelled);
    let refuse = |why: &str, flag: &Option<Flag>, instead: &str| Err(Error::input(why).at(spelled(flag)).help(instead));
    let named = types.as_ref().map(|flag| flag.values.clone());
    let only = named.as_ref().map(|names| names.join(" "));
    let kind_of_cpo = only.clone().filter(|only| kind == "cpo" && matches!(only.as_str(), "hinge" | "ipo"));
    let losses = match (kind.as_str(), only.as_deref()) {
        ("dpo", _) => named,
        ("kto", None | Some("kto")) => Some(vec!["kto".into()]),
        ("cpo", None | Some("sigmoid" | "hinge" | "ipo")) => Some(vec!["cpo".into()]),
        ("cpo" | "simpo", Some("simpo")) | ("simpo", None) => Some(vec!["simpo".into()]),
        ("orpo", None) => Some(vec!["orpo".into()]),
        ("kto" | "cpo" | "simpo" | "orpo", Some(_)) => {
            return refuse(&format!("{kind} has no such loss here"), &types, "leave it out, or say --rlhf_type dpo");
        }
        ("rm", _) => return refuse("no reward model is trained", &flag, "say dpo, kto, cpo, simpo or orpo"),
        ("ppo" | "grpo" | "gkd", _) => {
            return refuse("it learns from answers that are generated while it trains", &flag, OFFLINE);
        }
        _ => return refuse("no such type of training", &flag, "say dpo, kto, cpo, simpo or orpo"),
    };
    match t.take("beta") {
        Some(flag) => t.push_as("beta", flag),
        // Of SimPO by its own name the default is 2, here as there.
        None if kind == "cpo" && !t.has("beta") => t.push("beta", ["0.1"], place.clone()),
        None => {}
    }
    if let Some(flag) = t.take("ld_alpha") {
        t.notes.push(format!(
            "{}: ms-swift weights the policy's tokens alone, here the reference's as well",
            flag.spelled()
        ));
        t.push_as("ld-alpha", flag);
    }
    if losses.as_ref().is_some_and(|names| names.iter().any(|name| name == "bco_pair")) {
        t.notes.push(
            "bco_pair: ms-swift subtracts a running mean of the rewards; here, as in TRL from 0.29, nothing: --loss bco does"
                .into(),
        );
    }
    combine::losses(t, losses.map(|names| (names, place)), kind_of_cpo.map(|kind| format!("cpo_type={kind}")))
}

const OFFLINE: &str = "this tool learns from pairs that are there: say dpo, kto, cpo, simpo or orpo";

/// Names of models and datasets: of ModelScope, unless another hub is named.
fn names(t: &mut Translation) -> Result<()> {
    let told = t.take("use_hf").map(|flag| is_on(&flag));
    let variable = || std::env::var("USE_HF").ok().map(|v| ["1", "true"].contains(&v.to_lowercase().as_str()));
    let hugging_face = told.or_else(variable).unwrap_or(false);
    let mut meant = Vec::new();
    let mut named = |text: &str, dataset: bool| {
        let (prefix, title) = if hugging_face { ("hf", "Hugging Face") } else { ("ms", "ModelScope") };
        if text.contains("::") || exists(text) || !is_id(text.split(['#', ':', '@']).next().unwrap_or_default()) {
            return text.to_owned();
        }
        meant.push(format!("{text} is taken as one of {title}"));
        if hugging_face && !dataset { text.to_owned() } else { format!("{prefix}::{text}") }
    };
    let mut pushed = Vec::new();
    for (name, ours, revision) in
        [("model", "model", "model_revision"), ("ref_model", "ref-model", "ref_model_revision")]
    {
        let (flag, revision) = (t.take(name), t.take(revision));
        let Some(mut flag) = flag else { continue };
        for value in &mut flag.values {
            *value = named(value, false);
            if !exists(value)
                && let Some(revision) = revision.as_ref().and_then(|flag| flag.values.first())
            {
                *value = format!("{value}@{revision}");
            }
        }
        pushed.push((ours, flag));
    }
    for (name, ours) in [("dataset", "dataset"), ("val_dataset", "val-dataset")] {
        let Some(mut flag) = t.take(name) else { continue };
        let list = |value: &String| {
            if exists(value) { vec![value.clone()] } else { value.split(',').map(str::to_owned).collect() }
        };
        let values: Vec<String> = flag.values.iter().flat_map(list).collect();
        flag.values = values.iter().map(|value| subset(&named(value.trim(), true))).collect::<Result<_>>()?;
        pushed.push((ours, flag));
    }
    pushed.into_iter().for_each(|(ours, flag)| t.push_as(ours, flag));
    if !meant.is_empty() {
        meant.dedup();
        let other = if hugging_face { "without use_hf of ModelScope" } else { "--use_hf true for Hugging Face" };
        t.notes.push(format!("{}, as ms-swift does ({other}; ms:: or hf:: before a name says it)", meant.join(", ")));
    }
    Ok(())
}

/// `name:subset#N` without the subset that means everything.
fn subset(text: &str) -> Result<String> {
    let Some((hub, rest)) = text.split_once("::").filter(|_| !exists(text)) else { return Ok(text.to_owned()) };
    let (name, rows) = rest.split_once('#').map_or((rest, String::new()), |(name, rows)| (name, format!("#{rows}")));
    match name.split_once(':') {
        None | Some((_, "default")) => {
            let name = name.split(':').next().unwrap_or_default();
            Ok(format!("{}::{name}{rows}", hub.to_lowercase()))
        }
        Some((name, subset)) => Err(Error::input(format!("a subset by its name, '{subset}', is not known"))
            .at(text)
            .help(format!("name the folder or the file that it is: {hub}::{name}/FOLDER{rows}"))),
    }
}

/// The adapter to train on, and that of the reference. If they are one, it is the reference as it is at the start, as always here.
fn adapters(t: &mut Translation) {
    let (start, reference) = (t.take("adapters"), t.take("ref_adapters"));
    let same = start.as_ref().zip(reference.as_ref()).is_some_and(|(a, b)| a.values == b.values);
    if let Some(reference) = reference.filter(|_| !same) {
        t.push_as("ref-adapter", reference);
    }
    match start {
        Some(start) if same => t.push_as("init-adapter", start),
        Some(start) => combine::start_from(t, start),
        None => {}
    }
}

/// `output_dir`, inside of which every run has a folder of its own. A run that is resumed goes on in its folder.
fn output(t: &mut Translation) {
    if let Some(checkpoint) = t.ours_of("resume-from-checkpoint").filter(|flag| flag.values != ["latest"]).cloned() {
        if let Some(dir) = t.take("output_dir") {
            let (dir, checkpoint) = (dir.spelled(), checkpoint.spelled());
            t.notes.push(format!("{dir} is ignored: with {checkpoint} a run goes on in its own folder"));
        }
        t.ours.retain(|flag| flag.name != "--add-version");
        t.push("add-version", ["false"], None);
        combine::output(t);
        return;
    }
    combine::output(t);
    let model = || t.ours_of("model")?.values.first()?.rsplit(['/', ':']).next().map(str::to_owned);
    if let Some(name) = model().filter(|_| !t.has("output-dir")) {
        t.push("output-dir", [format!("output/{name}")], None);
    }
}
