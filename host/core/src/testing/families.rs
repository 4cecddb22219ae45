//! Small configs of every family, with heads and widths that GPUs take, and a vocabulary that is no multiple of 8.

/// A table of configs that say what they have otherwise than this one; of a key that is there twice, the last value counts.
macro_rules! small {
    ($($family:literal: $more:literal),* $(,)?) => {
        &[$(($family, concat!(
            r#"{"hidden_size":128,"intermediate_size":320,"num_hidden_layers":2,"num_attention_heads":4,"num_key_value_heads":2,"#,
            r#""vocab_size":501,"max_position_embeddings":4096,"rope_theta":10000.0,"tie_word_embeddings":false,"#,
            $more, "}"
        ))),*]
    };
}

/// Families with such a config; a family may have several.
pub const FAMILIES: &[(&str, &str)] = small! {
    "qwen2": r#""num_hidden_layers":3,"sliding_window":50,"use_sliding_window":true,"max_window_layers":1,
        "tie_word_embeddings":true"#,
    "qwen3": r#""head_dim":128,"rope_theta":1000000.0"#,
    "llama3": r#""num_key_value_heads":1,"rope_scaling":{"rope_type":"llama3","factor":8.0,"low_freq_factor":1.0,
        "high_freq_factor":4.0,"original_max_position_embeddings":64}"#,
    "exaone": r#""rms_norm_eps":1e-5"#,
    "mistral": r#""sliding_window":50"#,
    "ministral": r#""sliding_window":50,"layer_types":["sliding_attention","full_attention"]"#,
    "ministral3": r#""head_dim":64,"rope_parameters":{"rope_type":"yarn","rope_theta":1000000.0,"factor":4.0,
        "original_max_position_embeddings":32,"mscale":1.0,"mscale_all_dim":1.0,"llama_4_scaling_beta":0.3}"#,
    "gemma": r#""head_dim":64"#,
    "gemma2": r#""head_dim":256,"sliding_window":50,"final_logit_softcapping":8.0,"attn_logit_softcapping":4.0"#,
    "gemma3": r#""head_dim":64,"sliding_window":50,"layer_types":["sliding_attention","full_attention"],
        "query_pre_attn_scalar":64,"rope_scaling":{"rope_type":"linear","factor":8.0}"#,
    "gemma4": r#""head_dim":64,"global_head_dim":128,"num_global_key_value_heads":1,"attention_k_eq_v":true,
        "hidden_size_per_layer_input":0,"layer_types":["sliding_attention","full_attention"],
        "sliding_window":50,"final_logit_softcapping":8.0"#,
    "gemma4": r#""num_hidden_layers":5,"head_dim":32,"global_head_dim":64,"hidden_size_per_layer_input":16,
        "vocab_size_per_layer_input":501,"num_kv_shared_layers":3,"use_double_wide_mlp":true,
        "layer_types":["sliding_attention","full_attention","sliding_attention","sliding_attention",
        "full_attention"],"sliding_window":50"#,
    "phi": r#""partial_rotary_factor":0.5,"qk_layernorm":true"#,
    "phi3": r#""sliding_window":50,"partial_rotary_factor":0.5,"original_max_position_embeddings":4096,
        "rope_scaling":{"type":"longrope","short_factor":[1.0,1.1,1.2,1.3,1.4,1.5,1.6,1.7],
        "long_factor":[1.0,2.0,3.0,4.0,5.0,6.0,7.0,8.0]}"#,
    "glm": r#""head_dim":32"#,
    "glm4": r#""head_dim":32"#,
    "olmo": r#""clip_qkv":3.0"#,
    "olmo2": r#""rms_norm_eps":1e-5"#,
    "olmo3": r#""sliding_window":50,"layer_types":["sliding_attention","full_attention"]"#,
    "granite": r#""embedding_multiplier":6.0,"logits_scaling":4.0,"residual_multiplier":0.5,"attention_multiplier":0.1"#,
    "granite4": r#""layer_types":["attention","attention"],"num_local_experts":0,"shared_intermediate_size":320,
        "position_embedding_type":"rope","embedding_multiplier":6.0,"logits_scaling":4.0,
        "residual_multiplier":0.5,"attention_multiplier":0.1,"tie_word_embeddings":true"#,
    "minicpm": r#""scale_emb":6.0,"scale_depth":0.7,"dim_model_base":32"#,
    "cohere": r#""use_qk_norm":true,"logit_scale":0.25"#,
    "cohere2": r#""sliding_window":50,"layer_types":["sliding_attention","full_attention"],"logit_scale":0.25"#,
    "exaone4": r#""sliding_window":50,"layer_types":["sliding_attention","full_attention"]"#,
    "stablelm": r#""use_parallel_residual":true,"qk_layernorm":true,"use_qkv_bias":true,"partial_rotary_factor":0.5"#,
    "muse_glimmer": r#""head_dim":32,"num_hidden_layers":4,"sliding_window":50,"qk_scale_factor":1.0"#,
    "internlm3": r#""head_dim":32,"qkv_bias":true,"bias":true"#,
    "seed_oss": r#""head_dim":32"#,
    "iquestcoder": r#""head_dim":32"#,
    "cwm": r#""head_dim":32,"sliding_window":50,"layer_types":["full_attention","sliding_attention"]"#,
    "smollm3": r#""no_rope_layers":[1,0]"#,
    "hunyuan": r#""rope_scaling":{"rope_type":"dynamic","alpha":1000.0,"factor":1.0}"#,
    "ernie4_5": r#""head_dim":32,"use_bias":true"#,
    "apertus": r#""rms_norm_eps":1e-5"#,
    "arcee": r#""attention_bias":true,"mlp_bias":true"#,
    "nemotron": r#""rms_norm_eps":1e-5"#,
    "starcoder2": r#""sliding_window":50"#,
    "helium": r#""head_dim":32,"attention_bias":true"#,
};
