//! What a `config.json` is refused for, and what it is not: files as they are published, with keys that change nothing, that may
//! change everything, and that nobody knows.
#![allow(clippy::unwrap_used)] // In a test, a panic is the report.

use dpo_core::error::Error;
use dpo_hub::model::{Model, ModelOptions};
use dpo_plugins::Registry;
use dpo_tests::{Sandbox, golden, log};
use serde_json::{Value, json};

fn sandbox() -> Sandbox {
    Sandbox::new(env!("CARGO_BIN_EXE_dpo-host-test"))
}

/// A small Llama, Qwen2 or Qwen3 with further keys.
fn config(architecture: &str, more: &Value) -> Value {
    let mut config = json!({"architectures": [architecture], "hidden_size": 64, "intermediate_size": 128, "vocab_size": 320,
        "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "hidden_act": "silu",
        "max_position_embeddings": 512, "rms_norm_eps": 1e-6, "rope_theta": 10000.0, "tie_word_embeddings": true});
    config.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
    config
}

/// Opens a folder of some name with a config alone.
fn opened_as(folder: &str, config: &Value, ignored: &[&str]) -> Result<(), Error> {
    let (registry, temporary) = (Registry::discover(&[], None), tempfile::tempdir().unwrap());
    let folder = temporary.path().join(folder);
    std::fs::create_dir_all(&folder).unwrap();
    std::fs::write(folder.join("config.json"), config.to_string()).unwrap();
    let ignored_keys = ignored.iter().map(|key| (*key).to_owned()).collect();
    Model::open(&registry, &folder, &ModelOptions { plugin: None, ignored_keys, router_aux_loss: Default::default() })
        .map(drop)
}

fn opened(architecture: &str, more: &Value) -> Result<(), Error> {
    opened_as("model", &config(architecture, more), &[])
}

/// What is said of a config that is not refused.
fn told(s: &Sandbox, config: &Value, more: &[&str]) -> String {
    let file = s.write("told/config.json", &config.to_string());
    s.ok(&[&["describe", "llama3", "--config", &file], more].concat()).stderr
}

#[test]
fn published_configs_are_read_without_a_word() {
    let llama_2_13b = json!({"_name_or_path": "meta-llama/Llama-2-13b-hf", "bos_token_id": 1, "eos_token_id": 2,
        "initializer_range": 0.02, "model_type": "llama", "pretraining_tp": 2, "rope_scaling": null,
        "torch_dtype": "float16", "transformers_version": "4.32.0.dev0", "use_cache": true});
    let smollm2 = json!({"attention_bias": false, "attention_dropout": 0.0, "bos_token_id": 1, "eos_token_id": 2,
        "initializer_range": 0.041666666666666664, "is_llama_config": true, "mlp_bias": false, "model_type": "llama",
        "pad_token_id": 2, "pretraining_tp": 1, "rope_interleaved": false, "rope_scaling": null, "torch_dtype": "bfloat16",
        "transformers_version": "4.42.3", "transformers.js_config": {"kv_cache_dtype": {"q4f16": "float16"}}, "use_cache": true});
    let yi = json!({"auto_map": {"AutoConfig": "configuration_yi.YiConfig", "AutoModelForCausalLM": "modeling_llama.LlamaForCausalLM"},
        "max_sequence_length": 4096, "model_type": "llama", "unk_token_id": 0, "note": 1, "use_sdpa": true, "flash_attn": true});
    let legacy = json!({"sep_token_id": null, "cls_token_id": 3, "mask_token_id": 4, "decoder_start_token_id": 5, "num_labels": 2,
        "is_decoder": true, "prefix": "x", "pruned_heads": {"1": [0]}, "tf_legacy_loss": true, "do_sample": true, "temperature": 0.7,
        "top_p": 0.9, "repetition_penalty": 1.1, "max_length": 20, "gradient_checkpointing": true, "neftune_noise_alpha": 5.0,
        "model_name": "m", "name_or_path": "n", "license": "l", "model_max_length": 9, "max_seq_len": 9, "seq_length": 9,
        "context_length": 9, "tokenizer_padding_side": "left", "layer_types": ["full_attention", "full_attention"],
        "is_causal": true, "num_experts_per_tok": 0, "n_routed_experts": null, "renormalize_logits": true, "unsloth_fixed": true,
        "guidance_scale": 2.0, "attention_probs_dropout_prob": 0.1, "resid_pdrop": 0.1, "image_token_id": 7,
        "quantization_config": {"load_in_4bit": false, "load_in_8bit": false, "quant_method": "bitsandbytes"}});
    // At what transformers has by itself, a key changes nothing.
    let neutral = json!({"residual_multiplier": 1.0, "logit_scale": 1, "attn_logit_softcapping": null, "final_logit_softcapping": 0.0,
        "partial_rotary_factor": 1.0, "clip_qkv": null, "use_qk_norm": false, "mup": {}, "num_local_experts": 0, "alibi": false});
    let s = sandbox();
    for (name, more) in
        [("Llama-2-13b", &llama_2_13b), ("SmolLM2", &smollm2), ("legacy", &legacy), ("neutral", &neutral)]
    {
        assert_eq!(told(&s, &config("LlamaForCausalLM", more), &[]), "", "{name}");
    }
    // Its own class of the same name as ours reads nothing else; a key that nobody knows is told.
    let said = told(&s, &config("LlamaForCausalLM", &yi), &[]);
    assert!(
        said.starts_with(
            "warning: config.json: not known to the plugin 'llama3', and taken for harmless: 'note' (1)\n"
        ),
        "{said}"
    );
    let qwen =
        json!({"use_sliding_window": false, "sliding_window": 131_072, "attention_bias": true, "rope_scaling": null});
    opened("Qwen2ForCausalLM", &qwen).unwrap();
    opened("Qwen3ForCausalLM", &qwen).unwrap();
}

/// Families know the published files that they name as their example.
#[test]
fn every_familys_example_is_read_without_a_word() {
    let s = sandbox();
    let families = Registry::discover(&[], None).families;
    assert!(families.len() > 30, "{} families", families.len());
    for family in families {
        let said = s.ok(&["describe", &family.name]);
        assert_eq!(said.stderr, "", "{}", family.name);
    }
}

#[test]
fn keys_that_may_change_the_model_are_refused_all_at_once() {
    let bad = json!({"logits_scaling": 8.0, "attn_logit_softcapping": 50.0, "residual_multiplier": 0.22, "clip_qkv": 8,
        "use_qk_norm": true, "num_experts": 8, "mup_base": 256, "alibi": true, "window_pattern": 4, "use_rope": false,
        "rope_scaling": {"rope_type": "linear", "factor": 2.0, "attn_extra": 3.0, "finetuned": true}, "bos_token_id": 1, "colour": "red"});
    let error = opened("LlamaForCausalLM", &bad).unwrap_err().to_string();
    for key in [
        "logits_scaling' (8.0)",
        "attn_logit_softcapping",
        "residual_multiplier",
        "clip_qkv",
        "use_qk_norm",
        "num_experts",
        "mup_base",
        "alibi",
        "window_pattern",
        "use_rope' (false)",
        "rope_scaling.attn_extra' (3.0)",
    ] {
        assert!(error.contains(&format!("'{}", key)), "{key}: {error}");
        assert!(error.contains(&format!("--ignore-config-key {}", key.split('\'').next().unwrap())), "{key}: {error}");
    }
    assert!(error.contains("not understood by the plugin 'llama3'"), "{error}");
    for harmless in ["finetuned", "bos_token_id", "colour"] {
        assert!(!error.contains(harmless), "{error}");
    }
    // Attention in both directions: of no family, also as a wrapper has it.
    for architecture in ["LlamaForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM"] {
        let error = opened(architecture, &json!({"is_causal": false})).unwrap_err().to_string();
        assert!(error.contains("key 'is_causal' (false) is not understood"), "{error}");
        opened(architecture, &json!({"is_causal": true})).unwrap();
    }
    // Code of its own may read any key.
    let own =
        json!({"auto_map": {"AutoModelForCausalLM": "modeling_other.OtherForCausalLM"}, "colour": "red", "top_k": 3});
    let error = opened("LlamaForCausalLM", &own).unwrap_err().to_string();
    assert!(
        error.contains("key 'colour' (\"red\") is not") && error.contains("code of its own, OtherForCausalLM"),
        "{error}"
    );
}

#[test]
fn the_users_word_is_taken_and_kept() {
    let s = sandbox();
    let strange = config("LlamaForCausalLM", &json!({"logit_scale": 0.5, "colour": "red", "shape": {"a": 1}}));
    let said = told(&s, &strange, &["--ignore-config-key", "logit_scale", "--ignore-config-key", "colour"]);
    let lines: Vec<&str> = said.lines().collect();
    assert_eq!(
        lines[0],
        "note: config.json: left out of account, as --ignore-config-key says: 'colour' (\"red\"), 'logit_scale' (0.5)"
    );
    assert!(lines[1].contains("'shape' ({\"a\":1})") && lines[2].contains("help: "), "{said}");

    let case = golden("trajectories/qwen2");
    dpo_tests::copy(&case.join("model"), std::path::Path::new(&s.path("model")));
    let text = std::fs::read_to_string(case.join("model/config.json")).unwrap();
    let mut keys: Value = serde_json::from_str(&text).unwrap();
    keys["logit_scale"] = json!(0.5);
    s.write("model/config.json", &keys.to_string());
    let (model, rows, run) = (s.path("model"), case.join("prefs.jsonl").display().to_string(), s.path("run"));
    let flags = "--device cpu --max-steps 2 --save-steps 1 --batch-size 4 --logging-steps 1";
    let train = ["train", "--model", &model, "--dataset", &rows, "--output-dir", &run];
    let train = [&train[..], &flags.split_whitespace().collect::<Vec<_>>()].concat();
    let with = |more: &[&'static str]| [&train[..], more].concat();
    s.refuses(&train, &["'logit_scale' (0.5)", "--ignore-config-key logit_scale"]);
    let said = s.ok(&with(&["--ignore-config-key", "logit_scale"])).stderr;
    assert_eq!(said.matches("left out of account").count(), 1, "{said}");
    // What is printed to go on with works.
    assert_eq!(said.matches(" --ignore-config-key logit_scale").count(), 3, "{said}");
    assert_eq!(log(&run).len(), 2);
    let args: Value = serde_json::from_str(&std::fs::read_to_string(format!("{run}/args.json")).unwrap()).unwrap();
    assert_eq!(args["ignore_config_key"], json!(["logit_scale"]), "{args:#}");
    let other =
        ["--ignore-config-key", "logit_scale", "--ignore-config-key", "colour", "--resume-from-checkpoint", "latest"];
    s.refuses(&with(&other), &["--ignore-config-key was [\"logit_scale\"], is [\"logit_scale\",\"colour\"]"]);
}

#[test]
fn quantised_checkpoints_are_named_with_what_to_take() {
    let refused = |folder: &str, how: Value| {
        let config = config("Qwen2ForCausalLM", &json!({"quantization_config": how}));
        opened_as(folder, &config, &[]).unwrap_err().to_string()
    };
    let cases = [
        (
            "models--Qwen--Qwen2.5-7B-Instruct-AWQ/snapshots/0f",
            json!({"bits": 4, "group_size": 128, "quant_method": "awq", "version": "GEMV"}),
            "quantised (awq, 4 bits): its layout is gemv; gemm is read",
            "Qwen/Qwen2.5-7B-Instruct, by its name",
        ),
        (
            "models--Qwen--Qwen2.5-7B-Instruct-GPTQ-Int4/snapshots/0f",
            json!({"bits": 3, "quant_method": "gptq"}),
            "quantised (gptq, 3 bits): 4 and 8 bits are read",
            "Qwen/Qwen2.5-7B-Instruct, by",
        ),
        (
            "models--unsloth--Llama-3.2-1B-Instruct-unsloth-bnb-4bit/snapshots/0f",
            json!({"load_in_8bit": true, "quant_method": "bitsandbytes"}),
            "quantised (bitsandbytes): its 8 bits are int8",
            "unsloth/Llama-3.2-1B-Instruct, by",
        ),
        (
            "Qwen3-8B-FP8",
            json!({"quant_method": "fp8", "fmt": "e5m2", "weight_block_size": [128, 128]}),
            "quantised (fp8): fmt is e5m2; e4m3 is read",
            "bf16: Qwen3-8B, by",
        ),
        (
            "models/Qwen/Qwen2___5-7B-Instruct-GPTQ-Int8",
            json!({"bits": 8, "quant_method": "gptq", "checkpoint_format": "marlin"}),
            "8 bits): its format is marlin",
            "bf16: Qwen2.5-7B-Instruct, by",
        ),
        (
            "other",
            json!({"quant_method": "compressed-tensors", "format": "nvfp4-pack-quantized"}),
            "quantised (compressed-tensors): its format is nvfp4-pack-quantized",
            "made from, in bf16",
        ),
    ];
    for (folder, how, what, help) in cases {
        let error = refused(folder, how);
        assert!(error.contains(what) && error.contains(help), "{error}");
    }
    let wrapped =
        json!({"architectures": ["UnheardOf"], "text_config": {"quantization_config": {"quant_method": "hqq"}}});
    assert!(opened_as("m", &wrapped, &[]).unwrap_err().to_string().contains("quantised (hqq)"));
    let other = config("LlamaForCausalLM", &json!({"compression_config": {"format": "pack"}}));
    assert!(opened_as("m", &other, &[]).unwrap_err().to_string().contains("quantised (in an unknown way)"));
    opened_as("m", &other, &["compression_config"]).unwrap();
    let read = json!({"quant_method": "gptq", "bits": 4, "group_size": 128, "desc_act": false});
    opened_as("m", &config("LlamaForCausalLM", &json!({"quantization_config": read})), &[]).unwrap();
}

#[test]
fn an_architecture_of_nobody_is_told_why() {
    for (architecture, why) in [
        ("T5ForConditionalGeneration", "an encoder beside its decoder"),
        ("DeepseekV32ForCausalLM", "multi-head latent attention"),
        ("DbrxForCausalLM", "experts with a router"),
        ("JetMoeForCausalLM", "experts with a router"),
        ("MambaForCausalLM", "recurrent layers"),
        ("Qwen2_5_VLForConditionalGeneration", "takes images"),
        ("BertForMaskedLM", "it is an encoder"),
        ("LlamaForSequenceClassification", "classes or scores"),
    ] {
        let error = opened(architecture, &json!({})).unwrap_err().to_string();
        assert!(error.contains(&format!("no plugin answers for the architecture '{architecture}': ")), "{error}");
        assert!(error.contains(why) && error.contains("docs/plugins.md"), "{error}");
    }
    let error = opened("Qwen4ForCausalLM", &json!({})).unwrap_err().to_string();
    assert!(error.contains("'Qwen4ForCausalLM'\n") || error.contains("recurrent"), "{error}");
    let error = opened("LLaMAForCausalLM", &json!({})).unwrap_err().to_string();
    assert!(error.contains("did you mean LlamaForCausalLM of 'llama3'?"), "{error}");
}
