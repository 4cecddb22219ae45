//! Fixtures that the self-test on a GPU, the emulator's tests and the end-to-end tests share: graphs around every op, small
//! configs of the families, weights by name, examples of odd lengths.

use candle_core::{DType, Tensor};
use dpo_plugin_api::builder::{Attention, BlockBuilder, GraphBuilder, Norm, Var};
use dpo_plugin_api::graph::{ModelGraph, Weight};
use dpo_plugin_api::model::Config;
use dpo_plugin_api::ops::is_module;
use dpo_plugin_api::rope::Rope;
use half::bf16;
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;

use crate::aux_loss::AuxLoss;
use crate::device::CpuDevice;
use crate::engine::Engine;
use crate::error::Result;
use crate::example::{Answer, Example};
use crate::lora::{Adapter, AdapterConfig, Init, Patterns, Targets, is_parameter};
use crate::predictors::gather_predictors;
use crate::storage::Numbers;
use crate::weights::{blocks, is_quantized};
use crate::{fp8, mxfp4, nf4};

mod experts;
mod families;
mod heads;
mod recurrent;

pub use families::FAMILIES;

/// A block's own nodes.
type Body<'a> = &'a dyn Fn(&mut BlockBuilder, Var) -> Var;

/// Two layers of a body that is followed by a linear and a sum.
fn case(body: Body<'_>) -> Result<ModelGraph> {
    let (hidden, vocab) = (104, 248);
    let mut graph = GraphBuilder::decoder(hidden, vocab);
    graph.embed(|b, tokens| b.embedding("embed.weight", tokens, vocab, hidden));
    let block = graph.block("case", |b, x| {
        let inner = body(b, x);
        let out = b.linear("out", inner, hidden);
        b.add(x, out)
    });
    graph.layer(block, "layers.0.");
    graph.layer(block, "layers.1.");
    graph.head(|b, x| {
        let h = b.rms_norm("norm", x, 1e-6);
        b.lm_head("head.weight", h, vocab)
    });
    gather_predictors(graph.finish(&Config::parse("{}")?)?)
}

/// Derivatives of an auxiliary loss of routers by probabilities, as large as those of log-probs; none where a graph has no such loss.
pub fn router_dprobs(graph: &ModelGraph) -> Vec<f64> {
    let experts = AuxLoss::of(graph).map_or(0, |loss| loss.experts);
    (0..experts).map(|expert| (expert * 7 % 5) as f64 - 2.0).collect()
}

/// Graphs whose matmuls have so many columns that, of the rows of the self-test's batches, they take tiles of every size: a plain one, with a
/// bias, with a sum, with a gated activation, and their backward ones.
pub fn wide_cases() -> Result<Vec<(String, ModelGraph)>> {
    let of = |width: usize| {
        let graph = case(&|b, x| {
            let h = b.linear_bias("a", x, width);
            let g = b.linear("b", h, width);
            let h = b.add(h, g);
            let (gate, up) = (b.linear("gate", h, width), b.linear("up", h, width));
            b.glu("silu", gate, up)
        })?;
        Ok((format!("linears of {width} columns"), graph))
    };
    [2048, 2304, 3328].into_iter().map(of).collect()
}

/// A graph around every op: a linear before it and one after it, so that the gradient of the adapter passes through it.
pub fn op_cases() -> Result<Vec<(String, ModelGraph)>> {
    let mut cases: Vec<(String, ModelGraph)> = Vec::new();
    let mut case = |name: String, body: Body<'_>| -> Result<()> {
        cases.push((name, case(body)?));
        Ok(())
    };
    case("linear".into(), &|b, x| b.linear("a", x, 72))?;
    case("linear, biases, one input".into(), &|b, x| {
        let (p, q) = (b.linear_bias("a", x, 72), b.linear_bias("b", x, 72));
        b.add(p, q)
    })?;
    case("add of values that are read again".into(), &|b, x| {
        let p = b.linear("a", x, 104);
        let q = b.add(p, x);
        let r = b.rms_norm("n", q, 1e-6);
        let s = b.add(r, q);
        b.add(s, p)
    })?;
    case("rms_norm".into(), &|b, x| {
        let h = b.linear("a", x, 264);
        b.rms_norm("n", h, 1e-5)
    })?;
    case("rms_norm of heads, rope".into(), &|b, x| {
        let h = b.linear("a", x, 160);
        let h = b.head_norm(Norm::rms(1e-6), "n", h, 32);
        b.rope(h, 32, &Rope { attention_scale: 1.1, ..Rope::of((0..16).map(|j| 0.5_f64.powi(j)).collect()) })
    })?;
    let rope = |attention_scale| Rope { attention_scale, ..Rope::of((0..16).map(|j| 0.5_f64.powi(j)).collect()) };
    for bias in [true, false] {
        case(format!("layer_norm{}", if bias { ", bias" } else { "" }), &|b, x| {
            let n = b.norm(Norm::layer(1e-5).bias(bias), "n", x);
            let h = b.linear("a", n, 264);
            let m = b.norm(Norm::layer(1e-5).bias(bias), "m", h);
            b.add(m, h)
        })?;
    }
    for (name, norm) in [("rms_norm", Norm::rms(1e-5)), ("layer_norm", Norm::layer(1e-5))] {
        case(format!("{name} with an offset"), &|b, x| {
            let h = b.linear("a", x, 264);
            let h = b.norm(norm.offset(1.0), "n", h);
            b.head_norm(norm.offset(1.0), "m", h, 88)
        })?;
        case(format!("{name} without weights, of rows and of runs"), &|b, x| {
            let h = b.norm(norm.plain(), "n", x);
            let h = b.linear("a", h, 264);
            b.head_norm(norm.plain(), "m", h, 24)
        })?;
    }
    for bias in [true, false] {
        case(format!("layer_norm of heads, each its own weight{}", if bias { " and bias" } else { "" }), &|b, x| {
            let h = b.linear("a", x, 192);
            let (norm, heads) = (Norm::layer(1e-5).bias(bias), b.head_norm(Norm::layer(1e-5), "s", h, 64));
            let apart = b.norm_of_each_head(norm, "n", heads, 48);
            b.add(apart, h)
        })?;
    }
    case("norms before and after a linear".into(), &|b, x| {
        let norm = Norm::rms(1e-6).offset(1.0);
        let h = b.norm(norm, "before", x);
        let h = b.linear("a", h, 104);
        let h = b.norm(norm, "after", h);
        let sum = b.add(x, h);
        let g = b.norm(norm, "again", sum);
        let g = b.linear("b", g, 104);
        let g = b.norm(norm, "last", g);
        b.add(sum, g)
    })?;
    // Of 16 pairs of a head of 48 columns: all, eight at once; some, one by one; neighbours; far positions made longer.
    for interleaved in [false, true] {
        for (pairs, position_factor) in [(24, None), (8, None), (12, None), (24, Some((0.3, 3)))] {
            let of = Rope { attention_scale: 1.1, interleaved, position_factor, ..rope(1.0) };
            let of = Rope { inv_freq: (0..pairs).map(|j| 0.7_f64.powi(j)).collect(), ..of };
            let layout = if interleaved { "interleaved" } else { "half" };
            let far = if position_factor.is_some() { ", longer from 3 on" } else { "" };
            case(format!("rope {layout} of {pairs} pairs of 24{far}"), &|b, x| {
                let p = b.linear("a", x, 144);
                b.rope(p, 48, &of)
            })?;
        }
    }
    case("scale by a weight".into(), &|b, x| {
        let p = b.linear("a", x, 104);
        let p = b.scale_by("factor", p);
        let weight = Weight { role: "factor".into(), tensor: "both".into(), shape: vec![1] };
        let q = b.op("scale", &[p], vec![weight], &[("factor", serde_json::json!(-0.4))], 104);
        b.add(q, x)
    })?;
    for activation in ["silu", "gelu", "gelu_tanh", "relu2", "sigmoid"] {
        case(format!("activation {activation}"), &|b, x| {
            let h = b.rms_norm("n", x, 1e-6);
            let h = b.linear("up", h, 336);
            b.activation(activation, h)
        })?;
    }
    case("activations of a value that is read again".into(), &|b, x| {
        let h = b.linear("a", x, 104);
        let (c, s) = (b.clamp(h, 0.4), b.activation("sigmoid", h));
        let sum = b.add(c, s);
        b.add(sum, h)
    })?;
    case("xielu".into(), &|b, x| {
        let h = b.rms_norm("n", x, 1e-6);
        let h = b.linear("up", h, 336);
        b.xielu("act_fn", h, [&[1], &[1], &[], &[]])
    })?;
    case("attention and MLP of one norm".into(), &|b, x| {
        let h = b.layer_norm("n", x, 1e-5);
        let (q, k, v) = (b.linear("q", h, 64), b.linear("k", h, 32), b.linear("v", h, 32));
        let (gate, up) = (b.linear("gate", h, 200), b.linear("up", h, 200));
        let (q, k) = (b.rope(q, 32, &rope(1.0)), b.rope(k, 32, &rope(1.0)));
        let attended = b.attention(q, k, v, Attention::new(2, 1, 32));
        let (attended, y) = (b.linear("o", attended, 104), b.glu("silu", gate, up));
        let y = b.linear("down", y, 104);
        let sum = b.add(x, attended);
        b.add(sum, y)
    })?;
    case("attention and MLP without a gate of one norm, biases".into(), &|b, x| {
        let h = b.norm(Norm::layer(1e-5).bias(false), "n", x);
        let (q, k, v) = (b.linear_bias("q", h, 64), b.linear_bias("k", h, 32), b.linear_bias("v", h, 32));
        let part = Rope { interleaved: true, ..Rope::of(vec![1.0, 0.6, 0.3, 0.1]) };
        let (q, k) = (b.rope(q, 32, &part), b.rope(k, 32, &part));
        let attended = b.attention(q, k, v, Attention::new(2, 1, 32));
        let y = b.linear_bias("fc1", h, 208);
        let y = b.activation("relu2", y);
        let (attended, y) = (b.linear_bias("dense", attended, 104), b.linear_bias("fc2", y, 104));
        b.add(attended, y)
    })?;
    case("fused projections".into(), &|b, x| {
        let h = b.rms_norm("n", x, 1e-6);
        let qkv = b.linear("qkv_proj", h, 128);
        let [q, k, v] = b.split(qkv, [64, 32, 32]);
        let (q, k) = (b.rope(q, 32, &rope(1.0)), b.rope(k, 32, &rope(1.0)));
        let attended = b.attention(q, k, v, Attention::new(2, 1, 32));
        let h = b.linear("o_proj", attended, 104);
        let h = b.rms_norm("m", h, 1e-6);
        let fused = b.linear("gate_up_proj", h, 400);
        let [gate, up] = b.split(fused, [200, 200]);
        b.glu("silu", gate, up)
    })?;
    case("a part of a part, turned before the others are taken".into(), &|b, x| {
        let all = b.linear("a", x, 192);
        let left = b.narrow(all, 0, 128);
        let p = b.narrow(left, 64, 64);
        let turned = b.rope(p, 32, &rope(1.1));
        let (q, r) = (b.narrow(left, 0, 64), b.narrow(all, 128, 64));
        let q = b.head_norm(Norm::rms(1e-6), "n", q, 32);
        let sum = b.add(turned, q);
        let r = b.scale(r, 0.7);
        b.add(sum, r)
    })?;
    case("parts with columns between them, one that nothing reads".into(), &|b, x| {
        let all = b.linear("a", x, 200);
        let _ = b.narrow(all, 0, 24);
        let (p, q) = (b.narrow(all, 32, 64), b.narrow(all, 104, 64));
        let turned = b.rope(q, 32, &rope(1.1));
        b.add(turned, p)
    })?;
    // None of them may be turned in its place: what is read of it elsewhere would be lost.
    case("parts that overlap".into(), &|b, x| {
        let all = b.linear("a", x, 128);
        let (p, q, r) = (b.narrow(all, 0, 64), b.narrow(all, 32, 64), b.narrow(all, 64, 64));
        let (p, q) = (b.rope(p, 32, &rope(1.0)), b.rope(q, 32, &rope(0.9)));
        let sum = b.add(p, q);
        b.add(sum, r)
    })?;
    // What was read of the value is computed again of it.
    case("a part of a value that was read before".into(), &|b, x| {
        let all = b.linear("a", x, 104);
        let sum = b.add(all, x);
        let p = b.narrow(all, 0, 64);
        let turned = b.rope(p, 32, &rope(1.0));
        let n = b.rms_norm("n", sum, 1e-6);
        let q = b.narrow(n, 40, 64);
        b.add(turned, q)
    })?;
    case("a part of a value that is read whole, and all of it".into(), &|b, x| {
        let all = b.linear("a", x, 104);
        let n = b.rms_norm("n", all, 1e-6);
        let p = b.narrow(n, 40, 64);
        let turned = b.rope(p, 32, &rope(1.0));
        let (p, copy) = (b.linear("b", turned, 104), b.narrow(n, 0, 104));
        let (q, r) = (b.linear("c", n, 104), b.linear("d", copy, 104));
        let sum = b.add(p, q);
        b.add(sum, r)
    })?;
    case("parts of the block's input, put together otherwise".into(), &|b, x| {
        let (p, q) = (b.narrow(x, 0, 64), b.narrow(x, 64, 40));
        let turned = b.rope(p, 32, &rope(1.0));
        let h = b.linear("a", q, 40);
        let h = b.cat(h, turned);
        b.cat(h, q)
    })?;
    case("cat of a value and itself".into(), &|b, x| {
        let h = b.linear("a", x, 64);
        let twice = b.cat(h, h);
        b.rope(twice, 32, &rope(1.0))
    })?;
    case("scale".into(), &|b, x| {
        let (p, q) = (b.linear("a", x, 104), b.scale(x, 0.3));
        let (p, again) = (b.scale(p, -1.5), b.scale(q, 2.0));
        let r = b.add(p, q);
        let s = b.scale(r, 0.7);
        let t = b.add(s, r);
        b.add(t, again)
    })?;
    // A gradient that two values share must not be turned for one of them.
    case("rope of a value, added to another".into(), &|b, x| {
        let (p, q) = (b.linear("a", x, 160), b.linear("b", x, 160));
        let turned = b.rope(p, 32, &rope(1.1));
        b.add(turned, q)
    })?;
    case("rope of a value, added to itself".into(), &|b, x| {
        let p = b.linear("a", x, 160);
        let turned = b.rope(p, 32, &rope(1.0));
        let twice = b.rope(turned, 32, &rope(0.9));
        let sum = b.add(twice, p);
        b.add(sum, turned)
    })?;
    case("two attentions with one query".into(), &|b, x| {
        let h = b.rms_norm("n", x, 1e-6);
        let (q, k, v) = (b.linear("q", h, 64), b.linear("k", h, 32), b.linear("v", h, 32));
        let (k, other) = (b.rope(k, 32, &rope(1.0)), b.rms_norm("m", k, 1e-6));
        let first = b.attention(q, k, v, Attention::new(2, 1, 32));
        let second = b.attention(q, other, k, Attention::new(2, 1, 32).window(Some(9)));
        b.add(first, second)
    })?;
    case("linear whose bias is listed first".into(), &|b, x| {
        let weight = |role: &str, shape: &[usize]| Weight {
            role: role.into(),
            tensor: format!("a.{role}"),
            shape: shape.to_vec(),
        };
        b.op("linear", &[x], vec![weight("bias", &[72]), weight("weight", &[72, 104])], &[], 72)
    })?;
    for activation in ["silu", "gelu", "gelu_tanh", "relu2", "sigmoid", "identity"] {
        case(format!("glu {activation}"), &|b, x| {
            let h = b.rms_norm("n", x, 1e-6);
            let (gate, up) = (b.linear("gate", h, 336), b.linear("up", h, 336));
            b.glu(activation, gate, up)
        })?;
    }
    cases.extend(heads::cases()?);
    cases.extend(experts::cases()?);
    cases.extend(recurrent::cases()?);
    cases.extend(whole_graphs(&Config::parse("{}")?)?);
    Ok(cases)
}

/// Graphs whose embedding or head is the case.
fn whole_graphs(config: &Config) -> Result<Vec<(String, ModelGraph)>> {
    type Embed<'a> = &'a dyn Fn(&mut BlockBuilder, Var, usize) -> Var;
    type Head<'a> = &'a dyn Fn(&mut BlockBuilder, Var, usize) -> Var;
    let hidden = 72;
    let graph = |vocab: usize, embed: Embed<'_>, head: Head<'_>| -> Result<ModelGraph> {
        let mut graph = GraphBuilder::decoder(hidden, vocab);
        graph.embed(|b, tokens| embed(b, tokens, vocab));
        let block = graph.block("case", |b, x| {
            let h = b.layer_norm("n", x, 1e-5);
            let h = b.linear("a", h, hidden);
            b.add(x, h)
        });
        graph.layer(block, "layers.0.");
        graph.head(|b, x| head(b, x, vocab));
        gather_predictors(graph.finish(config)?)
    };
    let table = |b: &mut BlockBuilder, tokens: Var, vocab: usize| b.embedding("embed.weight", tokens, vocab, hidden);
    let several = |b: &mut BlockBuilder, tokens: Var, vocab: usize| {
        let x = table(b, tokens, vocab);
        let x = b.scale(x, 3.0);
        b.layer_norm("embed.norm", x, 1e-5)
    };
    let and_several = |b: &mut BlockBuilder, x: Var, vocab: usize| {
        let h = b.layer_norm("norm", x, 1e-5);
        let h = b.scale(h, 0.5);
        b.lm_head("embed.weight", h, vocab)
    };
    // What one table gives, and what another one has for a part of it.
    let two_tables = |b: &mut BlockBuilder, tokens: Var, vocab: usize| {
        let left = b.embedding("left.weight", tokens, vocab + 5, 40);
        let part = b.narrow(left, 8, 32);
        let right = b.embedding("right.weight", tokens, vocab, 32);
        let right = b.add(right, part);
        b.cat(left, right)
    };
    let mut cases = vec![
        ("embedding and head of several ops".into(), graph(88, &several, &and_several)?),
        ("embedding of two tables".into(), graph(83, &two_tables, &and_several)?),
    ];
    for (name, vocab, tensor, bias, softcap) in [
        ("head with a soft cap", 88, "head.weight", None, Some(1.5)),
        ("head with a bias", 88, "head.weight", Some("head.bias"), None),
        ("vocabulary of 83", 83, "head.weight", None, None),
        ("vocabulary of 81, tied, soft cap, bias", 81, "embed.weight", Some("head.bias"), Some(2.0)),
    ] {
        let head = |b: &mut BlockBuilder, x: Var, vocab: usize| {
            let h = b.rms_norm("norm", x, 1e-6);
            b.lm_head_with(tensor, h, vocab, bias, softcap)
        };
        cases.push((name.into(), graph(vocab, &table, &head)?));
    }
    cases.push(("a stream that is wider than its hidden states".into(), wide_stream(config)?));
    Ok(cases)
}

/// What the embedding adds to the stream is passed through every layer, and the head reads the rest.
fn wide_stream(config: &Config) -> Result<ModelGraph> {
    let (hidden, more, vocab) = (72, 32, 83);
    let mut graph = GraphBuilder::decoder(hidden + more, vocab);
    graph.embed(|b, tokens| b.embedding("embed.weight", tokens, vocab, hidden + more));
    let block = graph.block("case", |b, x| {
        let [x, more] = b.split(x, [hidden, more]);
        let h = b.rms_norm("n", x, 1e-6);
        let (gate, h) = (b.linear("gate", h, 32), b.linear("a", h, hidden));
        let x = b.add(x, h);
        let own = b.glu("gelu_tanh", gate, more);
        let own = b.linear("own", own, hidden);
        let x = b.add(x, own);
        b.cat(x, more)
    });
    graph.layer(block, "layers.0.");
    graph.layer(block, "layers.1.");
    graph.head(|b, x| {
        let x = b.narrow(x, 0, hidden);
        let h = b.rms_norm("norm", x, 1e-6);
        b.lm_head("head.weight", h, vocab)
    });
    gather_predictors(graph.finish(config)?)
}

/// Weights by name, the same on both devices: values that bf16 holds. Norms have a factor near a half, those of queries and keys a
/// smaller one, so that no softmax is nearly a maximum, whose gradient rounding decides.
pub fn given(name: &str, shape: &[usize]) -> Vec<f32> {
    let seed = name.bytes().fold(7_u64, |h, b| h.wrapping_mul(0x0100_0000_01b3) ^ u64::from(b));
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    let (spread, shift) = match shape {
        // The place where xIELU bends, a number just below 0.
        [] if name.ends_with("eps") => (0.0, -1e-6),
        [] => (0.2, 0.5),
        [_] if name.ends_with("bias") => (0.2, 0.0),
        // From logits that are lost beside scores to some that have most of the sum.
        [_] if name.ends_with("sinks") => (3.0, 1.0),
        [_] if name.contains("q_norm") || name.contains("k_norm") => (0.1, 0.25),
        [_] => (0.2, 0.5),
        [.., columns] => (1.5 / (*columns as f32).sqrt(), 0.0),
    };
    let count = shape.iter().product();
    (0..count).map(|_| bf16::from_f32(shift + spread * rng.random_range(-1.0..1.0_f32)).to_f32()).collect()
}

/// An adapter on every linear whose A and B are not zero, in values that bf16 holds.
pub fn adapter(graph: &ModelGraph, zero_b: bool) -> Result<Adapter> {
    adapter_of(graph, AdapterConfig::new(8, 16.0), zero_b)
}

/// One with ranks and scales that differ from linear to linear and from layer to layer, of a graph with the usual names.
pub fn patterned_adapter(graph: &ModelGraph) -> Result<Adapter> {
    let ranks = r#"{"layers.1.self_attn.q_proj": 16, "q_proj|k_proj": 3, "layers.0.mlp.down_proj": 12}"#;
    let config = AdapterConfig {
        rank_pattern: Patterns::parse(ranks)?,
        alpha_pattern: Patterns::parse(r#"{"v_proj": 40, "mlp.*": 4}"#)?,
        exclude: Some(Targets::parse(&[r".*layers\.1\..*o_proj".into()])?),
        rslora: true,
        ..AdapterConfig::new(8, 16.0)
    };
    adapter_of(graph, config, false)
}

/// One of every expert and router too, with a rank of its own for what comes out of experts.
pub fn experts_adapter(graph: &ModelGraph) -> Result<Adapter> {
    let nodes = graph.parts().flat_map(|(_, block)| &block.nodes).filter(|node| !is_module(node));
    let matrices = nodes.flat_map(|node| node.weights.iter().filter(|w| is_parameter(node, w)));
    let config = AdapterConfig {
        parameters: matrices.map(|w| w.tensor.clone()).collect(),
        rank_pattern: Patterns::parse(r#"{"down_proj": 12}"#)?,
        ..AdapterConfig::new(3, 6.0)
    };
    adapter_of(graph, config, false)
}

/// One whose update is the difference of what it is and what it began with.
pub fn subtracting_adapter(graph: &ModelGraph) -> Result<Adapter> {
    let config = AdapterConfig { init: Init::Pissa(None), ..AdapterConfig::new(4, 8.0) };
    let mut adapter = adapter_of(graph, config, false)?;
    adapter.subtracted = adapter.params.iter().map(|p| bf16::from_f32(0.7 * p + 0.01).to_f32()).collect();
    Ok(adapter)
}

fn adapter_of(graph: &ModelGraph, config: AdapterConfig, zero_b: bool) -> Result<Adapter> {
    let mut adapter = Adapter::new(graph, config, 1)?;
    let mut rng = ChaCha8Rng::seed_from_u64(2);
    for site in adapter.sites.clone() {
        let [a, b] = adapter.ranges(&site);
        adapter.params[a].iter_mut().for_each(|p| *p = bf16::from_f32(*p).to_f32());
        let value = |_: &f32| bf16::from_f32(if zero_b { 0.0 } else { 0.1 } * rng.random_range(-1.0..1.0_f32)).to_f32();
        let values: Vec<f32> = adapter.params[b.clone()].iter().map(value).collect();
        adapter.params[b].copy_from_slice(&values);
    }
    Ok(adapter)
}

/// The CPU as a device over [`given`] weights.
pub fn cpu(graph: &ModelGraph, tokens: usize, adapter: Adapter) -> Result<CpuDevice> {
    CpuDevice::new(engine_with(graph, adapter)?, tokens)
}

/// An engine over them, with [`adapter`].
pub fn engine(graph: &ModelGraph, zero_b: bool) -> Result<Engine> {
    engine_with(graph, adapter(graph, zero_b)?)
}

fn engine_with(graph: &ModelGraph, adapter: Adapter) -> Result<Engine> {
    engine_as(graph, adapter, Numbers::Bf16)
}

/// [`cpu`] with the matrices of layers as they are once they were kept as such numbers.
pub fn cpu_as(graph: &ModelGraph, tokens: usize, adapter: Adapter, numbers: Numbers) -> Result<CpuDevice> {
    CpuDevice::new(engine_as(graph, adapter, numbers)?, tokens)
}

/// [`given`], once it was kept as such numbers.
pub fn given_as(name: &str, shape: &[usize], numbers: Numbers) -> Vec<f32> {
    let mut values = given(name, shape);
    match numbers {
        Numbers::F32 | Numbers::Bf16 => {}
        Numbers::Fp8 => {
            let columns = shape.last().copied().unwrap_or(1);
            let (codes, scales) = fp8::quantize_rows(&values, columns);
            fp8::dequantize_rows(&codes, &scales, columns, &mut values);
        }
        Numbers::Nf4 => nf4::quantize(&values).dequantize(&mut values),
        Numbers::Mxfp4 => {
            let columns = shape.last().copied().unwrap_or(1);
            let packed = mxfp4::quantize_rows(&values, columns);
            mxfp4::dequantize_rows(&packed.codes, &packed.scales, columns, &mut values);
        }
    }
    values
}

/// [`given`], matrices of experts with values that mxfp4 has, so that it keeps them.
pub fn given_in_mxfp4(name: &str, shape: &[usize]) -> Vec<f32> {
    given_as(name, shape, if shape.len() == 3 { Numbers::Mxfp4 } else { Numbers::Bf16 })
}

/// An engine over the same.
pub fn engine_as(graph: &ModelGraph, adapter: Adapter, numbers: Numbers) -> Result<Engine> {
    let tensor = |name: String, shape: &[usize], numbers: Numbers| -> Result<Tensor> {
        let values = given_as(&name, shape, numbers);
        Ok(Tensor::from_vec(values, shape, &candle_core::Device::Cpu)?.to_dtype(DType::F32)?)
    };
    let of = blocks(graph).map(|(id, prefix, nodes)| {
        let of_node = |n: &dpo_plugin_api::graph::Node| -> Result<Vec<Tensor>> {
            let kept = |w: &Weight| if is_quantized(numbers, id, n, w) { numbers } else { Numbers::Bf16 };
            n.weights.iter().map(|w| tensor(format!("{prefix}{}", w.tensor), &w.shape, kept(w))).collect()
        };
        nodes.iter().map(of_node).collect::<Result<Vec<_>>>()
    });
    let weights = of.collect::<Result<Vec<_>>>()?;
    Engine::of(graph.clone(), weights, adapter)
}

/// Examples of random tokens, best answer first: of every one the length of the prompt, then those of its answers.
pub fn examples(vocab: usize, lengths: &[&[usize]], seed: u64) -> Result<Vec<Example>> {
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    let mut ids = |n: usize| (0..n).map(|_| rng.random_range(0..vocab as u32)).collect::<Vec<u32>>();
    let mut example = |lengths: &[usize]| {
        let mut parts = lengths.iter().map(|n| ids(*n));
        let prompt = parts.next().unwrap_or_default();
        let behind = (0..lengths.len() - 1).rev().map(|n| n as f64);
        Example::new(prompt, parts.zip(behind).map(|(ids, label)| Answer::new(ids, label)).collect(), "")
    };
    lengths.iter().map(|lengths| example(lengths)).collect()
}

/// `‖a − b‖ / ‖b‖`; NaN where a value is.
pub fn distance(a: &[f32], b: &[f32]) -> f64 {
    let squares = |v: &mut dyn Iterator<Item = f64>| v.map(|x| x * x).sum::<f64>().sqrt();
    let difference = squares(&mut a.iter().zip(b).map(|(a, b)| f64::from(*a) - f64::from(*b)));
    difference / squares(&mut b.iter().map(|b| f64::from(*b))).max(1e-12)
}
