//! Many ranks: the same run as on one, however they are started; losses of ranks; strangers.
//!
//! All on the CPU, over TCP. The rows are 13 of a family's 16, so that no split is even and the last batch of an epoch has
//! a single pair.
#![allow(clippy::unwrap_used)] // In a test, a panic is the report.

use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use dpo_core::memory::size;
use dpo_core::plan::{MemoryOptions, Plan};
use dpo_plugin_api::graph::ModelGraph;
use dpo_ranks::handshake::{Hello, Purpose, Refused, Secret, call};
use dpo_tests::{Sandbox, golden, graph, log, weights};

const BATCH: &[&str] = &["--batch-size", "4", "--num-epochs", "2", "--split-dataset-ratio", "0.2"];
const SECRET: &str = "of this test";

fn sandbox() -> Sandbox {
    Sandbox::new(env!("CARGO_BIN_EXE_dpo-host-test"))
}

/// `train` on the small model and rows of a family's goldens.
fn train(family: &str, output: &str, more: &[&[&str]]) -> Vec<String> {
    let path = |name: &str| golden("trajectories").join(family).join(name).display().to_string();
    let (model, rows) = (path("model"), path("prefs.jsonl"));
    let fixed = ["train", "--device", "cpu", "--model", &model, "--dataset", &rows, "--output-dir", output];
    let settings = ["--learning-rate", "2e-3", "--logging-steps", "1", "--seed", "7", "--micro-batch-tokens", "200"];
    fixed.iter().chain(&settings).chain(more.iter().copied().flatten()).map(|a| (*a).to_owned()).collect()
}

fn command(sandbox: &Sandbox, args: &[String]) -> Command {
    sandbox.command(&args.iter().map(String::as_str).collect::<Vec<_>>())
}

fn ok(sandbox: &Sandbox, args: &[String]) -> String {
    sandbox.ok(&args.iter().map(String::as_str).collect::<Vec<_>>()).stderr
}

fn adapter(folder: &str) -> Vec<u8> {
    std::fs::read(Path::new(folder).join("adapter_model.safetensors")).unwrap()
}

fn free_port() -> u16 {
    TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port()
}

/// A rank as torchrun and its kind start it.
fn rank(sandbox: &Sandbox, args: &[String], rank: usize, size: usize, port: u16) -> Command {
    let mut command = command(sandbox, args);
    let numbers = [("RANK", rank), ("LOCAL_RANK", rank), ("WORLD_SIZE", size), ("MASTER_PORT", port.into())];
    command.envs(numbers.map(|(name, value)| (name, value.to_string())));
    command.env("MASTER_ADDR", "127.0.0.1").env("DPO_HOST_SECRET", SECRET).env("RAYON_NUM_THREADS", "1");
    command.stdout(Stdio::null()).stderr(Stdio::piped());
    command
}

/// What a process printed and how it ended.
fn ended(child: Child) -> (i32, String) {
    let output = child.wait_with_output().unwrap();
    let text = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(!text.contains("panicked"), "{text}");
    (output.status.code().unwrap_or(-1), text)
}

fn wait_for(what: &str, mut holds: impl FnMut() -> bool) {
    let start = Instant::now();
    while !holds() {
        assert!(start.elapsed() < Duration::from_secs(60), "{what} did not come");
        std::thread::sleep(Duration::from_millis(5));
    }
}

/// Sends a signal by its name.
fn signal(name: &str, process: u32) {
    assert!(Command::new("kill").args([&format!("-{name}"), &process.to_string()]).status().unwrap().success());
}

/// The process of a rank that a launcher has started.
fn process_of(launcher: u32, rank: usize) -> Option<u32> {
    let wanted = format!("RANK={rank}");
    let children = std::fs::read_to_string(format!("/proc/{launcher}/task/{launcher}/children")).ok()?;
    children.split_whitespace().filter_map(|pid| pid.parse().ok()).find(|pid: &u32| {
        let environment = std::fs::read(format!("/proc/{pid}/environ")).unwrap_or_default();
        environment.split(|b| *b == 0).any(|v| v == wanted.as_bytes())
    })
}

/// Every number of every line but those that depend on the clock and the machine.
fn assert_equal_logs(a: &str, b: &str, what: &str) {
    let (a, b) = (log(a), log(b));
    assert_eq!(a.len(), b.len(), "{what}");
    for (a, b) in a.iter().zip(&b) {
        for (name, value) in a.as_object().unwrap() {
            if ["tokens_per_second", "memory_gib", "elapsed_s"].contains(&name.as_str()) {
                continue;
            }
            // Before anything is told apart, rounding decides which answer is ahead.
            let apart = a["rewards/margins"].as_f64().is_none_or(|margin| margin.abs() > 1e-4);
            if name == "rewards/accuracies" && !apart {
                continue;
            }
            let (a, b) = (value.as_f64().unwrap(), b[name].as_f64().unwrap());
            // Log-probs near 100 carry 1e-5 of f32 rounding into rewards, and the gradient's norm is made of them.
            let bound = if name.contains("loss") { 1e-5 } else { 1e-4 };
            assert!((a - b).abs() <= bound * a.abs().max(1.0), "{what}: {name} is {b}, not {a}");
        }
    }
}

#[test]
fn the_number_of_ranks_changes_nothing() {
    let sandbox = sandbox();
    let one = sandbox.path("one");
    ok(&sandbox, &train("qwen2", &one, &[BATCH]));
    assert_eq!(log(&one).iter().filter(|l| l.get("loss").is_some()).count(), 8);
    assert!(log(&one).iter().any(|l| l.get("eval_loss").is_some()), "nothing was evaluated");
    for ranks in ["2", "3", "4"] {
        let many = sandbox.path(ranks);
        // Computed anew by all ranks, not read from what one rank left.
        std::fs::remove_dir_all(sandbox.path("cache")).unwrap();
        let printed = ok(&sandbox, &train("qwen2", &many, &[BATCH, &["--gpus", ranks]]));
        assert_equal_logs(&one, &many, &format!("{ranks} ranks"));
        assert!(!printed.contains("rank 1:"), "ranks speak over each other:\n{printed}");
    }
    // The cache is one rank's, whoever fills it.
    let before = std::fs::read_dir(sandbox.path("cache/dpo-host/reference")).unwrap().count();
    ok(&sandbox, &train("qwen2", &sandbox.path("again"), &[BATCH]));
    assert_eq!(std::fs::read_dir(sandbox.path("cache/dpo-host/reference")).unwrap().count(), before);
}

#[test]
fn ranks_of_another_launcher_take_the_same_steps() {
    let sandbox = sandbox();
    let (one, two) = (sandbox.path("one"), sandbox.path("two"));
    ok(&sandbox, &train("llama3", &one, &[BATCH]));
    // As torchrun's own ports, these are not among those that the system chooses from, where a rank's ring may come to lie.
    // In ms-swift's words, of which one counts for each rank.
    let batch: &[&str] = &["--per_device_train_batch_size", "1", "--gradient_accumulation_steps", "2"];
    let (args, port) =
        (train("llama3", &two, &[&BATCH[2..], batch]), 20_000 + (std::process::id() % 1_000) as u16 * 10);
    // torchrun's own store has the port that it names.
    let _store = TcpListener::bind(("127.0.0.1", port));
    let start = |r| rank(&sandbox, &args, r, 2, port).env("TORCHELASTIC_RUN_ID", "none").spawn().unwrap();
    for child in [start(1), start(0)] {
        let (code, text) = ended(child);
        assert_eq!(code, 0, "{text}");
    }
    assert_equal_logs(&one, &two, "two ranks");
}

#[test]
fn losses_over_the_whole_step_and_sums_of_losses() {
    let sandbox = sandbox();
    let losses: [&[&str]; 3] = [
        &["--loss", "aot"],
        &["--loss", "bco_pair"],
        &["--loss", "sigmoid", "sft", "aot_unpaired", "--loss-weights", "1", "0.3", "0.5"],
    ];
    for (at, loss) in losses.into_iter().enumerate() {
        let (one, three) = (sandbox.path(&format!("{at}-one")), sandbox.path(&format!("{at}-three")));
        ok(&sandbox, &train("qwen3", &one, &[BATCH, loss]));
        ok(&sandbox, &train("qwen3", &three, &[BATCH, loss, &["--gpus", "3"]]));
        assert_equal_logs(&one, &three, &format!("{loss:?}"));
    }
}

/// How busy experts are is counted over the whole step: several micro-batches, one on each of many ranks and recomputed layers take the same
/// steps, and the same again to the last bit. Of 0 there is no such loss.
#[test]
fn experts_are_balanced_over_the_whole_step() {
    let sandbox = sandbox();
    let coefficient: &[&str] = &["--router-aux-loss-coef", "0.5"];
    let one = sandbox.path("one");
    ok(&sandbox, &train("qwen3_moe", &one, &[BATCH, coefficient]));
    let told = |name: &str| log(&one).iter().filter(|line| line[name].is_number()).count();
    assert!((told("aux_loss"), told("eval_aux_loss")) == (8, 1), "{:?}", log(&one));
    for (name, more) in [("again", &[][..]), ("4", &["--gpus", "4"]), ("recomputed", &["--recompute", "true"])] {
        let other = sandbox.path(name);
        ok(&sandbox, &train("qwen3_moe", &other, &[BATCH, coefficient, more]));
        assert_equal_logs(&one, &other, name);
        assert!(name == "4" || adapter(&one) == adapter(&other), "{name}: other bits");
    }
    let off = sandbox.path("off");
    ok(&sandbox, &train("qwen3_moe", &off, &[BATCH, &["--router-aux-loss-coef", "0"]]));
    assert!(log(&off).iter().all(|line| line.get("aux_loss").is_none()) && adapter(&off) != adapter(&one));
    sandbox.refuses(
        &train("qwen3", &sandbox.path("dense"), &[coefficient]).iter().map(String::as_str).collect::<Vec<_>>(),
        &["--router-aux-loss-coef", "no router with an auxiliary loss"],
    );
}

#[test]
fn a_loss_with_a_memory_remembers_the_same_on_every_rank() {
    let sandbox = sandbox();
    let plugins = test_losses(&sandbox);
    let run = |name: &str, more: &[&str]| {
        let output = sandbox.path(name);
        let loss: &[&str] = &["--loss", "bco-shifted", "--plugin-dir", &plugins];
        ok(&sandbox, &train("llama3", &output, &[BATCH, loss, more]));
        let state = std::fs::read_to_string(Path::new(&output).join("checkpoint-8/trainer_state.json")).unwrap();
        let state: serde_json::Value = serde_json::from_str(&state).unwrap();
        (output, state["losses"][0][0].as_f64().unwrap())
    };
    let (one, mean) = run("one", &["--micro-batch-tokens", "8192"]);
    assert!(mean.abs() > 1e-2, "a mean of {mean} shows nothing");
    for (name, more) in [("small", ["--micro-batch-tokens", "1"]), ("three", ["--gpus", "3"])] {
        let (other, its) = run(name, &more);
        assert!((mean - its).abs() < 1e-4, "{name}: remembers {its}, not {mean}");
        assert_equal_logs(&one, &other, name);
    }
}

#[test]
fn a_run_goes_on_with_another_number_of_ranks() {
    let sandbox = sandbox();
    let (whole, cut) = (sandbox.path("whole"), sandbox.path("cut"));
    let settings: &[&str] = &["--save-steps", "3", "--lr-scheduler", "constant"];
    ok(&sandbox, &train("qwen2", &whole, &[BATCH, settings]));
    ok(&sandbox, &train("qwen2", &cut, &[BATCH, settings, &["--gpus", "3"]]));
    std::fs::remove_dir_all(Path::new(&cut).join("checkpoint-8")).unwrap();
    std::fs::remove_dir_all(Path::new(&cut).join("checkpoint-6")).unwrap();
    let latest: &[&str] = &["--resume-from-checkpoint", "latest"];
    let printed = ok(&sandbox, &train("qwen2", &cut, &[BATCH, settings, latest, &["--gpus", "2"]]));
    assert!(!printed.contains("step 3/") && printed.contains("step 4/"), "{printed}");
    assert_equal_logs(&whole, &cut, "three ranks, then two");
}

/// A folder with the losses of `tests/stateful`.
fn test_losses(sandbox: &Sandbox) -> String {
    let plugins = sandbox.path("plugins");
    std::fs::create_dir(&plugins).unwrap();
    let file = format!("{}stateful{}", std::env::consts::DLL_PREFIX, std::env::consts::DLL_SUFFIX);
    std::fs::copy(std::env::current_exe().unwrap().with_file_name(&file), Path::new(&plugins).join(&file)).unwrap();
    plugins
}

/// A run of many steps, started as ranks by hand, at its second checkpoint or later.
fn under_way(sandbox: &Sandbox, output: &str, size: usize, more: &[&str]) -> Vec<Child> {
    let long: &[&str] = &["--batch-size", "4", "--num-epochs", "1000", "--save-steps", "4", "--save-total-limit", "1"];
    let (args, port) = (train("qwen2", output, &[long, more]), free_port());
    let ranks = (0..size).map(|r| rank(sandbox, &args, r, size, port).spawn().unwrap()).collect();
    wait_for("a checkpoint", || Path::new(output).join("checkpoint-4").exists());
    ranks
}

/// Ends all but one rank's wait, which has to be with its name, within 10 s.
fn assert_named(mut ranks: Vec<Child>, lost: usize, what: &str) {
    let start = Instant::now();
    let process = format!("rank {lost} (");
    let own = format!(":{})", ranks[lost].id());
    let mut lost = ranks.remove(lost);
    for mut rank in ranks {
        while rank.try_wait().unwrap().is_none() && start.elapsed() < Duration::from_secs(20) {
            std::thread::sleep(Duration::from_millis(10));
        }
        let _ = rank.kill();
        let (code, text) = ended(rank);
        assert_eq!(code, 1, "{text}");
        let named =
            text.lines().any(|l| l.starts_with("error: ") && [&process, &own, what].iter().all(|t| l.contains(*t)));
        assert!(named, "'{what}' of {process} {own} is not said:\n{text}");
    }
    assert!(start.elapsed() < Duration::from_secs(10), "it took {:?}", start.elapsed());
    lost.kill().unwrap();
    lost.wait().unwrap();
}

#[test]
fn a_rank_that_is_killed_is_named_by_all_others() {
    for killed in [2, 0] {
        let sandbox = sandbox();
        let mut ranks = under_way(&sandbox, &sandbox.path("run"), 3, &[]);
        ranks[killed].kill().unwrap();
        assert_named(ranks, killed, "died");
    }
}

#[test]
fn a_rank_that_computes_for_long_is_not_missed() {
    let sandbox = sandbox();
    let plugins = test_losses(&sandbox);
    let slow: &[&str] =
        &["--loss", "slow", "--plugin-dir", &plugins, "--max-steps", "1", "--micro-batch-tokens", "8192"];
    // The third rank has no pair and waits for the others, longer than a rank may be silent.
    let ranks: &[&str] = &["--batch-size", "2", "--gpus", "3", "--watchdog", "1"];
    ok(&sandbox, &train("qwen2", &sandbox.path("run"), &[slow, ranks]));
    // Nor is a run stuck that goes on slowly, for longer than it may stand still.
    let ranks: &[&str] = &["--batch-size", "4", "--gpus", "2", "--progress-timeout", "3", "--micro-batch-tokens", "1"];
    ok(&sandbox, &train("qwen2", &sandbox.path("slowly"), &[slow, ranks]));
}

#[test]
fn a_rank_that_lives_and_does_not_move_is_named() {
    let sandbox = sandbox();
    let plugins = test_losses(&sandbox);
    let more: &[&str] = &["--loss", "stuck", "--plugin-dir", &plugins, "--progress-timeout", "1.5"];
    let (args, port) = (train("qwen2", &sandbox.path("run"), &[BATCH, more]), free_port());
    let ranks = (0..3).map(|r| rank(&sandbox, &args, r, 3, port).spawn().unwrap()).collect();
    assert_named(ranks, 1, "is stuck: it has made no progress for 1.5 s");
}

#[test]
fn gpus_that_are_named_need_ranks() {
    let sandbox = sandbox();
    let listed = train("qwen2", &sandbox.path("run"), &[&["--device", "cuda:0,1"]]);
    sandbox.refuses(&listed.iter().map(String::as_str).collect::<Vec<_>>(), &["names 2 GPUs", "--gpus"]);
    let none = train("qwen2", &sandbox.path("run"), &[&["--gpus", "0"]]);
    sandbox.refuses(&none.iter().map(String::as_str).collect::<Vec<_>>(), &["--gpus: should be above 0"]);
}

#[test]
fn a_rank_that_hangs_is_named() {
    for stopped in [1, 0] {
        let sandbox = sandbox();
        let output = sandbox.path("run");
        let ranks = under_way(&sandbox, &output, 3, &["--watchdog", "2"]);
        // Shorter than the watchdog's time: nothing happens.
        signal("STOP", ranks[stopped].id());
        std::thread::sleep(Duration::from_millis(700));
        signal("CONT", ranks[stopped].id());
        let step = || log(&output).last().and_then(|l| l["global_step"].as_u64()).unwrap();
        let before = step();
        wait_for("a further step", || step() > before + 4);
        signal("STOP", ranks[stopped].id());
        assert_named(ranks, stopped, "has been silent for 2 s");
    }
}

#[test]
fn a_rank_that_fails_says_why_to_all() {
    let sandbox = sandbox();
    let (args, port) = (train("qwen2", &sandbox.path("run"), &[BATCH]), free_port());
    let other = train("qwen2", &sandbox.path("run"), &[BATCH, &["--beta", "0.3"]]);
    let ranks = [&args, &args, &other].into_iter().enumerate();
    let ranks: Vec<Child> = ranks.map(|(r, args)| rank(&sandbox, args, r, 3, port).spawn().unwrap()).collect();
    for child in ranks {
        let (code, text) = ended(child);
        assert_eq!(code, 2, "{text}");
        assert!(
            text.contains("rank 2 (") && text.contains("another model, data or set of flags than rank 0"),
            "{text}"
        );
    }
}

#[test]
fn a_run_that_lost_a_rank_starts_again_by_itself() {
    let sandbox = sandbox();
    let (whole, cut) = (sandbox.path("whole"), sandbox.path("cut"));
    let settings: &[&str] =
        &["--batch-size", "4", "--num-epochs", "30", "--save-steps", "3", "--gpus", "2", "--max-restarts", "1"];
    ok(&sandbox, &train("qwen2", &whole, &[settings]));
    let launcher = command(&sandbox, &train("qwen2", &cut, &[settings])).stderr(Stdio::piped()).spawn().unwrap();
    wait_for("a checkpoint", || Path::new(&cut).join("checkpoint-6").exists());
    signal("KILL", process_of(launcher.id(), 1).unwrap());
    let (code, text) = ended(launcher);
    assert_eq!(code, 0, "{text}");
    assert!(text.contains("warning: rank 1 ended with signal: 9") && text.contains("restart 1 of 1"), "{text}");
    assert_eq!(adapter(&whole), adapter(&cut));
    assert_equal_logs(&whole, &cut, "a run with a restart");
}

#[test]
fn ranks_end_with_their_launcher() {
    let sandbox = sandbox();
    let output = sandbox.path("run");
    let args =
        train("qwen2", &output, &[&["--batch-size", "4", "--num-epochs", "1000", "--save-steps", "4", "--gpus", "2"]]);
    let start = || {
        let _ = std::fs::remove_dir_all(&output);
        let launcher = command(&sandbox, &args).stderr(Stdio::piped()).spawn().unwrap();
        wait_for("a checkpoint", || Path::new(&output).join("checkpoint-4").exists());
        let ranks = [0, 1].map(|r| process_of(launcher.id(), r).unwrap());
        (launcher, ranks)
    };
    let gone = |process: &u32| {
        let stat = std::fs::read_to_string(format!("/proc/{process}/stat")).unwrap_or_default();
        stat.is_empty() || stat.contains(") Z ")
    };
    // A rank that is lost takes the others with it and is named.
    let (launcher, ranks) = start();
    signal("KILL", ranks[1]);
    let (code, text) = ended(launcher);
    assert_eq!(code, 1, "{text}");
    assert!(text.contains("error: rank 1 ended with signal: 9"), "{text}");
    assert!(ranks.iter().all(gone));
    // Whatever ends the launcher ends its ranks.
    for name in ["TERM", "KILL"] {
        let (launcher, ranks) = start();
        signal(name, launcher.id());
        let (_, text) = ended(launcher);
        assert_eq!(text.contains("ended by SIGTERM after step"), name == "TERM", "{text}");
        wait_for("the ranks' end", || ranks.iter().all(gone));
    }
}

#[test]
fn strangers_are_refused_and_the_run_goes_on() {
    let sandbox = sandbox();
    let (one, two) = (sandbox.path("one"), sandbox.path("two"));
    ok(&sandbox, &train("qwen2", &one, &[BATCH]));
    let (args, port) = (train("qwen2", &two, &[BATCH]), free_port());
    let first = rank(&sandbox, &args, 0, 2, port).spawn().unwrap();
    let call = || TcpStream::connect(("127.0.0.1", port));
    wait_for("rank 0", || call().is_ok());
    call().unwrap().write_all(b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n").unwrap();
    // A right opening, then a message that claims to have 4 GiB.
    let mut stream = call().unwrap();
    stream.write_all(b"dpo-host ranks 1").unwrap();
    stream.write_all(&[0; 32]).unwrap();
    stream.read_exact(&mut [0; 48]).unwrap();
    stream.write_all(&[0; 32]).unwrap();
    stream.write_all(&u32::MAX.to_le_bytes()).unwrap();
    assert_eq!(stream.read(&mut [0]).unwrap_or(0), 0, "a message of 4 GiB was answered");
    let refused = |mut rank: Command, texts: &[&str]| {
        let (code, text) = ended(rank.spawn().unwrap());
        assert_eq!(code, 1, "{text}");
        texts.iter().for_each(|t| assert!(text.contains(t), "'{t}' is not said:\n{text}"));
    };
    let mut other = rank(&sandbox, &args, 1, 2, port);
    other.env("DPO_HOST_SECRET", "of another test");
    refused(other, &["another secret", &format!("127.0.0.1:{port}")]);
    refused(rank(&sandbox, &args, 1, 3, port), &["refuses this rank: it counts 3 ranks, here are 2"]);
    let mut again = rank(&sandbox, &args, 0, 2, port);
    again.arg("--rendezvous").arg("1");
    let (code, text) = ended(again.spawn().unwrap());
    assert_eq!(code, 2, "{text}");
    assert!(text.contains("is in use") && text.contains("MASTER_PORT"), "{text}");
    let second = rank(&sandbox, &args, 1, 2, port).spawn().unwrap();
    let (code, text) = ended(second);
    assert_eq!(code, 0, "{text}");
    let (code, text) = ended(first);
    assert_eq!(code, 0, "{text}");
    for cause in
        ["is not a rank of dpo-host", "a message of 4294967295 bytes", "does not know the run's secret", "3 ranks"]
    {
        let lines = text.lines().filter(|l| l.starts_with("note: 127.0.0.1:") && l.contains(cause)).count();
        assert_eq!(lines, 1, "'{cause}':\n{text}");
    }
    assert_equal_logs(&one, &two, "a run that strangers called");
}

/// What a launcher tells its ranks can be known to others of the host; what rank 0 tells them cannot.
#[test]
fn a_stranger_of_the_same_host_who_knows_the_run_is_refused() {
    let sandbox = sandbox();
    let (args, port) = (train("qwen2", &sandbox.path("run"), &[BATCH]), free_port());
    let start = |r| {
        let mut rank = rank(&sandbox, &args, r, 2, port);
        rank.env_remove("DPO_HOST_SECRET").spawn().unwrap()
    };
    let (folder, first) = (sandbox.path("cache/dpo-host/ranks"), start(0));
    let files = || std::fs::read_dir(&folder).into_iter().flatten().map(|e| e.unwrap().path()).collect::<Vec<_>>();
    wait_for("a secret", || files().iter().any(|f| f.metadata().unwrap().len() == 64));
    assert_eq!(files()[0].metadata().unwrap().permissions().mode() & 0o777, 0o600);
    let shared = format!("torchrun [] 127.0.0.1 {:?} 2", port..=port);
    let guessed = Secret::new(shared.as_bytes());
    let hello = Hello {
        version: env!("CARGO_PKG_VERSION").into(),
        rank: 1,
        size: 2,
        attempt: 0,
        process: "stranger:1".into(),
        purpose: Purpose::Join,
        port: 1,
    };
    let mut stream = TcpStream::connect(("127.0.0.1", port)).unwrap();
    assert!(matches!(call(&mut stream, || Ok(guessed), &hello), Err(Refused::Unauthenticated(_))));
    let second = start(1);
    for child in [second, first] {
        let (code, text) = ended(child);
        assert_eq!(code, 0, "{text}");
        assert!(!text.contains("DPO_HOST_SECRET"), "{text}");
    }
    assert_eq!(files(), Vec::<std::path::PathBuf>::new());
}

#[test]
fn a_run_that_is_put_back_goes_on_or_begins() {
    let sandbox = sandbox();
    let (whole, cut) = (sandbox.path("whole"), sandbox.path("cut"));
    let settings: &[&str] = &["--save-steps", "3"];
    ok(&sandbox, &train("qwen2", &whole, &[BATCH, settings]));
    let latest: &[&str] = &["--resume-from-checkpoint", "latest"];
    let args = train("qwen2", &cut, &[BATCH, settings, latest]);
    ok(&sandbox, &args);
    // What a run leaves that was killed before and after its first checkpoint.
    for (kept, first) in [(None, "step 1/"), (Some("checkpoint-3"), "step 4/")] {
        ["checkpoint-3", "checkpoint-6", "checkpoint-8"].iter().filter(|c| Some(**c) != kept).for_each(|c| {
            let _ = std::fs::remove_dir_all(Path::new(&cut).join(c));
        });
        std::fs::remove_file(Path::new(&cut).join("adapter_model.safetensors")).unwrap();
        let printed = ok(&sandbox, &args);
        assert!(printed.lines().find(|l| l.starts_with("step ")).is_some_and(|l| l.starts_with(first)), "{printed}");
        assert_eq!(adapter(&whole), adapter(&cut));
        assert_equal_logs(&whole, &cut, first);
    }
    // torchrun counts restarts by machine; one rank that was started again is enough.
    std::fs::remove_dir_all(Path::new(&cut).join("checkpoint-8")).unwrap();
    let (args, port) = (train("qwen2", &cut, &[BATCH, settings]), free_port());
    let again = |r: usize| {
        let mut rank = rank(&sandbox, &args, r, 2, port);
        rank.env("TORCHELASTIC_RUN_ID", "none").env("TORCHELASTIC_RESTART_COUNT", r.to_string());
        rank.spawn().unwrap()
    };
    for child in [again(0), again(1)] {
        let (code, text) = ended(child);
        assert_eq!(code, 0, "{text}");
        assert!(!text.contains("step 6/"), "{text}");
    }
    assert_equal_logs(&whole, &cut, "two ranks that go on");
}

#[test]
fn ranks_that_do_not_come_are_named() {
    let sandbox = sandbox();
    let (args, port) = (train("qwen2", &sandbox.path("run"), &[BATCH, &["--rendezvous", "2"]]), free_port());
    let came = [0, 2].map(|r| rank(&sandbox, &args, r, 4, port).spawn().unwrap());
    for child in came {
        let (code, text) = ended(child);
        assert_eq!(code, 1, "{text}");
        assert!(text.contains("ranks 1, 3 of 4 did not come within 2 s"), "{text}");
    }
    let mut half = rank(&sandbox, &args, 0, 2, port);
    let (code, text) = ended(half.env_remove("MASTER_ADDR").spawn().unwrap());
    assert_eq!(code, 2, "{text}");
    assert!(text.contains("MASTER_ADDR: is not set, but RANK is"), "{text}");
}

#[test]
fn a_base_that_ranks_share_gives_the_same_bits() {
    let sandbox = sandbox();
    // The last step of an epoch has one pair, so that ranks attend without one; `aot` sees all pairs of a step at once.
    // Experts in mxfp4 are shared as they are published, and whole where they are not.
    let cases: [(&str, &str, &[&str]); 7] = [
        ("qwen2", "2", &[]),
        ("qwen3", "3", &["--recompute", "true"]),
        ("llama3", "4", &["--micro-batch-tokens", "8192"]),
        ("qwen2", "3", &["--loss", "aot"]),
        ("llama3", "3", &["--quantization", "nf4"]),
        ("qwen2", "2", &["--quantization", "fp8"]),
        ("gpt_oss-mxfp4", "2", &[]),
    ];
    for (at, (family, ranks, more)) in cases.into_iter().enumerate() {
        let run = |shared: &str| {
            // Reference log-probs, too, are computed by each run.
            let _ = std::fs::remove_dir_all(sandbox.path("cache"));
            let output = sandbox.path(&format!("{at}-{shared}"));
            let base: &[&str] = &["--gpus", ranks, "--shard-base", shared];
            let printed = ok(&sandbox, &train(family, &output, &[BATCH, base, more]));
            assert_eq!(printed.contains(&format!("sharded over {ranks} ranks")), shared == "true", "{printed}");
            output
        };
        let (whole, shared) = (run("false"), run("true"));
        assert_eq!(adapter(&whole), adapter(&shared), "{family} on {ranks} ranks, {more:?}");
        let numbers = |folder: &str| {
            let mut lines = log(folder);
            for line in lines.iter_mut().filter_map(|l| l.as_object_mut()) {
                ["tokens_per_second", "memory_gib", "elapsed_s"].iter().for_each(|n| drop(line.remove(*n)));
            }
            lines
        };
        assert_eq!(numbers(&whole), numbers(&shared), "{family} on {ranks} ranks, {more:?}");
    }
}

/// A checkpoint with random weights of a small family's shape, but for some of its sizes; the graph comes with it.
fn enlarged(sandbox: &Sandbox, sizes: &[(&str, usize)]) -> (String, ModelGraph) {
    let small = golden("trajectories/qwen2/model");
    let mut config: serde_json::Value =
        serde_json::from_str(&std::fs::read_to_string(small.join("config.json")).unwrap()).unwrap();
    let map = config.as_object_mut().unwrap();
    map.remove("layer_types");
    sizes.iter().for_each(|(name, value)| drop(map.insert((*name).into(), (*value).into())));
    let graph = graph("qwen2", &config.to_string());
    let folder = Path::new(&sandbox.write("large/config.json", &config.to_string())).parent().unwrap().to_owned();
    for name in ["tokenizer.json", "tokenizer_config.json"] {
        std::fs::copy(small.join(name), folder.join(name)).unwrap();
    }
    candle_core::safetensors::save(&weights(&graph, 1), folder.join("model.safetensors")).unwrap();
    (folder.display().to_string(), graph)
}

#[test]
fn weights_that_do_not_fit_are_shared() {
    let sandbox = sandbox();
    let sizes = [("hidden_size", 128), ("intermediate_size", 512), ("num_hidden_layers", 16), ("vocab_size", 8000)];
    let (model, graph) = enlarged(&sandbox, &sizes);
    // Between what ranks need with all weights and with shared ones.
    let plan = |parts| {
        Plan::new(&graph, 0, 1, parts, MemoryOptions { limit: Some(1 << 40), ..MemoryOptions::default() }).unwrap()
    };
    let (whole, shared) = (plan(1), plan(3));
    let memory = (whole.workspace + (whole.weights + shared.weights) / 2).to_string();
    let rows = golden("trajectories/qwen2/prefs.jsonl").display().to_string();
    let args = |output: &str, more: &[&str]| {
        let model = ["train", "--device", "cpu", "--model", &model, "--dataset", &rows, "--output-dir", output];
        let settings = ["--max-steps", "2", "--batch-size", "4", "--lora-rank", "1", "--micro-batch-tokens", "64"];
        let fixed = model.iter().chain(&settings).chain(&["--max-length", "48", "--recompute", "true", "--gpus", "3"]);
        fixed.chain(more).map(|a| (*a).to_owned()).collect::<Vec<String>>()
    };
    let tight: &[&str] = &["--gpu-memory", &memory];
    let printed = ok(&sandbox, &args(&sandbox.path("shared"), tight));
    assert!(printed.contains("base        sharded over 3 ranks: all weights, "), "{printed}");
    ok(&sandbox, &args(&sandbox.path("whole"), &["--gpu-memory", "64GiB"]));
    let adapters = ["shared", "whole"].map(|f| adapter(&sandbox.path(f)));
    assert!(adapters[0] == adapters[1], "a shared base gives another adapter");
    let refused = args(&sandbox.path("no"), &[tight, &["--shard-base", "false"]].concat());
    let refused: Vec<&str> = refused.iter().map(String::as_str).collect();
    sandbox.refuses(&refused, &[&size(whole.weights), &size(shared.weights), "--shard-base: "]);
    let least = (shared.workspace + (1 << 20)).to_string();
    let refused = args(&sandbox.path("no"), &["--gpu-memory", &least]);
    let refused: Vec<&str> = refused.iter().map(String::as_str).collect();
    sandbox.refuses(&refused, &[&size(whole.weights), &size(shared.weights), "sharded over 3 ranks"]);
}

#[test]
fn a_rank_that_is_killed_while_the_base_is_shared_is_named() {
    let sandbox = sandbox();
    let mut ranks = under_way(&sandbox, &sandbox.path("run"), 3, &["--shard-base", "true"]);
    ranks[1].kill().unwrap();
    assert_named(ranks, 1, "died");
}

#[test]
fn a_link_between_hosts_that_is_cut() {
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("hosts/two_hosts.sh");
    let output = Command::new(script).arg(env!("CARGO_BIN_EXE_dpo-host-test")).output().unwrap();
    let text = [output.stdout, output.stderr].map(|o| String::from_utf8_lossy(&o).into_owned()).concat();
    println!("{text}");
    assert!(output.status.success(), "{text}");
}

/// Else a rank whose place is that of a run on one device would start ranks without end.
#[test]
fn a_rank_starts_no_ranks() {
    let sandbox = sandbox();
    let output = sandbox.path("run");
    let mut command = command(&sandbox, &train("qwen2", &output, &[&["--gpus", "2"]]));
    let child = command.env("DPO_HOST_LAUNCHED", "1").stdout(Stdio::null()).stderr(Stdio::piped()).spawn().unwrap();
    let (code, text) = ended(child);
    assert!(code == 1 && text.contains("is a rank and starts none"), "{code}: {text}");
}
