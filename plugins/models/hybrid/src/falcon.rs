//! Falcon-H1: attention and Mamba 2 side by side in every layer, with a factor on everything.

use dpo_plugin_api::mixer::Mamba2;
use dpo_plugin_api::prelude::*;

pub(crate) static FALCON_H1: Family = Family {
    name: "falcon_h1",
    summary: "Falcon-H1: attention and Mamba 2 side by side in every layer, multipliers",
    claims: &["FalconH1ForCausalLM"],
    checkpoints: &[
        "tiiuae/Falcon-H1-0.5B-Instruct",
        "tiiuae/Falcon-H1-1.5B-Instruct",
        "tiiuae/Falcon-H1-3B-Instruct",
        "tiiuae/Falcon-H1-7B-Instruct",
        "tiiuae/Falcon-H1-34B-Instruct",
    ],
    example_config: include_str!("../configs/falcon_h1.json"),
    graph,
};

/// So many numbers of a list; ones where the config has none.
fn numbers<const N: usize>(config: &Config, key: &str) -> Result<[f64; N]> {
    let Some(stated) = config.get(key) else { return Ok([1.0; N]) };
    let numbers: Option<Vec<f64>> = stated.as_array().and_then(|list| list.iter().map(Value::as_f64).collect());
    match numbers.and_then(|list| list.try_into().ok()) {
        Some(numbers) => Ok(numbers),
        None => bail!("config.json: {key} should be {N} numbers, is {stated}"),
    }
}

/// transformers, `modeling_falcon_h1.py`.
fn graph(config: &Config) -> Result<ModelGraph> {
    // Sizes of other versions of the model, and what generation keeps.
    for key in ["attn_layer_indices", "mlp_expansion_factor", "expansion_factor", "num_logits_to_keep"] {
        config.get(key);
    }
    config.only("mamba_use_mlp", &[json!(true)])?;
    config.only("sliding_window", &[])?;
    let factor = |key: &str| Ok::<_, Error>(config.opt_float(key)?.unwrap_or(1.0));
    let config = &config.with_defaults(&[("num_key_value_heads", json!(8)), ("rms_norm_eps", json!(1e-5))]);
    let mut decoder = Decoder::read(config)?;
    decoder.norms.before_mlp = Some("pre_ff_layernorm");
    decoder.final_norm = "final_layernorm";
    (decoder.names.gate, decoder.names.up, decoder.names.down) =
        ("feed_forward.gate_proj", "feed_forward.up_proj", "feed_forward.down_proj");
    decoder.attention_bias(config.flag("attention_bias", false)?);
    decoder.mlp_bias = config.flag("mlp_bias", false)?;
    decoder.embedding_scale = factor("embedding_multiplier")?;
    decoder.logit_scale = factor("lm_head_multiplier")?;
    // A factor on keys is one on scores.
    decoder.attention_scale *= factor("key_multiplier")?;

    let expanded = decoder.hidden * config.opt_size("mamba_expand")?.unwrap_or(2);
    let inner = match config.has("mamba_d_ssm") {
        true => config.opt_size("mamba_d_ssm")?.unwrap_or(expanded),
        false => 1024,
    };
    let mut mamba = Mamba2::read(&config.with_defaults(&[("mamba_n_heads", json!(128))]), inner)?;
    mamba.bias[1] = config.flag("projectors_bias", false)?;
    let (normed, first) = (config.flag("mamba_rms_norm", false)?, config.flag("mamba_norm_before_gate", true)?);
    mamba.norm = mamba.norm.filter(|_| normed);
    mamba.norm_before_gate = first;
    mamba.scales = numbers(config, "ssm_multipliers")?;
    mamba.out_is_parameter = true;

    let [of_gate, of_mlp] = numbers(config, "mlp_multipliers")?;
    let [into_attention, of_attention] = [factor("attention_in_multiplier")?, factor("attention_out_multiplier")?];
    let [into_mamba, of_mamba] = [factor("ssm_in_multiplier")?, factor("ssm_out_multiplier")?];
    let layers = decoder.layers.clone();
    let graph = decoder.build_of(
        &layers,
        |_| "hybrid".into(),
        |b, x, layer| {
            let scaled = |b: &mut BlockBuilder, x: Var, factor: f64| if factor == 1.0 { x } else { b.scale(x, factor) };
            let h = b.norm(decoder.norm, "input_layernorm", x);
            let state = scaled(b, h, into_mamba);
            let state = mamba.build(b, state);
            let state = scaled(b, state, of_mamba);
            let attended = scaled(b, h, into_attention);
            let attended = decoder.attention(b, attended, layer);
            let attended = scaled(b, attended, of_attention);
            let both = b.add(state, attended);
            let x = b.add(x, both);
            let h = b.norm(decoder.norm, "pre_ff_layernorm", x);
            let [gate, up] =
                [decoder.names.gate, decoder.names.up].map(|m| b.linear_if(decoder.mlp_bias, m, h, decoder.ffn));
            let gate = scaled(b, gate, of_gate);
            let y = b.glu(&decoder.activation, gate, up);
            let y = b.linear_if(decoder.mlp_bias, decoder.names.down, y, decoder.hidden);
            let y = scaled(b, y, of_mlp);
            b.add(x, y)
        },
    )?;
    graph.finish(config)
}
