//! Llama 3, 3.1, 3.2, and older Llama checkpoints: the plain decoder, with every rope scaling they were published with. And EXAONE 3,
//! which is a Llama whose files have other names.

use dpo_plugin_api::prelude::*;

/// The family of `LlamaForCausalLM` (transformers, `modeling_llama.py`).
pub struct Llama3;

impl ModelFamily for Llama3 {
    fn name(&self) -> &'static str {
        "llama3"
    }

    fn summary(&self) -> &'static str {
        "Llama 2, 3, 3.1, 3.2: llama3, linear and dynamic rope scaling"
    }

    fn claims(&self) -> &'static [&'static str] {
        &["LlamaForCausalLM"]
    }

    fn example_config(&self) -> &'static str {
        include_str!("../example_config.json")
    }

    fn chat_template(&self) -> Option<&'static str> {
        Some(include_str!("../chat_template.jinja"))
    }

    fn checkpoints(&self) -> &'static [&'static str] {
        &[
            "meta-llama/Llama-3.1-8B-Instruct",
            "meta-llama/Llama-3.2-1B-Instruct",
            "meta-llama/Llama-3.2-3B-Instruct",
            "meta-llama/Llama-3.3-70B-Instruct",
            "meta-llama/Llama-2-7b-chat-hf",
            "deepseek-ai/DeepSeek-R1-Distill-Llama-8B",
            "deepseek-ai/deepseek-llm-7b-chat",
            "allenai/Llama-3.1-Tulu-3-8B",
            "01-ai/Yi-1.5-9B-Chat",
            "tiiuae/Falcon3-7B-Instruct",
            "HuggingFaceTB/SmolLM2-1.7B-Instruct",
            "TinyLlama/TinyLlama-1.1B-Chat-v1.0",
        ]
    }

    fn graph(&self, config: &Config) -> Result<ModelGraph> {
        // Files of models that were a Mistral before may have one. Transformers' Llama has no window.
        config.get("sliding_window");
        // Transformers 5 writes EXAONE 3 as a Llama, under the names that its files had.
        let decoder = decoder(&config.with_names(EXAONE_KEYS))?;
        let mut graph = decoder.build()?;
        name_exaone(&mut graph);
        graph.finish(config)
    }
}

fn decoder(config: &Config) -> Result<Decoder> {
    let mut decoder = Decoder::read(config)?;
    decoder.attention_bias(config.flag("attention_bias", false)?);
    decoder.mlp_bias = config.flag("mlp_bias", false)?;
    Ok(decoder)
}

/// The family of `ExaoneForCausalLM`, which is a Llama in transformers 5 (`configuration_exaone.py`).
pub struct Exaone;

impl ModelFamily for Exaone {
    fn name(&self) -> &'static str {
        "exaone"
    }

    fn summary(&self) -> &'static str {
        "EXAONE 3.0, 3.5, Deep: a Llama whose files have other names"
    }

    fn claims(&self) -> &'static [&'static str] {
        &["ExaoneForCausalLM"]
    }

    fn checkpoints(&self) -> &'static [&'static str] {
        &[
            "LGAI-EXAONE/EXAONE-3.5-2.4B-Instruct",
            "LGAI-EXAONE/EXAONE-3.5-7.8B-Instruct",
            "LGAI-EXAONE/EXAONE-3.5-32B-Instruct",
            "LGAI-EXAONE/EXAONE-Deep-7.8B",
        ]
    }

    fn example_config(&self) -> &'static str {
        include_str!("../exaone_config.json")
    }

    fn graph(&self, config: &Config) -> Result<ModelGraph> {
        let config = config.with_names(EXAONE_KEYS).with_defaults(&[
            ("num_key_value_heads", json!(8)),
            ("rms_norm_eps", json!(1e-5)),
            ("rope_theta", json!(500_000.0)),
        ]);
        let mut graph = decoder(&config)?.build()?;
        name_exaone(&mut graph);
        graph.finish(&config)
    }
}

const EXAONE_KEYS: &[(&str, &str)] = &[
    ("num_layers", "num_hidden_layers"),
    ("layer_norm_epsilon", "rms_norm_eps"),
    ("activation_function", "hidden_act"),
];

/// Names of EXAONE's files (transformers, `conversion_mapping.py`, "exaone").
fn name_exaone(graph: &mut GraphBuilder) {
    graph.layout(&[
        ("model.embed_tokens.", "transformer.wte."),
        ("model.layers.", "transformer.h."),
        ("model.norm.", "transformer.ln_f."),
        (".self_attn.o_proj.", ".attn.attention.out_proj."),
        (".self_attn.", ".attn.attention."),
        (".input_layernorm.", ".ln_1."),
        (".post_attention_layernorm.", ".ln_2."),
        (".mlp.gate_proj.", ".mlp.c_fc_0."),
        (".mlp.up_proj.", ".mlp.c_fc_1."),
        (".mlp.down_proj.", ".mlp.c_proj."),
    ]);
    graph.unused_tensor("*.attn.attention.rotary.inv_freq");
}

plugin! { models: [Llama3, Exaone] }

#[cfg(test)]
mod tests {
    use dpo_plugin_api::testing::check_model;

    use super::*;

    #[test]
    fn published_config() {
        let graph = check_model(&Llama3);
        assert_eq!(graph.layers.len(), 32);
        let rope = graph.blocks[0].nodes.iter().find(|n| n.op == "rope").unwrap();
        let slowest = rope.attrs["inv_freq"].as_array().unwrap().last().unwrap().as_f64().unwrap();
        // The slowest wave is divided by the factor of 8.
        assert!((slowest * 8.0 - 500_000.0_f64.powf(-126.0 / 128.0)).abs() < 1e-12, "{slowest}");
        assert_eq!(check_model(&Exaone).layers.len(), 32);
    }
}
