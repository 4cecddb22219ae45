//! `dpo-host serve`: what clients of OpenAI's API are answered, that answers together are those of each alone, who is let in, and that
//! nobody is held up by others. `tests/oracle/check_serve.py` does the same with OpenAI's own client.
#![allow(clippy::unwrap_used)] // In a test, a panic is the report.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::TcpStream;
use std::process::{Child, Stdio};
use std::time::{Duration, Instant};

use dpo_tests::{Sandbox, golden};
use serde_json::{Value, json};

fn sandbox() -> Sandbox {
    Sandbox::new(env!("CARGO_BIN_EXE_dpo-host-test"))
}

/// A server that is ended with the test.
struct Server {
    child: Child,
    address: String,
}

impl Server {
    /// Of a golden model with its adapter as `tuned`.
    fn start(sandbox: &Sandbox, more: &[&str]) -> Server {
        let case = golden("trajectories/qwen3");
        let model = case.join("model").display().to_string();
        let adapter = format!("tuned={}", case.join("final_adapter").display());
        let args = ["serve", "--model", &model, "--adapter", &adapter, "--device", "cpu", "--listen", "0"];
        let args = [&args[..], &["--served-model-name", "base"], more].concat();
        let mut child = sandbox.command(&args).stderr(Stdio::piped()).spawn().unwrap();
        let mut lines = BufReader::new(child.stderr.take().unwrap()).lines().map_while(Result::ok);
        let line = lines.find(|line| line.starts_with("serving")).unwrap();
        std::thread::spawn(move || lines.count());
        let address = line.split("//").nth(1).unwrap().trim_end_matches("/v1").to_owned();
        Server { child, address }
    }

    fn begin(&self, method: &str, path: &str, headers: &str, body: &str) -> TcpStream {
        let mut stream = TcpStream::connect(&self.address).unwrap();
        let (host, length) = (&self.address, body.len());
        let head =
            format!("{method} {path} HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\nContent-Length: {length}\r\n");
        stream.write_all(format!("{head}{headers}\r\n{body}").as_bytes()).unwrap();
        stream
    }

    /// Status and body.
    fn send(&self, method: &str, path: &str, headers: &str, body: &str) -> (u16, String) {
        read(self.begin(method, path, headers, body))
    }

    fn post(&self, path: &str, body: &Value) -> (u16, Value) {
        let (status, text) = self.send("POST", path, JSON, &body.to_string());
        (status, serde_json::from_str(&text).unwrap())
    }

    fn chat(&self, model: &str, more: Value) -> Value {
        let (status, answer) = self.post(CHATS, &chat(model, more));
        assert_eq!(status, 200, "{answer}");
        answer
    }

    /// The events of a stream, without the last.
    fn stream(&self, path: &str, body: &Value) -> Vec<Value> {
        let (status, text) = self.send("POST", path, JSON, &body.to_string());
        assert_eq!(status, 200, "{text}");
        let mut events: Vec<&str> = text.split("\n\n").filter_map(|e| e.trim().strip_prefix("data: ")).collect();
        assert_eq!(events.pop(), Some("[DONE]"), "{text}");
        events.into_iter().map(|event| serde_json::from_str(event).unwrap()).collect()
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

const CHATS: &str = "/v1/chat/completions";
const COMPLETIONS: &str = "/v1/completions";
const JSON: &str = "Content-Type: application/json\r\n";

/// The answer to a request, whose body may come in chunks.
fn read(mut stream: TcpStream) -> (u16, String) {
    stream.set_read_timeout(Some(Duration::from_secs(60))).unwrap();
    let mut text = String::new();
    stream.read_to_string(&mut text).unwrap();
    let (head, body) = text.split_once("\r\n\r\n").unwrap_or((&text, ""));
    let status = head.split(' ').nth(1).unwrap().parse().unwrap();
    if !head.to_lowercase().contains("transfer-encoding: chunked") {
        return (status, body.into());
    }
    let (mut rest, mut whole) = (body, String::new());
    while let Some((size, more)) = rest.split_once("\r\n") {
        let size = usize::from_str_radix(size, 16).unwrap();
        whole += &more[..size];
        rest = more[size..].trim_start_matches("\r\n");
    }
    (status, whole)
}

/// A greedy chat of a few tokens.
fn chat(model: &str, more: Value) -> Value {
    let mut body =
        json!({"model": model, "messages": [{"role": "user", "content": "hello"}], "max_tokens": 12, "temperature": 0});
    body.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
    body
}

fn text(answer: &Value) -> &str {
    answer["choices"][0]["message"]["content"].as_str().unwrap()
}

#[test]
fn chats_completions_and_streams() {
    let (sandbox, case) = (sandbox(), golden("trajectories/qwen3"));
    let server = Server::start(&sandbox, &[]);
    let models: Value = serde_json::from_str(&server.send("GET", "/v1/models", "", "").1).unwrap();
    let names: Vec<&str> = models["data"].as_array().unwrap().iter().map(|m| m["id"].as_str().unwrap()).collect();
    assert_eq!(names, ["base", "tuned"]);
    assert_eq!(server.send("GET", "/health", "", "").0, 200);
    // As `chat` answers.
    let (model, adapter) = (case.join("model").display().to_string(), case.join("final_adapter").display().to_string());
    let said = [
        "chat",
        "--device",
        "cpu",
        "--model",
        &model,
        "--adapter",
        &adapter,
        "--compare",
        "--json",
        "--temperature",
        "0",
    ];
    let said = sandbox.ok(&[&said[..], &["--max-new-tokens", "12", "--prompt", "hello"]].concat()).stdout;
    let said: Value = serde_json::from_str(&said).unwrap();
    for name in names {
        let answer = server.chat(name, json!({}));
        assert_eq!((text(&answer), &answer["model"]), (said[name]["text"].as_str().unwrap(), &json!(name)));
        assert_eq!(answer["usage"]["completion_tokens"], said[name]["tokens"]);
        let total = answer["usage"]["prompt_tokens"].as_u64().unwrap() + said[name]["tokens"].as_u64().unwrap();
        assert_eq!((&answer["object"], &answer["usage"]["total_tokens"]), (&json!("chat.completion"), &json!(total)));
        let reason = if said[name]["stop"] == "turn" { "stop" } else { "length" };
        assert_eq!(answer["choices"][0]["finish_reason"], reason);
        let events =
            server.stream(CHATS, &chat(name, json!({"stream": true, "stream_options": {"include_usage": true}})));
        let parts = events.iter().filter_map(|e| e["choices"][0]["delta"]["content"].as_str());
        assert_eq!(parts.collect::<String>(), text(&answer));
        assert_eq!(events[0]["choices"][0]["delta"]["role"], "assistant");
        assert_eq!(events.last().unwrap()["usage"], answer["usage"]);
        assert_eq!(events[events.len() - 2]["choices"][0]["finish_reason"], reason);
    }
    // Several answers, by a seed; log-probs; a stop string.
    let drawn = json!({"n": 3, "temperature": 1.5, "seed": 5});
    let several = server.chat("tuned", drawn.clone());
    let texts: Vec<&Value> = several["choices"].as_array().unwrap().iter().map(|c| &c["message"]["content"]).collect();
    assert!(texts.len() == 3 && (texts[0] != texts[1] || texts[1] != texts[2]), "{texts:?}");
    assert_eq!(server.chat("tuned", drawn)["choices"], several["choices"]);
    let told = server.chat("base", json!({"logprobs": true, "top_logprobs": 2}));
    for token in told["choices"][0]["logprobs"]["content"].as_array().unwrap() {
        let top = token["top_logprobs"].as_array().unwrap();
        assert!(
            top.len() == 2 && token["logprob"] == top[0]["logprob"] && token["logprob"].as_f64().unwrap() < 0.0,
            "{token}"
        );
    }
    let whole = server.chat("base", json!({}));
    let stop: String = text(&whole).chars().skip(4).take(3).collect();
    let stopped = server.chat("base", json!({"stop": [stop, "never"]}));
    assert_eq!(text(&stopped), text(&whole).split(&stop).next().unwrap());
    assert_eq!(stopped["choices"][0]["finish_reason"], "stop");
    // Completions of texts and of tokens.
    let greedy = |more: Value| {
        let mut body = json!({"model": "tuned", "temperature": 0, "max_tokens": 6});
        body.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        body
    };
    let (status, one) = server.post(COMPLETIONS, &greedy(json!({"prompt": [5, 9, 40, 7], "logprobs": 1})));
    assert_eq!(
        (status, &one["object"], one["usage"]["prompt_tokens"].as_u64()),
        (200, &json!("text_completion"), Some(4))
    );
    let tokens = one["choices"][0]["logprobs"]["tokens"].as_array().unwrap().len() as u64;
    assert_eq!(one["usage"]["completion_tokens"], tokens);
    let (_, two) = server.post(COMPLETIONS, &greedy(json!({"prompt": [[5, 9, 40, 7], [8, 8]], "n": 2})));
    assert_eq!(two["choices"].as_array().unwrap().len(), 4);
    assert_eq!(
        (&two["choices"][0]["text"], &two["choices"][1]["text"]),
        (&one["choices"][0]["text"], &one["choices"][0]["text"])
    );
    let echoed = server.stream(COMPLETIONS, &greedy(json!({"prompt": "hello", "echo": true, "stream": true})));
    let echoed: String = echoed.iter().filter_map(|e| e["choices"][0]["text"].as_str()).collect();
    let (_, plain) = server.post(COMPLETIONS, &greedy(json!({"prompt": "hello"})));
    assert_eq!(echoed, format!("hello{}", plain["choices"][0]["text"].as_str().unwrap()));
}

#[test]
fn answers_at_once_are_those_of_each_alone() {
    let sandbox = sandbox();
    let server = Server::start(&sandbox, &["--max-num-seqs", "5"]);
    let body = |at: usize| {
        let prompt: Vec<usize> = (0..3 + at).map(|i| (i * 31 + at * 7) % 320).collect();
        let model = if at.is_multiple_of(2) { "base" } else { "tuned" };
        json!({"model": model, "prompt": prompt, "max_tokens": 4 + at, "temperature": 0.7, "seed": at, "ignore_eos": true})
    };
    let alone: Vec<Value> = (0..24).map(|at| server.post(COMPLETIONS, &body(at)).1["choices"].clone()).collect();
    // Clients that leave in the middle, and one that does not read, hold up nobody.
    let long =
        |stream: bool| json!({"model": "base", "prompt": [1], "max_tokens": 300, "ignore_eos": true, "stream": stream});
    let idle = server.begin("POST", COMPLETIONS, JSON, &long(true).to_string());
    (0..6).for_each(|_| drop(server.begin("POST", COMPLETIONS, JSON, &long(false).to_string())));
    let (server, bodies) = (&server, (0..24).map(body).collect::<Vec<Value>>());
    std::thread::scope(|scope| {
        let asked: Vec<_> = bodies.iter().map(|body| scope.spawn(move || server.post(COMPLETIONS, body))).collect();
        for (at, thread) in asked.into_iter().enumerate() {
            let (status, answer) = thread.join().unwrap();
            assert_eq!((status, &answer["choices"]), (200, &alone[at]), "{at}");
        }
    });
    let (status, text) = read(idle);
    assert!(status == 200 && text.ends_with("data: [DONE]\n\n"), "{text}");
}

#[test]
fn what_is_refused_is_told() {
    let sandbox = sandbox();
    let server = Server::start(&sandbox, &["--max-model-len", "64"]);
    let refused = |path: &str, body: Value, status: u16, param: &str, part: &str| {
        let (is, answer) = server.post(path, &body);
        let error = &answer["error"];
        let told = error["message"].as_str().is_some_and(|m| m.contains(part)) && error["param"] == json!(param);
        assert!(is == status && told, "{body}: {is} {answer}");
    };
    for (more, status, param, part) in [
        (json!({"model": "other"}), 404, "model", "base, tuned"),
        (json!({"model": null}), 400, "model", "'model'"),
        (json!({"temprature": 1}), 400, "temprature", "did you mean 'temperature'?"),
        (json!({"temperature": "hot"}), 400, "temperature", "a number from 0 to 2, not \"hot\""),
        (json!({"temperature": 3}), 400, "temperature", "not 3"),
        (json!({"top_p": 0}), 400, "top_p", "not 0"),
        (json!({"n": 0}), 400, "n", "from 1 to 128"),
        (json!({"max_tokens": -1}), 400, "max_tokens", "from 1 on"),
        (json!({"max_tokens": 64}), 400, "max_tokens", "more than the 64"),
        (json!({"stop": ["a", ""]}), 400, "stop", "empty"),
        (json!({"top_logprobs": 3}), 400, "top_logprobs", "needs 'logprobs'"),
        (json!({"logit_bias": {"5": 200}}), 400, "logit_bias", "from -100 to 100"),
        (json!({"tools": [{"type": "function"}]}), 400, "tools", "not supported"),
        (json!({"response_format": {"type": "json_object"}}), 400, "response_format", "answers are text"),
        (json!({"messages": []}), 400, "messages", "a message at least"),
        (json!({"messages": [{"role": "wizard", "content": "hi"}]}), 400, "messages", "wizard"),
        (json!({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}), 400, "messages", "not text"),
        (
            json!({"messages": [{"role": "user", "content": "rice ".repeat(80)}]}),
            400,
            "messages",
            "there is room for 64",
        ),
    ] {
        refused(CHATS, chat("base", more), status, param, part);
    }
    refused(COMPLETIONS, json!({"model": "base"}), 400, "prompt", "'prompt'");
    refused(COMPLETIONS, json!({"model": "base", "prompt": [1, -2]}), 400, "prompt", "a list of tokens");
    refused(COMPLETIONS, json!({"model": "base", "prompt": [100_000]}), 400, "prompt", "vocabulary");
    refused(COMPLETIONS, json!({"model": "base", "prompt": "", "max_tokens": 1}), 400, "prompt", "nothing to answer");
    refused(COMPLETIONS, json!({"model": "base", "prompt": "a", "messages": []}), 400, "messages", "no parameter");
    // What changes nothing is not refused.
    let same = json!({"tools": [], "tool_choice": "none", "response_format": {"type": "text"}, "user": "me", "store": false, "n": 1,
        "stop": null, "logit_bias": {}, "stream_options": null, "top_k": -1, "parallel_tool_calls": true});
    assert_eq!(text(&server.chat("base", same)), text(&server.chat("base", json!({}))));
    for (method, path, headers, body, status) in [
        ("POST", CHATS, JSON, "{", 400),
        ("POST", CHATS, JSON, "[]", 400),
        ("POST", CHATS, "", "{}", 415),
        ("POST", CHATS, "Content-Type: text/plain\r\n", "{}", 415),
        ("GET", CHATS, "", "", 405),
        ("GET", "/v1/other", "", "", 404),
    ] {
        let (is, answer) = server.send(method, path, headers, body);
        assert!(is == status && answer.contains("\"error\""), "{method} {path} {body}: {is} {answer}");
    }
    // A body that is larger than any prompt.
    let mut stream = TcpStream::connect(&server.address).unwrap();
    let head = format!("POST {CHATS} HTTP/1.1\r\nHost: localhost\r\n{JSON}Content-Length: {}\r\n\r\n", 1 << 30);
    stream.write_all(head.as_bytes()).unwrap();
    let part = vec![b' '; 1 << 20];
    let sent = (0..64).take_while(|_| stream.write_all(&part).is_ok()).count();
    assert!(sent < 64, "64 MiB were taken");
}

#[test]
fn who_is_let_in() {
    let sandbox = sandbox();
    let open = Server::start(&sandbox, &[]);
    let of_host = |server: &Server, host: &str, more: &str| {
        let mut stream = TcpStream::connect(&server.address).unwrap();
        stream
            .write_all(format!("GET /v1/models HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\n{more}\r\n").as_bytes())
            .unwrap();
        read(stream).0
    };
    assert_eq!([of_host(&open, "localhost", ""), of_host(&open, "evil.example", "")], [200, 421]);
    let closed = Server::start(&sandbox, &["--api-key", "secret"]);
    let key = "Authorization: Bearer secret\r\n";
    assert_eq!(of_host(&closed, "any.example", key), 200);
    assert_eq!(
        [of_host(&closed, "localhost", ""), of_host(&closed, "localhost", "Authorization: Bearer no\r\n")],
        [401, 401]
    );
    assert_eq!(closed.send("POST", CHATS, JSON, &chat("base", json!({})).to_string()).0, 401);
    assert_eq!(closed.send("POST", CHATS, &format!("{JSON}{key}"), &chat("base", json!({})).to_string()).0, 200);
}

/// Ctrl-C ends answers that go on, and the process, at once.
#[test]
fn a_signal_ends_it() {
    let sandbox = sandbox();
    let mut server = Server::start(&sandbox, &[]);
    let body = json!({"model": "base", "prompt": [1], "max_tokens": 500, "ignore_eos": true, "stream": true});
    let going = server.begin("POST", COMPLETIONS, JSON, &body.to_string());
    std::thread::sleep(Duration::from_millis(50));
    let start = Instant::now();
    let pid = server.child.id().to_string();
    assert!(std::process::Command::new("kill").args(["-INT", &pid]).status().unwrap().success());
    let (_, text) = read(going);
    assert!(text.contains("\"abort\"") || text.contains("\"length\""), "{text}");
    assert!(server.child.wait().unwrap().success() && start.elapsed() < Duration::from_secs(10));
}
