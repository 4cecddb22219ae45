//! `train --report-to`: what trackers get, and that none of them ever costs a run anything. Their own programs read it in
//! `tests/oracle/trackers.py`.
#![allow(clippy::unwrap_used)] // In a test, a panic is the report.

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use dpo_tests::mlflow::{Mlflow, Mood};
use dpo_tests::{Ended, Sandbox, golden, log};

fn sandbox() -> Sandbox {
    Sandbox::new(env!("CARGO_BIN_EXE_dpo-host-test"))
}

fn args(s: &Sandbox, more: &[&str]) -> Vec<String> {
    let folder = golden("trajectories").join("qwen2");
    let (model, rows) = (folder.join("model").display().to_string(), folder.join("prefs.jsonl").display().to_string());
    let fixed = ["train", "--device", "cpu", "--model", &model, "--dataset", &rows, "--batch-size", "2"];
    let output = s.path("run");
    let more = [&["--logging-steps", "1", "--save-steps", "2", "--output-dir", &output], more].concat();
    fixed.iter().copied().chain(more).map(str::to_owned).collect()
}

fn run(s: &Sandbox, uri: &str, more: &[&str]) -> Ended {
    let args = args(s, more);
    let mut command = s.command(&args.iter().map(String::as_str).collect::<Vec<_>>());
    for name in
        ["WANDB_PROJECT", "SWANLAB_PROJ_NAME", "MLFLOW_EXPERIMENT_NAME", "http_proxy", "HTTP_PROXY", "all_proxy"]
    {
        command.env_remove(name);
    }
    let output = command.env("MLFLOW_TRACKING_URI", uri).env("MLFLOW_TRACKING_TOKEN", "secret").output().unwrap();
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    Ended { code: output.status.code().unwrap(), stdout: text(&output.stdout), stderr: text(&output.stderr) }
}

/// The numbers of a run's log, by their names in trackers, with their steps.
fn numbers(s: &Sandbox) -> Vec<(String, u64)> {
    let mut all = Vec::new();
    for line in log(&s.path("run")) {
        let line = line.as_object().unwrap();
        let is_evaluation = line.keys().any(|name| name.starts_with("eval_"));
        let own = |name: &str| name != "global_step" && name.starts_with("eval_") == is_evaluation;
        for (name, value) in line.iter().filter(|(name, _)| own(name)) {
            let group = if name.starts_with("eval_") { "eval" } else { "train" };
            if value.is_number() {
                let name = format!("{group}/{}", name.trim_start_matches("eval_"));
                all.push((name, line["global_step"].as_u64().unwrap()));
            }
        }
    }
    all.sort();
    all
}

fn arrived(server: &Mlflow) -> Vec<(String, u64)> {
    let metrics = server.state.lock().unwrap().metrics.clone();
    let mut all: Vec<(String, u64)> = metrics.into_iter().map(|(_, name, step)| (name, step)).collect();
    all.sort();
    all
}

const MLFLOW: [&str; 4] = ["--report-to", "mlflow", "--max-steps", "4"];

#[test]
fn every_number_arrives_once_though_the_server_stumbles() {
    let (s, server) = (sandbox(), Mlflow::start(Mood::Broken(2)));
    let ended = run(&s, &server.address, &[&MLFLOW[..], &["--project", "tests", "--run-name", "first"]].concat());
    assert_eq!(ended.code, 0, "{}", ended.stderr);
    assert_eq!(ended.stderr.matches("does not answer: status 500").count(), 1, "{}", ended.stderr);
    assert_eq!(arrived(&server), numbers(&s));
    {
        let state = server.state.lock().unwrap();
        assert_eq!(
            (state.experiments.clone(), state.statuses.clone()),
            (vec!["tests".into()], vec!["FINISHED".into()])
        );
        assert_eq!((state.params["batch_size"].as_str(), state.runs), ("2", 1));
        assert!(state.shown.iter().all(|shown| shown == "Bearer secret") && !state.shown.is_empty());
    }
    // Two steps are taken again, which the server has; two more follow, in the same run.
    let checkpoint = format!("{}/checkpoint-2", s.path("run"));
    for (steps, from) in [("4", checkpoint.as_str()), ("6", "latest")] {
        let more = ["--report-to", "mlflow", "--max-steps", steps, "--resume-from-checkpoint", from];
        let ended = run(&s, &server.address, &more);
        assert_eq!(ended.code, 0, "{}", ended.stderr);
        assert_eq!(arrived(&server), numbers(&s));
    }
    assert_eq!(server.state.lock().unwrap().runs, 1);
}

#[test]
fn a_server_that_is_gone_silent_or_closed_ends_nothing() {
    let gone = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
    let (silent, closed) = (Mlflow::start(Mood::Silent), Mlflow::start(Mood::Closed));
    let cases = [
        (format!("http://{gone}"), "does not answer"),
        (silent.address.clone(), "did not take the last numbers"),
        (closed.address.clone(), "403 PERMISSION_DENIED not yours"),
    ];
    for (uri, says) in cases {
        let (s, start) = (sandbox(), Instant::now());
        let ended = run(&s, &uri, &MLFLOW);
        assert_eq!(ended.code, 0, "{}", ended.stderr);
        assert!(ended.stderr.contains(says), "it does not say '{says}':\n{}", ended.stderr);
        assert!(start.elapsed() < Duration::from_secs(60), "{uri}: {:?}", start.elapsed());
        assert_eq!(log(&s.path("run")).len(), 4);
        assert!(Path::new(&s.path("run/adapter_model.safetensors")).is_file());
    }
}

#[test]
fn a_run_that_is_told_to_end_says_so() {
    let (s, server) = (sandbox(), Mlflow::start(Mood::Well));
    let args = args(&s, &["--report-to", "mlflow", "wandb", "--num-epochs", "100000"]);
    let mut command = s.command(&args.iter().map(String::as_str).collect::<Vec<_>>());
    command.env("MLFLOW_TRACKING_URI", &server.address).stderr(std::process::Stdio::null());
    let mut child = command.spawn().unwrap();
    let start = Instant::now();
    while arrived(&server).is_empty() {
        assert!(start.elapsed() < Duration::from_secs(120) && child.try_wait().unwrap().is_none());
        std::thread::sleep(Duration::from_millis(20));
    }
    std::process::Command::new("kill").args(["-INT", &child.id().to_string()]).status().unwrap();
    assert_eq!(child.wait().unwrap().code(), Some(1));
    assert_eq!(server.state.lock().unwrap().statuses, ["KILLED"]);
    assert_eq!(arrived(&server), numbers(&s));
}

#[test]
fn servers_are_named_before_anything_is_done() {
    let s = sandbox();
    for uri in ["", "file:///tmp/mlruns", "sqlite:///mlflow.db"] {
        let ended = run(&s, uri, &MLFLOW);
        assert_eq!(ended.code, 2, "{}", ended.stderr);
        assert!(
            ended.stderr.contains("--report-to mlflow") && ended.stderr.contains("mlflow server"),
            "{}",
            ended.stderr
        );
        assert!(!Path::new(&s.path("run")).exists());
    }
    let ended = run(&s, "", &["--report-to", "comet"]);
    assert_eq!(ended.code, 2, "{}", ended.stderr);
    assert!(ended.stderr.contains("swanlab"), "{}", ended.stderr);
}

/// The one run of a tracker's folder, and its file.
fn offline(s: &Sandbox, tracker: &str) -> (String, Vec<u8>) {
    let folders: Vec<PathBuf> =
        std::fs::read_dir(s.path(&format!("run/{tracker}"))).unwrap().map(|e| e.unwrap().path()).collect();
    assert_eq!(folders.len(), 1, "{folders:?}");
    let name = folders[0].file_name().unwrap().to_str().unwrap().to_owned();
    let id = name.rsplit('-').next().unwrap();
    let file = folders[0].join(format!("run-{id}.{tracker}"));
    (name.clone(), std::fs::read(file).unwrap())
}

#[test]
fn files_of_other_trackers_are_of_one_run() {
    let s = sandbox();
    let wanted = ["--report-to", "wandb", "swanlab", "wandb", "--max-steps", "4"];
    let ended = run(&s, "", &wanted);
    assert_eq!(ended.code, 0, "{}", ended.stderr);
    let steps = |bytes: &[u8], name: &str| bytes.windows(name.len()).filter(|w| *w == name.as_bytes()).count();
    let first = ["wandb", "swanlab"].map(|tracker| offline(&s, tracker).0);
    for (tracker, head, times) in [("wandb", b":W&B", 8), ("swanlab", b":SWL", 5)] {
        let (name, bytes) = offline(&s, tracker);
        assert!(bytes.starts_with(head) && ended.stderr.contains(&format!("{tracker} sync ")), "{}", ended.stderr);
        assert!(ended.stderr.contains(&name), "{}", ended.stderr);
        // A line of wandb has each number in its history and its summary; SwanLab's column has the name once more.
        assert_eq!(steps(&bytes, "train/grad_norm"), times, "{tracker}");
    }
    let checkpoint = format!("{}/checkpoint-2", s.path("run"));
    let ended = run(&s, "", &[&wanted[..], &["--resume-from-checkpoint", &checkpoint]].concat());
    assert_eq!(ended.code, 0, "{}", ended.stderr);
    assert_eq!(["wandb", "swanlab"].map(|tracker| offline(&s, tracker).0), first);
    assert_eq!(steps(&offline(&s, "wandb").1, "train/grad_norm"), 8);
    assert_eq!(steps(&offline(&s, "swanlab").1, "train/grad_norm"), 5);
}

#[test]
fn names_of_other_tools_are_obeyed() {
    let cases: [(&[&str], &str, &str); 3] = [
        (&["--pref_loss", "sigmoid", "--use_swanlab", "true", "--swanlab_run_name", "mine"], "swanlab", "llamafactory"),
        (
            &["--rlhf_type", "dpo", "--report_to", "swanlab", "--swanlab_exp_name", "mine", "--add_version", "false"],
            "swanlab",
            "ms-swift",
        ),
        (&["--report_to", "wandb", "--run_name", "mine", "--project", "theirs"], "wandb", "theirs"),
    ];
    for (more, tracker, project) in cases {
        let s = sandbox();
        let ended = run(&s, "", &[more, &["--max-steps", "1"]].concat());
        assert_eq!(ended.code, 0, "{}", ended.stderr);
        let bytes = offline(&s, tracker).1;
        for text in [project, "mine"] {
            assert!(bytes.windows(text.len()).any(|w| w == text.as_bytes()), "{more:?}: no {text}");
        }
    }
    let s = sandbox();
    let ended = run(&s, "", &["--report-to", "none", "--max-steps", "1"]);
    assert_eq!(ended.code, 0, "{}", ended.stderr);
    assert!(!Path::new(&s.path("run/wandb")).exists() && Path::new(&s.path("run/runs")).is_dir());
}
