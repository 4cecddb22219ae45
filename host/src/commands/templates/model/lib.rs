//! The model family `@name@`.
//!
//! As it stands it is a Llama. Go through `modeling_*.py` of your family, line by line, and change
//! the fields of `Decoder` that differ; put a published `config.json` into `example_config.json`.

use dpo_plugin_api::prelude::*;

/// Say here which checkpoints these are, and which file their arithmetic was read from.
pub struct Family;

impl ModelFamily for Family {
    /// What `--plugin` takes: lower case, unique among all plugins.
    fn name(&self) -> &'static str {
        "@name@"
    }

    /// The line of `dpo-host list`.
    fn summary(&self) -> &'static str {
        "plain decoder"
    }

    /// Entries of `architectures` in `config.json` for which `--plugin` may be left out.
    fn claims(&self) -> &'static [&'static str] {
        &["@Name@ForCausalLM"]
    }

    /// The host makes a graph of it at start-up; the test below checks it as the host does.
    fn example_config(&self) -> &'static str {
        include_str!("../example_config.json")
    }

    /// `Decoder` says what its fields are. A key of `config.json` that is not read here refuses the
    /// checkpoint where it may change the arithmetic. A family that is no plain decoder builds its
    /// graph op by op with `GraphBuilder`.
    fn graph(&self, config: &Config) -> Result<ModelGraph> {
        // What transformers' configuration class has where a config does not say it.
        let config = config.with_defaults(&[("rms_norm_eps", json!(1e-6))]);
        let mut decoder = Decoder::read(&config)?;
        decoder.attention_bias(config.flag("attention_bias", false)?);
        decoder.mlp_bias = config.flag("mlp_bias", false)?;
        decoder.graph(&config)
    }
}

plugin! { models: [Family] }

#[cfg(test)]
mod tests {
    use super::*;
    use dpo_plugin_api::testing::check_model;

    #[test]
    fn the_example_is_whole() {
        let graph = check_model(&Family);
        assert_eq!(graph.layers.len(), 4);
    }
}
