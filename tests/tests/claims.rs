//! What a run holds and what it relies on: its folder, what decided its steps, and the caches. `DPO_CAMPAIGN` says how often two
//! runs are started beside each other.
#![allow(clippy::unwrap_used)] // In a test, a panic is the report.

use std::collections::BTreeSet;
use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Stdio};
use std::time::Duration;

use dpo_tests::{Numbers, Sandbox, copy, golden, log};
use serde_json::{Value, json};

const LATEST: [&str; 2] = ["--resume-from-checkpoint", "latest"];

fn sandbox() -> Sandbox {
    Sandbox::new(env!("CARGO_BIN_EXE_dpo-host-test"))
}

fn model() -> String {
    golden("trajectories/qwen2/model").display().to_string()
}

fn rows() -> String {
    golden("trajectories/qwen2/prefs.jsonl").display().to_string()
}

fn train(model: &str, more: &[&[&str]]) -> Vec<String> {
    let (rows, more) = (rows(), more.concat());
    let fixed = ["train", "--device", "cpu", "--batch-size", "4", "--model", model, "--dataset", &rows];
    fixed.iter().chain(&more).map(|a| (*a).to_owned()).collect()
}

fn spawn(sandbox: &Sandbox, args: &[String]) -> Child {
    let mut command = sandbox.command(&args.iter().map(String::as_str).collect::<Vec<_>>());
    command.stdout(Stdio::null()).stderr(Stdio::piped()).spawn().unwrap()
}

fn ok(sandbox: &Sandbox, args: &[String]) -> String {
    sandbox.ok(&args.iter().map(String::as_str).collect::<Vec<_>>()).stderr
}

fn refuses(sandbox: &Sandbox, args: &[String], texts: &[&str]) {
    sandbox.refuses(&args.iter().map(String::as_str).collect::<Vec<_>>(), texts);
}

/// Two runs, one a moment after the other: with a folder's name one of them is refused, without they have a folder each.
#[test]
fn two_starts_never_share_a_folder() {
    let times = std::env::var("DPO_CAMPAIGN").map_or(4, |_| 50);
    let mut moments = Numbers::new(times);
    let (mut beside, mut after) = (0, 0);
    for time in 0..times {
        let sandbox = sandbox();
        let wait = Duration::from_secs_f64(if time % 4 == 0 { 0.0 } else { moments.draw() + 1.0 });
        let named = sandbox.path("run");
        let named: &[&str] = if time % 2 == 0 { &["--output-dir", &named] } else { &[] };
        // The second takes other steps, so that a shared folder would show.
        let args =
            |seed: &str| train(&model(), &[named, &["--num-epochs", "30", "--logging-steps", "1", "--seed", seed]]);
        let first = spawn(&sandbox, &args("1"));
        std::thread::sleep(wait);
        let second = spawn(&sandbox, &args("2"));
        let ended = [first, second].map(|child| child.wait_with_output().unwrap());
        let said = ended.each_ref().map(|o| String::from_utf8_lossy(&o.stderr).into_owned());
        let codes = ended.each_ref().map(|o| o.status.code());
        if time % 2 == 0 {
            let refused = if codes == [Some(0), Some(2)] { &said[1] } else { &said[0] };
            assert!([[Some(0), Some(2)], [Some(2), Some(0)]].contains(&codes), "{codes:?}\n{said:?}");
            let held = refused.contains("another run writes this folder: process ");
            assert!(held || refused.contains("holds a run already"), "{refused}");
            if held {
                beside += 1
            } else {
                after += 1
            }
            assert_eq!(log(&sandbox.path("run")).len(), 120, "the run lost lines");
        } else {
            assert_eq!(codes, [Some(0), Some(0)], "{said:?}");
            let folders: BTreeSet<PathBuf> =
                fs::read_dir(sandbox.path("output")).unwrap().map(|e| e.unwrap().path()).collect();
            assert_eq!(folders.len(), 2, "{folders:?}");
            folders.iter().for_each(|f| assert_eq!(log(f.to_str().unwrap()).len(), 120, "{f:?} lost lines"));
        }
    }
    println!("{times} times; with a name {beside} were refused beside the first, {after} after it");
}

/// The folder is held before rows are read, and left as it was where the run is refused.
#[test]
fn a_refused_run_leaves_no_folder_and_a_killed_one_no_lock() {
    let sandbox = sandbox();
    let bad = sandbox.write("bad.jsonl", "{\"prompt\": \"a\"}\n");
    let output = sandbox.path("runs/deep/run");
    let args = ["train", "--device", "cpu", "--model", &model(), "--dataset", &bad, "--output-dir", &output]
        .map(str::to_owned);
    refuses(&sandbox, &args, &["bad.jsonl"]);
    assert!(!Path::new(&sandbox.path("runs")).exists(), "folders stay");
    fs::create_dir_all(&output).unwrap();
    refuses(&sandbox, &args, &["bad.jsonl"]);
    assert!(fs::read_dir(&output).unwrap().next().is_none(), "something is left in the user's own folder");

    let mut child = spawn(&sandbox, &train(&model(), &[&["--output-dir", &output, "--num-epochs", "400"]]));
    while !Path::new(&output).join("args.json").exists() {
        std::thread::sleep(Duration::from_millis(5));
    }
    refuses(
        &sandbox,
        &train(&model(), &[&["--output-dir", &output], &LATEST]),
        &["another run writes this folder: process"],
    );
    child.kill().unwrap();
    child.wait().unwrap();
    ok(&sandbox, &train(&model(), &[&["--output-dir", &output, "--max-steps", "2"], &LATEST]));
}

/// Killed between the two renames that put a checkpoint in the place of another of the same step.
#[test]
fn a_checkpoint_that_was_moved_aside_is_put_back() {
    let sandbox = sandbox();
    let output = sandbox.path("run");
    let steps = ["--output-dir", &output, "--max-steps", "2", "--save-steps", "1"];
    ok(&sandbox, &train(&model(), &[&steps]));
    fs::rename(format!("{output}/checkpoint-2"), format!("{output}/.checkpoint-2.old")).unwrap();
    let said = ok(&sandbox, &train(&model(), &[&steps, &LATEST]));
    assert!(said.contains("resuming") && said.contains("checkpoint-2"), "{said}");
}

/// What decided a run's steps is on record, and a run is resumed with the same or not at all.
#[test]
fn a_run_is_resumed_with_the_plugins_that_it_began_with() {
    let sandbox = sandbox();
    let (output, other) = (sandbox.path("run"), sandbox.path("other"));
    let steps = ["--output-dir", &output, "--max-steps", "2", "--save-steps", "1"];
    ok(&sandbox, &train(&model(), &[&steps]));
    let args: Value = serde_json::from_str(&fs::read_to_string(format!("{output}/args.json")).unwrap()).unwrap();
    let resolved = &args["resolved"];
    assert_eq!(resolved["package"], format!("dpo-model-qwen2 {}", env!("CARGO_PKG_VERSION")));
    assert_eq!(resolved["settings"]["dpo-host"], env!("CARGO_PKG_VERSION"));
    assert!(resolved["settings"]["the plugin's graph of the model"].is_string(), "{resolved:#}");
    assert!(
        resolved["settings"]["the plugin of loss 'sigmoid'"].as_str().unwrap().starts_with("dpo-losses "),
        "{resolved:#}"
    );

    // The same loss from a library of another build.
    let plugins = sandbox.path("plugins");
    fs::create_dir_all(&plugins).unwrap();
    let library = format!("{}dpo_losses{}", std::env::consts::DLL_PREFIX, std::env::consts::DLL_SUFFIX);
    let beside = std::env::current_exe().unwrap().with_file_name(&library);
    fs::copy(beside, Path::new(&plugins).join(&library)).unwrap();
    let with = [&steps[..], &LATEST, &["--plugin-dir", &plugins]].concat();
    refuses(
        &sandbox,
        &train(&model(), &[&with]),
        &["is of another run", "the plugin of loss 'sigmoid' was dpo-losses", "(sha256 "],
    );

    // Another graph of the same weights.
    copy(&golden("trajectories/qwen2/model"), Path::new(&other));
    let config = fs::read_to_string(format!("{other}/config.json")).unwrap();
    let mut config: Value = serde_json::from_str(&config).unwrap();
    config["rms_norm_eps"] = json!(0.1);
    fs::write(format!("{other}/config.json"), config.to_string()).unwrap();
    refuses(
        &sandbox,
        &train(&other, &[&steps, &LATEST]),
        &["is of another run", "the plugin's graph of the model was "],
    );
    ok(&sandbox, &train(&model(), &[&steps, &LATEST]));
}

/// The loss of the first step, which is ln 2 as long as the reference is the adapter of the start.
fn first_loss(output: &str) -> f64 {
    log(output)[0]["loss"].as_f64().unwrap()
}

/// The reference cache's one file.
fn cached(sandbox: &Sandbox) -> PathBuf {
    let mut files = fs::read_dir(sandbox.path("cache/dpo-host/reference")).unwrap().map(|e| e.unwrap().path());
    let file = files.next().unwrap();
    assert_eq!(files.next(), None);
    file
}

#[test]
fn a_cached_reference_is_what_was_written_or_computed_again() {
    let sandbox = sandbox();
    let own = sandbox.path("model");
    copy(Path::new(&model()), Path::new(&own));
    let mut count = 0;
    let mut run = || {
        count += 1;
        let output = sandbox.path(&format!("run-{count}"));
        let said = ok(&sandbox, &train(&own, &[&["--output-dir", &output, "--max-steps", "1"]]));
        (first_loss(&output), said)
    };
    let ln2 = std::f64::consts::LN_2;
    assert!((run().0 - ln2).abs() < 1e-6);
    let file = cached(&sandbox);
    assert_eq!(fs::metadata(file.parent().unwrap()).unwrap().permissions().mode() & 0o777, 0o700);

    // Other numbers of the same length, and a file that is cut short.
    let whole = fs::read(&file).unwrap();
    let planted: Vec<u8> =
        whole.iter().enumerate().map(|(i, b)| if i > 40 && i % 4 == 2 { b ^ 1 } else { *b }).collect();
    for bytes in [&planted[..], &whole[..whole.len() - 4], &[]] {
        fs::write(&file, bytes).unwrap();
        let (loss, said) = run();
        assert!((loss - ln2).abs() < 1e-6, "{loss}");
        assert!(said.contains("is not what was written there"), "{said}");
        assert_eq!(fs::read(&file).unwrap(), whole);
    }

    // Other weights under the same name, of the same size, with the old time of modification.
    let weights = Path::new(&own).join("model.safetensors");
    let time = fs::metadata(&weights).unwrap().modified().unwrap();
    let mut bytes = fs::read(&weights).unwrap();
    let end = bytes.len();
    bytes[end - 4000..].chunks_exact_mut(4).for_each(|b| b[2] ^= 0x40);
    fs::write(&weights, bytes).unwrap();
    fs::File::options().write(true).open(&weights).unwrap().set_modified(time).unwrap();
    let (loss, _) = run();
    assert!((loss - ln2).abs() < 1e-6, "a stale reference: {loss}");
}

/// What others can write is not read, and a run goes on without a cache.
#[test]
fn a_cache_that_others_can_write_is_not_used() {
    let sandbox = sandbox();
    let own = sandbox.path("cache/dpo-host");
    fs::create_dir_all(&own).unwrap();
    fs::set_permissions(&own, fs::Permissions::from_mode(0o777)).unwrap();
    let said = ok(&sandbox, &train(&model(), &[&["--output-dir", &sandbox.path("run"), "--max-steps", "1"]]));
    assert!(said.contains("reference log-probs are not cached") && said.contains("with mode 777"), "{said}");
    let demo = sandbox.run(&["train", "--device", "cpu", "--max-steps", "1"]);
    assert!(demo.code == 1 && demo.stderr.contains("XDG_CACHE_HOME"), "{}", demo.stderr);
    // Neither is a temporary folder.
    let mut command = sandbox.command(&["train", "--device", "cpu", "--max-steps", "1"]);
    let temporary = sandbox.path("tmp");
    fs::create_dir_all(&temporary).unwrap();
    let ended =
        command.env_remove("XDG_CACHE_HOME").env("HOME", "/dev/null").env("TMPDIR", &temporary).output().unwrap();
    assert_eq!(ended.status.code(), Some(1), "{ended:?}");
    assert!(fs::read_dir(&temporary).unwrap().next().is_none());
}
