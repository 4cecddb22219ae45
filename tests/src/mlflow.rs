//! As much of an MLflow server as runs talk to, on the loopback, which fails when told to.

use std::collections::BTreeMap;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use serde_json::{Value, json};

/// How requests are answered.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Mood {
    /// As they should be.
    #[default]
    Well,
    /// So many times with status 500, then well.
    Broken(usize),
    /// Not at all.
    Silent,
    /// With status 403.
    Closed,
}

/// What the server has.
#[derive(Default)]
pub struct State {
    /// How it answers.
    pub mood: Mood,
    /// Experiments by name.
    pub experiments: Vec<String>,
    /// Settings of runs.
    pub params: BTreeMap<String, String>,
    /// Numbers: run, name, step.
    pub metrics: Vec<(String, String, u64)>,
    /// Statuses that were told.
    pub statuses: Vec<String>,
    /// Runs that were made.
    pub runs: usize,
    /// What was shown to be let in.
    pub shown: Vec<String>,
}

/// A running server.
pub struct Mlflow {
    /// Its address.
    pub address: String,
    /// What it has; may be changed while it runs.
    pub state: Arc<Mutex<State>>,
}

impl Mlflow {
    /// A server that answers so.
    pub fn start(mood: Mood) -> Mlflow {
        let listener = TcpListener::bind("127.0.0.1:0").expect("a free port");
        let address = format!("http://{}", listener.local_addr().expect("an address"));
        let state = Arc::new(Mutex::new(State { mood, ..State::default() }));
        let shared = state.clone();
        std::thread::spawn(move || {
            for stream in listener.incoming().flatten() {
                let state = shared.clone();
                std::thread::spawn(move || answer(stream, &state));
            }
        });
        Mlflow { address, state }
    }
}

fn answer(mut stream: TcpStream, state: &Mutex<State>) -> Option<()> {
    let mut reader = BufReader::new(stream.try_clone().ok()?);
    let mut first = String::new();
    reader.read_line(&mut first).ok()?;
    let target = first.split(' ').nth(1)?.strip_prefix("/api/2.0/mlflow/")?.to_owned();
    let (mut length, mut shown) = (0, None);
    for line in reader.by_ref().lines().map_while(|l| l.ok().filter(|l| !l.is_empty())) {
        match line.split_once(": ").map(|(name, value)| (name.to_lowercase(), value.to_owned())) {
            Some((name, value)) if name == "content-length" => length = value.parse().ok()?,
            Some((name, value)) if name == "authorization" => shown = Some(value),
            _ => {}
        }
    }
    let mut body = vec![0; length];
    reader.read_exact(&mut body).ok()?;
    let asked: Value = serde_json::from_slice(&body).unwrap_or_default();
    let mut state = state.lock().ok()?;
    state.shown.extend(shown);
    let (status, said) = match state.mood {
        Mood::Silent => {
            drop(state);
            std::thread::sleep(Duration::from_secs(60));
            return None;
        }
        Mood::Broken(times @ 1..) => {
            state.mood = Mood::Broken(times - 1);
            (500, json!({}))
        }
        Mood::Closed => (403, json!({"error_code": "PERMISSION_DENIED", "message": "not yours"})),
        _ => done(&mut state, &target, &asked),
    };
    let said = said.to_string();
    write!(stream, "HTTP/1.1 {status} X\r\ncontent-length: {}\r\nconnection: close\r\n\r\n{said}", said.len()).ok()
}

fn done(state: &mut State, target: &str, asked: &Value) -> (u16, Value) {
    let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
    let missing = (404, json!({"error_code": "RESOURCE_DOES_NOT_EXIST", "message": "none"}));
    match target.split('?').next().unwrap_or_default() {
        "experiments/get-by-name" if state.experiments.is_empty() => missing,
        "experiments/get-by-name" => (200, json!({"experiment": {"experiment_id": "7"}})),
        "experiments/create" => {
            state.experiments.push(text(&asked["name"]));
            (200, json!({"experiment_id": "7"}))
        }
        "runs/create" if asked["experiment_id"] == "7" => {
            state.runs += 1;
            (200, json!({"run": {"info": {"run_id": format!("run{}", state.runs)}}}))
        }
        "runs/get" => {
            let mut latest = BTreeMap::<&str, u64>::new();
            for (_, name, step) in &state.metrics {
                latest.entry(name).and_modify(|last| *last = (*last).max(*step)).or_insert(*step);
            }
            let metrics: Vec<Value> = latest.iter().map(|(k, step)| json!({"key": k, "step": step})).collect();
            (200, json!({"run": {"data": {"metrics": metrics}}}))
        }
        "runs/update" => {
            state.statuses.push(text(&asked["status"]));
            (200, json!({}))
        }
        "runs/log-batch" => {
            let run = text(&asked["run_id"]);
            for metric in asked["metrics"].as_array().into_iter().flatten() {
                state.metrics.push((run.clone(), text(&metric["key"]), metric["step"].as_u64().unwrap_or(u64::MAX)));
            }
            let params = asked["params"].as_array().into_iter().flatten();
            state.params.extend(params.map(|param| (text(&param["key"]), text(&param["value"]))));
            (200, json!({}))
        }
        _ => missing,
    }
}
