//! `eval --generate`: answers with the adapter and without, which stay when the command is run again, and judges of every kind.
#![allow(clippy::unwrap_used)] // In a test, a panic is the report.

use std::fs;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::path::Path;
use std::sync::{Arc, Mutex};

use dpo_tests::{Ended, Sandbox};
use serde_json::{Value, json};

/// What a judge answers to the answers of A and B, at its so-manieth request: status and body.
type Answer = fn(usize, &str, &str, &Value) -> (u16, String);

/// A judge on this machine, and what it was asked: the head and the body of each request.
struct LoopbackJudge {
    url: String,
    asked: Arc<Mutex<Vec<(String, Value)>>>,
}

impl LoopbackJudge {
    fn new(answer: Answer) -> LoopbackJudge {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let url = format!("http://{}/v1", listener.local_addr().unwrap());
        let asked: Arc<Mutex<Vec<(String, Value)>>> = Arc::default();
        let seen = asked.clone();
        std::thread::spawn(move || {
            for stream in listener.incoming().map_while(Result::ok) {
                let seen = seen.clone();
                std::thread::spawn(move || serve(&stream, answer, &seen));
            }
        });
        LoopbackJudge { url, asked }
    }

    fn asked(&self) -> Vec<(String, Value)> {
        self.asked.lock().unwrap().clone()
    }
}

fn serve(mut stream: &TcpStream, answer: Answer, seen: &Mutex<Vec<(String, Value)>>) {
    let mut reader = BufReader::new(stream);
    let (mut head, mut line) = (String::new(), String::new());
    while reader.read_line(&mut line).unwrap_or(0) > 2 {
        head += &line.to_lowercase();
        line.clear();
    }
    let length = head.lines().find_map(|l| l.strip_prefix("content-length: ")?.trim().parse::<usize>().ok());
    let mut body = vec![0; length.unwrap()];
    reader.read_exact(&mut body).unwrap();
    let body: Value = serde_json::from_slice(&body).unwrap();
    let question = body["messages"][1]["content"].as_str().unwrap();
    let of = |name: &str| {
        let (_, rest) = question.split_once(&format!("[Start of assistant {name}'s answer]\n")).unwrap();
        rest.split_once(&format!("\n[End of assistant {name}'s answer]")).unwrap().0.to_owned()
    };
    let number = {
        let mut seen = seen.lock().unwrap();
        seen.push((head, body.clone()));
        seen.len()
    };
    let (status, body) = answer(number, &of("A"), &of("B"), &body);
    let length = body.len();
    let _ = write!(stream, "HTTP/1.1 {status} X\r\ncontent-length: {length}\r\nconnection: close\r\n\r\n{body}");
}

fn says(text: &str) -> (u16, String) {
    (200, json!({"choices": [{"message": {"role": "assistant", "content": text}}]}).to_string())
}

const PROMPTS: &str = "What is the capital of France?\n\nMy dog died\nhello\nI feel sad\n";
const COUNT: usize = 4;

/// A run of the demo, long enough for other answers than before.
fn trained(sandbox: &Sandbox) -> String {
    let run = sandbox.path("run");
    sandbox.ok(&[
        "train",
        "--model",
        "demo",
        "--output-dir",
        &run,
        "--max-steps",
        "24",
        "--batch-size",
        "8",
        "--learning-rate",
        "2e-3",
    ]);
    sandbox.write("p.txt", PROMPTS);
    run
}

/// Generates, with a judge where there is one, and a key where it wants one.
fn eval(sandbox: &Sandbox, more: &[&str], judge: Option<&LoopbackJudge>, key: Option<&str>) -> Ended {
    let mut args = vec!["eval", "--adapter", "run", "--generate", "p.txt", "--max-new-tokens", "40"];
    args.extend(judge.iter().flat_map(|judge| ["--judge", &judge.url, "--judge-model", "some"]));
    args.extend(more);
    let mut command = sandbox.command(&args);
    command.env_remove("OPENAI_API_KEY").envs(key.map(|key| ("OPENAI_API_KEY", key)));
    let output = command.output().unwrap();
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    Ended { code: output.status.code().unwrap(), stdout: text(&output.stdout), stderr: text(&output.stderr) }
}

/// The numbers of what a judge says.
fn tally(ended: &Ended) -> Value {
    assert_eq!(ended.code, 0, "{}", ended.stderr);
    serde_json::from_str::<Value>(&ended.stdout).unwrap()["judge"].clone()
}

fn lines(path: &str) -> Vec<Value> {
    fs::read_to_string(path).unwrap().lines().map(|l| serde_json::from_str(l).unwrap()).collect()
}

#[test]
fn answers_stand_side_by_side_and_stay() {
    let sandbox = Sandbox::new(env!("CARGO_BIN_EXE_dpo-host-test"));
    let run = trained(&sandbox);
    let ended = eval(&sandbox, &[], None, None);
    assert!(ended.code == 0 && ended.stderr.contains("4 prompts, base "), "{}", ended.stderr);
    let file = format!("{run}/generated.jsonl");
    let written = fs::read_to_string(&file).unwrap();
    let all = lines(&file);
    assert_eq!(all.len(), 1 + COUNT);
    let places: Vec<&str> = all[1..].iter().map(|l| l["place"].as_str().unwrap()).collect();
    assert_eq!(places, ["p.txt:1", "p.txt:3", "p.txt:4", "p.txt:5"]);
    assert_eq!(all[1]["base"]["text"], "Paris.");
    assert!(all[1..].iter().any(|l| l["base"]["text"] != l["tuned"]["text"]), "{written}");
    // The same as `chat --compare` says.
    let chat = ["chat", "--compare", "--json", "--adapter", "run", "--max-new-tokens", "40", "--prompt", "My dog died"];
    let said: Value = serde_json::from_str(&sandbox.ok(&chat).stdout).unwrap();
    assert_eq!([&said["base"], &said["tuned"]], [&all[2]["base"], &all[2]["tuned"]]);
    for page in ["generated.html", "report.html"] {
        let html = fs::read_to_string(Path::new(&run).join(page)).unwrap();
        assert!(html.contains("p.txt:3") && html.contains("<h4>tuned</h4>") && html.contains("4 prompts"), "{page}");
    }
    // What is there is not made again, and what is not there is.
    let cut: String = written.lines().take(3).map(|l| format!("{l}\n")).collect();
    fs::write(&file, cut).unwrap();
    let ended = eval(&sandbox, &[], None, None);
    assert!(ended.stderr.contains("2 of 4 prompts are answered already"), "{}", ended.stderr);
    assert_eq!(fs::read_to_string(&file).unwrap(), written);
    let marked = written.replace("Paris.", "Paris, it was kept.");
    fs::write(&file, &marked).unwrap();
    eval(&sandbox, &[], None, None);
    assert!(fs::read_to_string(&file).unwrap().contains("it was kept"), "it was made again");
    // Nothing of another kind is written over.
    for (more, said) in [(&["--top-k", "2"][..], "drawn in another way"), (&["--max-samples", "2"], "other prompts")] {
        let ended = eval(&sandbox, more, None, None);
        assert!(ended.code == 2 && ended.stderr.contains(said), "{}", ended.stderr);
    }
    sandbox.write("other.jsonl", "{\"loss\":1}\n");
    let ended = eval(&sandbox, &["--output", "other.jsonl"], None, None);
    assert!(ended.code == 2 && ended.stderr.contains("not a file of generated answers"), "{}", ended.stderr);
    // Rows of a dataset are asked what their pairs answer.
    let rows = json!({"prompt": "hello", "chosen": "a", "rejected": "b"});
    sandbox.write("rows.jsonl", &format!("{rows}\n{}\n", json!({"prompt": "hello", "chosen": "c", "rejected": "d"})));
    let args =
        ["eval", "--adapter", "run", "--generate", "rows.jsonl", "--output", "rows.out", "--max-new-tokens", "40"];
    sandbox.ok(&args);
    let rows = lines(&sandbox.path("rows.out"));
    assert!(rows.len() == 2 && rows[1]["tuned"] == all[3]["tuned"], "one prompt, once: {rows:?}");
}

#[test]
fn what_has_no_meaning_is_refused() {
    let sandbox = Sandbox::new(env!("CARGO_BIN_EXE_dpo-host-test"));
    sandbox.write("p.txt", PROMPTS);
    sandbox.write("empty.txt", "\n\n");
    let base = ["eval", "--model", "demo"];
    let refused: [(&[&str], &str); 8] = [
        (&["--generate", "p.txt"], "names no file to write answers into"),
        (&["--generate", "p.txt", "--output", "o", "--beta", "1"], "--beta: is for scores"),
        (&["--generate", "p.txt", "--output", "o", "--dataset", "x"], "--dataset: is for scores"),
        (&["--dataset", "x", "--temperature", "1"], "--temperature: is for answers"),
        (&["--generate", "p.txt", "--output", "o", "--judge", "http://a/v1", "--judge-model", "m"], "--adapter"),
        (&["--generate", "p.txt", "--output", "o", "--judge", "http://a/v1"], "--judge-model"),
        (&["--generate", "empty.txt", "--output", "o"], "there is no prompt"),
        (&["--generate", "missing.jsonl", "--output", "o"], "missing.jsonl"),
    ];
    for (more, said) in refused {
        sandbox.refuses(&[&base, more].concat(), &[said]);
    }
    // A model alone answers, too.
    sandbox.ok(&[&base[..], &["--generate", "p.txt", "--output", "o.jsonl", "--max-new-tokens", "8"]].concat());
    assert!(lines(&sandbox.path("o.jsonl"))[1].get("tuned").is_none());
}

#[test]
fn judges_of_every_kind() {
    let sandbox = Sandbox::new(env!("CARGO_BIN_EXE_dpo-host-test"));
    let run = trained(&sandbox);
    let all = lines(&{
        eval(&sandbox, &[], None, None);
        format!("{run}/generated.jsonl")
    });
    let length = |line: &Value, name: &str| line[name]["text"].as_str().unwrap().len();
    let count = |so: &dyn Fn(&Value) -> bool| all[1..].iter().filter(|l| so(l)).count();
    let differing = count(&|l| l["base"]["text"] != l["tuned"]["text"]);
    assert!(differing > 1, "the adapter has learned nothing: {all:?}");
    let own = |name: &str| ["--json".to_owned(), "--output".to_owned(), sandbox.path(name)];
    let judged = |name: &str, judge: &LoopbackJudge, key| {
        fs::copy(format!("{run}/generated.jsonl"), sandbox.path(name)).unwrap();
        eval(&sandbox, &own(name).each_ref().map(String::as_str), Some(judge), key)
    };

    // One that always prefers what stands first says nothing.
    let first = LoopbackJudge::new(|_, _, _, _| says("The first. [[A]]"));
    let told = tally(&judged("first.jsonl", &first, None));
    assert_eq!([&told["wins"], &told["losses"], &told["ties"]], [&json!(0), &json!(0), &json!(COUNT)], "{told}");
    assert_eq!(told["win_rate"], 0.5);
    let asked = first.asked();
    assert_eq!(asked.len(), 2 * differing, "twice each, and none whose answers are the same");
    for (head, body) in &asked {
        assert!(head.starts_with("post /v1/chat/completions http/1.1") && !head.contains("authorization"), "{head}");
        assert!(body["model"] == "some" && body["temperature"] == 0, "{body}");
    }

    // One that likes the longer answer, with a key.
    let longer = LoopbackJudge::new(|_, a, b, _| {
        says(if a.len() > b.len() {
            "[[A]]"
        } else if b.len() > a.len() {
            "Not [[A]]. [[B]]"
        } else {
            "[[C]]"
        })
    });
    let told = tally(&judged("longer.jsonl", &longer, Some("secret")));
    assert_eq!(told["wins"], count(&|l| length(l, "tuned") > length(l, "base")), "{told}");
    assert_eq!(told["losses"], count(&|l| length(l, "tuned") < length(l, "base")), "{told}");
    assert!(longer.asked().iter().all(|(head, _)| head.contains("authorization: bearer secret\r\n")));
    let [low, high] = [0, 1].map(|i| told["interval_95"][i].as_f64().unwrap());
    let rate = told["win_rate"].as_f64().unwrap();
    assert!(low < rate && rate <= high && low > 0.0 && high <= 1.0, "{told}");
    // What is judged is not asked again.
    let before = longer.asked().len();
    let again = eval(&sandbox, &own("longer.jsonl").each_ref().map(String::as_str), Some(&longer), Some("secret"));
    assert_eq!((tally(&again), longer.asked().len()), (told, before));
    let other = ["--output", &sandbox.path("longer.jsonl"), "--judge", &longer.url, "--judge-model", "other"];
    let ended = eval(&sandbox, &other, None, None);
    assert!(ended.code == 2 && ended.stderr.contains("holds verdicts of 'some'"), "{}", ended.stderr);
    let html = fs::read_to_string(sandbox.path("longer.html")).unwrap();
    assert!(html.contains("95% interval") && html.contains(" · tuned is better"), "{html}");

    // Answers that cannot be read are counted, and not as anything else.
    let broken = LoopbackJudge::new(|_, _, _, _| says("I cannot decide."));
    let told = tally(&judged("broken.jsonl", &broken, None));
    assert_eq!((&told["unclear"], &told["ties"]), (&json!(differing), &json!(COUNT - differing)), "{told}");

    // One that is busy is asked again; one that does not take a temperature, without.
    let busy = LoopbackJudge::new(|n, _, _, body| match body.get("temperature") {
        _ if n == 1 => (500, "busy".into()),
        Some(_) => (400, json!({"error": {"param": "temperature"}}).to_string()),
        None => says("[[B]]"),
    });
    assert_eq!(tally(&judged("busy.jsonl", &busy, None))["ties"], COUNT);

    // What fails says why, and leaves the answers.
    let failing: [(Answer, i32, &str); 4] = [
        (|_, _, _, _| (503, "down".into()), 1, "the judge was asked 4 times: 503: down"),
        (|_, _, _, _| (401, "who?".into()), 2, "help: set OPENAI_API_KEY"),
        (|_, _, _, _| (404, "no such model".into()), 1, "404: no such model"),
        (|_, _, _, _| (200, "<html>".into()), 1, "this is no chat completion: <html>"),
    ];
    for (answer, code, said) in failing {
        let ended = judged("failing.jsonl", &LoopbackJudge::new(answer), None);
        assert!(ended.code == code && ended.stderr.contains(said), "{}", ended.stderr);
        let kept = lines(&sandbox.path("failing.jsonl"));
        assert_eq!(kept.len(), 1 + COUNT);
        assert!(kept.iter().zip(&all).all(|(a, b)| a["tuned"] == b["tuned"]));
    }
    assert_eq!(
        tally(&eval(&sandbox, &own("failing.jsonl").each_ref().map(String::as_str), Some(&first), None))["ties"],
        COUNT
    );
}
