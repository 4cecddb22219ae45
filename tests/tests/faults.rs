//! What goes wrong and what then becomes of a run: kills, corrupt checkpoints, full disks, signals, NaN and infinite values, and
//! input that means harm. `DPO_CAMPAIGN` says how often a run is killed.
#![allow(clippy::unwrap_used)] // In a test, a panic is the report.

use std::fs;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use dpo_data::ChatTokenizer;
use dpo_tests::{Ended, Numbers, Sandbox, copy, golden, log};
use serde_json::Value;

/// Kills of one test unless `DPO_CAMPAIGN` says otherwise.
const KILLS: usize = 5;
const LATEST: [&str; 2] = ["--resume-from-checkpoint", "latest"];
/// About a second of training with many checkpoints.
const BUSY: [&str; 8] =
    ["--num-epochs", "40", "--save-steps", "2", "--save-total-limit", "2", "--split-dataset-ratio", "0.2"];
/// A few steps.
const SHORT: [&str; 6] = ["--max-steps", "7", "--save-steps", "2", "--save-total-limit", "3"];

fn sandbox() -> Sandbox {
    Sandbox::new(env!("CARGO_BIN_EXE_dpo-host-test"))
}

fn case(name: &str) -> String {
    golden("trajectories").join("qwen3").join(name).display().to_string()
}

fn train(output: &str, more: &[&[&str]]) -> Vec<String> {
    train_on(&case("model"), &case("prefs.jsonl"), output, more)
}

fn train_on(model: &str, rows: &str, output: &str, more: &[&[&str]]) -> Vec<String> {
    let fixed = ["train", "--model", model, "--dataset", rows, "--output-dir", output, "--batch-size", "4"];
    let settings = ["--learning-rate", "2e-3", "--logging-steps", "1", "--seed", "7", "--device", "cpu"];
    fixed.iter().chain(&settings).chain(more.concat().iter()).map(|a| (*a).to_owned()).collect()
}

fn run(sandbox: &Sandbox, args: &[String]) -> Ended {
    sandbox.run(&args.iter().map(String::as_str).collect::<Vec<_>>())
}

fn ok(sandbox: &Sandbox, args: &[String]) -> Ended {
    let ended = run(sandbox, args);
    assert_eq!(ended.code, 0, "{args:?}\n{}", ended.stderr);
    ended
}

/// Runs to an end with this exit code, and checks that all of the texts are said.
fn says(sandbox: &Sandbox, args: &[String], code: i32, texts: &[&str]) {
    let ended = run(sandbox, args);
    assert_eq!(ended.code, code, "{args:?}\n{}", ended.stderr);
    texts.iter().for_each(|t| assert!(ended.stderr.contains(t), "does not say '{t}':\n{}", ended.stderr));
}

fn spawn(sandbox: &Sandbox, args: &[String]) -> Child {
    let mut command = sandbox.command(&args.iter().map(String::as_str).collect::<Vec<_>>());
    command.stderr(Stdio::piped()).spawn().unwrap()
}

/// What a run that was started says, and its exit code.
fn ended(child: Child) -> (Option<i32>, String) {
    let output = child.wait_with_output().unwrap();
    (output.status.code(), String::from_utf8_lossy(&output.stderr).into_owned())
}

fn signal(child: &Child, name: &str) {
    assert!(Command::new("kill").args([name, &child.id().to_string()]).status().unwrap().success());
}

/// Waits until the run has written a checkpoint.
fn wait_for_checkpoint(folder: &str) {
    let start = Instant::now();
    while !Path::new(folder).join("latest").exists() {
        assert!(start.elapsed() < Duration::from_secs(60), "no checkpoint appeared");
        std::thread::sleep(Duration::from_millis(1));
    }
}

/// A log without what depends on the clock and the machine.
fn timeless(folder: &str) -> Vec<Value> {
    let mut lines = log(folder);
    for line in lines.iter_mut().map(|l| l.as_object_mut().unwrap()) {
        ["tokens_per_second", "memory_gib", "elapsed_s"].iter().for_each(|k| drop(line.remove(*k)));
    }
    lines
}

/// The steps of a run's TensorBoard events, in the order of its files.
fn board(folder: &str) -> Vec<u64> {
    let mut steps = Vec::new();
    for file in fs::read_dir(Path::new(folder).join("runs")).unwrap() {
        let bytes = fs::read(file.unwrap().path()).unwrap();
        let mut rest = bytes.as_slice();
        while !rest.is_empty() {
            let length = u64::from_le_bytes(rest[..8].try_into().unwrap()) as usize;
            // An event is wall time (tag and 8 bytes), then the step (tag and varint) or the file's version.
            let event = &rest[12..12 + length];
            if event[9] == 2 << 3 {
                let end = event[10..].iter().position(|b| b & 0x80 == 0).unwrap();
                steps.push(event[10..=10 + end].iter().rev().fold(0, |n, b| n << 7 | u64::from(b & 0x7f)));
            }
            rest = &rest[16 + length..];
        }
    }
    steps
}

fn same_end(whole: &str, other: &str) {
    let adapter = |folder: &str| fs::read(Path::new(folder).join("adapter_model.safetensors")).unwrap();
    assert_eq!(adapter(whole), adapter(other), "the adapters differ");
    assert_eq!(timeless(whole), timeless(other), "the logs differ");
    let steps: Vec<u64> = log(other).iter().map(|l| l["global_step"].as_u64().unwrap()).collect();
    assert_eq!(board(other), steps, "TensorBoard shows other steps than the log");
    let hidden = |e: &fs::DirEntry| e.file_name().to_string_lossy().ends_with(".tmp");
    assert!(!fs::read_dir(other).unwrap().any(|e| hidden(&e.unwrap())), "leftovers stay");
}

/// What was said, and of the sample pairs; returned is what was said.
fn same_tale(whole: &str, other: &str) -> String {
    let text = |folder: &str, file: &str| fs::read_to_string(Path::new(folder).join(file)).unwrap();
    assert_eq!(text(whole, "samples.jsonl"), text(other, "samples.jsonl"), "the samples differ");
    assert_eq!(text(whole, "remarks.jsonl"), text(other, "remarks.jsonl"), "the remarks differ");
    text(whole, "remarks.jsonl")
}

/// A small disk in memory, where this user may mount one.
struct Disk(String);

impl Disk {
    fn new(sandbox: &Sandbox, options: &str) -> Option<Disk> {
        let folder = sandbox.path("disk");
        fs::create_dir_all(&folder).unwrap();
        let mounted = Command::new("mount").args(["-t", "tmpfs", "-o", options, "tmpfs", &folder]).output();
        if mounted.is_ok_and(|m| m.status.success()) {
            return Some(Disk(folder));
        }
        eprintln!("skipped: this user may not mount a disk in memory");
        None
    }

    fn change(&self, options: &str) {
        assert!(Command::new("mount").args(["-o", &format!("remount,{options}"), &self.0]).status().unwrap().success());
    }
}

impl Drop for Disk {
    fn drop(&mut self) {
        let _ = Command::new("umount").args(["-l", &self.0]).status();
    }
}

#[test]
fn a_run_killed_at_any_moment_comes_to_the_same_end() {
    let sandbox = sandbox();
    let whole = sandbox.path("whole");
    let start = Instant::now();
    ok(&sandbox, &train(&whole, &[&BUSY]));
    let time = start.elapsed().as_secs_f64();
    let kills = std::env::var("DPO_CAMPAIGN").map_or(KILLS, |n| n.parse().unwrap());
    let mut moments = Numbers::new(std::process::id().into());
    let (mut killed, mut ends) = (0, 0);
    while killed < kills {
        let output = sandbox.path(&format!("run-{ends}"));
        // A run of the test's own may end before its kill; then it is compared, and the next one begins.
        loop {
            let last = killed >= kills;
            let mut child = spawn(&sandbox, &train(&output, &[&BUSY, &LATEST]));
            if !last {
                std::thread::sleep(Duration::from_secs_f64(time * 0.3 * (moments.draw() + 1.0)));
                child.kill().unwrap();
            }
            let (code, said) = ended(child);
            if code.is_some() {
                assert_eq!(code, Some(0), "after {killed} kills:\n{said}");
                break;
            }
            killed += 1;
        }
        same_end(&whole, &output);
        same_tale(&whole, &output);
        ends += 1;
    }
    println!("{killed} kills, {ends} runs compared");
}

#[test]
fn a_corrupt_checkpoint_is_told_and_the_one_before_is_taken() {
    let sandbox = sandbox();
    let whole = sandbox.path("whole");
    ok(&sandbox, &train(&whole, &[&SHORT]));
    let newest = fs::read_to_string(Path::new(&whole).join("latest")).unwrap().trim().to_owned();
    assert_eq!(newest, "checkpoint-7");
    let files = ["adapter_config.json", "adapter_model.safetensors", "optimizer.safetensors", "trainer_state.json"];
    for file in files.iter().chain(&["manifest.json"]) {
        let output = sandbox.path(file);
        copy(Path::new(&whole), Path::new(&output));
        fs::remove_file(Path::new(&output).join("adapter_model.safetensors")).unwrap();
        let torn = Path::new(&output).join(&newest).join(file);
        let bytes = fs::read(&torn).unwrap();
        fs::write(&torn, &bytes[..bytes.len() / 2]).unwrap();
        let args = train(&output, &[&SHORT, &["--resume-from-checkpoint", &format!("{output}/{newest}")]]);
        says(&sandbox, &args, 2, &["the checkpoint is incomplete or corrupt", file]);
        says(
            &sandbox,
            &train(&output, &[&SHORT, &LATEST]),
            0,
            &["checkpoint-7 is incomplete or corrupt and left out", file, "checkpoint-6\n"],
        );
        same_end(&whole, &output);
    }
    // A bit that fell over, and a folder without any whole checkpoint.
    let output = sandbox.path("bit");
    copy(Path::new(&whole), Path::new(&output));
    for step in [7, 6, 4] {
        let path = Path::new(&output).join(format!("checkpoint-{step}")).join("optimizer.safetensors");
        let mut bytes = fs::read(&path).unwrap();
        *bytes.last_mut().unwrap() ^= 1;
        fs::write(&path, bytes).unwrap();
    }
    says(
        &sandbox,
        &train(&output, &[&SHORT, &LATEST]),
        2,
        &["SHA-256 differs", "every checkpoint is incomplete or corrupt"],
    );
}

#[test]
fn the_doctor_says_once_what_it_says_wherever_a_run_was_cut() {
    let sandbox = sandbox();
    let whole = sandbox.path("whole");
    // So little is learned that the tenth line is remarked on.
    let settings =
        ["--max-steps", "15", "--save-steps", "4", "--learning-rate", "1e-7", "--split-dataset-ratio", "0.2"];
    ok(&sandbox, &train(&whole, &[&settings]));
    for step in [4, 8, 12] {
        let output = sandbox.path(&format!("from-{step}"));
        copy(Path::new(&whole), Path::new(&output));
        fs::remove_file(Path::new(&output).join("adapter_model.safetensors")).unwrap();
        let args = ["--resume-from-checkpoint", &format!("{output}/checkpoint-{step}")];
        ok(&sandbox, &train(&output, &[&settings, &args]));
        same_end(&whole, &output);
        let said = same_tale(&whole, &output);
        assert!(said.lines().count() == 1 && said.contains("\"global_step\":10,\"kind\":\"doctor\""), "{said}");
    }
}

#[test]
fn without_a_checkpoint_latest_begins_anew_and_never_over_a_finished_run() {
    let sandbox = sandbox();
    let (whole, other) = (sandbox.path("whole"), sandbox.path("other"));
    ok(&sandbox, &train(&whole, &[&SHORT]));
    fs::create_dir(&other).unwrap();
    fs::write(Path::new(&other).join("args.json"), "{").unwrap();
    fs::write(Path::new(&other).join("logging.jsonl"), "{\"global_step\":1,\"loss\":0.5}\n{\"global_st").unwrap();
    says(&sandbox, &train(&other, &[&SHORT, &LATEST]), 0, &["the run starts from the beginning"]);
    same_end(&whole, &other);
    for step in [2, 4, 6, 7] {
        let _ = fs::remove_dir_all(Path::new(&other).join(format!("checkpoint-{step}")));
    }
    says(&sandbox, &train(&other, &[&SHORT, &LATEST]), 2, &["holds a run already"]);
}

#[test]
fn a_full_disk_costs_a_warning_and_at_the_end_the_run() {
    let sandbox = sandbox();
    let whole = sandbox.path("whole");
    ok(&sandbox, &train(&whole, &[&SHORT]));
    let size: u64 =
        fs::read_dir(format!("{whole}/checkpoint-7")).unwrap().map(|e| e.unwrap().metadata().unwrap().len()).sum();
    // One checkpoint and a half.
    let Some(disk) = Disk::new(&sandbox, &format!("size={}k", size * 3 / 2 / 1024 + 64)) else { return };
    let output = format!("{}/run", disk.0);
    // What cannot be saved even once is told before weights are read.
    let large = train(&output, &[&SHORT, &["--lora-rank", "256"]]);
    says(&sandbox, &large, 2, &["a checkpoint takes", "are free", "--lora-rank"]);
    let texts = ["no space left on device", "help: make room", "the run goes on and tries again", "error: "];
    says(&sandbox, &train(&output, &[&SHORT]), 1, &texts);
    disk.change("size=64m");
    says(&sandbox, &train(&output, &[&SHORT, &LATEST]), 0, &["checkpoint-2\n"]);
    same_end(&whole, &output);
}

#[test]
fn a_read_only_folder_is_refused_at_once() {
    let sandbox = sandbox();
    let Some(disk) = Disk::new(&sandbox, "ro") else { return };
    // Before the rows are looked for, which are not there.
    let args = train(&format!("{}/run", disk.0), &[&SHORT, &["--val-dataset", "nowhere.jsonl"]]);
    says(&sandbox, &args, 1, &["read-only file system", "help: ", &disk.0]);
}

#[test]
fn a_folder_that_vanished_is_not_made_anew() {
    let sandbox = sandbox();
    let (whole, output, moved) = (sandbox.path("whole"), sandbox.path("run"), sandbox.path("moved"));
    ok(&sandbox, &train(&whole, &[&BUSY]));
    let child = spawn(&sandbox, &train(&output, &[&BUSY]));
    wait_for_checkpoint(&output);
    fs::rename(&output, &moved).unwrap();
    let (code, said) = ended(child);
    assert_eq!(code, Some(1), "{said}");
    assert!(said.contains("help: the folder is gone") && said.contains(&output), "{said}");
    assert!(!Path::new(&output).exists(), "the folder was made anew");
    fs::rename(&moved, &output).unwrap();
    ok(&sandbox, &train(&output, &[&BUSY, &LATEST]));
    same_end(&whole, &output);
}

#[test]
fn a_signal_saves_and_says_how_to_go_on() {
    let sandbox = sandbox();
    let (whole, output) = (sandbox.path("whole"), sandbox.path("run"));
    // Only signals save before the end.
    let settings = ["--num-epochs", "40", "--save-steps", "100000"];
    ok(&sandbox, &train(&whole, &[&settings]));
    for name in ["-TERM", "-INT"] {
        let child = spawn(&sandbox, &train(&output, &[&settings, &LATEST]));
        let lines = || fs::read_to_string(Path::new(&output).join("logging.jsonl")).unwrap_or_default().lines().count();
        let (start, before) = (Instant::now(), lines());
        while lines() <= before {
            assert!(start.elapsed() < Duration::from_secs(60), "no step was taken");
            std::thread::sleep(Duration::from_millis(1));
        }
        signal(&child, name);
        let (code, said) = ended(child);
        assert_eq!(code, Some(1), "{said}");
        let name = name.replace('-', "SIG");
        assert!(
            said.contains(&format!("ended by {name}")) && said.contains("--resume-from-checkpoint latest"),
            "{said}"
        );
        assert!(!Path::new(&output).join("adapter_model.safetensors").exists(), "the run came to its end");
    }
    ok(&sandbox, &train(&output, &[&settings, &LATEST]));
    same_end(&whole, &output);
}

/// The small data set with a further row, its line, and a token that only this row has.
fn rare_row(sandbox: &Sandbox) -> (String, usize, u32) {
    let tokenizer = ChatTokenizer::open(Path::new(&case("model")), None).unwrap();
    let text = fs::read_to_string(case("prefs.jsonl")).unwrap();
    let row = text.lines().next().unwrap().replacen("\"content\": \"", "\"content\": \"\u{6f22}", 1);
    let others = tokenizer.encode(&text, false).unwrap();
    let rare = tokenizer.encode("\u{6f22}", false).unwrap().into_iter().find(|id| !others.contains(id));
    let rows = sandbox.write("rows.jsonl", &format!("{}\n{row}\n", text.trim_end()));
    (rows, text.lines().count() + 1, rare.unwrap())
}

/// The small model with an infinite embedding of some tokens.
fn broken_model(sandbox: &Sandbox, name: &str, broken: impl Fn(usize) -> bool) -> String {
    let folder = sandbox.path(name);
    copy(Path::new(&case("model")), Path::new(&folder));
    let path = Path::new(&folder).join("model.safetensors");
    let mut bytes = fs::read(&path).unwrap();
    let header = u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize;
    let entries: Value = serde_json::from_slice(&bytes[8..8 + header]).unwrap();
    let entry = &entries["model.embed_tokens.weight"];
    assert_eq!(entry["dtype"], "F32");
    let number = |pointer: &str| entry.pointer(pointer).unwrap().as_u64().unwrap() as usize;
    let (rows, width, start) = (number("/shape/0"), number("/shape/1"), 8 + header + number("/data_offsets/0"));
    for row in (0..rows).filter(|r| broken(*r)) {
        bytes[start + row * width * 4..][..4].copy_from_slice(&f32::INFINITY.to_le_bytes());
    }
    fs::write(&path, bytes).unwrap();
    folder
}

#[test]
fn a_pair_whose_loss_is_no_number_is_named_and_its_step_is_skipped() {
    let sandbox = sandbox();
    let (rows, line, token) = rare_row(&sandbox);
    let model = broken_model(&sandbox, "rare", |row| row == token as usize);
    let place = format!("rows.jsonl:{line}: ");
    let output = sandbox.path("run");
    let args = train_on(&model, &rows, &output, &[&["--num-epochs", "2"]]);
    let ended = ok(&sandbox, &args);
    let told: Vec<&str> = ended.stderr.lines().filter(|l| l.contains("the step is skipped")).collect();
    assert_eq!(told.len(), 2, "once an epoch:\n{}", ended.stderr);
    assert!(told.iter().all(|l| l.contains(&place)), "{place} is not named: {told:?}");
    // One rank of three has the pair; all skip the step and the first names the pair.
    let ranks =
        ok(&sandbox, &train_on(&model, &rows, &sandbox.path("ranks"), &[&["--num-epochs", "2", "--gpus", "3"]]));
    assert_eq!(told, ranks.stderr.lines().filter(|l| l.contains("the step is skipped")).collect::<Vec<_>>());
    let adapter = dpo_core::weights::read_f32(&Path::new(&output).join("adapter_model.safetensors")).unwrap();
    assert!(adapter.values().all(|(_, values)| values.iter().all(|v| v.is_finite())));
    assert!(adapter.iter().any(|(n, (_, values))| n.contains("lora_B") && values.iter().any(|v| *v != 0.0)));

    let output = sandbox.path("all");
    let model = broken_model(&sandbox, "every", |_| true);
    let args = train(&output, &[&["--num-epochs", "2", "--save-steps", "100"], &["--model", &model]]);
    says(
        &sandbox,
        &args,
        2,
        &["no log-prob", "number 0 of tensor 'model.embed_tokens.weight'", "help: the checkpoint is broken"],
    );
    assert!(!Path::new(&output).exists());

    // Numbers that f32 does not have: the third step that is not taken ends the run, and nothing of it is saved.
    let output = sandbox.path("beyond");
    for (flag, value) in [("--adam-epsilon", "1e-320"), ("--learning-rate", "1e38")] {
        let args = train(&output, &[&["--num-epochs", "2", "--save-steps", "100"], &[flag, value]]);
        says(&sandbox, &args, 1, &["step 3 has loss", "AdamW's step", "as had the 2 steps before", "help: "]);
        let files: Vec<_> = fs::read_dir(&output).unwrap().map(|e| e.unwrap().file_name()).collect();
        assert!(!files.iter().any(|f| f.to_string_lossy().contains("checkpoint") || f == "adapter_model.safetensors"));
        fs::remove_dir_all(&output).unwrap();
    }
}

#[test]
fn another_run_is_not_resumed_and_what_differs_is_named() {
    let sandbox = sandbox();
    let output = sandbox.path("run");
    ok(&sandbox, &train(&output, &[&SHORT]));
    let fewer = {
        let text = fs::read_to_string(case("prefs.jsonl")).unwrap();
        sandbox.write("fewer.jsonl", &text.lines().skip(1).collect::<Vec<_>>().join("\n"))
    };
    let other = broken_model(&sandbox, "other", |row| row == 0);
    let moved = sandbox.path("moved");
    copy(Path::new(&case("model")), Path::new(&moved));
    let args = train_on(&case("model"), &fewer, &output, &[&SHORT, &LATEST]);
    says(&sandbox, &args, 2, &["the data was 16 examples, ", "is 15 examples, "]);
    let refused: [(&[&str], &str); 5] = [
        (&["--beta", "0.5"], "--beta was not given, is 0.5"),
        (&["--learning-rate", "1e-3"], "--learning-rate was 0.002, is 0.001"),
        (&["--loss", "ipo"], "--loss was [\"sigmoid\"], is [\"ipo\"]"),
        (&["--lora-rank", "4"], "--lora-rank was 8, is 4"),
        (&["--model", &other], "the model was "),
    ];
    for (flags, text) in refused {
        says(&sandbox, &train(&output, &[&SHORT, &LATEST, flags]), 2, &["is of another run: ", text]);
    }
    says(
        &sandbox,
        &train(&output, &[&SHORT, &LATEST, &["--micro-batch-tokens", "64"]]),
        2,
        &["--micro-batch-tokens: is 64; the run that is resumed has 8192"],
    );
    let same: [&[&str]; 3] = [
        &["--recompute", "true", "--gpu-memory", "8GiB"],
        &["--model", &moved],
        &["--save-steps", "3", "--logging-steps", "2"],
    ];
    same.iter().for_each(|flags| drop(ok(&sandbox, &train(&output, &[&SHORT, &LATEST, flags]))));
}

#[test]
fn names_in_a_checkpoint_stay_in_its_folder() {
    let sandbox = sandbox();
    let model = sandbox.path("model");
    copy(Path::new(&case("model")), Path::new(&model));
    fs::rename(format!("{model}/model.safetensors"), sandbox.path("outside.safetensors")).unwrap();
    let absolute = sandbox.path("outside.safetensors");
    for name in ["../outside.safetensors", &absolute, "..", "a/../../outside.safetensors"] {
        let index = serde_json::json!({"weight_map": {"model.embed_tokens.weight": name}});
        fs::write(format!("{model}/model.safetensors.index.json"), index.to_string()).unwrap();
        let args = train(&sandbox.path("run"), &[&SHORT, &["--model", &model]]);
        says(&sandbox, &args, 2, &["which is not a file of this folder", name]);
    }
}

#[test]
fn an_adapter_takes_no_memory_on_its_word() {
    let sandbox = sandbox();
    let adapter = sandbox.path("adapter");
    copy(Path::new(&case("init_adapter")), Path::new(&adapter));
    let path = Path::new(&adapter).join("adapter_config.json");
    let config: Value = serde_json::from_str(&fs::read_to_string(&path).unwrap()).unwrap();
    for (rank, text) in [(65_536, "has shape"), (1_000_000, "'r' is 1000000"), (u64::MAX, "from 1 to 65536")] {
        let mut hostile = config.clone();
        hostile["r"] = rank.into();
        fs::write(&path, hostile.to_string()).unwrap();
        says(&sandbox, &train(&sandbox.path("run"), &[&SHORT, &["--init-adapter", &adapter]]), 2, &[text]);
    }
}

/// What `args.json` of a run says of its micro-batches.
fn micro_batch_tokens(output: &str) -> u64 {
    let text = fs::read_to_string(Path::new(output).join("args.json")).unwrap();
    serde_json::from_str::<Value>(&text).unwrap()["resolved"]["packing"]["micro_batch_tokens"].as_u64().unwrap()
}

/// A run under a memory limit is resumed with other memory free: it goes on with the micro-batches that it began with, to the
/// bytes of a run that was not interrupted, or is refused with the numbers.
#[test]
fn a_resumed_run_keeps_its_micro_batches_whatever_memory_is_free() {
    let sandbox = sandbox();
    let adapter = |output: &str| fs::read(Path::new(output).join("adapter_model.safetensors")).unwrap();
    let limited = |name: &str, kib: usize, more: &[&str]| {
        let (output, limit) = (sandbox.path(name), format!("{kib}KiB"));
        (output.clone(), train(&output, &[&SHORT, &["--batch-size", "16", "--gpu-memory", &limit], more]))
    };
    // The least memory under which a step takes several micro-batches.
    let enough = |kib: &usize| {
        let (output, args) = limited(&format!("probe-{kib}"), *kib, &["--max-steps", "1"]);
        run(&sandbox, &args).code == 0 && micro_batch_tokens(&output) >= 32
    };
    let coarse = (0..60).map(|n| (1024.0 * 1.15_f64.powi(n)) as usize).find(enough).expect("a limit that is enough");
    // A seventh more memory may be several times as many tokens.
    let tight = (coarse - coarse / 8..coarse).step_by(coarse / 64).find(enough).unwrap_or(coarse);
    let (whole, args) = limited("whole", tight, &[]);
    ok(&sandbox, &args);
    let tokens = micro_batch_tokens(&whole);
    assert!(tokens < 256, "a step is a single micro-batch of {tokens} tokens at most, within {tight} KiB");
    let (other, args) = limited("other", 1 << 22, &[]);
    ok(&sandbox, &args);
    assert_ne!(adapter(&whole), adapter(&other), "other micro-batches would round alike, so that this shows nothing");

    let (resumed, args) = limited("resumed", tight, &[]);
    ok(&sandbox, &args);
    let stop_after = |step: &str| {
        for late in ["checkpoint-4", "checkpoint-6", "checkpoint-7"].iter().filter(|c| **c > step) {
            let _ = fs::remove_dir_all(Path::new(&resumed).join(late));
        }
        fs::write(Path::new(&resumed).join("latest"), format!("{step}\n")).unwrap();
        fs::remove_file(Path::new(&resumed).join("adapter_model.safetensors")).unwrap();
    };
    stop_after("checkpoint-4");
    let (_, args) = limited("resumed", 1 << 22, &LATEST);
    ok(&sandbox, &args);
    assert_eq!(adapter(&resumed), adapter(&whole));

    stop_after("checkpoint-4");
    let (_, args) = limited("resumed", 600, &LATEST);
    says(&sandbox, &args, 2, &["there are 600.0 KiB", "micro-batches that it began with"]);
    let (_, args) = limited("resumed", 1 << 22, &[&LATEST[..], &["--micro-batch-tokens", "7"]].concat());
    says(&sandbox, &args, 2, &["--micro-batch-tokens: is 7; the run that is resumed has"]);
}
