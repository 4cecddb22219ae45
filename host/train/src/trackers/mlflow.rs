//! A run on an MLflow server, by its REST API 2.0 (mlflow.org/docs/latest/api_reference/rest-api.html).
//!
//! A thread of its own talks to the server, so that neither a slow nor a dead one costs the training anything: lines wait in a
//! queue, are sent together, and are sent again until the server takes them. A resumed run goes on in the run that it had, whose
//! name on the server is in `mlflow.json`; of numbers that the server has it asks first.

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{self, Receiver, SyncSender, TrySendError};
use std::thread;
use std::time::Duration;

use base64::Engine;
use base64::engine::general_purpose::STANDARD as BASE64;
use serde_json::{Value, json};
use ureq::Agent;
use ureq::http::Method;

use super::{About, End, Line, Tracker, now, numbers, step, variable};
use dpo_core::console::{self, Remark};
use dpo_core::error::{Error, Result};
use dpo_core::files;

/// Lines that wait for the server at most.
const QUEUE: usize = 10_000;
/// Numbers and settings that the server takes at once.
const METRICS: usize = 1000;
const PARAMS: usize = 100;
/// Letters of a setting's value that servers of all versions take.
const VALUE: usize = 500;
/// How long an answer may take.
const SILENCE: Duration = Duration::from_secs(10);
/// How long the end of a run waits for what was not sent yet.
const GRACE: Duration = Duration::from_secs(12);
/// Pauses between tries, each twice as long as the one before.
const PAUSES: [Duration; 2] = [Duration::from_millis(500), Duration::from_secs(30)];
/// The file with the run's name on the server.
const FILE: &str = "mlflow.json";

/// The server that the environment names.
///
/// # Errors
/// None, or one that is not spoken to by HTTP.
pub(super) fn server() -> Result<String> {
    let help = "start one with `mlflow server`, and set MLFLOW_TRACKING_URI=http://127.0.0.1:5000";
    let at = "--report-to mlflow";
    match variable("MLFLOW_TRACKING_URI") {
        None => Err(Error::input("MLflow's server is not named").at(at).help(help)),
        Some(uri) if !uri.starts_with("http://") && !uri.starts_with("https://") => {
            Err(Error::input(format!("MLFLOW_TRACKING_URI={uri} is not a server that speaks HTTP")).at(at).help(help))
        }
        Some(uri) => Ok(uri.trim_end_matches('/').to_owned()),
    }
}

pub(super) struct Mlflow {
    lines: Option<SyncSender<Message>>,
    /// Ends with the thread.
    done: Receiver<()>,
    ending: Arc<AtomicBool>,
    lost: bool,
}

enum Message {
    Line(Vec<Metric>),
    End(End),
}

struct Metric {
    name: String,
    value: f64,
    step: u64,
    /// Milliseconds since 1970.
    time: u64,
}

impl Mlflow {
    pub(super) fn start(about: &About<'_>) -> Result<Mlflow> {
        let server = Server::new()?;
        let value = |value: &Value| {
            let text = value.as_str().map_or_else(|| value.to_string(), str::to_owned);
            if text.chars().count() > VALUE { text.chars().take(VALUE - 1).chain(['…']).collect() } else { text }
        };
        let start = Start {
            experiment: about.project("MLFLOW_EXPERIMENT_NAME"),
            name: about.name(),
            params: about.settings().map(|(name, v)| json!({"key": name, "value": value(v)})).collect(),
            file: about.folder.join(FILE),
        };
        console::line(format!("mlflow      {}, experiment {}", server.uri, start.experiment));
        let (lines, from) = mpsc::sync_channel(QUEUE);
        let (ended, done) = mpsc::channel();
        let ending = server.ending.clone();
        thread::spawn(move || {
            let _ended: mpsc::Sender<()> = ended;
            serve(&server, &start, &from);
        });
        Ok(Mlflow { lines: Some(lines), done, ending, lost: false })
    }
}

impl Tracker for Mlflow {
    fn write(&mut self, line: &Line) -> Result<()> {
        let (step, time) = (step(line), milliseconds());
        let metrics = numbers(line).map(|(name, value)| Metric { name, value, step, time }).collect();
        // One that has given up has said so.
        if let Some(Err(TrySendError::Full(_))) = self.lines.as_ref().map(|l| l.try_send(Message::Line(metrics)))
            && !std::mem::replace(&mut self.lost, true)
        {
            console::warning("MLflow's server is too slow: numbers are left out there; logging.jsonl has all");
        }
        Ok(())
    }

    fn end(&mut self, how: End) -> Result<()> {
        self.ending.store(true, Ordering::Relaxed);
        if let Some(lines) = self.lines.take() {
            let _ = lines.try_send(Message::End(how));
        }
        match self.done.recv_timeout(GRACE) {
            Err(mpsc::RecvTimeoutError::Timeout) => {
                Err(Error::run("MLflow's server did not take the last numbers in time")
                    .help("logging.jsonl has all; resuming the finished run sends them"))
            }
            _ => Ok(()),
        }
    }
}

/// What the server is told first.
struct Start {
    experiment: String,
    name: String,
    params: Vec<Value>,
    file: PathBuf,
}

/// Why there is no answer.
enum Failure {
    /// Another try may do.
    Passing(String),
    /// The server says no: status, its word for it, its words.
    Refused(u16, String, String),
}

struct Server {
    agent: Agent,
    uri: String,
    authorization: Option<String>,
    ending: Arc<AtomicBool>,
    warned: AtomicBool,
}

impl Server {
    fn new() -> Result<Server> {
        let basic = || {
            let (user, password) = (variable("MLFLOW_TRACKING_USERNAME")?, variable("MLFLOW_TRACKING_PASSWORD")?);
            Some(format!("Basic {}", BASE64.encode(format!("{user}:{password}"))))
        };
        let bearer = variable("MLFLOW_TRACKING_TOKEN").map(|token| format!("Bearer {token}"));
        Ok(Server {
            agent: dpo_hub::agent(SILENCE)?,
            uri: server()?,
            authorization: bearer.or_else(basic),
            ending: Arc::default(),
            warned: AtomicBool::default(),
        })
    }

    /// Asks once.
    fn once(&self, method: &Method, path: &str, body: &Value) -> std::result::Result<Value, Failure> {
        let mut request = ureq::http::Request::builder()
            .method(method)
            .uri(format!("{}/api/2.0/mlflow/{path}", self.uri))
            .header("content-type", "application/json");
        if let Some(authorization) = &self.authorization {
            request = request.header("authorization", authorization);
        }
        let passing = |e: &dyn std::fmt::Display| Failure::Passing(e.to_string());
        let sent = match *method {
            Method::GET => request.body(()).map_err(|e| passing(&e)).and_then(|request| {
                let request = self.agent.configure_request(request).timeout_global(Some(SILENCE)).build();
                self.agent.run(request).map_err(|e| passing(&e))
            }),
            _ => request.body(body.to_string()).map_err(|e| passing(&e)).and_then(|request| {
                let request = self.agent.configure_request(request).timeout_global(Some(SILENCE)).build();
                self.agent.run(request).map_err(|e| passing(&e))
            }),
        };
        let mut response = sent?;
        let status = response.status().as_u16();
        let text = response.body_mut().read_to_string().map_err(|e| passing(&e))?;
        let answer: Value = serde_json::from_str(&text).unwrap_or_default();
        match status {
            200..=299 => Ok(answer),
            408 | 429 | 500..=599 => Err(Failure::Passing(format!("status {status}"))),
            _ => {
                let word = |name: &str| answer[name].as_str().unwrap_or_default().to_owned();
                Err(Failure::Refused(status, word("error_code"), word("message")))
            }
        }
    }

    /// Asks until there is an answer, or the run is over. Of the first failure is told.
    fn ask(&self, method: Method, path: &str, body: &Value) -> std::result::Result<Value, Failure> {
        let mut pause = PAUSES[0];
        loop {
            match self.once(&method, path, body) {
                Err(Failure::Passing(cause)) => {
                    if !self.warned.swap(true, Ordering::Relaxed) {
                        let what = format!("MLflow's server does not answer: {cause}");
                        let help =
                            "the run goes on; what is missing there is sent as soon as it does. logging.jsonl has all";
                        console::warning(Remark::from(what).help(help));
                    }
                    let mut waited = Duration::ZERO;
                    while waited < pause {
                        if self.ending.load(Ordering::Relaxed) && waited >= PAUSES[0] {
                            return self.once(&method, path, body);
                        }
                        thread::sleep(PAUSES[0]);
                        waited += PAUSES[0];
                    }
                    pause = (pause * 2).min(PAUSES[1]);
                }
                answer => return answer,
            }
        }
    }

    fn post(&self, path: &str, body: &Value) -> std::result::Result<Value, Failure> {
        self.ask(Method::POST, path, body)
    }
}

/// Talks to the server until the run is over.
fn serve(server: &Server, start: &Start, from: &Receiver<Message>) {
    if let Err(failure) = sent(server, start, from) {
        let cause = match failure {
            Failure::Passing(cause) => cause,
            Failure::Refused(status, code, message) => format!("{status} {code} {message}"),
        };
        let help = "logging.jsonl has all numbers; resuming the run sends what is missing there";
        console::warning(Remark::from(format!("MLflow has not all of this run: {}", cause.trim())).help(help));
    }
}

fn sent(server: &Server, start: &Start, from: &Receiver<Message>) -> std::result::Result<(), Failure> {
    let (run, latest) = run(server, start)?;
    let is_new = |metric: &Metric| latest.get(&metric.name).is_none_or(|last| metric.step > *last);
    while let Ok(message) = from.recv() {
        let (mut metrics, mut end) = (Vec::new(), None);
        let mut next = Some(message);
        while let Some(message) = next {
            match message {
                Message::Line(line) => metrics.extend(line.into_iter().filter(is_new)),
                Message::End(how) => end = Some(how),
            }
            next = if end.is_none() && metrics.len() < METRICS { from.try_recv().ok() } else { None };
        }
        for part in metrics.chunks(METRICS) {
            let of = |m: &Metric| json!({"key": m.name, "value": m.value, "timestamp": m.time, "step": m.step});
            let metrics: Vec<Value> = part.iter().map(of).collect();
            server.post("runs/log-batch", &json!({"run_id": run, "metrics": metrics}))?;
        }
        if let Some(how) = end {
            let status = match how {
                End::Finished => "FINISHED",
                End::Failed => "FAILED",
                End::Killed => "KILLED",
            };
            server.post("runs/update", &json!({"run_id": run, "status": status, "end_time": milliseconds()}))?;
        }
    }
    Ok(())
}

/// The run on the server, and the last step of each number that it has.
fn run(server: &Server, start: &Start) -> std::result::Result<(String, HashMap<String, u64>), Failure> {
    if let Some(id) = known(server, &start.file) {
        match server.ask(Method::GET, &format!("runs/get?run_id={id}"), &Value::Null) {
            Ok(answer) => {
                server.post("runs/update", &json!({"run_id": id, "status": "RUNNING"}))?;
                let metrics = answer["run"]["data"]["metrics"].as_array().cloned().unwrap_or_default();
                let last = |m: &Value| Some((m["key"].as_str()?.to_owned(), integer(&m["step"])?));
                return Ok((id, metrics.iter().filter_map(last).collect()));
            }
            // Somebody has removed it.
            Err(Failure::Refused(404, ..)) => {}
            Err(failure) => return Err(failure),
        }
    }
    let experiment = experiment(server, &start.experiment)?;
    let source = json!([{"key": "mlflow.source.name", "value": "dpo-host"}]);
    let asked =
        json!({"experiment_id": experiment, "run_name": start.name, "start_time": milliseconds(), "tags": source});
    let answer = server.post("runs/create", &asked)?;
    let id = answer["run"]["info"]["run_id"].as_str().unwrap_or_default().to_owned();
    let kept = json!({"uri": server.uri, "run_id": id}).to_string();
    if let Err(e) = files::write_into(&start.file, kept.as_bytes()) {
        console::warning(Remark::from(&e));
    }
    for params in start.params.chunks(PARAMS) {
        server.post("runs/log-batch", &json!({"run_id": id, "params": params}))?;
    }
    Ok((id, HashMap::new()))
}

/// The run that this one goes on with.
fn known(server: &Server, file: &Path) -> Option<String> {
    let kept: Value = serde_json::from_str(&files::read_text(file).ok()?).ok()?;
    (kept["uri"] == server.uri.as_str()).then(|| kept["run_id"].as_str().map(str::to_owned))?
}

/// The experiment of this name, which is made if it is not there.
fn experiment(server: &Server, name: &str) -> std::result::Result<String, Failure> {
    let id = |answer: &Value| answer.as_str().unwrap_or_default().to_owned();
    let find = || {
        let escaped: String = name.bytes().map(|b| format!("%{b:02X}")).collect();
        let path = format!("experiments/get-by-name?experiment_name={escaped}");
        server.ask(Method::GET, &path, &Value::Null).map(|answer| id(&answer["experiment"]["experiment_id"]))
    };
    match find() {
        Err(Failure::Refused(404, ..)) => {}
        found => return found,
    }
    match server.post("experiments/create", &json!({"name": name})) {
        Ok(answer) => Ok(id(&answer["experiment_id"])),
        // Another run was faster.
        Err(Failure::Refused(_, code, _)) if code == "RESOURCE_ALREADY_EXISTS" => find(),
        Err(failure) => Err(failure),
    }
}

/// A whole number, which JSON of protobuf writes as a text where it is long.
fn integer(value: &Value) -> Option<u64> {
    value.as_u64().or_else(|| value.as_str()?.parse().ok())
}

fn milliseconds() -> u64 {
    (now() * 1000.0) as u64
}
