//! The command line: what it refuses and how it says so, and files of flags.
#![allow(clippy::unwrap_used)] // In a test, a panic is the report.

use std::path::Path;

use dpo_tests::{Sandbox, golden};
use serde_json::Value;

fn sandbox() -> Sandbox {
    Sandbox::new(env!("CARGO_BIN_EXE_dpo-host-test"))
}

fn model() -> String {
    golden("trajectories").join("qwen2/model").display().to_string()
}

fn rows() -> String {
    golden("trajectories").join("qwen2/prefs.jsonl").display().to_string()
}

const ROW: &str = r#"{"messages":[{"role":"user","content":"hi"},{"role":"assistant","content":"ok sure"}],"rejected_response":"no"}"#;

#[test]
fn bad_rows_are_named() {
    let (s, model) = (sandbox(), model());
    let broken = s.write("broken.jsonl", &format!("{ROW}\n{ROW}\n{{\"messages\": [\n"));
    s.refuses(&["train", "--model", &model, "--dataset", &broken], &["broken.jsonl:3", "help: mend the row"]);
    let silent = s.write(
        "silent.jsonl",
        &format!("{ROW}\n{{\"messages\":[{{\"role\":\"user\",\"content\":\"hi\"}}],\"rejected_response\":\"no\"}}\n"),
    );
    s.refuses(&["train", "--model", &model, "--dataset", &silent, "--strict"], &["silent.jsonl:2", "assistant"]);
    let same = s.write("same.jsonl", &format!("{ROW}\n{}\n", ROW.replace("\"no\"", "\"ok sure\"")));
    s.refuses(&["train", "--model", &model, "--dataset", &same, "--strict"], &["same.jsonl:2"]);
    let all_same = s.write("all_same.jsonl", &ROW.replace("\"no\"", "\"ok sure\""));
    let refused = s.run(&["train", "--model", &model, "--dataset", &all_same]);
    assert!(refused.stderr.contains("no pair is left of 1 rows"), "{}", refused.stderr);
    assert_eq!(refused.stderr.matches("help:").count(), 1, "{}", refused.stderr);
    let empty = s.write("empty.jsonl", "");
    s.refuses(&["train", "--model", &model, "--dataset", &empty], &["empty.jsonl"]);
    let missing = s.path("missing.jsonl");
    s.refuses(&["train", "--model", &model, "--dataset", &missing], &["missing.jsonl", "no such file"]);
}

#[test]
fn unknown_names_come_with_the_nearest() {
    let (s, model, rows) = (sandbox(), model(), rows());
    let base = ["train", "--model", &model, "--dataset", &rows];
    let with = |more: &[&'static str]| [&base[..], more].concat();
    s.refuses(&with(&["--plugin", "qwen4"]), &["--plugin", "unknown plugin 'qwen4'", "qwen2"]);
    s.refuses(&with(&["--loss", "sigmod"]), &["unknown loss 'sigmod'", "did you mean 'sigmoid'"]);
    s.refuses(&with(&["--loss", "dpo"]), &["unknown loss 'dpo'", "DPO is --loss sigmoid"]);
    s.refuses(&with(&["--loss", "GRPO"]), &["unknown loss 'GRPO'", "learns from answers that are there"]);
    s.refuses(&with(&["--learnin-rate", "1"]), &["unknown flag '--learnin-rate'", "mean '--learning-rate'"]);
    s.refuses(&with(&["--lora-bias", "all"]), &["--lora-bias all: biases are frozen"]);
    s.refuses(&with(&["--warm-water", "1"]), &["unknown flag '--warm-water'", "`dpo-host train --help` lists all"]);
    s.refuses(&["train", "--model", &model, "stray.jsonl"], &["'stray.jsonl' belongs to no flag", "--dataset"]);
    s.refuses(&["train", "stray.jsonl", "--dataset", &rows], &["stray.jsonl: rows are named here and with --dataset"]);
    s.refuses(&with(&["--dataset-format", "msswift"]), &["msswift", "did you mean 'ms-swift'"]);
    s.refuses(&with(&["--target-modules", "q_prj"]), &["did you mean 'q_proj'"]);
    s.refuses(&with(&["--loss-option", "bta=1"]), &["bta", "did you mean 'beta'"]);
    s.refuses(&with(&["--no-such-flag"]), &["--no-such-flag"]);
    s.refuses(&["train", "--plugin", "qwen9"], &["unknown plugin 'qwen9'"]);
}

#[test]
fn a_file_is_no_model_and_asks_no_hub() {
    let (s, rows) = (sandbox(), rows());
    for file in ["model.gguf", "owner/model.safetensors"] {
        s.write(file, "GGUF");
        s.refuses(&["train", "--model", file, "--dataset", &rows], &[file, "is a file", "help: name the folder"]);
    }
}

/// A copy of the small model in which a file has been changed.
fn broken_model(s: &Sandbox, name: &str, change: impl Fn(Vec<u8>) -> Vec<u8>) -> String {
    let folder = s.path("model");
    std::fs::create_dir_all(&folder).unwrap();
    for entry in std::fs::read_dir(model()).unwrap() {
        let path = entry.unwrap().path();
        std::fs::copy(&path, Path::new(&folder).join(path.file_name().unwrap())).unwrap();
    }
    let path = Path::new(&folder).join(name);
    std::fs::write(&path, change(std::fs::read(&path).unwrap())).unwrap();
    folder
}

#[test]
fn broken_checkpoints_are_named() {
    let rows = rows();
    let refuses = |name: &str, change: &dyn Fn(Vec<u8>) -> Vec<u8>, texts: &[&str]| {
        let s = sandbox();
        let model = broken_model(&s, name, change);
        s.refuses(&["train", "--model", &model, "--dataset", &rows], texts);
        assert!(!Path::new(&s.path("output")).exists(), "a refused run left something");
    };
    let replaced = |from: &'static str, to: &'static str| {
        move |bytes: Vec<u8>| String::from_utf8(bytes).unwrap().replace(from, to).into_bytes()
    };
    let cut = |bytes: Vec<u8>| bytes[..bytes.len() - 4000].to_vec();
    refuses("model.safetensors", &cut, &["model.safetensors", "cut short at tensor '"]);
    let renamed = |bytes: Vec<u8>| {
        let at = bytes.windows(10).position(|w| w == b"model.norm").unwrap();
        [&bytes[..at], b"model.nrom", &bytes[at + 10..]].concat()
    };
    refuses("model.safetensors", &renamed, &["model.nrom.weight", "not part of the model"]);
    refuses(
        "config.json",
        &replaced("\"intermediate_size\": 64", "\"intermediate_size\": 72"),
        &["[64, 32]", "[72, 32]", ".safetensors"],
    );
    refuses(
        "config.json",
        &replaced("\"use_cache\"", "\"attn_logit_softcapping\": 50.0, \"use_cache\""),
        &["attn_logit_softcapping"],
    );
    refuses("config.json", &replaced("Qwen2ForCausalLM", "GPT2LMHeadModel"), &["GPT2LMHeadModel"]);
}

/// A tokenizer with a token more than the model has rows for, as one that was added to the tokenizer alone.
#[test]
fn a_token_that_the_model_does_not_have_is_refused_wherever_it_is_read() {
    let s = sandbox();
    let model = broken_model(&s, "tokenizer.json", |bytes| {
        let mut tokenizer: Value = serde_json::from_slice(&bytes).unwrap();
        tokenizer["model"]["vocab"]["<|more|>"] = 407.into();
        let mut token = tokenizer["added_tokens"][0].clone();
        (token["id"], token["content"]) = (407.into(), "<|more|>".into());
        tokenizer["added_tokens"].as_array_mut().unwrap().push(token);
        tokenizer.to_string().into_bytes()
    });
    let sound = s.write("sound.jsonl", &ROW.repeat(2).replace("}{", "}\n{"));
    let says = |place: &str| {
        [place.to_owned(), "token id 407 is beyond the model's vocabulary of 320".into(), "help: the tokenizer".into()]
    };
    for (part, row) in [("prompt", ROW.replace("hi", "hi <|more|>")), ("answer", ROW.replace("no\"", "no <|more|>\""))]
    {
        let rows = s.write(&format!("{part}.jsonl"), &format!("{ROW}\n{row}\n"));
        let [place, id, help] = says(&format!("{part}.jsonl:2: "));
        let refuses = |args: &[&str]| s.refuses(args, &[&place, &id, &help]);
        refuses(&["train", "--model", &model, "--dataset", &rows]);
        refuses(&["train", "--model", &model, "--dataset", &sound, "--val-dataset", &rows]);
        refuses(&["eval", "--model", &model, "--dataset", &rows]);
        refuses(&["data", "--model", &model, &rows]);
    }
    s.refuses(
        &["chat", "--model", &model, "--prompt", "hi <|more|>"],
        &says("")[1..].iter().map(String::as_str).collect::<Vec<_>>(),
    );
}

#[test]
fn a_folder_with_a_run_is_left_alone() {
    let (s, model, rows) = (sandbox(), model(), rows());
    let output = s.path("run");
    let args = ["train", "--model", &model, "--dataset", &rows, "--output-dir", &output, "--max-steps", "1"];
    s.ok(&args);
    let before = std::fs::read(Path::new(&output).join("adapter_model.safetensors")).unwrap();
    s.refuses(&args, &["holds a run already", "--resume-from-checkpoint"]);
    assert_eq!(before, std::fs::read(Path::new(&output).join("adapter_model.safetensors")).unwrap());
}

/// Its batch is of one process; ours is of all.
#[test]
fn ms_swifts_batch_is_of_all_processes() {
    let (s, model, rows) = (sandbox(), model(), rows());
    let run = |name: &str, more: &[&str], variables: &[(&str, &str)]| {
        let output = s.path(name);
        let fixed = ["train", "--device", "cpu", "--model", &model, "--dataset", &rows, "--output_dir", &output];
        let mut command = s.command(&[&fixed, &["--max_steps", "1"][..], more].concat());
        let ended = command.envs(variables.iter().copied()).output().unwrap();
        let text = String::from_utf8_lossy(&ended.stderr).into_owned();
        (ended.status.code(), text, output)
    };
    let each: &[&str] = &["--per_device_train_batch_size", "1", "--gradient_accumulation_steps", "3"];
    let two = ["--gpus", "2"];
    for (name, more, variables, batch) in [
        ("one", each, &[][..], 3),
        ("two", &[each, &two].concat()[..], &[], 6),
        ("before", &[&two, each].concat(), &[], 6),
        ("swift", each, &[("NPROC_PER_NODE", "2")], 6),
        ("default", &["--per_device_train_batch_size", "3"], &[("NPROC_PER_NODE", "2")], 18),
    ] {
        let (code, text, output) = run(name, more, variables);
        assert_eq!(code, Some(0), "{text}");
        assert_eq!(resolved(&output)["batch_size"], batch, "{name}");
        assert_eq!(text.matches(&format!("note: --batch-size {batch}: ")).count(), 1, "{name}: {text}");
        assert_eq!(text.contains("NPROC_PER_NODE=2 is taken as --gpus 2"), !variables.is_empty(), "{name}: {text}");
    }
    for (variable, value, says) in [
        ("NPROC_PER_NODE", "gpu", "NPROC_PER_NODE: 'gpu' should be a whole number"),
        ("NNODES", "2", "NNODES: 2 machines, but no launcher"),
    ] {
        let (code, text, _) = run("refused", each, &[(variable, value)]);
        assert!(code == Some(2) && text.contains(says), "{text}");
    }
}

/// The args.json of a run.
fn resolved(output: &str) -> Value {
    serde_json::from_str(&std::fs::read_to_string(Path::new(output).join("args.json")).unwrap()).unwrap()
}

#[test]
fn a_file_of_flags_is_overruled_by_the_command_line() {
    let (s, model, rows) = (sandbox(), model(), rows());
    let text = format!(
        "# Names of ms-swift, too.\nmodel = {model:?}\ndataset = ['missing.jsonl', 'too.jsonl']\nnum_train_epochs = 2\n\
         per_device_train_batch_size = 1\ngradient_accumulation_steps = 3\nmax-steps = 1\nshuffle = false\n\
         use_rslora = true\ntorch_dtype = 'fp32'\ndevice = 'cpu'\nlora_rank = 2\nlearning-rate = 1e-3\nquiet = false\n"
    );
    let config = s.write("run.toml", &text);
    let output = s.path("run");
    s.ok(&["train", "--lora_rank", "4", "--config", &config, "--dataset", &rows, "--output-dir", &output]);
    let expected = serde_json::json!({
        "dataset": [rows], "num_epochs": 2.0, "batch_size": 3, "max_steps": 1, "shuffle": false, "use_rslora": true,
        "dtype": "float32", "lora_rank": 4, "learning_rate": 1e-3,
    });
    let args = resolved(&output);
    expected.as_object().unwrap().iter().for_each(|(name, value)| assert_eq!(&args[name], value, "{name}"));
    // The batch that the file puts together gives way to one that the command line names.
    let output = s.path("other");
    let given = ["--quiet", "train", "--config", &config, "--dataset", &rows, "--output-dir", &output];
    s.ok(&[&given[..], &["--batch-size", "2"]].concat());
    assert_eq!(resolved(&output)["batch_size"], 2);
}

#[test]
fn a_wrong_file_of_flags_is_told_with_its_line() {
    let s = sandbox();
    let refuses = |name: &str, text: &str, texts: &[&str]| {
        let file = s.write(name, text);
        s.refuses(&["train", "--config", &file], texts);
    };
    refuses("a.toml", "model = 'x'\nbatch_size = = 3\n", &["a.toml:2"]);
    refuses("b.toml", "model = 'x'\n\nlerning_rate = 1e-4\n", &["b.toml:3", "lerning_rate", "mean 'learning_rate'"]);
    refuses("c.toml", "num_train_epoch = 1\n", &["c.toml:1", "did you mean 'num_train_epochs'"]);
    refuses(
        "d.toml",
        "beta = 1\nlearning-rate = 'fast'\n",
        &["d.toml:2: 'learning_rate' should be a number, not 'fast'"],
    );
    refuses("e.toml", "lr_scheduler = 'cosinus'\n", &["e.toml:1: 'lr_scheduler' should be ", "cosine", "'cosinus'"]);
    refuses("f.toml", "batch_size = [1, 2]\n", &["f.toml:1: 'batch_size' should be one value, a whole number"]);
    refuses("g.toml", "loss_weights = [1, 'two']\n", &["g.toml:1: 'two' in 'loss_weights' should be a number"]);
    refuses("h.toml", "[optimizer]\nbeta = 1\n", &["h.toml:1: 'optimizer'", "without [sections]"]);
    refuses("i.toml", "shuffle = 'maybe'\n", &["i.toml:1: 'shuffle' should be true or false"]);
    refuses("j.toml", "tuner_type = 'full'\n", &["j.toml:1: --tuner_type full: only LoRA"]);
    refuses("k.toml", "save_steps = 1.5\n", &["k.toml:1: 'save_steps' should be a whole number, not '1.5'"]);
    refuses("l.json", "{\n  \"beta\": 0.1,\n  \"seed\": \"x\"\n}", &["l.json:3: 'seed' should be a whole number"]);
    refuses("m.json", "{\n  \"beta\": 0.1,\n}", &["m.json:3"]);
    s.refuses(
        &["train", "--config", "none.toml"],
        &["none.toml: cannot read: no such file", "help: check the spelling"],
    );
    s.refuses(&["train", "--config"], &["--config: needs a file"]);
}

/// Lines of a log without what depends on the clock and the machine.
fn timeless(folder: &str) -> Vec<Value> {
    let mut lines = dpo_tests::log(folder);
    for line in lines.iter_mut().filter_map(Value::as_object_mut) {
        ["tokens_per_second", "memory_gib", "elapsed_s"].iter().for_each(|name| drop(line.remove(*name)));
    }
    lines
}

#[test]
fn a_runs_arguments_given_back_take_the_same_steps() {
    let (s, model, rows) = (sandbox(), model(), rows());
    let (first, second) = (s.path("first"), s.path("second"));
    let flags = "--batch-size 3 --num-epochs 1 --learning-rate 2e-3 --loss sigmoid sft --loss-weights 1 0.2 --use-rslora \
        --target-modules q_proj v_proj --split-dataset-ratio 0.2 --logging-steps 1 --loss-option beta=0.3 --seed 3";
    let given = ["train", "--model", &model, "--dataset", &rows, "--output-dir", &first];
    s.ok(&given.into_iter().chain(flags.split_whitespace()).collect::<Vec<_>>());
    let args = Path::new(&first).join("args.json").display().to_string();
    s.ok(&["train", "--config", &args, "--output-dir", &second]);
    assert!(timeless(&first).len() > 2);
    assert_eq!(timeless(&first), timeless(&second));
    // As it is, it would write where the run is.
    s.refuses(&["train", "--config", &args], &["holds a run already"]);
}

#[test]
fn the_demo_leaves_alone_what_is_said() {
    let s = sandbox();
    let output = s.path("demo");
    // What the flags say is their default.
    s.ok(&["train", "--learning-rate", "1e-4", "--num-epochs", "1", "--max-steps", "1", "--output-dir", &output]);
    let args = resolved(&output);
    assert_eq!((&args["learning_rate"], &args["num_epochs"]), (&1e-4.into(), &1.0.into()));
    // Its files have names in args.json, which can be given back.
    let (args, again) = (Path::new(&output).join("args.json").display().to_string(), s.path("again"));
    s.ok(&["train", "--config", &args, "--output-dir", &again]);
    assert_eq!(timeless(&output), timeless(&again));
}

#[test]
fn numbers_out_of_range_are_refused() {
    let (s, model, rows) = (sandbox(), model(), rows());
    for (flag, value, text) in [
        ("--learning-rate", "-1e-4", "0 or more, not -0.0001"),
        ("--learning-rate", "nan", "0 or more"),
        ("--beta", "-0.1", "above 0"),
        ("--num-epochs", "0", "above 0"),
        ("--max-steps", "0", "above 0"),
        ("--label-smoothing", "0.6", "from 0 to below 0.5"),
        ("--warmup-ratio", "5", "from 0 to 1"),
        ("--adam-beta2", "1", "from 0 to below 1"),
        ("--split-dataset-ratio", "1", "from 0 to below 1"),
    ] {
        s.refuses(&["train", "--model", &model, "--dataset", &rows, flag, value], &[flag, text, "help: "]);
    }
}

fn small<'a>(model: &'a str, rows: &'a str, output: &'a str) -> Vec<&'a str> {
    let steps = ["--batch-size", "4", "--max-steps", "3", "--logging-steps", "2", "--split-dataset-ratio", "0.2"];
    [&["train", "--model", model, "--dataset", rows, "--output-dir", output, "--device", "cpu"][..], &steps].concat()
}

#[test]
fn a_quiet_run_says_where_its_adapter_is() {
    let (s, model, rows) = (sandbox(), model(), rows());
    let output = s.path("run");
    // A note is not worth a word, a warning is.
    let more = ["--quiet", "--lora-dropout", "0.1", "--val-dataset", &rows];
    let ended = s.ok(&[&small(&model, &rows, &output)[..], &more].concat());
    let mut lines: Vec<&str> = ended.stderr.lines().collect();
    assert_eq!(lines.pop(), Some(format!("adapter     {output}/adapter_model.safetensors").as_str()));
    assert!(lines[0].starts_with("warning: ") && lines[0].ends_with("are trained on as well"), "{}", ended.stderr);
    // The loss doctor may say more.
    assert!(lines.iter().all(|l| l.starts_with("warning: ") || l.starts_with("  help: ")), "{}", ended.stderr);
    assert_eq!(ended.stdout, "");
    s.refuses(&["train", "--quiet", "--beta", "-1"], &["error: --beta"]);
}

#[test]
fn a_run_tells_programs_in_lines_of_json() {
    let (s, model, rows) = (sandbox(), model(), rows());
    let output = s.path("run");
    let ended = s.ok(&[&small(&model, &rows, &output)[..], &["--json", "--lora-dropout", "0.1"]].concat());
    let events = |text: &str| -> Vec<Value> { text.lines().map(|l| serde_json::from_str(l).unwrap()).collect() };
    let of = |ended: &dpo_tests::Ended, kind: &str| -> Vec<Value> {
        events(&ended.stdout).into_iter().filter(|e| e["event"] == kind).collect()
    };
    // What is logged, with the kind before it.
    let mut logged = [of(&ended, "step"), of(&ended, "evaluation")].concat();
    logged.iter_mut().for_each(|line| drop(line.as_object_mut().unwrap().remove("event")));
    assert_eq!(logged, dpo_tests::log(&output));
    assert_eq!(of(&ended, "step").iter().map(|e| e["global_step"].as_u64().unwrap()).collect::<Vec<_>>(), [1, 2, 3]);
    assert!(of(&ended, "note")[0]["text"].as_str().unwrap().contains("--lora-dropout"));
    let end = events(&ended.stdout).pop().unwrap();
    assert_eq!((&end["event"], &end["global_step"]), (&"end".into(), &3.into()));
    assert!(Path::new(end["adapter"].as_str().unwrap()).is_file());
    assert!(!ended.stderr.lines().any(|l| l.starts_with("step ")), "{}", ended.stderr);
    let refused = s.run(&["train", "--json", "--model", "./nowhere", "--dataset", &rows]);
    let error = of(&refused, "error").pop().unwrap();
    assert_eq!((refused.code, error["place"].as_str()), (2, Some("--model")), "{}", refused.stdout);
}

#[test]
fn colours_are_for_terminals_and_those_who_ask() {
    let s = sandbox();
    let coloured = |variable: Option<(&str, &str)>| {
        let mut command = s.command(&["train", "--beta", "-1"]);
        for name in ["NO_COLOR", "CLICOLOR", "CLICOLOR_FORCE"] {
            command.env_remove(name);
        }
        command.envs(variable);
        String::from_utf8(command.output().unwrap().stderr).unwrap().contains('\x1b')
    };
    assert!(!coloured(None), "a pipe is no terminal");
    assert!(coloured(Some(("CLICOLOR_FORCE", "1"))));
    assert!(!coloured(Some(("NO_COLOR", "1"))));
}

#[test]
fn a_reader_that_leaves_early_ends_a_command_without_a_panic() {
    let s = sandbox();
    let mut command = s.command(&["describe", "qwen2"]);
    let mut child = command.stdout(std::process::Stdio::piped()).stderr(std::process::Stdio::piped()).spawn().unwrap();
    drop(child.stdout.take());
    let stderr = String::from_utf8(child.wait_with_output().unwrap().stderr).unwrap();
    assert_eq!(stderr, "");
}

#[test]
fn shells_and_man_are_told_of_every_command() {
    let s = sandbox();
    for shell in ["bash", "zsh", "fish"] {
        let script = s.ok(&["completions", shell]).stdout;
        ["train", "merge", "learning-rate"].iter().for_each(|w| assert!(script.contains(w), "{w} for {shell}"));
    }
    assert!(s.ok(&["man"]).stdout.contains("dpo\\-host\\-train"));
    assert!(s.ok(&["man", "train"]).stdout.contains("\\-\\-learning\\-rate"));
    s.refuses(&["man", "trian"], &["did you mean 'train'"]);
}

#[test]
fn plugins_describe_themselves() {
    let s = sandbox();
    let list = s.ok(&["list"]).stdout;
    for name in ["qwen2", "qwen3", "llama3", "ms-swift", "sigmoid", "built-in"] {
        assert!(list.contains(name), "{name} is not listed:\n{list}");
    }
    assert!(s.ok(&["describe", "qwen2"]).stdout.contains("self_attn.q_proj.weight [3584, 3584]"));
    assert!(s.ok(&["describe", "ms-swift"]).stdout.contains("rejected_response"));
    assert!(s.ok(&["describe", "sigmoid"]).stdout.contains("beta"));
    assert!(s.ok(&["list", "ops"]).stdout.contains("rms_norm"));
    s.refuses(&["describe", "qwen7"], &["unknown plugin 'qwen7'"]);
}

#[test]
fn a_plan_shares_what_one_card_cannot_hold() {
    let s = sandbox();
    let plan = |gpus: &'static str| ["plan", "--model", "qwen2.5-14b", "--gpu-memory", "24GiB", "--gpus", gpus];
    s.refuses(&plan("1"), &["needs ", "there are 24.0 GiB", "help: "]);
    let shared = s.ok(&plan("2")).stdout;
    assert!(shared.contains("layers are sharded over 2 ranks") && shared.contains("micro-batch "), "{shared}");
    // NCCL takes its part where there are several cards.
    let context = |text: &str| text.lines().find(|l| l.trim_start().starts_with("CUDA")).unwrap().to_owned();
    let alone = s.ok(&["plan", "--model", "qwen2.5-7b", "--gpu-memory", "24GiB"]).stdout;
    assert_ne!(context(&shared), context(&alone));
}

/// `train --help` names the default of every flag that takes a value.
#[test]
fn help_names_every_default() {
    let s = Sandbox::new(env!("CARGO_BIN_EXE_dpo-host-test"));
    let help = s.ok(&["train", "--help"]).stdout;
    let mut flags: Vec<(String, String)> = Vec::new();
    for line in help.lines().map(str::trim) {
        match line.strip_prefix("--").or_else(|| line.split_once(", --").map(|(_, name)| name)) {
            Some(flag) if line.starts_with('-') => flags.push((flag.to_owned(), String::new())),
            _ => flags.last_mut().into_iter().for_each(|(_, text)| *text += line),
        }
    }
    assert!(flags.len() > 50, "{} flags", flags.len());
    // What a run begins with, and what is no setting of it.
    let without = ["config", "dataset", "plugin-dir"];
    for (flag, text) in flags.iter().filter(|(flag, _)| flag.contains('<')) {
        let name = flag.split([' ', '[']).next().unwrap();
        assert!(without.contains(&name) || text.contains("[default"), "--{flag} names no default: {text}");
    }
}
