//! What goes up to the hub on the loopback: repositories, large files, commits, as both hubs' clients send them.

use std::collections::HashMap;
use std::io::{BufRead, BufReader, Read};
use std::net::TcpStream;

use base64::Engine;
use base64::engine::general_purpose::STANDARD as BASE64;
use serde_json::{Value, json};
use sha2::{Digest, Sha256};

use super::{COMMIT, State, Trouble, git};

/// A request.
pub(super) struct Call<'a> {
    pub(super) method: &'a str,
    pub(super) target: &'a str,
    pub(super) headers: &'a HashMap<String, String>,
}

/// What is said to it.
pub(super) enum Answer {
    Json(u16, Value),
    /// With the name of what is stored.
    Stored(String),
    Busy(u16),
    /// The connection ends.
    Nothing,
}

/// Files that are objects whatever their size, as the attributes of new repositories have it.
const LARGE: [&str; 3] = [".safetensors", ".gguf", ".bin"];

impl Call<'_> {
    /// An answer to what is about going up; nothing to other requests.
    pub(super) fn answer(&self, state: &mut State, body: &mut BufReader<TcpStream>) -> Option<Answer> {
        let path = self.target.split('?').next()?;
        let parts: Vec<&str> = path.trim_matches('/').split('/').collect();
        match (self.method, parts.as_slice()) {
            ("GET", ["api", "models", owner, name]) => Some(found(state, &format!("{owner}/{name}"), false)),
            ("GET", ["api", "v1", "models", owner, name] | ["openapi", "v1", "models", owner, name]) => {
                Some(found(state, &format!("{owner}/{name}"), true))
            }
            ("GET", ["api", "models", _, _, "revision", branch]) => {
                let known = ["main", COMMIT].contains(branch) || state.branches.iter().any(|b| b == branch);
                let missing = !known && !state.repositories.is_empty();
                missing.then(|| Answer::Json(404, json!({"error": "Invalid rev id"})))
            }
            ("POST" | "PUT", parts) => {
                let what = match parts {
                    ["api", "repos", "create"] | ["api", "v1", "models"] => "create".to_owned(),
                    ["store", _] => "object".to_owned(),
                    ["store", _, part] => format!("object {part}"),
                    ["complete", _] | ["verify"] | ["api", "validate-yaml"] => parts.last()?.to_string(),
                    [.., what @ ("preupload" | "branch" | "commit"), _] => (*what).to_owned(),
                    [.., "objects", what] => (*what).to_owned(),
                    _ => return None,
                };
                state.sent.push(what.clone());
                let trouble = state.troubles.get_mut(&what).filter(|t| !t.is_empty()).map(|t| t.remove(0));
                let length = self.headers.get("content-length").and_then(|l| l.parse().ok()).unwrap_or(0);
                match trouble {
                    Some(Trouble::Breaks) => {
                        let _ = std::io::copy(&mut body.take(length / 2), &mut std::io::sink());
                        return Some(Answer::Nothing);
                    }
                    Some(Trouble::Status(status)) => {
                        received(self.headers, body)?;
                        return Some(Answer::Busy(status));
                    }
                    _ => {}
                }
                let bytes = received(self.headers, body)?;
                let done = self.done(state, parts, &bytes);
                Some(if trouble == Some(Trouble::Lost) { Answer::Nothing } else { done })
            }
            _ => None,
        }
    }

    /// Does what is asked for.
    fn done(&self, state: &mut State, parts: &[&str], bytes: &[u8]) -> Answer {
        if state.read_only && parts[0] == "api" {
            return Answer::Json(
                403,
                json!({"error": "You don't have the rights", "Message": "no right", "Code": 403}),
            );
        }
        let asked: Value = serde_json::from_slice(bytes).unwrap_or_default();
        let ok = |value: Value| Answer::Json(200, value);
        match parts {
            ["api", "repos", "create"] => {
                let id = format!("{}/{}", asked["organization"].as_str().unwrap_or("me"), text(&asked["name"]));
                if state.repositories.contains_key(&id) {
                    return Answer::Json(
                        409,
                        json!({"error": "You already created this model repo", "url": self.url(&id)}),
                    );
                }
                let private = asked["visibility"] == "private" || asked["private"] == true;
                state.repositories.insert(id.clone(), private);
                ok(json!({"url": self.url(&id), "id": id}))
            }
            ["api", "v1", "models"] => {
                let id = format!("{}/{}", text(&asked["Path"]), text(&asked["Name"]));
                if state.repositories.insert(id, asked["Visibility"] == 1).is_some() {
                    return Answer::Json(
                        400,
                        json!({"Code": 10010101001_u64, "Success": false, "Message": "model exists"}),
                    );
                }
                // A new repository has a card of the hub's.
                if state.files.iter().all(|(path, _)| path != "README.md") {
                    state.files.push(("README.md".into(), b"---\nlicense: other\n---\nNo words yet.\n".to_vec()));
                }
                ok(json!({"Code": 200, "Success": true, "Data": {}}))
            }
            [.., "branch", branch] => {
                state.branches.push((*branch).to_owned());
                ok(json!({}))
            }
            [.., "preupload", _] => ok(preupload(state, &asked)),
            [.., "objects", "batch"] => {
                let objects: Vec<Value> =
                    asked["objects"].as_array().into_iter().flatten().map(|o| self.action(state, o)).collect();
                if parts.get(1) != Some(&"v1") {
                    return ok(json!({"transfer": "basic", "objects": objects}));
                }
                // ModelScope names those alone that it lacks.
                let absent: Vec<Value> = objects.into_iter().filter(|o| o["actions"].is_object()).collect();
                ok(json!({"Code": 200, "Success": true, "Data": {"objects": absent}}))
            }
            ["store", oid] => stored(state, oid, bytes.to_vec()),
            ["store", oid, part] => {
                let part: usize = part.parse().unwrap_or(0);
                state.parts.insert(((*oid).to_owned(), part), bytes.to_vec());
                Answer::Stored(format!("\"etag-{part}\""))
            }
            ["complete", oid] => {
                let named = asked["parts"].as_array().cloned().unwrap_or_default();
                let mut all = Vec::new();
                for part in &named {
                    let number = part["partNumber"].as_u64().unwrap_or(0) as usize;
                    if part["etag"] != format!("\"etag-{number}\"") {
                        return Answer::Json(400, json!({"error": "another etag"}));
                    }
                    all.extend(state.parts.get(&((*oid).to_owned(), number)).cloned().unwrap_or_default());
                }
                stored(state, oid, all)
            }
            ["verify"] => match state.objects.get(text(&asked["oid"])).map(Vec::len) {
                Some(length) if asked["size"] == length => ok(json!({})),
                _ => Answer::Json(404, json!({"error": "no such object"})),
            },
            [.., owner, name, "commit", _] => {
                commit(state, &asked, bytes, &format!("{}/commit/{COMMIT}", self.url(&format!("{owner}/{name}"))))
            }
            _ => ok(json!({"errors": [], "warnings": []})),
        }
    }

    fn url(&self, id: &str) -> String {
        format!("http://{}/{id}", self.headers.get("host").map_or("", String::as_str))
    }

    /// What is to be done with an object.
    fn action(&self, state: &State, object: &Value) -> Value {
        let (oid, size) = (text(&object["oid"]), object["size"].as_u64().unwrap_or(0) as usize);
        if state.objects.contains_key(oid) {
            return json!({"oid": oid, "size": size});
        }
        let store = state.store.clone().unwrap_or_else(|| self.url("").trim_end_matches('/').to_owned());
        let mut upload = json!({"href": format!("{store}/store/{oid}"), "header": {"x-store": "yes"}});
        if let Some(part) = state.part {
            upload = json!({"href": format!("{store}/complete/{oid}"), "header": {"chunk_size": part.to_string()}});
            for number in 1..=size.div_ceil(part) {
                upload["header"][format!("{number:05}")] = json!(format!("{store}/store/{oid}/{number}"));
            }
        }
        let verify = json!({"href": self.url("verify")});
        json!({"oid": oid, "size": size, "actions": {"upload": upload, "verify": verify}})
    }
}

fn text(value: &Value) -> &str {
    value.as_str().unwrap_or_default()
}

fn found(state: &State, id: &str, modelscope: bool) -> Answer {
    match (state.repositories.get(id), modelscope) {
        (None, true) => {
            Answer::Json(404, json!({"Code": 10010205001_u64, "Success": false, "Message": "no such model"}))
        }
        (None, false) => Answer::Json(404, json!({"error": "Repository not found"})),
        (Some(private), true) => {
            let data = json!({"Visibility": if *private { 1 } else { 5 }, "Path": id});
            Answer::Json(200, json!({"Code": 200, "Success": true, "Data": data, "success": true, "data": {"id": id}}))
        }
        (Some(private), false) => {
            Answer::Json(200, json!({"id": id, "private": private, "sha": COMMIT, "siblings": []}))
        }
    }
}

/// How files go up: which are objects, and what is there.
fn preupload(state: &State, asked: &Value) -> Value {
    let of = |file: &Value| {
        let path = text(&file["path"]);
        let large = LARGE.iter().any(|ending| path.ends_with(ending));
        let there = state.files.iter().find(|(own, _)| own == path);
        let oid = there.map(|(_, bytes)| if large { format!("{:x}", Sha256::digest(bytes)) } else { git(bytes) });
        let mode = if large { "lfs" } else { "regular" };
        json!({"path": path, "uploadMode": mode, "shouldIgnore": path.ends_with(".ignored"), "oid": oid})
    };
    json!({"files": asked["files"].as_array().into_iter().flatten().map(of).collect::<Vec<_>>()})
}

/// Takes an object that has the hash it is named by.
fn stored(state: &mut State, oid: &str, bytes: Vec<u8>) -> Answer {
    if format!("{:x}", Sha256::digest(&bytes)) != oid {
        return Answer::Json(400, json!({"error": "another hash"}));
    }
    state.objects.insert(oid.to_owned(), bytes);
    Answer::Stored("\"whole\"".into())
}

/// Makes a commit of lines of JSON as Hugging Face has them, or of ModelScope's actions.
fn commit(state: &mut State, asked: &Value, bytes: &[u8], page: &str) -> Answer {
    let lines: Vec<Value> = bytes.split(|b| *b == b'\n').filter_map(|line| serde_json::from_slice(line).ok()).collect();
    let (message, files): (String, Vec<&Value>) = match asked["actions"].as_array() {
        Some(actions) => (text(&asked["commit_message"]).to_owned(), actions.iter().collect()),
        None => {
            let summary = lines.first().map(|header| text(&header["value"]["summary"])).unwrap_or_default();
            (summary.to_owned(), lines.iter().skip(1).map(|line| &line["value"]).collect())
        }
    };
    let mut taken = Vec::new();
    for file in files {
        let oid = [&file["oid"], &file["sha256"]].map(text).into_iter().find(|oid| !oid.is_empty());
        let content = match oid {
            Some(oid) => state.objects.get(oid).cloned(),
            None => BASE64.decode(text(&file["content"])).ok(),
        };
        let Some(content) = content else {
            return Answer::Json(400, json!({"error": format!("no object for {}", file["path"]), "Code": 400}));
        };
        taken.push((text(&file["path"]).to_owned(), content));
    }
    state.files.retain(|(path, _)| taken.iter().all(|(new, _)| new != path));
    state.files.extend(taken);
    state.commits.push(message);
    let commit = json!({"commitUrl": page, "commitOid": COMMIT, "hookOutput": "", "success": true});
    if asked["actions"].is_array() {
        return Answer::Json(200, json!({"Code": 200, "Success": true, "Data": commit}));
    }
    Answer::Json(200, commit)
}

/// The bytes of a request, which clients that do not know its length send in chunks.
fn received(headers: &HashMap<String, String>, body: &mut BufReader<TcpStream>) -> Option<Vec<u8>> {
    let mut bytes = Vec::new();
    if let Some(length) = headers.get("content-length") {
        body.take(length.parse().ok()?).read_to_end(&mut bytes).ok()?;
        return Some(bytes);
    }
    if headers.get("transfer-encoding").is_none_or(|coding| coding != "chunked") {
        return Some(bytes);
    }
    loop {
        let mut line = String::new();
        body.read_line(&mut line).ok()?;
        let length = u64::from_str_radix(line.trim(), 16).ok()?;
        body.by_ref().take(length).read_to_end(&mut bytes).ok()?;
        body.read_line(&mut line).ok()?;
        if length == 0 {
            return Some(bytes);
        }
    }
}
