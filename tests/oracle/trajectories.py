#!/usr/bin/env python3
"""Makes tests/golden/trajectories: the exact steps TRL takes on small random models, in float32 on the CPU.

Usage: trajectories.py OUT [FOLDER...]      needs torch, transformers, peft, trl, datasets, tokenizers, bitsandbytes from PyPI
A folder is a model with a starting adapter and rows; every case over it is one expected file. The first one, expected.json,
has the adapter at its end beside it.
"""
import functools, importlib.metadata, json, os, random, shutil, sys, zlib

import torch
from datasets import Dataset
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText, PreTrainedTokenizerFast
from trl import DPOConfig, DPOTrainer, KTOConfig, KTOTrainer, SFTConfig, SFTTrainer
from trl.experimental.cpo import CPOConfig, CPOTrainer
from trl.experimental.orpo import ORPOConfig, ORPOTrainer

BATCH, STEPS, RATE, RANK = 4, 4, 2e-3, 4
SMALL = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
             max_position_embeddings=512, rope_theta=10000.0, tie_word_embeddings=False, attention_dropout=0.0)
LLAMA3 = dict(rope_type="llama3", rope_theta=10000.0, factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
              original_max_position_embeddings=32)
GELU = dict(hidden_activation="gelu_pytorch_tanh", tie_word_embeddings=True)
SLIDING, FULL = "sliding_attention", "full_attention"
GEMMA3 = dict(head_dim=12, query_pre_attn_scalar=12, sliding_window=12, layer_types=[SLIDING, FULL], **GELU, rope_parameters={
    FULL: dict(rope_type="linear", factor=8.0, rope_theta=1e6), SLIDING: dict(rope_type="default", rope_theta=1e4)})
GEMMA4 = dict(head_dim=12, num_hidden_layers=4, layer_types=[SLIDING, FULL] * 2, sliding_window=12, hidden_size_per_layer_input=0, **GELU,
              vocab_size_per_layer_input=320, per_layer_config={1: dict(head_dim=16, num_key_value_heads=1), 3: dict(head_dim=16, num_key_value_heads=1)})
MUSE = dict(head_dim=12, num_hidden_layers=4, sliding_window=12, layer_types=[SLIDING] * 3 + [FULL], final_logit_softcapping=4.0)
YARN = dict(rope_type="yarn", rope_theta=1e6, factor=4.0, original_max_position_embeddings=16, mscale=1.0, mscale_all_dim=1.0)
SIGLIP = dict(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=28, patch_size=14)
# Dense families, a folder each: model_type, what its config changes. A wrapper has its language model's in text_config.
DENSE = {
    "mistral": ("mistral", dict(sliding_window=12)),
    "mistral3-wrapped": ("mistral3", dict(text_config=dict(model_type="mistral", head_dim=12), vision_config=dict(
        model_type="pixtral", hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=28, patch_size=14))),
    "ministral": ("ministral", dict(head_dim=12, sliding_window=12, layer_types=[SLIDING, FULL])),
    "ministral3": ("ministral3", dict(head_dim=12, rope_parameters=dict(YARN, llama_4_scaling_beta=0.3))),
    "gemma": ("gemma", dict(head_dim=12, hidden_act="gelu_pytorch_tanh", tie_word_embeddings=True)),
    "gemma2": ("gemma2", dict(head_dim=12, query_pre_attn_scalar=12, sliding_window=12, final_logit_softcapping=4.0, attn_logit_softcapping=3.0, **GELU)),
    "gemma3": ("gemma3_text", GEMMA3),
    "gemma3-wrapped": ("gemma3", dict(text_config=GEMMA3, vision_config=SIGLIP)),
    "gemma4": ("gemma4_text", dict(GEMMA4, attention_k_eq_v=True, final_logit_softcapping=4.0)),
    "gemma4-wrapped": ("gemma4", dict(text_config=dict(GEMMA4, hidden_size_per_layer_input=8, num_kv_shared_layers=2, use_double_wide_mlp=True), vision_config=dict(
        hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=2, head_dim=8, position_embedding_size=16))),
    "phi": ("phi", dict(partial_rotary_factor=0.5, qk_layernorm=True, resid_pdrop=0.0, embd_pdrop=0.0)),
    "phi3": ("phi3", dict(original_max_position_embeddings=256, sliding_window=12, tie_word_embeddings=True, rope_parameters=dict(
        rope_type="longrope", rope_theta=1e4, partial_rotary_factor=0.5, short_factor=[1.0, 1.3], long_factor=[1.0, 2.0]))),
    "glm": ("glm", dict(head_dim=8)),
    "glm4": ("glm4", dict(head_dim=8)),
    "olmo": ("olmo", dict(clip_qkv=0.4)),
    "olmo2": ("olmo2", {}),
    "olmo3": ("olmo3", dict(sliding_window=12, layer_types=[SLIDING, FULL], rope_parameters={
        FULL: dict(rope_type="yarn", factor=8.0, rope_theta=5e5, original_max_position_embeddings=64), SLIDING: dict(rope_type="default", rope_theta=5e5)})),
    "granite": ("granite", dict(embedding_multiplier=6.0, logits_scaling=4.0, residual_multiplier=0.5, attention_multiplier=0.1)),
    "granite4": ("granitemoehybrid", dict(mamba_n_heads=8, layer_types=[FULL] * 2, num_local_experts=0, num_experts_per_tok=0, shared_intermediate_size=48,
        position_embedding_type="rope", embedding_multiplier=6.0, logits_scaling=4.0, residual_multiplier=0.5, attention_multiplier=0.1, tie_word_embeddings=True)),
    "minicpm": ("granite", dict(embedding_multiplier=6.0, logits_scaling=4.0, residual_multiplier=0.5, attention_multiplier=8 ** -0.5)),
    "cohere": ("cohere", dict(use_qk_norm=True, logit_scale=0.25, tie_word_embeddings=True)),
    "cohere2": ("cohere2", dict(sliding_window=12, layer_types=[SLIDING, FULL], logit_scale=0.25, tie_word_embeddings=True)),
    "exaone": ("exaone", {}),
    "exaone4": ("exaone4", dict(head_dim=12, sliding_window=12, layer_types=[SLIDING, FULL])),
    "stablelm": ("stablelm", dict(use_parallel_residual=True, qk_layernorm=True, use_qkv_bias=True, hidden_dropout=0.0)),
    "muse_glimmer-wrapped": ("muse_glimmer", dict(text_config=MUSE, out_hidden_size=16, projector_hidden_size=16, vision_config=dict(
        hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, pos_emb_height=2, pos_emb_width=2, max_position_embeddings=4))),
    "internlm3": ("internlm3", dict(qkv_bias=True, bias=True, head_dim=12)),
    "seed_oss": ("seed_oss", dict(head_dim=12, residual_dropout=0.0)),
    "iquestcoder": ("iquestcoder", dict(head_dim=12)),
    "cwm": ("cwm", dict(head_dim=12, sliding_window=12, layer_types=[FULL, SLIDING])),
    "smollm3": ("smollm3", dict(no_rope_layers=[1, 0], tie_word_embeddings=True)),
    "hunyuan": ("hunyuan_v1_dense", dict(head_dim=12, rope_scaling=dict(rope_type="dynamic", alpha=1000.0, factor=1.0))),
    "ernie4_5": ("ernie4_5", dict(head_dim=12, use_bias=True, tie_word_embeddings=True)),
    "apertus": ("apertus", dict(hidden_act="xielu")),
    "arcee": ("arcee", dict(hidden_act="relu2")),
    "nemotron": ("nemotron", dict(hidden_act="relu2", partial_rotary_factor=0.5)),
    "starcoder2": ("starcoder2", dict(use_bias=True, sliding_window=12, residual_dropout=0.0, embedding_dropout=0.0)),
    "helium": ("helium", dict(head_dim=8, attention_bias=True, mlp_bias=True, rms_norm_eps=1e-8)),
}
# Decoders with experts, as the dense ones.
EXPERTS = dict(num_experts_per_tok=2, moe_intermediate_size=16, norm_topk_prob=True)
SIGMOID = dict(**EXPERTS, n_group=4, topk_group=2, routed_scaling_factor=1.5, head_dim=12)
MOE = {
    "qwen3_moe": ("qwen3_moe", dict(**EXPERTS, num_experts=6, head_dim=12, num_hidden_layers=3, mlp_only_layers=[1])),
    "qwen2_moe": ("qwen2_moe", dict(EXPERTS, num_experts=6, shared_expert_intermediate_size=24, norm_topk_prob=False)),
    "mixtral": ("mixtral", dict(num_local_experts=4, num_experts_per_tok=2, intermediate_size=24)),
    "minimax_m2": ("minimax_m2", dict(num_local_experts=4, num_experts_per_tok=2, intermediate_size=24, head_dim=12, rope_parameters=dict(
        rope_type="default", rope_theta=1e4, partial_rotary_factor=0.5))),
    "olmoe": ("olmoe", dict(num_experts=6, num_experts_per_tok=2, intermediate_size=16)),
    "flex_olmo": ("flex_olmo", dict(num_experts=4, num_experts_per_tok=3, intermediate_size=16)),
    "glm4_moe": ("glm4_moe", dict(SIGMOID, n_routed_experts=8, n_shared_experts=2, first_k_dense_replace=1, partial_rotary_factor=0.5, use_qk_norm=True, attention_bias=True)),
    "ernie4_5_moe": ("ernie4_5_moe", dict(moe_num_experts=6, moe_k=2, moe_intermediate_size=16, moe_num_shared_experts=2, moe_layer_start_index=1,
        moe_layer_end_index=-1, moe_layer_interval=1, tie_word_embeddings=True)),
    "gpt_oss": ("gpt_oss", dict(head_dim=12, num_local_experts=4, num_experts_per_tok=2, intermediate_size=24, sliding_window=12, swiglu_limit=0.5,
        layer_types=[SLIDING, FULL], rope_parameters=dict(rope_type="yarn", rope_theta=1e4, factor=4.0, beta_fast=32.0, beta_slow=1.0, truncate=False,
        original_max_position_embeddings=128))),
    "gpt_oss-mxfp4": ("gpt_oss", dict(head_dim=12, num_local_experts=4, num_experts_per_tok=2, intermediate_size=32, sliding_window=12, swiglu_limit=0.5,
        layer_types=[SLIDING, FULL])),
    "granitemoe": ("granitemoe", dict(num_local_experts=4, num_experts_per_tok=2, intermediate_size=16, embedding_multiplier=6.0, logits_scaling=4.0,
        residual_multiplier=0.5, attention_multiplier=0.1)),
    "hy_v3": ("hy_v3", dict(EXPERTS, num_experts=6, num_shared_experts=1, head_dim=12)),
    "exaone_moe": ("exaone_moe", dict(SIGMOID, num_experts=8, num_shared_experts=1, sliding_window=12, layer_types=[SLIDING, FULL], first_k_dense_replace=1)),
    "dots1": ("dots1", dict(SIGMOID, n_routed_experts=8, n_shared_experts=2, first_k_dense_replace=1, sliding_window=12, layer_types=[FULL, SLIDING])),
    "solar_open": ("solar_open", dict(SIGMOID, n_routed_experts=8, n_shared_experts=1, rope_parameters=dict(rope_type="default", rope_theta=1e4))),
}
# Families with a state between attention, a folder each: model_type, what its config changes.
GDN = dict(head_dim=16, linear_num_key_heads=2, linear_num_value_heads=4, linear_key_head_dim=8, linear_value_head_dim=8, linear_conv_kernel_dim=4,
           layer_types=["linear_attention", FULL], rope_parameters=dict(rope_type="default", rope_theta=1e4, partial_rotary_factor=0.5))
ROUTED = dict(num_experts=8, num_experts_per_tok=2, moe_intermediate_size=16)
MAMBA = dict(mamba_n_heads=8, mamba_d_head=8, mamba_n_groups=2, mamba_d_state=16, mamba_d_conv=4, mamba_expand=2, mamba_chunk_size=16)
HYBRID = {
    "qwen3_5": ("qwen3_5_text", GDN),
    "qwen3_5-wrapped": ("qwen3_5", dict(text_config=GDN, vision_config=dict(
        depth=1, hidden_size=16, intermediate_size=16, num_heads=2, patch_size=2, out_hidden_size=32, num_position_embeddings=4))),
    "qwen3_5_moe": ("qwen3_5_moe_text", dict(GDN, **ROUTED, shared_expert_intermediate_size=24)),
    "qwen3_next": ("qwen3_next", dict(GDN, **ROUTED, shared_expert_intermediate_size=24)),
    "lfm2": ("lfm2", dict(layer_types=["conv", FULL], conv_L_cache=3, conv_bias=True, block_multiple_of=16, norm_eps=1e-5)),
    "lfm2_moe": ("lfm2_moe", dict(layer_types=["conv", FULL], conv_L_cache=4, num_dense_layers=1, use_expert_bias=True, routed_scaling_factor=1.5, **ROUTED)),
    "lfm3": ("lfm3", dict(num_hidden_layers=3, layer_types=["conv", SLIDING, FULL], head_dim=12, sliding_window=12, rope_parameters={
        FULL: dict(rope_type="proportional", rope_theta=1e6, partial_rotary_factor=0.5), SLIDING: dict(rope_type="default", rope_theta=1e4)})),
    "granite4-h": ("granitemoehybrid", dict(MAMBA, layer_types=["mamba", FULL], num_local_experts=4, num_experts_per_tok=2, intermediate_size=16, shared_intermediate_size=24,
        position_embedding_type="nope", embedding_multiplier=6.0, logits_scaling=4.0, residual_multiplier=0.5, attention_multiplier=0.1, tie_word_embeddings=True)),
    "bamba": ("bamba", dict(MAMBA, attn_layer_indices=[1])),
    "nemotron_h": ("nemotron_h", dict(layers_block_type=["mamba", "moe", "attention", "mlp"], head_dim=12, mamba_num_heads=8, mamba_head_dim=8, n_groups=2, ssm_state_size=16,
        conv_kernel=4, chunk_size=16, time_step_min=0.5, n_routed_experts=8, num_experts_per_tok=2, moe_intermediate_size=16, moe_shared_expert_intermediate_size=24,
        n_group=2, topk_group=1, routed_scaling_factor=2.5, mlp_hidden_act="relu2")),
    "falcon_h1": ("falcon_h1", dict(MAMBA, mamba_d_ssm=64, mamba_rms_norm=True, mamba_norm_before_gate=False, embedding_multiplier=2.0, lm_head_multiplier=0.5, key_multiplier=0.7,
        attention_in_multiplier=0.9, attention_out_multiplier=0.8, ssm_in_multiplier=1.1, ssm_out_multiplier=0.6, mlp_multipliers=[0.9, 0.4], ssm_multipliers=[0.5, 0.6, 0.7, 0.8, 0.9])),
}
# What PEFT takes for all linears of a model with experts, and what it refuses of one with Mamba 2, is not what is compared here.
TARGETS = {name: ["q_proj", "k_proj", "v_proj", "o_proj", *more] for name, more in {
    "qwen3_next": ["in_proj_qkvz", "in_proj_ba", "out_proj"], "nemotron_h": ["in_proj", "up_proj", "down_proj"],
    "falcon_h1": ["in_proj", "gate_proj", "up_proj", "down_proj"]}.items()}
# Multi-head latent attention, with keys that are wider than values; sinks.
LATENT = dict(num_key_value_heads=4, kv_lora_rank=24, qk_nope_head_dim=8, qk_rope_head_dim=4, v_head_dim=6)
LATENTS = {
    "granite_swa": ("granite_swa", dict(sliding_window=12, layer_types=[SLIDING, FULL], layer_rope_theta=[500.0, 0], embedding_multiplier=6.0, logits_scaling=4.0,
        residual_multiplier=0.5, attention_multiplier=0.1)),
    "youtu": ("youtu", dict(LATENT, q_lora_rank=16, rope_parameters=YARN)),
    "minicpm3": ("minicpm3", dict(LATENT, q_lora_rank=16, scale_emb=6.0, scale_depth=0.7, dim_model_base=8, rms_norm_eps=1e-5)),
    "deepseek_v2": ("deepseek_v2", dict(LATENT, q_lora_rank=None, n_routed_experts=6, num_experts_per_tok=2, moe_intermediate_size=16, n_shared_experts=2,
        first_k_dense_replace=1, topk_method="greedy", routed_scaling_factor=1.5, rope_parameters=dict(YARN, mscale=0.7, mscale_all_dim=0.9))),
    "deepseek_v2-groups": ("deepseek_v2", dict(LATENT, q_lora_rank=16, n_routed_experts=8, num_experts_per_tok=2, moe_intermediate_size=8, n_shared_experts=1,
        first_k_dense_replace=1, topk_method="group_limited_greedy", n_group=4, topk_group=2, routed_scaling_factor=4.0)),
    "deepseek_v3": ("deepseek_v3", dict(LATENT, q_lora_rank=16, n_routed_experts=8, num_experts_per_tok=2, moe_intermediate_size=8, n_shared_experts=1,
        first_k_dense_replace=1, n_group=4, topk_group=2, routed_scaling_factor=1.5, norm_topk_prob=True, rope_parameters=YARN, num_nextn_predict_layers=0)),
    "glm4_moe_lite": ("glm4_moe_lite", dict(LATENT, q_lora_rank=16, n_routed_experts=6, num_experts_per_tok=2, moe_intermediate_size=16, n_shared_experts=1,
        n_group=1, topk_group=1, routed_scaling_factor=1.8, norm_topk_prob=True, num_nextn_predict_layers=0)),
}
# Families that came later.
LATER = {
    "gemma4-moe": ("gemma4_text", dict(GEMMA4, enable_moe_block=True, num_experts=6, top_k_experts=2, moe_intermediate_size=16)),
    "granitemoe-shared": ("granitemoeshared", dict(num_local_experts=4, num_experts_per_tok=2, intermediate_size=16, shared_intermediate_size=24, embedding_multiplier=6.0,
        logits_scaling=4.0, residual_multiplier=0.5, attention_multiplier=0.1)),
    "granitemoe_swa": ("granitemoe_swa", dict(num_local_experts=4, num_experts_per_tok=2, intermediate_size=16, sliding_window=12, layer_types=[SLIDING, FULL], layer_rope_theta=[500.0, 0],
        embedding_multiplier=6.0, logits_scaling=4.0, residual_multiplier=0.5, attention_multiplier=0.1)),
    "hunyuan_moe": ("hunyuan_v1_moe", dict(head_dim=12, num_experts=6, moe_topk=2, intermediate_size=24, rope_parameters=dict(rope_type="dynamic", alpha=1000.0, factor=1.0, rope_theta=1e4))),
    "afmoe": ("afmoe", dict(num_experts=6, num_experts_per_tok=2, moe_intermediate_size=16, num_shared_experts=1, num_dense_layers=1, num_hidden_layers=3, route_scale=1.5, mup_enabled=True, head_dim=12,
        sliding_window=12, layer_types=[SLIDING, FULL, SLIDING])),
}
# Transformers opens these as Llamas and writes them so; their published files say what they are.
PUBLISHED = {"internlm3": "InternLM3ForCausalLM", "iquestcoder": "IQuestCoderForCausalLM", "exaone": "ExaoneForCausalLM"}
# Families whose routers have an auxiliary loss, with a coefficient at which its gradient is as large as the rest; of one, with its config's.
AUX = {name: {"aux": dict(router_aux_loss_coef=0.5)} for name in (
    "mixtral", "qwen2_moe", "qwen3_moe", "olmoe", "flex_olmo", "gpt_oss", "granitemoe", "ernie4_5_moe", "minimax_m2", "qwen3_5_moe", "qwen3_next", "granite4-h")}
AUX["olmoe"]["aux-default"] = dict(router_aux_loss_coef=None)
# Folder: model_type, what its config changes, and its cases: name -> what DPOConfig changes. The unnamed case is first.
FOLDERS = {
    "qwen2": ("qwen2", dict(tie_word_embeddings=True), {
        "": {}, "hinge": dict(loss_type=["hinge"]), "sft": dict(loss_type=["sigmoid", "sft"], loss_weights=[1.0, 0.1]),
        "mpo": dict(loss_type=["sigmoid", "bco_pair", "sft"], loss_weights=[0.8, 0.2, 1.0]), "truncated": dict(max_length=40),
        "forward_kl": dict(f_divergence_type="forward_kl"), "sppo_hard": dict(loss_type=["sppo_hard"]),
        "nf4": dict(quantization="nf4")}),
    "qwen2-window": ("qwen2", dict(use_sliding_window=True, sliding_window=12, max_window_layers=1), {
        "": dict(loss_type=["ipo"]), "aot": dict(loss_type=["aot"]), "discopop": dict(loss_type=["discopop"])}),
    "qwen2-yarn": ("qwen2", dict(rope_parameters=dict(rope_type="yarn", rope_theta=10000.0, factor=4.0, original_max_position_embeddings=32)), {
        "": {}, "aot_unpaired": dict(loss_type=["aot_unpaired"], label_smoothing=0.1)}),
    "qwen3": ("qwen3", dict(head_dim=24), {
        "": {}, "ld": dict(ld_alpha=0.5), "exo_pair": dict(loss_type=["exo_pair"], label_smoothing=0.01),
        "js": dict(f_divergence_type="js_divergence"), "apo_down": dict(loss_type=["apo_down"])}),
    "qwen3-tied-bias": ("qwen3", dict(head_dim=24, tie_word_embeddings=True, attention_bias=True), {
        "": dict(loss_type=["apo_zero"]), "nca_pair": dict(loss_type=["nca_pair"])}),
    "llama3": ("llama", dict(rope_parameters=LLAMA3), {
        "": {}, "robust": dict(loss_type=["robust"], label_smoothing=0.1), "bco_pair": dict(loss_type=["bco_pair"]),
        "sigmoid_norm": dict(loss_type=["sigmoid_norm"]), "alpha": dict(f_divergence_type="alpha_divergence"), "nf4": dict(quantization="nf4")}),
    "llama-linear-bias": ("llama", dict(head_dim=12, attention_bias=True, mlp_bias=True,
                                        rope_parameters=dict(rope_type="linear", rope_theta=10000.0, factor=4.0)), {
        "": {}, "ld-truncated": dict(ld_alpha=0.3, max_length=40)}),
    "qwen2-unpaired": ("qwen2", dict(tie_word_embeddings=True), {
        "": dict(loss_type=["kto"]), "apo_zero_unpaired": dict(loss_type=["apo_zero_unpaired"])}),
    **{name: (kind, change, {"": {}}) for name, (kind, change) in DENSE.items()},
    **{name: (kind, change, {"": {}, **AUX.get(name, {})}) for name, (kind, change) in MOE.items()},
    # Other trainers than DPOTrainer and KTOTrainer, on plain text: some of them end a conversation's answer twice.
    "qwen3-trainers": ("qwen3", dict(head_dim=12), {
        "": dict(trainer="sft"), "wpo": dict(use_weighting=True), "orpo": dict(trainer="orpo", beta=0.3),
        "cpo": dict(trainer="cpo", cpo_alpha=0.5, label_smoothing=0.1), "cpo-hinge": dict(trainer="cpo", loss_type="hinge", cpo_alpha=1.0),
        "simpo": dict(trainer="cpo", loss_type="simpo", beta=2.0, simpo_gamma=0.5, cpo_alpha=0.25),
        "alphapo": dict(trainer="cpo", loss_type="alphapo", beta=2.0, simpo_gamma=0.5, alpha=0.25)}),
    **{name: (kind, change, {"": {}, **AUX.get(name, {})}) for name, (kind, change) in HYBRID.items()},
    **{name: (kind, change, {"": {}}) for name, (kind, change) in (LATENTS | LATER).items()},
}
# Of a trainer's loss its name here, and what it names otherwise than the option here.
OURS = {"sft": ("sft", {}), "orpo": ("orpo_prompt", {}), "cpo": ("cpo", {}), "hinge": ("cpo", {"loss_type": "cpo_type"}), "simpo": ("simpo", {}),
        "alphapo": ("alphapo", {"alpha": "alphapo_alpha"})}
TRAINERS = {"sft": (SFTTrainer, SFTConfig), "orpo": (ORPOTrainer, ORPOConfig), "cpo": (CPOTrainer, CPOConfig)}
PLAIN = ("qwen3-trainers",)
UNPAIRED = ("kto", "apo_zero_unpaired")  # losses of KTOTrainer, over answers that were liked or not
CHATML = ("{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>' + '\n' }}{% endfor %}"
          "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}")
WORDS = "早上 好 谢谢 你 我们 明天 见 the kettle is on and a bird sang 🌱 🎈 yes perhaps not now 7 2048 snake_case ok sure no hi".split()


def model_class(change):
    return AutoModelForImageTextToText if "text_config" in change else AutoModelForCausalLM


def model_config(kind, change, vocab):
    sizes = {**SMALL, "vocab_size": vocab, "pad_token_id": 0}
    if "text_config" not in change: return AutoConfig.for_model(kind, **{**sizes, **change})
    tied = change["text_config"].get("tie_word_embeddings", False)
    return AutoConfig.for_model(kind, **{**change, "text_config": {**sizes, **change["text_config"]}, "tie_word_embeddings": tied})


def tokenizer(folder, rng):
    tok = Tokenizer(models.BPE())
    tok.pre_tokenizer, tok.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    trainer = trainers.BpeTrainer(vocab_size=300, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), special_tokens=special)
    tok.train_from_iterator([" ".join(rng.choices(WORDS, k=12)) for _ in range(200)], trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tok, eos_token="<|im_end|>", pad_token="<|endoftext|>")
    fast.chat_template = CHATML
    fast.save_pretrained(folder)
    path = f"{folder}/tokenizer_config.json"
    config = json.load(open(path)) | {"chat_template": CHATML}
    json.dump(config, open(path, "w"), ensure_ascii=False, indent=1)
    if os.path.exists(f"{folder}/chat_template.jinja"): os.remove(f"{folder}/chat_template.jinja")
    return fast


def in_mxfp4(folder):
    """Experts of random codes, in the files that gpt-oss is published in."""
    tensors = load_file(f"{folder}/model.safetensors")
    for name in [name for name in tensors if name.endswith(("experts.gate_up_proj", "experts.down_proj"))]:
        experts, inputs, outputs = tensors.pop(name).shape
        tensors[f"{name}_blocks"] = torch.randint(256, (experts, outputs, inputs // 32, 16), dtype=torch.uint8)
        tensors[f"{name}_scales"] = torch.randint(121, 125, (experts, outputs, inputs // 32), dtype=torch.uint8)
    save_file(tensors, f"{folder}/model.safetensors", metadata={"format": "pt"})
    quantization = dict(quant_method="mxfp4", modules_to_not_convert=["model.layers.*.self_attn", "model.layers.*.mlp.router", "model.embed_tokens", "lm_head"])
    config = json.load(open(f"{folder}/config.json")) | {"quantization_config": quantization}
    json.dump(config, open(f"{folder}/config.json", "w"), indent=1)


def rows(rng, count):
    say = lambda a, b: " ".join(rng.choices(WORDS, k=rng.randint(a, b)))
    for _ in range(count):
        messages = [{"role": "system", "content": say(2, 5)}] if rng.random() < 0.3 else []
        messages += [{"role": ["user", "assistant"][turn % 2], "content": say(3, 10)} for turn in range(rng.choice([1, 1, 3]))]
        yield {"messages": messages + [{"role": "assistant", "content": say(3, 14)}], "rejected_response": say(3, 14)}


def main():
    out, wanted = sys.argv[1], sys.argv[2:] or list(FOLDERS)
    for seed, (name, (kind, change, cases)) in enumerate(FOLDERS.items()):
        if name not in wanted: continue
        if name in MOE | LATENTS | LATER: seed = zlib.crc32(name.encode())
        folder, rng = f"{out}/{name}", random.Random(seed)
        shutil.rmtree(folder, ignore_errors=True)
        torch.manual_seed(seed)
        tok = tokenizer(f"{folder}/model", rng)
        base = model_class(change).from_config(model_config(kind, change, -(-len(tok) // 32) * 32), dtype=torch.float32)
        with torch.no_grad():  # far from the default, so that no gradient is near zero
            for key, weight in base.named_parameters():
                weight.copy_(torch.randn_like(weight) * (0.4 if key.endswith("bias") else 0.15) + (1.0 if "norm" in key else 0.0))
            for key, buffer in base.named_buffers():  # state that a checkpoint carries: scalars of layers, slopes
                if buffer.dtype == torch.float32 and key in base.state_dict():
                    buffer.copy_(torch.randn_like(buffer) * 0.1 + (1.0 if "scal" in key else 0.0))
        # The dense families' files are half as large: a checkpoint in bf16, as published ones are.
        (base.to(torch.bfloat16) if name in DENSE | MOE | HYBRID | LATENTS | LATER else base).save_pretrained(f"{folder}/model")
        base.float()
        if name.endswith("mxfp4"): in_mxfp4(f"{folder}/model")
        if kind in PUBLISHED:
            path = f"{folder}/model/config.json"
            config = json.load(open(path)) | {"architectures": [PUBLISHED[kind]]}
            json.dump(config, open(path, "w"), indent=1)
        targets = r".*language_model.*(proj|proj_\w+|gate|projection)" if "text_config" in change else TARGETS.get(name, "all-linear")
        start = get_peft_model(base, LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules=targets, task_type="CAUSAL_LM"))
        with torch.no_grad():
            for key, weight in start.named_parameters():
                if "lora_" in key: weight.copy_(torch.randn_like(weight) * 0.05)
        start.save_pretrained(f"{folder}/init_adapter")
        data = list(rows(rng, BATCH * STEPS))
        if name in PLAIN:
            text = lambda turns: "\n".join(turn["content"] for turn in turns)
            data = [{"prompt": text(r["messages"][:-1]) + "\n", "chosen": r["messages"][-1]["content"], "rejected": r["rejected_response"]} for r in data]
            path, tok.chat_template = f"{folder}/model/tokenizer_config.json", None
            config = json.load(open(path))
            del config["chat_template"]
            json.dump(config, open(path, "w"), ensure_ascii=False, indent=1)
        unpaired = cases[""].get("loss_type", [""])[0] in UNPAIRED
        if unpaired:
            answer = lambda i, r: r["messages"][-1:] if i % 3 else [{"role": "assistant", "content": r["rejected_response"]}]
            data = [{"messages": r["messages"][:-1] + answer(i, r), "label": bool(i % 3)} for i, r in enumerate(data)]
        with open(f"{folder}/prefs.jsonl", "w", encoding="utf-8") as file:
            file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in data)
        split = data if name in PLAIN else [{"prompt": r["messages"][:-1], "chosen": r["messages"][-1:],
                  "rejected": [{"role": "assistant", "content": r["rejected_response"]}]} for r in data if not unpaired]
        split = split or [{"prompt": r["messages"][:-1], "completion": r["messages"][-1:], "label": r["label"]} for r in data]
        for case, settings in cases.items():
            run(folder, case, settings, split, tok)
        if name == "minicpm":  # not in transformers: the same arithmetic as a Granite's under other keys
            path = f"{folder}/model/config.json"
            config = json.load(open(path))
            for key in ("embedding_multiplier", "logits_scaling", "residual_multiplier", "attention_multiplier"): del config[key]
            config |= dict(architectures=["MiniCPMForCausalLM"], model_type="minicpm", scale_emb=6.0, scale_depth=0.5 * SMALL["num_hidden_layers"] ** 0.5,
                           dim_model_base=SMALL["hidden_size"] / 4)
            json.dump(config, open(path, "w"), indent=1)
        for part in ("init_adapter", "final_adapter"):  # where the model was made is nobody's concern
            path = f"{folder}/{part}/adapter_config.json"
            config = json.load(open(path)) | {"base_model_name_or_path": None}
            json.dump(config, open(path, "w"), indent=2)
        for path in ("init_adapter/README.md", "final_adapter/README.md", "model/generation_config.json"):
            if os.path.exists(f"{folder}/{path}"): os.remove(f"{folder}/{path}")
        shutil.rmtree(f"{folder}/trl", ignore_errors=True)
    with open(f"{out}/PROVENANCE", "w") as file:
        file.write("Made by tests/oracle/trajectories.py; random weights, words and rows, no other source.\n")
        file.writelines(f"{p} {importlib.metadata.version(p)}\n" for p in ("torch", "transformers", "peft", "trl", "tokenizers", "bitsandbytes"))


def quantized(base):
    """As transformers loads it with BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
    bnb_4bit_compute_dtype=torch.bfloat16): weights are dequantised to bf16. What they are multiplied with stays in float32."""
    import bitsandbytes as bnb
    import bitsandbytes_nf4
    bitsandbytes_nf4.exact()

    def product(module, x):
        # As one row: of a matrix whose rows are shorter than a block, its kernel for AVX-512 takes other blocks than that for CUDA.
        state = module.weight.quant_state
        state.shape = torch.Size([module.in_features * module.out_features])
        weight = bnb.functional.dequantize_4bit(module.weight.data, state).view(module.out_features, module.in_features)
        return torch.nn.functional.linear(x, weight.to(x.dtype), module.bias)

    for name, module in list(base.named_modules()):
        for key, child in list(module.named_children()):
            if type(child) is not torch.nn.Linear or key == "lm_head": continue
            small = bnb.nn.Linear4bit(child.in_features, child.out_features, bias=child.bias is not None, compute_dtype=torch.float32, compress_statistics=True, quant_type="nf4")
            small.weight = bnb.nn.Params4bit(child.weight.data.bfloat16(), requires_grad=False, compress_statistics=True, quant_type="nf4").to("cpu")
            small.bias, small.forward = child.bias, functools.partial(product, small)
            setattr(module, key, small)
    base.is_loaded_in_4bit = True
    return base


def run(folder, case, settings, split, tok):
    settings = dict(settings)
    quantization = settings.pop("quantization", None)
    stated = json.load(open(f"{folder}/model/config.json"))
    wrapped = "text_config" in stated
    base = (AutoModelForImageTextToText if wrapped else AutoModelForCausalLM).from_pretrained(f"{folder}/model", dtype=torch.float32)
    # What mxfp4 stands for, transformers has in bf16.
    if "quantization_config" in stated: base.float()
    if quantization: base = quantized(base)
    model = PeftModel.from_pretrained(base, f"{folder}/init_adapter", is_trainable=True)
    # TRL rounds A and B of a model that says so to bf16.
    if quantization: del base.is_loaded_in_4bit
    args = {"loss_type": ["sigmoid"], "max_length": 512, "beta": 0.1, **settings}
    unpaired = args["loss_type"][0] in UNPAIRED
    Trainer, Config = (KTOTrainer, KTOConfig) if unpaired else (DPOTrainer, DPOConfig)
    other = args.pop("trainer", None)
    if other:
        (Trainer, Config), settings = TRAINERS[other], {k: v for k, v in settings.items() if k != "trainer"}
        if other == "sft": split = [{"prompt": r["prompt"], "completion": r["chosen"]} for r in split]
        kind = settings.get("loss_type", other)
        args = {"max_length": 512, **settings}
    config = Config(
        output_dir=f"{folder}/trl", per_device_train_batch_size=BATCH, gradient_accumulation_steps=1, max_steps=STEPS, learning_rate=RATE,
        lr_scheduler_type="linear", warmup_steps=0, weight_decay=0.01, adam_beta1=0.9, adam_beta2=0.95, max_grad_norm=1.0,
        optim="adamw_torch", logging_steps=1, save_strategy="no", report_to=[], bf16=False, use_cpu=True, disable_tqdm=True, seed=0,
        gradient_checkpointing=False, train_sampling_strategy="sequential", **{**args, **({"loss_type": args["loss_type"][0]} if unpaired else {}), **({"packing": False} if other == "sft" else {})})
    # TRL adds the auxiliary loss of routers with the config's coefficient, unless it is told another one.
    routed = hasattr(base.config.get_text_config(), "output_router_logits")
    if routed: config.router_aux_loss_coef = settings.get("router_aux_loss_coef", 0.0)
    # It asks for their number by a name that Granite's configs do not have, and fails.
    if config.router_aux_loss_coef != 0.0 and "Granite" in type(base.config).__name__: base.config.num_experts = base.config.num_local_experts
    losses = []

    class Exact(Trainer):
        def training_step(self, *a, **k):
            losses.append(float(loss := super().training_step(*a, **k)))
            return loss

    trainer = Exact(model=model, args=config, train_dataset=Dataset.from_list(split), processing_class=tok)
    trainer.train()
    if not case: model.save_pretrained(f"{folder}/final_adapter", selected_adapters=["default"])
    keep = ("grad_norm", "learning_rate", "rewards/chosen", "rewards/rejected", "rewards/margins", "rewards/accuracies", "logps/chosen", "logps/rejected", "aux_loss")
    # CPOTrainer and ORPOTrainer log means where others have sums.
    if other: keep = keep[:2]
    logs = [line for line in trainer.state.log_history if "loss" in line]
    steps = [{"loss": loss, **{k: line[k] for k in keep if k in line}} for loss, line in zip(losses, logs)]
    if other:
        loss, renamed = OURS[kind]
        options = {renamed.get(k, k): v for k, v in settings.items() if k in ("cpo_alpha", "simpo_gamma", "alpha") or k in renamed}
        if loss == "alphapo": options.pop("cpo_alpha", None)
        args |= {"loss_type": [loss], "beta": settings.get("beta", None if other == "sft" else 0.1), "options": options}
    named = {"batch": BATCH, "steps": STEPS, "lr": RATE, "loss": args["loss_type"], "f_divergence": args.get("f_divergence_type", "reverse_kl"),
             **{k: args[k] for k in ("options", "use_weighting") if k in args}, **{k: args.get(k) for k in ("max_length", "beta", "loss_weights", "ld_alpha")}, "label_smoothing": args.get("label_smoothing", 0.0)}
    if routed: named["router_aux_loss_coef"] = config.router_aux_loss_coef
    kept = quantization or stated.get("quantization_config", {}).get("quant_method")
    expected = {"args": named | ({"quantization": kept} if kept else {}), "steps": steps}
    if not case:
        # What the base model says after the first row's chosen answer.
        first = trainer.train_dataset[0]
        row = first["prompt_ids"] + first.get("chosen_ids", first.get("completion_ids")) if "prompt_ids" in first else first["input_ids"]
        with torch.no_grad(), model.disable_adapter():
            expected["logits"] = model(input_ids=torch.tensor([row])).logits[0, -1].tolist()
        ids = ("prompt_ids", "chosen_ids", "rejected_ids", "completion_ids", "KL_completion_ids")
        expected["rows"] = [{k: r[k] for k in ids if k in r} for r in trainer.train_dataset]
        if other == "sft":
            learned = lambda mark: mark not in (0, -100)
            expected["rows"] = [{"prompt_ids": [i for i, m in zip(r["input_ids"], r["labels"] if "labels" in r else r["completion_mask"]) if not learned(m)],
                                 "chosen_ids": [i for i, m in zip(r["input_ids"], r["labels"] if "labels" in r else r["completion_mask"]) if learned(m)]} for r in trainer.train_dataset]
    json.dump(expected, open(f"{folder}/expected{'-' + case if case else ''}.json", "w"))


if __name__ == "__main__":
    main()
