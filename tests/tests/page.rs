//! The page of runs: who is let in, what is served, that training does not notice it, and that texts of data stay texts.
#![allow(clippy::unwrap_used)] // In a test, a panic is the report.

use std::fs;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use dpo_tests::{Numbers, Sandbox, golden};
use serde_json::{Value, json};

fn sandbox() -> Sandbox {
    Sandbox::new(env!("CARGO_BIN_EXE_dpo-host-test"))
}

/// A command that serves a page; it is ended with the test.
struct Page {
    child: Child,
    /// `http://ADDRESS/QUERY`.
    address: String,
    query: String,
}

impl Page {
    /// Starts a command and waits for the address that it prints behind `name`.
    fn start(sandbox: &Sandbox, args: &[&str], name: &str) -> Page {
        let mut child = sandbox.command(args).stderr(Stdio::piped()).spawn().unwrap();
        let mut lines = BufReader::new(child.stderr.take().unwrap()).lines().map_while(Result::ok);
        let line = lines.find(|l| l.starts_with(name)).unwrap();
        // Nobody else reads the rest, and a full pipe would stop the command.
        std::thread::spawn(move || lines.count());
        let url = line.split_whitespace().nth(1).unwrap().strip_prefix("http://").unwrap();
        let (address, query) = url.split_once('/').unwrap();
        let port = address.rsplit_once(':').unwrap().1;
        Page { child, address: format!("127.0.0.1:{port}"), query: query.into() }
    }

    /// Sends a request; answers status and everything that came.
    fn send(&self, request: &str) -> (u16, String) {
        let mut stream = TcpStream::connect(&self.address).unwrap();
        stream.write_all(request.as_bytes()).unwrap();
        let mut text = String::new();
        stream.read_to_string(&mut text).unwrap();
        (text.split(' ').nth(1).unwrap_or("0").parse().unwrap(), text)
    }

    fn get(&self, path: &str, headers: &str) -> (u16, String) {
        self.send(&format!("GET {path} HTTP/1.1\r\nHost: {}\r\n{headers}\r\n", self.address))
    }

    /// As the page itself asks for something; answers status and text.
    fn post(&self, path: &str, body: &Value) -> (u16, String) {
        let own = format!("Origin: http://{}\r\nX-Dpo-Host: 1\r\nContent-Type: application/json\r\n", self.address);
        self.post_with(path, &format!("{own}{}", self.cookie()), &body.to_string())
    }

    fn post_with(&self, path: &str, headers: &str, body: &str) -> (u16, String) {
        let (host, length) = (&self.address, body.len());
        self.send(&format!("POST {path} HTTP/1.1\r\nHost: {host}\r\n{headers}Content-Length: {length}\r\n\r\n{body}"))
    }

    /// The header of who has opened the printed address.
    fn cookie(&self) -> String {
        let port = self.address.rsplit_once(':').unwrap().1;
        let token = self.query.strip_prefix("?token=");
        token.map(|token| format!("Cookie: dpo-host-{port}={token}\r\n")).unwrap_or_default()
    }

    fn json(&self, path: &str) -> Value {
        let (status, text) = self.get(path, &self.cookie());
        assert_eq!(status, 200, "{path}: {text}");
        serde_json::from_str(text.split_once("\r\n\r\n").unwrap().1).unwrap()
    }
}

impl Drop for Page {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// A folder that looks like a run's.
fn write_run(sandbox: &Sandbox, name: &str) -> String {
    sandbox.write(&format!("{name}/logging.jsonl"), "{\"global_step\":1,\"loss\":0.5}\n");
    sandbox.write(&format!("{name}/secret.txt"), "secret");
    sandbox.write(&format!("{name}/args.json"), "{\"learning_rate\":0.125}");
    sandbox.path(name)
}

fn train<'a>(model: &'a str, rows: &'a str, output: &'a str, more: &[&'a str]) -> Vec<&'a str> {
    let fixed = ["train", "--model", model, "--dataset", rows, "--output-dir", output, "--batch-size", "4"];
    [&fixed, &["--logging-steps", "1", "--device", "cpu"][..], more].concat()
}

fn case(name: &str) -> String {
    golden("trajectories").join("qwen3").join(name).display().to_string()
}

#[test]
fn known_names_are_served_to_known_hosts() {
    let sandbox = sandbox();
    write_run(&sandbox, "output/a");
    write_run(&sandbox, "output/b");
    let page = Page::start(&sandbox, &["ui", &sandbox.path("output"), "--listen", "0"], "page");
    let (status, text) = page.get("/", "");
    assert_eq!(status, 200);
    assert!(text.contains("content-security-policy: default-src 'none'") && text.contains("<!doctype html>"), "{text}");
    // Whatever the page's modules name is served, and is a module of its own.
    let mut modules = vec!["/page.css".to_owned(), "/page.js".to_owned()];
    let mut read = 0;
    while let Some(path) = modules.get(read).cloned() {
        let (status, text) = page.get(&path, "");
        assert_eq!(status, 200, "{path}");
        let named = text.split(" from \"./").skip(1).filter_map(|rest| rest.split_once('"'));
        let new: Vec<String> = named.map(|(name, _)| format!("/{name}")).filter(|p| !modules.contains(p)).collect();
        modules.extend(new);
        read += 1;
    }
    assert!(read > 5, "{modules:?}");
    let list = page.json("/runs");
    let names: Vec<_> = list["runs"].as_array().unwrap().iter().map(|r| r["name"].as_str().unwrap()).collect();
    assert_eq!(names, ["a", "b"]);
    assert_eq!(page.json("/runs/1/args.json"), json!({"learning_rate": 0.125}));
    assert!(page.get("/runs/0/logging.jsonl", "").1.ends_with("{\"global_step\":1,\"loss\":0.5}\n"));
    // A run that begins later comes to the list.
    write_run(&sandbox, "output/c");
    assert_eq!(page.json("/runs")["runs"][2]["name"], "c");

    let foreign =
        ["/runs/0/secret.txt", "/runs/0/../a/secret.txt", "/runs/7/args.json", "/runs/x/args.json", "/etc/passwd"];
    for path in foreign.iter().chain(&["/runs/0/%2e%2e/secret.txt", "//", "/runs/0/", "/page.html"]) {
        let (status, text) = page.get(path, "");
        assert!(status == 404 && !text.contains("secret\n"), "{path}: {text}");
    }
    assert_eq!(page.send("POST / HTTP/1.1\r\nHost: localhost\r\n\r\n").0, 405);
    for host in
        ["Host: evil.example\r\n", "Host: localhost.evil.example:80\r\n", "", "Host: localhost\r\nHost: evil\r\n"]
    {
        assert_eq!(page.send(&format!("GET /runs HTTP/1.1\r\n{host}\r\n")).0, 421, "{host}");
    }
    assert_eq!(page.send("GET /runs HTTP/1.1\r\nHost: localhost:1234\r\n\r\n").0, 200);
    let long = "x".repeat(8_600);
    for nonsense in ["\r\n\r\n", "GET\r\n\r\n", "GET / HTTP/9.9\r\n\r\n", &format!("GET /{long}\r\n\r\n")] {
        assert_eq!(page.send(nonsense).0, 400, "{nonsense:.40}");
    }
}

#[test]
fn over_the_network_a_token_is_needed() {
    let sandbox = sandbox();
    let page = Page::start(&sandbox, &["ui", &write_run(&sandbox, "run"), "--listen", "0.0.0.0:0"], "page");
    let token = page.query.strip_prefix("?token=").unwrap();
    assert_eq!(token.len(), 32);
    let cut = &token[..31];
    for path in ["/", "/runs", "/page.js", "/?token=", &format!("/?token={cut}"), &format!("/runs?token={token}")] {
        let (status, text) = page.get(path, "");
        assert!(status == 403 && !text.contains(token), "{path}: {text}");
    }
    let (status, text) = page.get(&format!("/{}", page.query), "");
    assert_eq!(status, 303, "{text}");
    let cookie = text.lines().find_map(|l| l.strip_prefix("set-cookie: ")).unwrap();
    assert!(cookie.contains("HttpOnly") && cookie.contains("SameSite=Strict"), "{cookie}");
    let cookie = cookie.split(';').next().unwrap();
    assert_eq!(page.get("/runs", &format!("Cookie: other=1; {cookie}\r\n")).0, 200);
    assert_eq!(page.get("/runs", &format!("Cookie: {}\r\n", cookie.replace(token, cut))).0, 403);
}

#[test]
fn what_cannot_be_served_is_one_clear_line() {
    let sandbox = sandbox();
    let run = write_run(&sandbox, "run");
    let taken = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = taken.local_addr().unwrap().to_string();
    sandbox
        .refuses(&["ui", &run, "--listen", &address], &["--listen: cannot listen at", "already", "help: name another"]);
    sandbox
        .refuses(&["ui", &run, "--listen", "nowhere"], &["'nowhere' is not an address with a port", "help: such as"]);
    fs::create_dir(sandbox.path("empty")).unwrap();
    sandbox.refuses(&["ui", &sandbox.path("empty")], &["empty: holds no run", "help: "]);
    sandbox.refuses(&["ui", &sandbox.path("missing")], &["missing: is not a folder", "help: "]);
    let (model, rows) = (case("model"), case("prefs.jsonl"));
    sandbox.refuses(&train(&model, &rows, "other", &["--dashboard", &address]), &["--dashboard: cannot listen at"]);
    assert!(!Path::new(&sandbox.path("other")).exists(), "a run was begun");
}

#[test]
fn training_does_not_notice_the_page() {
    let sandbox = sandbox();
    let (model, rows) = (case("model"), case("prefs.jsonl"));
    let (with, without) = (sandbox.path("with"), sandbox.path("without"));
    let more = ["--num-epochs", "30"];
    sandbox.ok(&train(&model, &rows, &without, &more));
    let args = train(&model, &rows, &with, &[&more[..], &["--dashboard", "127.0.0.1:0"]].concat());
    let mut page = Page::start(&sandbox, &args, "dashboard");
    // Connections that say nothing and stay.
    let idle: Vec<_> = (0..20).map(|_| TcpStream::connect(&page.address).unwrap()).collect();
    let start = Instant::now();
    let mut seen = 0;
    while seen == 0 {
        assert!(start.elapsed() < Duration::from_secs(60), "the page shows no step");
        seen = page.get("/runs/0/logging.jsonl", "").1.matches("grad_norm").count();
    }
    assert!(page.json("/runs")["runs"][0]["folder"].as_str().unwrap().ends_with("with"));
    let (answered, facts) = page.get("/runs/0/run.json", "");
    assert!(answered == 200 && facts.contains("\"total_steps\":"), "{facts}");
    assert!(page.child.wait().unwrap().success());
    drop(idle);
    let adapter = |folder: &str| fs::read(Path::new(folder).join("adapter_model.safetensors")).unwrap();
    assert!(adapter(&with) == adapter(&without), "the adapters differ");
    // A resumed run may have a page or none.
    sandbox.ok(&[&args[..], &["--resume-from-checkpoint", "latest", "--dashboard", "false"]].concat());
}

#[test]
fn texts_of_data_stay_texts() {
    let sandbox = sandbox();
    let evil = "</script><script>alert('1')</script><img src=x onerror=\"alert(2)\">";
    let turn = |role: &str, text: &str| json!({"role": role, "content": text});
    let row = json!({"messages": [turn("user", evil), turn("assistant", evil)], "rejected_response": "no & <b>"});
    let rows = sandbox.write("rows.jsonl", &format!("{row}\n{row}\n"));
    let output = sandbox.path("<i>run");
    sandbox.ok(&train(&case("model"), &rows, &output, &["--num-epochs", "3", "--eval-steps", "1"]));
    let report = fs::read_to_string(Path::new(&output).join("report.html")).unwrap();
    ["<script", "<img", "<i>run", "<b>\"", "& <"]
        .iter()
        .for_each(|t| assert!(!report.contains(t), "{t} in the report"));
    ["Sample examples", "Settings", "class=curve", "&lt;i&gt;run", "<h4>after</h4>"]
        .iter()
        .for_each(|t| assert!(report.contains(t), "no {t} in the report"));
    let lines = fs::read_to_string(Path::new(&output).join("samples.jsonl")).unwrap();
    let lines: Vec<Value> = lines.lines().map(|l| serde_json::from_str(l).unwrap()).collect();
    let steps: Vec<_> = lines.iter().map(|l| l["global_step"].as_u64().unwrap()).collect();
    assert_eq!(steps, [0, 1, 2, 3]);
    let tokens = lines[0]["examples"][0]["answers"][0]["tokens"].as_array().unwrap();
    let text: String = tokens.iter().map(|t| t.as_str().unwrap()).collect();
    assert!(text.contains(evil), "{text}");
    for line in &lines {
        let score = &line["scores"][0][0];
        let logps: Vec<f64> = score["logps"].as_array().unwrap().iter().map(|l| l.as_f64().unwrap()).collect();
        assert_eq!(logps.len(), tokens.len());
        assert!((logps.iter().sum::<f64>() - score["sum"].as_f64().unwrap()).abs() < 0.1, "{line}");
    }
    assert_ne!(lines[0]["scores"], lines[2]["scores"]);
}

/// The most memory that a process had, in MiB.
fn peak_memory(process: u32) -> usize {
    let status = fs::read_to_string(format!("/proc/{process}/status")).unwrap();
    let line = status.lines().find_map(|l| l.strip_prefix("VmHWM:")).unwrap();
    line.trim().trim_end_matches(" kB").parse::<usize>().unwrap() >> 10
}

#[test]
fn slow_readers_are_in_nobodys_way() {
    let sandbox = sandbox();
    let run = write_run(&sandbox, "run");
    let line = |length: usize, step: usize| format!("{{\"global_step\":{step},\"x\":\"{}\"}}\n", "x".repeat(length));
    sandbox.write("run/samples.jsonl", &line(1_000_000, 1).repeat(60));
    sandbox.write("run/logging.jsonl", &line(300, 1).repeat(200_000));
    sandbox.write("run/args.json", &line(60_000_000, 1));
    let page = Page::start(&sandbox, &["ui", &run, "--listen", "0"], "page");
    let slow: Vec<TcpStream> = (0..60)
        .map(|i| {
            let mut stream = TcpStream::connect(&page.address).unwrap();
            let file = ["samples.jsonl", "logging.jsonl", "args.json"][i % 3];
            write!(stream, "GET /runs/0/{file} HTTP/1.1\r\nHost: localhost\r\n\r\n").unwrap();
            stream
        })
        .collect();
    for _ in 0..25 {
        let start = Instant::now();
        assert_eq!(page.json("/runs")["runs"][0]["id"], 0);
        assert_eq!(page.get("/page.js", "").0, 200);
        assert!(start.elapsed() < Duration::from_secs(5), "it took {:?}", start.elapsed());
    }
    let peak = peak_memory(page.child.id());
    assert!(peak < 400, "{peak} MiB");
    drop(slow);
}

#[test]
fn what_is_no_file_of_the_run_is_not_shown() {
    let sandbox = sandbox();
    let (run, secret) = (write_run(&sandbox, "run"), sandbox.write("secret.jsonl", "{\"secret\":1}\n"));
    let file = |name: &str| Path::new(&run).join(name);
    fs::remove_file(file("args.json")).unwrap();
    for (name, place) in [("args.json", secret.as_str()), ("run.json", "/dev/zero")] {
        std::os::unix::fs::symlink(place, file(name)).unwrap();
    }
    fs::create_dir(file("answers.jsonl")).unwrap();
    assert!(Command::new("mkfifo").arg(file("samples.jsonl")).status().unwrap().success());
    let page = Page::start(&sandbox, &["ui", &run, "--listen", "0"], "page");
    let start = Instant::now();
    for name in ["args.json", "run.json", "samples.jsonl", "answers.jsonl"] {
        let (status, text) = page.get(&format!("/runs/0/{name}"), "");
        assert!(status == 200 && text.ends_with("\r\n\r\n"), "{name}: {text}");
    }
    let files = page.json("/runs")["runs"][0]["files"].as_object().unwrap().clone();
    assert_eq!(files.keys().collect::<Vec<_>>(), ["logging.jsonl"]);
    assert!(start.elapsed() < Duration::from_secs(5), "it took {:?}", start.elapsed());
}

#[test]
fn the_end_of_a_long_log_is_shown() {
    let sandbox = sandbox();
    let run = write_run(&sandbox, "run");
    let line = |step: usize| format!("{{\"global_step\":{step},\"x\":\"{}\"}}\n", "x".repeat(1000));
    sandbox.write("run/logging.jsonl", &(line(1).repeat(70_000) + &line(2)));
    let page = Page::start(&sandbox, &["ui", &run, "--listen", "0"], "page");
    let (status, text) = page.get("/runs/0/logging.jsonl", "");
    assert!(status == 200 && text.ends_with(&line(2)), "{} bytes", text.len());
    let told = page.json("/runs")["runs"][0]["left_out"].clone();
    assert_eq!(told, json!(["of logging.jsonl the last 64 MiB are shown"]));
}

#[test]
fn a_run_whose_process_is_gone_has_ended() {
    let sandbox = sandbox();
    let (model, rows, output) = (case("model"), case("prefs.jsonl"), sandbox.path("run"));
    let more =
        ["--num-epochs", "1000000", "--save-steps", "2", "--save-total-limit", "2", "--dashboard", "127.0.0.1:0"];
    let mut page = Page::start(&sandbox, &train(&model, &rows, &output, &more), "dashboard");
    let told = |page: &Page| page.json("/runs")["runs"][0].clone();
    let start = Instant::now();
    while told(&page)["saved_step"].is_null() {
        assert!(start.elapsed() < Duration::from_secs(60), "nothing is saved");
        std::thread::sleep(Duration::from_millis(20));
    }
    let other = Page::start(&sandbox, &["ui", &output, "--listen", "0"], "page");
    // Of a run that goes on, its own page and another one say so.
    for own in [&page, &other] {
        assert_eq!(told(own)["ended"], false);
    }
    page.child.kill().unwrap();
    page.child.wait().unwrap();
    let run = told(&other);
    assert!(run["ended"] == true && run["done"] == false && run["saved_step"].as_u64() >= Some(2), "{run}");
    // Whoever looks at it is not in the way of the run that goes on from there.
    let resumed = [&more[..6], &["--resume-from-checkpoint", "latest", "--dashboard", "127.0.0.1:0"]].concat();
    let _page = Page::start(&sandbox, &train(&model, &rows, &output, &resumed), "dashboard");
    assert_eq!(told(&other)["ended"], false);
}

/// A page that may start runs in the sandbox's folder `runs`.
fn starting(sandbox: &Sandbox) -> Page {
    Page::start(sandbox, &["ui", "--allow-start", "runs", "--listen", "0"], "page")
}

#[test]
fn only_the_page_itself_starts_runs() {
    let sandbox = sandbox();
    let page = starting(&sandbox);
    assert_eq!(page.query.len(), "?token=".len() + 32, "on this machine, too, a token is needed");
    for path in ["/", "/runs", "/start", "/start.js"] {
        assert_eq!(page.get(path, "").0, 403, "{path}");
        assert_eq!(page.get(path, &page.cookie()).0, 200, "{path}");
    }
    let body = json!({"args": ["--model", "demo", "--output-dir", "runs/a"]}).to_string();
    let (origin, own) = (format!("Origin: http://{}\r\n", page.address), "X-Dpo-Host: 1\r\n");
    let (kind, cookie) = ("Content-Type: application/json\r\n", page.cookie());
    let other = format!("Origin: http://{}\r\n", page.address.replace("127.0.0.1", "localhost"));
    let refused = [
        (403, [&*origin, own, kind, ""]),
        (403, ["", own, kind, &cookie]),
        (403, [&other, own, kind, &cookie]),
        (403, ["Origin: null\r\n", own, kind, &cookie]),
        (403, [&origin, "", kind, &cookie]),
        (403, [&origin, "X-Dpo-Host: 1\r\nSec-Fetch-Site: same-site\r\n", kind, &cookie]),
        (415, [&origin, own, "Content-Type: text/plain\r\n", &cookie]),
        (413, [&origin, own, "Content-Length: 99999999\r\n", &cookie]),
    ];
    for (status, headers) in refused {
        let request = headers.concat();
        let answered = match request.contains("Content-Length") {
            true => page.send(&format!("POST /start HTTP/1.1\r\nHost: {}\r\n{request}\r\n", page.address)),
            false => page.post_with("/start", &request, &body),
        };
        assert_eq!(answered.0, status, "{request}");
    }
    assert_eq!(page.send(&format!("PUT /start HTTP/1.1\r\nHost: localhost\r\n{cookie}\r\n")).0, 405);
    let without = [origin.as_str(), own, kind].concat();
    let plain = Page::start(&sandbox, &["ui", &write_run(&sandbox, "other"), "--listen", "0"], "page");
    assert_eq!(plain.post_with("/start", &without.replace(&page.address, &plain.address), &body).0, 405);
    assert_eq!(plain.get("/start", "").0, 404);
    assert_eq!(plain.json("/runs")["starts"], false);
    assert_eq!(fs::read_dir(sandbox.path("runs")).unwrap().count(), 0, "a run was started");
}

#[test]
fn what_a_page_may_not_start() {
    let sandbox = sandbox();
    let page = starting(&sandbox);
    let file = sandbox.write("run.toml", "model = \"demo\"");
    let away = sandbox.path("away");
    fs::create_dir(&away).unwrap();
    std::os::unix::fs::symlink(&away, sandbox.path("runs/link")).unwrap();
    let fine = ["--model", "demo", "--output-dir", "runs/a"];
    let with = |more: &[&'static str]| [&fine[..], more].concat();
    let refused: [(Vec<&str>, &str); 20] = [
        (with(&["--plugin-dir", "/tmp"]), "--plugin-dir"),
        (with(&["--plugin-dir=/tmp"]), "--plugin-dir"),
        (with(&["--plugin_dir", "/tmp"]), "--plugin-dir"),
        (with(&["--config", "run.toml"]), "--config"),
        (vec![&file], "is no flag"),
        (vec!["-x"], "is no flag"),
        (with(&["--dashboard", "0.0.0.0:1"]), "--dashboard"),
        (with(&["--add-version"]), "--add-version"),
        (with(&["--rlhf_type", "dpo"]), "--add-version false"),
        (with(&["--beta", "-1"]), "should be above 0"),
        (with(&["--modle", "demo"]), "did you mean '--model'"),
        (with(&["--num-epochs", "many"]), "many"),
        (vec!["--model", "demo"], "right inside of runs"),
        (vec!["--model", "demo", "--output-dir", "away"], "right inside of runs"),
        (vec!["--model", "demo", "--output-dir", "runs"], "right inside of runs"),
        (vec!["--model", "demo", "--output-dir", "runs/../away"], "right inside of runs"),
        (vec!["--model", "demo", "--output-dir", "runs/a/.."], "right inside of runs"),
        (vec!["--model", "demo", "--output-dir", "runs/link"], "right inside of runs"),
        (vec!["--model", "demo", "--output-dir", "runs/link/a"], "right inside of runs"),
        (vec!["--help"], ""),
    ];
    for (args, said) in refused {
        for path in ["/start", "/check"] {
            let (status, text) = page.post(path, &json!({"args": args}));
            assert!(status == 422 && text.contains(said), "{args:?}: {text}");
        }
    }
    // Arguments of ms-swift are taken here, too.
    let swift = with(&["--rlhf_type", "dpo", "--add_version", "false", "--lora_rank", "4"]);
    let (status, text) = page.post("/check", &json!({"args": swift}));
    assert!(status == 200 && text.contains("plan --model="), "{text}");
    for body in [json!(null), json!({"args": "--model demo"}), json!({"args": [1]}), json!([])] {
        assert_eq!(page.post("/start", &body).0, 422, "{body}");
    }
    for body in [json!({}), json!({"run": 7}), json!({"run": -1})] {
        assert_eq!(page.post("/stop", &body).0, 422, "{body}");
    }
    assert_eq!(page.post("/else", &json!({})).0, 404);
    assert_eq!(fs::read_dir(sandbox.path("runs")).unwrap().count(), 1, "a run was started");
    assert_eq!(fs::read_dir(&away).unwrap().count(), 0, "a run was started");
}

#[test]
fn a_started_run_outlives_the_page() {
    let sandbox = sandbox();
    let mut page = starting(&sandbox);
    let (model, rows) = (case("model"), case("prefs.jsonl"));
    let args = ["--model", &model, "--dataset", &rows, "--output-dir", "runs/a b", "--device", "cpu"];
    let args = [&args[..], &["--num-epochs", "1000000", "--logging-steps", "1"]].concat();
    let (status, text) = page.post("/check", &json!({"args": args}));
    assert!(status == 200 && text.contains("data --model=") && text.contains("planned"), "{text}");
    assert!(!Path::new(&sandbox.path("runs/a b")).exists(), "a check leaves nothing");
    let (status, text) = page.post("/start", &json!({"args": args}));
    assert_eq!(status, 200, "{text}");
    let (status, text) = page.post("/start", &json!({"args": args}));
    assert!(status == 422 && text.contains("in this folder") || text.contains("holds a run"), "{text}");
    let start = Instant::now();
    let wait = |what: &str, so: &dyn Fn() -> bool| {
        while !so() {
            assert!(start.elapsed() < Duration::from_secs(60), "{what}");
            std::thread::sleep(Duration::from_millis(20));
        }
    };
    let lines = || fs::read_to_string(sandbox.path("runs/a b/logging.jsonl")).unwrap_or_default().lines().count();
    wait("no step", &|| lines() > 1);
    let console = fs::read_to_string(sandbox.path("runs/a b/console.log")).unwrap();
    assert!(console.starts_with(&format!("$ dpo-host train --model {model} ")), "{console}");
    assert!(console.lines().next().unwrap().contains(" --output-dir 'runs/a b' "), "{console}");
    // No key of the page's terminal reaches it: it leads a group of its own.
    let holder = fs::read_to_string(sandbox.path("runs/a b/.lock")).unwrap();
    let process = holder.split(' ').nth(1).unwrap();
    let stat = fs::read_to_string(format!("/proc/{process}/stat")).unwrap();
    let group = stat.rsplit_once(") ").unwrap().1.split(' ').nth(2).unwrap();
    assert_eq!(group, process, "{stat}");
    page.child.kill().unwrap();
    page.child.wait().unwrap();
    let before = lines();
    wait("it has ended with the page", &|| lines() > before + 1);
    // A page that comes later knows it by its lock.
    let page = starting(&sandbox);
    let run = || page.json("/runs")["runs"][0].clone();
    assert!(run()["stoppable"] == true && run()["ended"] == false, "{}", run());
    assert_eq!(page.post("/stop", &json!({"run": 0})).0, 200);
    wait("it goes on", &|| run()["ended"] == true);
    assert!(run()["saved_step"].as_u64() > Some(0) && run()["stoppable"] == false, "{}", run());
    assert_eq!(page.post("/stop", &json!({"run": 0})).0, 422);
}

/// Requests that somebody made up: right ones with bytes changed, repeated, cut out, and parts of others put in.
#[test]
fn requests_that_mean_harm_end_nothing() {
    let sandbox = sandbox();
    let run = write_run(&sandbox, "run");
    harm(&mut Page::start(&sandbox, &["ui", &run, "--listen", "0"], "page"));
    harm(&mut Page::start(&sandbox, &["ui", &run, "--allow-start", "runs", "--listen", "0"], "page"));
    assert_eq!(fs::read_dir(sandbox.path("runs")).unwrap().count(), 0, "a run was started");
}

fn harm(page: &mut Page) {
    let head =
        |target: &str| format!("GET {target} HTTP/1.1\r\nHost: localhost\r\nCookie: a=b; c\r\n\r\n").into_bytes();
    let mut right: Vec<Vec<u8>> =
        ["/", "/runs", "/runs/0/logging.jsonl", "/runs/0/../x", "/?token=0", "/page.js"].map(head).to_vec();
    right.push(b"POST /start HTTP/1.1\r\nHost: localhost\r\nContent-Length: 11\r\n\r\n{\"args\":[]}".to_vec());
    let pieces: [&[u8]; 12] = [
        b"\r\n",
        b"\r\n\r\n",
        b"\0",
        b"\xff\xfe",
        b"%2e%2e/",
        b"Host: a\r\n",
        b"Content-Length: 99999999999\r\n",
        b"Transfer-Encoding: chunked\r\n",
        b"/runs/18446744073709551616/",
        b"HTTP/1.1",
        b"://[::1",
        b"POST ",
    ];
    let mut numbers = Numbers::new(7);
    let start = Instant::now();
    for _ in 0..1_000 {
        let mut request = right[numbers.below(right.len())].clone();
        for _ in 0..=numbers.below(6) {
            let at = numbers.below(request.len() + 1);
            match numbers.below(5) {
                0 => request.truncate(at),
                1 => drop(request.splice(at..at, pieces[numbers.below(pieces.len())].iter().copied())),
                2 => drop(request.splice(at..at, vec![b'A'; numbers.below(9_000)])),
                3 => drop(request.drain(at..(at + numbers.below(20)).min(request.len()))),
                _ => request.iter_mut().skip(at).take(1).for_each(|b| *b ^= 1 << numbers.below(8)),
            }
        }
        let mut stream = TcpStream::connect(&page.address).unwrap();
        stream.set_read_timeout(Some(Duration::from_secs(10))).unwrap();
        // Who is refused may be so before all is sent, and what was not read breaks the connection.
        let _ = stream.write_all(&request).and_then(|()| stream.shutdown(Shutdown::Write));
        let mut answer = Vec::new();
        let ended = stream.read_to_end(&mut answer).map_err(|e| e.kind());
        let hangs = [std::io::ErrorKind::WouldBlock, std::io::ErrorKind::TimedOut];
        assert!(!ended.is_err_and(|e| hangs.contains(&e)), "no end to {:?}", String::from_utf8_lossy(&request));
        assert!(answer.is_empty() || answer.starts_with(b"HTTP/1.1 "), "{:?}", String::from_utf8_lossy(&answer));
        assert!(!answer.windows(6).any(|w| w == b"secret"), "{:?}", String::from_utf8_lossy(&request));
    }
    println!("1,000 requests in {:?}", start.elapsed());
    assert_eq!(page.json("/runs")["runs"][0]["id"], 0);
    assert!(page.child.try_wait().unwrap().is_none(), "the server has ended");
}
