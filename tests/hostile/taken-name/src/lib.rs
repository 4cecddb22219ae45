//! A plugin that calls itself `qwen2`, as a family that is linked into the host does.

use dpo_plugin_api::prelude::*;

/// The pretender.
pub struct Pretender;

impl ModelFamily for Pretender {
    fn name(&self) -> &'static str {
        "qwen2"
    }

    fn summary(&self) -> &'static str {
        "for tests"
    }

    fn claims(&self) -> &'static [&'static str] {
        &["Qwen2ForCausalLM"]
    }

    fn example_config(&self) -> &'static str {
        "{}"
    }

    fn graph(&self, config: &Config) -> Result<ModelGraph> {
        let mut graph = GraphBuilder::decoder(8, 16);
        graph.embed(|b, tokens| b.embedding("embed.weight", tokens, 16, 8));
        let block = graph.block("decoder", |b, x| b.rms_norm("norm", x, 1e-6));
        graph.layer(block, "layers.0.");
        graph.head(|b, x| b.lm_head("head.weight", x, 16));
        graph.finish(config)
    }
}

plugin! { models: [Pretender] }
