//! Mistakes that authors of model families make: `check_model` names each with its block, its op and what it should be.

#![allow(clippy::unwrap_used)] // In a test, a panic is the report.

use std::panic::{AssertUnwindSafe, catch_unwind};

use dpo_plugin_api::graph::Node;
use dpo_plugin_api::prelude::*;
use dpo_plugin_api::testing::{check_config, check_model};

const CONFIG: &str = r#"{"hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 1, "vocab_size": 16}"#;

/// A Llama with a mistake.
struct Spoiled {
    name: &'static str,
    spoil: fn(&mut ModelGraph),
}

impl ModelFamily for Spoiled {
    fn name(&self) -> &'static str {
        self.name
    }

    fn summary(&self) -> &'static str {
        "for tests"
    }

    fn claims(&self) -> &'static [&'static str] {
        &["SpoiledForCausalLM"]
    }

    fn example_config(&self) -> &'static str {
        CONFIG
    }

    fn graph(&self, config: &Config) -> Result<ModelGraph> {
        let mut graph = Decoder::read(config)?.graph(config)?;
        (self.spoil)(&mut graph);
        Ok(graph)
    }
}

/// What a check panics with.
fn said(check: impl FnOnce() -> ModelGraph) -> String {
    let panic = catch_unwind(AssertUnwindSafe(check)).expect_err("the mistake is taken");
    panic.downcast_ref::<String>().unwrap().clone()
}

fn node<'a>(graph: &'a mut ModelGraph, op: &str) -> &'a mut Node {
    graph.blocks[0].nodes.iter_mut().find(|n| n.op == op).unwrap()
}

fn set(graph: &mut ModelGraph, op: &str, attr: &str, value: Value) {
    node(graph, op).attrs.insert(attr.into(), value);
}

#[test]
fn a_sound_family_passes() {
    assert_eq!(check_model(&Spoiled { name: "sound", spoil: |_| {} }).layers.len(), 2);
}

type Mistake = (fn(&mut ModelGraph), &'static [&'static str]);

#[test]
fn mistakes_are_named_with_their_place_and_what_should_be() {
    let mistakes: &[Mistake] = &[
        (
            |g| node(g, "rms_norm").op = "rmsnorm".into(),
            &["block 'decoder': unknown op 'rmsnorm'", "did you mean 'rms_norm'"],
        ),
        (
            |g| set(g, "rms_norm", "epsilon", json!(1e-6)),
            &[
                "block 'decoder': op 'rms_norm' (input_layernorm.weight): unknown attribute 'epsilon'",
                "did you mean 'eps'",
            ],
        ),
        (
            |g| set(g, "attention", "window", json!("all")),
            &["block 'decoder': op 'attention': attribute 'window' should be a whole number above 0, is \"all\""],
        ),
        (
            |g| set(g, "glu", "activation", json!("swiglu")),
            &["op 'glu': attribute 'activation' should be one of silu, gelu", "is \"swiglu\""],
        ),
        (
            |g| g.blocks[0].nodes[13].weights[0].shape.reverse(),
            &["block 'decoder': op 'linear' (mlp.down_proj.weight): weight", "is [12, 8], needs [8, 12]"],
        ),
        (|g| set(g, "attention", "kv_heads", json!(3)), &["op 'attention': 2 heads cannot share 3 key heads"]),
        (
            |g| {
                let rope = Node { inputs: vec![0], width: 8, ..node(g, "rope").clone() };
                g.head.nodes.iter_mut().for_each(|n| n.inputs[0] += 1);
                g.head.nodes.insert(0, rope);
                g.head.output += 1;
            },
            &["block 'head': the head has the op 'rope'", "in layers alone"],
        ),
        (|g| g.blocks[0].output = 2, &["block 'decoder': op 'add': its value should be read"]),
        (|g| g.blocks[0].output = 3, &["block 'decoder': returns 4 columns, needs the 8 of the residual stream"]),
        (
            |g| {
                g.head.nodes.pop();
                g.head.output -= 1;
            },
            &["block 'head': the head should end in the op 'lm_head', ends in 'rms_norm'"],
        ),
        (
            |g| g.blocks[0].nodes.iter_mut().filter(|n| n.op == "linear").for_each(|n| n.op = "lm_head".into()),
            &["block 'decoder': op 'lm_head' should end the head, and be nowhere else"],
        ),
        (
            |g| g.blocks[0].nodes[2].weights[0].tensor = "self_attn.v_proj.weight".into(),
            &["block 'decoder'", "two linears of the name 'model.layers.0.self_attn.v_proj'"],
        ),
        (
            |g| g.layers[1].prefix = g.layers[0].prefix.clone(),
            &[
                "two linears of the name 'model.layers.0.self_attn.q_proj'",
                "2 layers have the prefix 'model.layers.0.'",
            ],
        ),
        (
            |g| g.layouts.push(vec![("layers.1.".into(), "layers.0.".into())]),
            &["layout 0 gives the tensors 'model.layers.0.input_layernorm.weight' and", "the same name"],
        ),
        (|g| g.unused_tensors.push("*".into()), &["unused tensors '*' should name a part"]),
        (|g| g.layers[1].block = 7, &["layer 'model.layers.1.' is of block 7, which is not there"]),
        (|g| g.requires.push("telepathy".into()), &["requires the feature 'telepathy'"]),
    ];
    for (number, (spoil, parts)) in mistakes.iter().enumerate() {
        let said = said(|| check_model(&Spoiled { name: "spoiled", spoil: *spoil }));
        assert!(said.starts_with("spoiled: ") && parts.iter().all(|p| said.contains(p)), "mistake {number}: {said}");
    }
}

#[test]
fn names_and_keys_are_judged_as_the_host_does() {
    let sound = Spoiled { name: "sound", spoil: |_| {} };
    let with = |key: &str| CONFIG.replacen('{', &format!("{{{key}, "), 1);
    let told = said(|| check_config(&sound, &with("\"logit_scale\": 0.5")));
    assert!(told.contains("key 'logit_scale' (0.5) is not understood by the plugin 'sound'"), "{told}");
    let told = said(|| check_config(&sound, &with("\"colour\": \"red\"")));
    assert!(told.contains("not known to the plugin 'sound', and taken for harmless: 'colour' (\"red\")"), "{told}");
    check_config(&sound, &with("\"bos_token_id\": 1, \"attention_dropout\": 0.1"));
    let told = said(|| check_model(&Spoiled { name: "No Name", spoil: |_| {} }));
    assert!(told.contains("the name 'No Name' should be of lower-case letters"), "{told}");
}
