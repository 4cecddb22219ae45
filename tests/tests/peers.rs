//! Arguments of ms-swift, LLaMA-Factory and TRL: that all of them have a fate here, what is said of them, and that files of those
//! tools train what they train there.
#![allow(clippy::unwrap_used)] // In a test, a panic is the report.

use std::collections::BTreeMap;
use std::path::Path;

use dpo_host::args::peers::{Kind, PEERS, Peer};
use dpo_tests::{Ended, Sandbox, golden, log};
use serde_json::{Value, json};

/// The arguments of a tool with their defaults, as `tests/oracle/peer_arguments.py` found them in its wheel.
fn listed(peer: &Peer) -> BTreeMap<String, String> {
    let text = std::fs::read_to_string(golden("peers").join(file(peer, "tsv"))).unwrap();
    let line = |line: &str| {
        let (name, default) = line.split_once('\t').unwrap_or((line, ""));
        (name.to_owned(), default.to_owned())
    };
    text.lines().filter(|l| !l.starts_with('#')).map(line).collect()
}

fn file(peer: &Peer, extension: &str) -> String {
    format!("{}.{extension}", peer.name.to_lowercase())
}

#[test]
fn every_argument_of_a_tool_has_a_fate() {
    for peer in PEERS {
        let listed = listed(peer);
        assert!(listed.len() > 200, "{}", peer.name);
        let missing: Vec<&String> = listed.keys().filter(|name| peer.argument(name).is_none()).collect();
        assert!(missing.is_empty(), "{}: {missing:?}", peer.name);
        for argument in peer.arguments() {
            let Some(default) = listed.get(argument.name) else { continue };
            let told = argument.default.unwrap_or_default();
            let name = format!("{} {}", peer.name, argument.name);
            // What is obeyed under a name of ours may leave its default to us, and what is named does nothing.
            match argument.kind() {
                Kind::Refused => {
                    assert!(
                        argument.is_usual(std::slice::from_ref(default)),
                        "{name} is refused by its default {default}"
                    )
                }
                _ => {
                    assert!(
                        told.is_empty() || argument.is_usual(std::slice::from_ref(default)),
                        "{name}: {told} is not {default}"
                    )
                }
            }
        }
    }
}

#[test]
fn what_arguments_become_are_flags() {
    let help = sandbox().ok(&["train", "--help"]).stdout;
    let flags: Vec<&str> = help.split_whitespace().filter_map(|w| w.strip_prefix("--")).collect();
    let known = |flag: &str| flags.contains(&flag);
    for peer in PEERS {
        for flag in peer.arguments().filter_map(|argument| argument.flag()) {
            assert!(known(&flag), "{}: --{flag}", peer.name);
        }
        // Lines that name other commands have flags of these.
        let page: String = peer.page().lines().filter(|line| !line.contains("dpo-host ")).collect();
        for flag in page.split(['`', ' ']).filter_map(|word| word.strip_prefix("--")) {
            assert!(known(flag.trim_end_matches([',', ';', ':'])), "{}: --{flag}", peer.name);
        }
    }
}

/// `DPO_HOST_BLESS=1 cargo test --release -p dpo-tests --test peers pages` writes them anew.
#[test]
fn pages_show_the_tables() {
    for peer in PEERS {
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../docs").join(file(peer, "md"));
        let text = std::fs::read_to_string(&path).unwrap();
        let (begin, end) = ("<!-- The table begins. -->\n\n", "<!-- The table ends. -->\n");
        let (before, rest) = text.split_once(begin).unwrap();
        let (table, after) = rest.split_once(end).unwrap();
        if std::env::var_os("DPO_HOST_BLESS").is_some() {
            std::fs::write(&path, format!("{before}{begin}{}{end}{after}", peer.page())).unwrap();
        } else {
            assert!(table == peer.page(), "{} is not the table: write it anew with DPO_HOST_BLESS=1", path.display());
        }
    }
}

fn sandbox() -> Sandbox {
    Sandbox::new(env!("CARGO_BIN_EXE_dpo-host-test"))
}

fn model() -> String {
    golden("trajectories").join("qwen2/model").display().to_string()
}

fn rows() -> String {
    golden("trajectories").join("qwen2/prefs.jsonl").display().to_string()
}

/// The args.json of a run has these values.
fn has(folder: &str, expected: Value) {
    let text = std::fs::read_to_string(Path::new(folder).join("args.json")).unwrap();
    let args: Value = serde_json::from_str(&text).unwrap();
    for (name, value) in expected.as_object().unwrap() {
        assert_eq!(&args[name], value, "{name} in {folder}");
    }
}

/// The folders in a folder, in their order.
fn folders(folder: &str) -> Vec<String> {
    let mut names: Vec<String> =
        std::fs::read_dir(folder).unwrap().map(|e| e.unwrap().file_name().into_string().unwrap()).collect();
    names.sort();
    names
}

/// Runs a line of `swift rlhf` behind `swift rlhf`, with a model, rows and folder of this machine.
fn swift(s: &Sandbox, line: &str) -> (Ended, String) {
    let (model, rows) = (model(), rows());
    let given = ["train", "--model", &model, "--dataset", &rows, "--output_dir", "output"];
    let ended = s.ok(&given.into_iter().chain(line.split_whitespace()).collect::<Vec<_>>());
    let newest = folders(&s.path("output")).into_iter().rfind(|name| name.starts_with('v'));
    let newest = format!("{}/{}", s.path("output"), newest.unwrap_or_default());
    (ended, newest)
}

#[test]
fn a_script_of_ms_swift_trains_what_it_trains_there() {
    let s = sandbox();
    let (ended, first) = swift(
        &s,
        "--rlhf_type dpo --tuner_type lora --load_from_cache_file true --split_dataset_ratio 0.01 --torch_dtype bfloat16 \
         --num_train_epochs 1 --per_device_train_batch_size 1 --per_device_eval_batch_size 1 --learning_rate 1e-4 \
         --lora_rank 8 --lora_alpha 32 --target_modules all-linear --gradient_accumulation_steps 16 --eval_steps 50 \
         --save_steps 50 --save_total_limit 2 --logging_steps 5 --max_length 2048 --warmup_ratio 0.05 \
         --dataloader_num_workers 4 --rpo_alpha 0.1 --dataset_num_proc 4",
    );
    for named in ["load_from_cache_file", "per_device_eval_batch_size", "dataloader_num_workers", "dataset_num_proc"] {
        let note = ended.stderr.lines().find(|l| l.contains(named) && l.contains("is ignored: "));
        assert!(note.is_some(), "no reason for {named}:\n{}", ended.stderr);
    }
    let expected = json!({
        "split_dataset_ratio": 0.01, "dtype": "bfloat16", "num_epochs": 1.0, "batch_size": 16, "learning_rate": 1e-4,
        "lora_rank": 8, "lora_alpha": 32.0, "target_modules": ["all-linear"], "eval_steps": 50, "save_steps": 50,
        "save_total_limit": 2, "logging_steps": 5, "max_length": 2048, "warmup_ratio": 0.05, "rpo_alpha": 0.1,
        "lr_scheduler": "cosine", "weight_decay": 0.1, "adam_beta2": 0.95, "loss": ["sigmoid"],
    });
    has(&first, expected);
    // Every run has a folder of its own, also with several processes; without its defaults are its own.
    let (_, second) = swift(&s, "--rlhf_type dpo --max_steps 1 --device cpu --gpus 2 --target_modules q_proj,v_proj");
    let more =
        json!({"num_epochs": 3.0, "batch_size": 16, "max_length": "auto", "target_modules": ["q_proj", "v_proj"]});
    has(&second, more);
    let names = folders(&s.path("output"));
    assert!(names.len() == 2 && names[0].starts_with("v0-") && names[1].starts_with("v1-"), "{names:?}");
    // A resumed run goes on in its folder.
    let checkpoint = format!("{second}/checkpoint-1");
    let (ended, _) = swift(
        &s,
        &format!(
            "--rlhf_type dpo --max_steps 1 --resume_from_checkpoint {checkpoint} --device cpu \
        --target_modules q_proj,v_proj"
        ),
    );
    assert!(
        ended.stderr.contains("goes on in its own folder") && folders(&s.path("output")).len() == 2,
        "{}",
        ended.stderr
    );
    // `latest` is the newest run's, and what args.json says of the folder is where it is.
    let last = format!("{}/{}", s.path("output"), folders(&s.path("output"))[1]);
    let before = std::fs::read(format!("{last}/adapter_model.safetensors")).unwrap();
    let (ended, _) = swift(
        &s,
        "--rlhf_type dpo --max_steps 3 --resume_from_checkpoint true --device cpu --target_modules q_proj,v_proj",
    );
    assert!(ended.stderr.contains("prolonged from 1 to 3 steps"), "{}", ended.stderr);
    assert_eq!(folders(&s.path("output")).len(), 2);
    assert_ne!(before, std::fs::read(format!("{last}/adapter_model.safetensors")).unwrap());
    let named = format!("output/{}", folders(&s.path("output"))[1]);
    has(&last, json!({"output_dir": named, "add_version": false}));
    let (ended, _) = swift(
        &s,
        "--rlhf_type dpo --max_steps 1 --add_version false --loss_type sigmoid bco_pair sft \
        --loss_weights 0.8 0.2 1.0 --rpo_alpha 0.0 --freeze_vit true --deepspeed zero3 --save_only_model true",
    );
    assert!(ended.stderr.contains("bco_pair: ms-swift subtracts"), "{}", ended.stderr);
    has(&s.path("output"), json!({"loss": ["sigmoid", "bco_pair", "sft"], "loss_weights": [0.8, 0.2, 1.0]}));
}

/// Kinds of LoRA under the tools' names.
#[test]
fn kinds_of_lora_are_translated() {
    let s = sandbox();
    let (ended, run) = swift(
        &s,
        "--rlhf_type dpo --max_steps 1 --device cpu --lorap_lr_ratio 16 --init_weights pissa_niter_4 --lora_dropout 0.1 --lora_rank 2",
    );
    has(&run, json!({"loraplus_lr_ratio": 16.0, "init_lora_weights": "pissa_niter_4", "lora_dropout": 0.0}));
    assert!(ended.stderr.contains("--lora_dropout 0.1 is ignored: dropout is off"), "{}", ended.stderr);
    let (model, rows, output) = (model(), rows(), s.path("trl"));
    let trl = "--use_peft --lora_r 2 --use_dora --lora_dropout 0.1 --disable_dropout false --max_steps 1 --device cpu";
    let given = ["train", "--model_name_or_path", &model, "--dataset_name", &rows, "--output_dir", &output];
    s.ok(&given.into_iter().chain(trl.split_whitespace()).collect::<Vec<_>>());
    has(&output, json!({"use_dora": true, "lora_dropout": 0.1, "disable_dropout": false, "lora_rank": 2}));
    let file = format!(
        "stage: dpo\nmodel_name_or_path: {model}\ndataset: {rows}\nfinetuning_type: lora\nlora_rank: 2\npissa_init: true\npissa_iter: 4\n\
         pissa_convert: true\nloraplus_lr_ratio: 4\nmax_steps: 1\noutput_dir: factory\ntemplate: qwen\n"
    );
    let file = s.write("factory.yaml", &file);
    s.ok(&["train", &file, "--device", "cpu"]);
    has(&s.path("factory"), json!({"init_lora_weights": "pissa_niter_4", "loraplus_lr_ratio": 4.0}));
}

/// A file of `swift rlhf`, which is its first argument there.
#[test]
fn a_file_of_ms_swift_is_taken_as_its_flags() {
    let s = sandbox();
    let text = format!(
        "rlhf_type: dpo\nmodel: {}\ntuner_type: lora\ndataset:\n  - {}\nload_from_cache_file: true\n\
         split_dataset_ratio: 0.1\ntorch_dtype: float32\nnum_train_epochs: 1\nper_device_train_batch_size: 1\n\
         gradient_accumulation_steps: 2\nlearning_rate: 1e-4\nlora_rank: 4\ntarget_modules: all-linear\nmax_length: 256\n\
         output_dir: {}\nwarmup_ratio: 0.05\ncolumns:\n  extra: unused\ngradient_checkpointing_kwargs: {{a: 1}}\n",
        model(),
        s.write(
            "rows.jsonl",
            &std::fs::read_to_string(rows()).unwrap().replace("{\"messages\"", "{\"extra\": \"s\", \"messages\"")
        ),
        s.path("output"),
    );
    let file = s.write("dpo.yaml", &text);
    s.ok(&["train", &file, "--lora_rank", "2"]);
    let run = format!("{}/{}", s.path("output"), folders(&s.path("output"))[0]);
    has(
        &run,
        json!({"batch_size": 2, "lora_rank": 2, "dtype": "float32", "columns": r#"{"extra":"unused"}"#, "max_length": 256}),
    );
    let file = s.write("env.yaml", &format!("ENV:\n  CUDA_VISIBLE_DEVICES: 0\n{text}"));
    s.refuses(&["train", "--config", &file], &["env.yaml:1: ", "a file sets no variables"]);
}

#[test]
fn a_type_of_training_is_a_loss() {
    let s = sandbox();
    for (line, expected) in [
        (
            "--rlhf_type cpo --tuner_type lora --deepspeed zero2",
            json!({"loss": ["cpo"], "beta": 0.1, "loss_option": ["cpo_alpha=1.0"]}),
        ),
        (
            "--rlhf_type simpo",
            json!({"loss": ["simpo"], "beta": null, "loss_option": ["cpo_alpha=1.0", "simpo_gamma=1"]}),
        ),
        (
            "--rlhf_type cpo --loss_type simpo --cpo_alpha 0.5 --simpo_gamma 0.7",
            json!({"loss": ["simpo"], "beta": 0.1,
            "loss_option": ["cpo_alpha=0.5", "simpo_gamma=0.7"]}),
        ),
        ("--rlhf_type orpo --beta 0.2 --label_smoothing 0", json!({"loss": ["orpo"], "beta": 0.2, "loss_option": []})),
        (
            "--rlhf_type dpo --loss_type discopop --desirable_weight 2",
            json!({"loss": ["discopop"],
            "loss_option": ["discopop_tau=0.05"]}),
        ),
    ] {
        let (ended, folder) = swift(&s, &format!("{line} --max_steps 1"));
        has(&folder, expected);
        assert_eq!(ended.stderr.contains("only the loss kto has it"), line.contains("desirable"), "{}", ended.stderr);
    }
}

/// An adapter that is trained on has the model as its reference there, unless it is the reference's, too.
#[test]
fn adapters_keep_their_reference() {
    let s = sandbox();
    let start = golden("trajectories").join("qwen2/init_adapter").display().to_string();
    let first = |folder: &str| log(folder)[0]["loss"].as_f64().unwrap() - 2.0_f64.ln();
    let (_, alone) = swift(&s, &format!("--rlhf_type dpo --max_steps 1 --adapters {start}"));
    has(&alone, json!({"init_adapter": start, "ref_model": model(), "ref_adapter": null}));
    assert!(first(&alone).abs() > 1e-4, "its reference is not the model");
    let (_, both) = swift(&s, &format!("--rlhf_type dpo --max_steps 1 --adapters {start} --ref_adapters {start}"));
    has(&both, json!({"init_adapter": start, "ref_model": null}));
    assert!(first(&both).abs() < 1e-6, "its reference is not the start");
    let (_, free) = swift(&s, &format!("--rlhf_type orpo --max_steps 1 --adapters {start}"));
    has(&free, json!({"init_adapter": start, "ref_model": null}));
}

#[test]
fn answers_with_labels_and_what_stands_before_them() {
    let (s, model) = (sandbox(), model());
    let row = |i: usize| {
        json!({"messages": [{"role": "user", "content": format!("q {i}")}, {"role": "assistant", "content": "yes"}],
            "label": i.is_multiple_of(2)})
    };
    let rows = s.write("labelled.jsonl", &(0..8).map(|i| format!("{}\n", row(i))).collect::<String>());
    let (system, output) = (s.write("system.txt", "be kind"), s.path("output"));
    let line = "--rlhf_type kto --tuner_type lora --desirable_weight 1.5 --max_steps 1 --add_version false --lr_scheduler_type \
        cosine_with_min_lr --early_stop_interval 3 --split_dataset_ratio 0.25 --quant_bits 4 --quant_method bnb --bnb_4bit_compute_dtype bfloat16";
    let more = ["--system", &system, "--output_dir", &output, "--lr_scheduler_kwargs", r#"{"min_lr": 1e-6}"#];
    let given = ["train", "--model", &model, "--dataset", &rows];
    s.ok(&given.into_iter().chain(line.split_whitespace()).chain(more).collect::<Vec<_>>());
    let expected = json!({"loss": ["kto"], "loss_option": ["desirable_weight=1.5", "undesirable_weight=1.0"],
        "system": "be kind", "min_lr": 1e-6, "early_stopping_patience": 3, "quantization": "nf4"});
    has(&output, expected);
}

#[test]
fn what_ms_swift_asks_for_and_is_not_done_is_refused() {
    let (s, model, rows) = (sandbox(), model(), rows());
    for (line, says) in [
        ("--rlhf_type grpo", "--rlhf_type grpo: it learns from answers that are generated"),
        ("--rlhf_type rm", "--rlhf_type rm: no reward model"),
        ("--rlhf_type kto --loss_type apo_zero_unpaired", "--loss_type apo_zero_unpaired: kto has no such loss"),
        ("--rlhf_type dpo --tuner_type full", "--tuner_type full: only LoRA"),
        ("--rlhf_type dpo --quant_bits 8", "--quant_bits 8: frozen weights are kept in nf4, fp8, bf16 or f32"),
        ("--rlhf_type dpo --load_in_8bit true", "--load_in_8bit true: frozen weights"),
        ("--rlhf_type dpo --quant_method hqq --quant_bits 4", "--quant_method hqq: frozen weights"),
        (
            "--rlhf_type dpo --quant_bits 4 --bnb_4bit_quant_type fp4",
            "--bnb_4bit_quant_type fp4: four bits are those of nf4",
        ),
        ("--rlhf_type dpo --init_weights lora-ga", "--init-lora-weights"),
        ("--rlhf_type dpo --neftune_noise_alpha 5", "no noise"),
        ("--rlhf_type dpo --torch_dtype float16", "--torch_dtype float16: half precision overflows"),
        ("--rlhf_type dpo --lr_scheduler_kwargs {\"a\":1}", "no option 'a'"),
        ("--rlhf_type dpo --save_strategy epoch", "--save-steps N"),
        ("--rlhf_type dpo --push_to_hub true", "uploads nothing"),
        ("--rlhf_type dpo --external_plugins plugin.py", "Python is not run"),
        ("--rlhf_type dpo --use_ray true", "--gpus, torchrun"),
        ("--rlhf_type dpo --lora_r 4", "it is TRL's, and --rlhf_type is ms-swift's"),
        ("--rlhf_type dpo --dataset tiny/pairs:odd#3", "a subset by its name, 'odd', is not known"),
        ("--dataset_nam x", "unknown flag '--dataset_nam'"),
    ] {
        let given = ["train", "--model", &model, "--dataset", &rows];
        s.refuses(&given.into_iter().chain(line.split_whitespace()).collect::<Vec<_>>(), &[says]);
    }
    assert!(!Path::new(&s.path("output")).exists());
}

/// Names without a hub are of the hub that the tool means.
#[test]
fn names_are_of_the_hub_that_the_tool_means() {
    let s = sandbox();
    let nowhere = |line: &str, variables: &[(&str, &str)]| {
        let mut command = s.command(&line.split_whitespace().collect::<Vec<_>>());
        command.env("HF_ENDPOINT", "http://127.0.0.1:9").env("MODELSCOPE_ENDPOINT", "http://127.0.0.1:9");
        command.env("MODELSCOPE_CACHE", s.path("ms")).env("HF_HUB_OFFLINE", "1").env_remove("USE_HF");
        let output = command.envs(variables.iter().copied()).output().unwrap();
        String::from_utf8_lossy(&output.stderr).into_owned()
    };
    let rows = s.write("here/rows.jsonl", "");
    let lines = format!("--model tiny/qwen --dataset tiny/pairs#3,{rows}");
    let ours = nowhere(&format!("train {lines}"), &[]);
    assert!(ours.contains("tiny/qwen@main on Hugging Face") && !ours.contains("is taken as"), "{ours}");
    let theirs = nowhere(&format!("train --rlhf_type dpo {lines}"), &[]);
    let note = "tiny/qwen is taken as one of ModelScope, tiny/pairs#3 is taken as one of ModelScope, as ms-swift does";
    assert!(theirs.contains(note) && theirs.contains("tiny/qwen@master on ModelScope"), "{theirs}");
    for (line, variables) in [("--use_hf true", &[][..]), ("", &[("USE_HF", "1")][..])] {
        let theirs = nowhere(&format!("train --rlhf_type dpo {line} {lines}"), variables);
        assert!(theirs.contains("tiny/qwen is taken as one of Hugging Face"), "{theirs}");
        assert!(theirs.contains("tiny/qwen@main on Hugging Face"), "{theirs}");
    }
    // What is there is there, and what has a hub keeps it.
    std::fs::create_dir_all(s.path("tiny/qwen")).unwrap();
    let local = nowhere("train --rlhf_type dpo --model tiny/qwen --dataset hf::tiny/pairs", &[]);
    assert!(!local.contains("is taken as") && local.contains("tiny/qwen"), "{local}");
}

/// A folder `data` of LLaMA-Factory: a ranking of instructions, one of conversations, answers with labels, and what is refused.
fn data(s: &Sandbox) -> String {
    let lines = |rows: Vec<Value>| rows.iter().map(|row| format!("{row}\n")).collect::<String>();
    let words = ["one", "two", "three", "four", "five", "six"];
    let alpaca = words.iter().map(|w| json!({"question": format!("say {w}"), "input": "", "good": w, "bad": "no"}));
    s.write("data/alpaca.jsonl", &lines(alpaca.collect()));
    let turn = |from: &str, value: &str| json!({"from": from, "value": value});
    let talk = words.iter().map(
        |w| json!({"conversations": [turn("human", w)], "chosen": turn("gpt", "yes"), "rejected": turn("gpt", "no")}),
    );
    s.write("data/talk.jsonl", &lines(talk.collect()));
    let labelled = words.iter().enumerate().map(|(i, w)| {
        json!({"messages": [{"role": "user", "content": w}, {"role": "assistant", "content": "yes"}], "good": i % 2 == 0})
    });
    s.write("data/labelled.jsonl", &lines(labelled.collect()));
    let info = json!({
        "pairs": {"file_name": "alpaca.jsonl", "ranking": true,
            "columns": {"prompt": "question", "query": "input", "chosen": "good", "rejected": "bad"}},
        "talk": {"file_name": "talk.jsonl", "ranking": true, "formatting": "sharegpt",
            "columns": {"messages": "conversations", "chosen": "chosen", "rejected": "rejected"}},
        "labelled": {"file_name": "labelled.jsonl", "formatting": "sharegpt",
            "columns": {"messages": "messages", "kto_tag": "good"},
            "tags": {"role_tag": "role", "content_tag": "content", "user_tag": "user", "assistant_tag": "assistant"}},
        "hub": {"hf_hub_url": "tiny/pairs", "ms_hub_url": "tiny/paare", "ranking": true, "num_samples": 7,
            "columns": {"prompt": "instruction", "chosen": "chosen", "rejected": "rejected"}},
        "single": {"file_name": "single.jsonl", "columns": {"prompt": "question", "response": "good"}},
        "seen": {"file_name": "x.json", "ranking": true, "columns": {"images": "images", "chosen": "a", "rejected": "b"}},
        "tagged": {"file_name": "x.json", "ranking": true, "formatting": "sharegpt", "tags": {"user_tag": "questioner"},
            "columns": {"chosen": "chosen", "rejected": "rejected"}},
    });
    s.write(
        "data/single.jsonl",
        "{\"question\": \"why?\", \"good\": \"so\"}\n{\"question\": \"how?\", \"good\": \"ok\"}\n",
    );
    s.write("data/dataset_info.json", &info.to_string());
    s.path("data")
}

/// A file of LLaMA-Factory, with a model of this machine.
fn yaml(s: &Sandbox, name: &str, more: &str) -> String {
    let text = format!(
        "### model\nmodel_name_or_path: {}\ntrust_remote_code: true\n\n### method\ndo_train: true\nfinetuning_type: lora\n\
         lora_rank: 4\nlora_target: all\n\n### dataset\ndataset_dir: {}\ntemplate: qwen\npreprocessing_num_workers: 16\n\
         dataloader_num_workers: 4\n\n### output\noutput_dir: {}\nlogging_steps: 1\nsave_steps: 500\nplot_loss: true\n\
         overwrite_output_dir: true\nsave_only_model: false\nreport_to: none\n\n### train\nper_device_train_batch_size: 1\n\
         gradient_accumulation_steps: 2\nlearning_rate: 5.0e-6\nnum_train_epochs: 1.0\nlr_scheduler_type: cosine\n\
         warmup_ratio: 0.1\nbf16: true\nddp_timeout: 180000000\nresume_from_checkpoint: null\n{more}",
        model(),
        data(s),
        s.path(name)
    );
    s.write(&format!("{name}.yaml"), &text)
}

#[test]
fn a_file_of_llama_factory_trains_what_it_trains_there() {
    let s = sandbox();
    let run = |name: &str, more: &str, expected: Value| {
        let ended = s.ok(&["train", &yaml(&s, name, more), "--device", "cpu"]);
        has(&s.path(name), expected);
        ended.stderr
    };
    let said = run(
        "dpo",
        "stage: dpo\ndataset: pairs\npref_beta: 0.2\npref_loss: sigmoid\ncutoff_len: 512\nmax_samples: 4\nval_size: 0.25\n\
         per_device_eval_batch_size: 1\neval_strategy: steps\neval_steps: 2\n",
        json!({
            "beta": 0.2, "loss": ["sigmoid"], "max_length": 512, "max_samples": 4, "split_dataset_ratio": 0.25,
            "batch_size": 2, "eval_steps": 2, "learning_rate": 5e-6, "num_epochs": 1.0, "warmup_ratio": 0.1,
            "lora_rank": 4, "lora_alpha": 8.0, "target_modules": ["all-linear"], "dataset_format": "pairs",
            "columns": r#"{"bad":"rejected","good":"chosen","question":"instruction"}"#,
            // Its defaults.
            "weight_decay": 0.0, "adam_beta2": 0.999, "save_steps": 500, "seed": 42, "truncation_strategy": "left",
        }),
    );
    assert!(said.contains("data        4 pairs"), "{said}");
    for named in ["trust_remote_code", "template qwen", "preprocessing_num_workers", "plot_loss", "bf16"] {
        assert!(said.lines().any(|l| l.contains(named) && l.contains("is ignored: ")), "no reason for {named}: {said}");
    }
    let expected = json!({"loss": ["simpo"], "loss_option": ["simpo_gamma=0.5"], "beta": 0.1, "dataset_format": "pairs", "quantization": "nf4"});
    let small = "quantization_bit: 4\nquantization_method: bnb\nquantization_type: nf4\ndouble_quantization: true\n";
    run("simpo", &format!("stage: dpo\ndataset: talk\npref_loss: simpo\nmax_steps: 1\n{small}"), expected);
    let expected = json!({"loss": ["orpo"], "loss_option": ["nll_mean=answers"], "beta": 0.1, "lora_alpha": 5.0, "target_modules": ["q_proj", "v_proj"]});
    let more = "stage: dpo\ndataset: talk\npref_loss: orpo\nmax_steps: 1\nlora_alpha: 5\nlora_target: q_proj,v_proj\n";
    // A key is there once.
    let file = yaml(&s, "orpo", more);
    let text = std::fs::read_to_string(&file).unwrap().replace("lora_target: all\n", "");
    s.write("orpo.yaml", &text);
    s.ok(&["train", "--config", &file, "--device", "cpu", "--eval-dataset", "data/talk.jsonl"]);
    has(&s.path("orpo"), expected);
    let expected = json!({"loss": ["kto"], "dataset_format": "kto", "columns": r#"{"good":"label"}"#,
        "loss_option": ["desirable_weight=2.0", "undesirable_weight=1.0"]});
    run("kto", "stage: kto\ndataset: labelled\nkto_chosen_weight: 2.0\nmax_steps: 2\n", expected);
    let expected =
        json!({"loss": ["sft"], "dataset_format": "sft", "columns": r#"{"good":"output","question":"instruction"}"#});
    run("sft", "stage: sft\ndataset: single\nmax_steps: 1\n", expected);
    let expected =
        json!({"loss": ["hinge"], "rpo_alpha": 0.5, "loss_option": ["nll_mean=answers"], "dataset_format": "pairs"});
    let said = run("hinge", "stage: dpo\ndataset: talk\npref_loss: hinge\npref_ftx: 0.5\nmax_steps: 1\n", expected);
    assert!(said.contains("pref_loss hinge is hinge"), "{said}");
}

#[test]
fn what_llama_factory_asks_for_and_is_not_done_is_refused() {
    let s = sandbox();
    for (more, says) in [
        (
            "stage: dpo\ndataset: pairs\nquantization_bit: 4\nquantization_method: hqq\n",
            "quantization_method hqq: frozen weights",
        ),
        ("stage: pt\ndataset: pairs\n", "--stage pt: it learns whole texts"),
        ("stage: dpo\ndataset: pairs\npref_loss: kto_pair\n", "kto_pair: pairs have no KTO loss"),
        ("stage: dpo\ndataset: pairs\nadditional_target: embed_tokens\n", "only LoRA matrices of linear modules"),
        ("stage: dpo\ndataset: pears\n", "did you mean 'pairs'"),
        ("stage: dpo\ndataset: single\n", "dataset_info.json: single: is no ranking"),
        ("stage: dpo\ndataset: seen\n", "dataset_info.json: seen: has images"),
        ("stage: dpo\ndataset: tagged\n", "user_tag 'questioner' is not read"),
        ("stage: dpo\ndataset: pairs, talk\n", "'talk' and 'pairs' are written in different ways"),
        ("stage: dpo\ndataset: pairs\nlearnin_rate: 1\n", "wrong.yaml:38: unknown key 'learnin_rate'"),
        ("stage: dpo\ndataset: pairs\neval_strategy: epoch\n", "--eval-steps N"),
        ("stage: dpo\ndataset: pairs\nrlhf_type: dpo\n", "it is ms-swift's"),
        ("stage: dpo\ndataset: pairs\nstage: kto\n", "'stage' is there twice"),
        ("stage: dpo\ndataset: [a\n", "wrong.yaml:"),
    ] {
        s.refuses(&["train", &yaml(&s, "wrong", more)], &[says]);
    }
    let file = s.write(
        "lost.yaml",
        &format!("stage: dpo\nmodel_name_or_path: {}\ndataset_dir: lost\ndataset: pairs\n", model()),
    );
    s.refuses(
        &["train", &file],
        &["lost/dataset_info.json: cannot read", "lost.yaml:4: --dataset pairs names datasets", "dataset_dir"],
    );
    for (variables, name) in [
        (&[][..], "tiny/pairs@main on Hugging Face"),
        (&[("USE_MODELSCOPE_HUB", "1")], "tiny/paare@master on ModelScope"),
    ] {
        let mut command = s.command(&["train", &yaml(&s, "hub", "stage: dpo\ndataset: hub\n"), "--device", "cpu"]);
        command.env("HF_HUB_OFFLINE", "1").env("MODELSCOPE_CACHE", s.path("ms")).envs(variables.iter().copied());
        let text = String::from_utf8_lossy(&command.output().unwrap().stderr).into_owned();
        assert!(text.contains(name), "{text}");
    }
}

#[test]
fn names_of_trl_are_taken() {
    let (s, model, rows) = (sandbox(), model(), rows());
    let line = "--per_device_train_batch_size 2 --gradient_accumulation_steps 2 --use_peft --lora_target_modules q_proj v_proj \
        --loss_type sigmoid sft --loss_weights 1.0 0.1 --max_steps 1 --gradient_checkpointing --eval_strategy no \
        --precompute_ref_log_probs true --bf16 true --load_in_4bit --device cpu";
    let (output, given) = (s.path("run"), ["train", "--model_name_or_path", &model, "--dataset_name", &rows]);
    let more: Vec<&str> = line.split_whitespace().chain(["--output_dir", &output]).collect();
    let ended = s.ok(&[&given[..], &more].concat());
    has(
        &output,
        json!({
            "batch_size": 4, "loss": ["sigmoid", "sft"], "loss_weights": [1.0, 0.1], "lora_rank": 16, "lora_alpha": 32.0,
            "target_modules": ["q_proj", "v_proj"], "learning_rate": 1e-6, "max_length": 1024, "weight_decay": 0.0,
            "truncation_strategy": "right", "lr_scheduler": "linear", "num_epochs": 3.0, "recompute": true,
            "quantization": "nf4",
        }),
    );
    assert!(ended.stderr.contains("TRL's defaults: "), "{}", ended.stderr);
    for (line, says) in [
        ("--use_peft --load_in_8bit", "--load_in_8bit: frozen weights are kept in nf4, fp8, bf16 or f32"),
        ("--use_peft --sync_ref_model", "--sync_ref_model: the reference stays"),
        ("--use_peft --max_prompt_length 128", "prompts and answers have one length together"),
        ("--use_peft --truncation_mode middle", "'middle' should be keep_start or keep_end"),
        ("--use_peft --loss_type dpo", "DPO is --loss sigmoid"),
    ] {
        s.refuses(&given.into_iter().chain(line.split_whitespace()).collect::<Vec<_>>(), &[says]);
    }
}

/// Names that several tools have say nothing of the tool: defaults, folders and hubs are ours.
#[test]
fn names_of_several_tools_bring_no_habits() {
    let (s, model, rows) = (sandbox(), model(), rows());
    let line = "--model_name_or_path MODEL --num_train_epochs 1 --lr_scheduler_type linear --report_to none --deepspeed z.json \
        --loss_type hinge --max_steps 1 --output_dir run";
    let line = line.replace("MODEL", &model);
    let ended = s.ok(&["train", &rows].into_iter().chain(line.split_whitespace()).collect::<Vec<_>>());
    assert!(!ended.stderr.contains("defaults"), "{}", ended.stderr);
    has(
        &s.path("run"),
        json!({"learning_rate": 1e-4, "loss": ["hinge"], "lr_scheduler": "linear", "max_length": 2048}),
    );
}

/// Lists have spaces or commas between their values; a file whose name has a comma is one file.
#[test]
fn lists_may_have_commas() {
    let s = sandbox();
    let text = std::fs::read_to_string(rows()).unwrap();
    let files = ["one.jsonl", "two.jsonl", "one,two.jsonl"].map(|name| s.write(name, &text));
    for (dataset, count) in [(format!("{},{}", files[0], files[1]), 32), (files[2].clone(), 16)] {
        let output = s.path(&format!("run{count}"));
        let more =
            ["--target-modules", "q_proj,v_proj", "--max-steps", "1", "--device", "cpu", "--output-dir", &output];
        let ended = s.ok(&[&["train", "--model", &model(), "--dataset", &dataset][..], &more].concat());
        assert!(ended.stderr.contains(&format!("data        {count} pairs")), "{}", ended.stderr);
        has(&output, json!({"target_modules": ["q_proj", "v_proj"]}));
    }
}
