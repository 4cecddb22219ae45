//! Arguments of transformers' `TrainingArguments` and `Seq2SeqTrainingArguments`, which all the tools have.

use super::table::{Group, becomes, is, named, refused, same};
use super::translation::HALF;

pub(super) const REPORT_TO: &str =
    "`--report-to`, of wandb, swanlab and mlflow; others are named; runs/ for TensorBoard is always written";

pub(super) const TABLE: &[Group] = &[
    same("learning_rate=5e-05 weight_decay=0.0 adam_beta1=0.9 adam_beta2=0.999 adam_epsilon=1e-08 max_grad_norm=1.0"),
    same("warmup_ratio=0.0 logging_steps=500 save_steps=500 save_total_limit seed=42"),
    same("eval_on_start=false load_best_model_at_end=false metric_for_best_model greater_is_better"),
    is("num_train_epochs=3.0", "num-epochs"),
    is("lr_scheduler_type=linear", "lr-scheduler"),
    is("data_seed", "seed"),
    is("ddp_timeout", "progress-timeout"),
    is("gradient_checkpointing activation_checkpointing", "recompute"),
    becomes(
        "per_device_train_batch_size=8 gradient_accumulation_steps=1",
        "`--batch-size`, together with the number of processes",
    ),
    becomes("max_steps=-1", "`--max-steps`, unless it is below 0"),
    becomes("warmup_steps=0", "`--warmup-steps`; below 1 `--warmup-ratio`, and 0 leaves that as it is"),
    becomes("lr_scheduler_kwargs", "`--min-lr`, of `min_lr`; other options are refused"),
    becomes("output_dir", "`--output-dir`"),
    becomes("resume_from_checkpoint", "`--resume-from-checkpoint`; `true` is `latest`"),
    becomes(
        "eval_strategy=no eval_steps",
        "`--eval-steps`, by default `logging_steps`; `no` holds nothing out; `epoch` is refused",
    ),
    becomes("save_strategy=steps", "`--save-steps`; `no` saves at the end alone; `epoch` and `best` are refused"),
    becomes("use_cpu=false no_cuda=false", "`--device cpu`"),
    becomes(
        "train_sampling_strategy=random",
        "`sequential` is `--shuffle false`; others only order examples by length",
    ),
    // Memory and speed.
    named(
        "bf16 bf16_full_eval fp16_full_eval half_precision_backend=auto fp16_backend=auto fp16_opt_level=O1 tf32",
        DTYPE,
    ),
    named(
        "torch_compile=false torch_compile_backend torch_compile_mode torchdynamo jit_mode_eval=false",
        "kernels are compiled when they are first used",
    ),
    named("use_liger_kernel=false liger_kernel_config", "the head never makes a logits tensor"),
    named("use_cache=false", "training needs no KV cache"),
    named(
        "deepspeed fsdp fsdp_config fsdp_min_num_params=0 fsdp_transformer_layer_cls_to_wrap accelerator_config \
        parallelism_config mp_parameters",
        "memory is planned, not configured: frozen weights are sharded where they do not fit (--shard-base)",
    ),
    named(
        "auto_find_batch_size=false torch_empty_cache_steps per_device_eval_batch_size=8",
        "micro-batches follow from memory",
    ),
    named("gradient_checkpointing_kwargs activation_checkpointing_kwargs", "layers are recomputed block by block"),
    named("group_by_length=false length_column_name=length", "examples of any lengths are packed"),
    named(
        "dataloader_num_workers=0 dataloader_pin_memory=true dataloader_persistent_workers=false \
        dataloader_prefetch_factor dataloader_in_order=true dataloader_multiprocessing_context",
        "rows are tokenised before the first step: there is no data loader",
    ),
    named("remove_unused_columns=true", "formats read the columns they know"),
    // Ranks.
    named(
        "ddp_backend ddp_find_unused_parameters ddp_bucket_cap_mb ddp_broadcast_buffers ddp_static_graph local_rank=-1 \
        log_on_each_node=true save_on_each_node=false ray_scope=last tpu_num_cores tpu_metrics_debug=false",
        "ranks find each other and exchange one flat buffer; rank 0 alone writes and prints",
    ),
    named("average_tokens_across_devices=true", "losses are means over a whole step, whatever the number of ranks"),
    // Log, evaluation, checkpoints.
    named(
        "logging_first_step=false logging_strategy=steps",
        "--logging-steps says when; the first step is always logged",
    ),
    becomes("report_to=none", REPORT_TO),
    becomes("run_name", "`--run-name`"),
    becomes("project=huggingface", "`--project`, where it is given"),
    named(
        "trackio_space_id trackio_bucket_id trackio_static_space_id logging_dir",
        "logging.jsonl, report.html and runs/ for TensorBoard are always written, into the run's folder",
    ),
    named(
        "log_level=passive log_level_replica=warning disable_tqdm debug skip_memory_metrics=true",
        "see --quiet and --json",
    ),
    named("logging_nan_inf_filter=true", "a step whose loss is not finite is skipped and told"),
    named(
        "include_num_input_tokens_seen=no include_tokens_per_second=false prediction_loss_only=false label_names \
        eval_accumulation_steps eval_do_concat_batches=true eval_use_gather_object=false include_for_metrics \
        include_inputs_for_metrics=false batch_eval_metrics=false use_legacy_prediction_loop=false past_index=-1",
        "losses, rewards, accuracies and tokens/s are always logged",
    ),
    named(
        "save_only_model=false save_safetensors=true enable_jit_checkpoint=false \
        restore_callback_states_from_checkpoint=false",
        "a checkpoint has the adapter as safetensors, and all that a resumed run needs",
    ),
    named("overwrite_output_dir=false", "a folder that holds a run is never overwritten"),
    named("do_train=false do_eval=false", "`train` trains, and evaluates where there are rows for it"),
    named("full_determinism=false", "two runs with the same seed and packing are always equal byte for byte"),
    named(
        "generation_max_length generation_num_beams generation_config sortish_sampler=false",
        "no answers are generated while training",
    ),
    named(
        "hub_model_id hub_private_repo hub_strategy=every_save hub_always_push=false hub_revision push_to_hub_model_id \
        push_to_hub_organization push_to_hub_token",
        "only of push_to_hub",
    ),
    named("hub_token", "tokens are those of HF_TOKEN, or of MODELSCOPE_API_TOKEN"),
    refused("push_to_hub=false", "`train` uploads nothing", "afterwards: dpo-host push OWNER/NAME RUN"),
    refused("fp16=false", HALF, "leave it out: GPUs compute in bfloat16"),
    refused(
        "optim=|adamw_torch|adamw_torch_fused|adamw_torch_xla|adamw_torch_npu_fused|adamw_apex_fused|adamw_anyprecision\
        |adamw_hf|paged_adamw|paged_adamw_32bit optim_args optim_target_modules adafactor=false",
        "the optimizer is AdamW in float32 on one flat buffer",
        "leave it out: an adapter's optimizer state is small",
    ),
    refused(
        "label_smoothing_factor=0.0",
        "the cross-entropy of labels is not trained",
        "--label-smoothing is that of preferences",
    ),
    refused("neftune_noise_alpha", "embeddings get no noise", "leave it out"),
    refused("dataloader_drop_last=false", "the last examples of an epoch are a step, too", "leave it out"),
    refused("ignore_data_skip=false", "a resumed run takes the steps that it would have taken", "leave it out"),
    refused("eval_delay=0", "evaluations begin with the first --eval-steps", "leave it out, or raise --eval-steps"),
    refused(
        "do_predict=false predict_with_generate=false",
        "no answers are generated while training",
        "ask with dpo-host chat",
    ),
    refused("use_mps_device=false", "there is no such device", "--device is auto, cpu or cuda"),
    refused("per_gpu_train_batch_size per_gpu_eval_batch_size", "the name is outdated", "per_device_train_batch_size"),
];

pub(super) const DTYPE: &str = "GPUs compute in bfloat16, the CPU in float32; the adapter is kept in float32";
