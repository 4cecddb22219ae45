//! ModelScope's way (modelscope_hub: `_upload.py`, `_legacy_api.py`): the client decides which files are objects, and the commit is
//! one JSON with an action for each file.

use base64::Engine;
use base64::engine::general_purpose::STANDARD as BASE64;
use serde_json::{Value, json};

use super::{Mode, Repository, Source, Terms, objects, post, post_bytes, refused};
use crate::client::{Client, Failure, passing};
use crate::protocol::{self, escaped};
use crate::{Content, Name};
use dpo_core::error::Result;

/// Bytes from which on a file is an object.
const LARGE: u64 = 64 << 10;
/// Endings of files that are objects whatever their size.
const BINARY: [&str; 11] = ["bin", "ckpt", "gguf", "h5", "model", "msgpack", "npz", "onnx", "pt", "pth", "safetensors"];
/// Files that the hub itself reads, which are never objects.
const READ: [&str; 4] = ["README.md", ".gitattributes", "config.json", "configuration.json"];
/// Who sees a repository.
const PRIVATE: u64 = 1;
const PUBLIC: u64 = 5;
/// What the hub says of a name that is taken, on its two sites.
const TAKEN: [u64; 2] = [10010101001, 10010202004];
/// What it says of a commit that another one came before.
const RACED: u64 = 10030000001;
/// Licenses as the hub spells them; those it does not know are `Other`.
const LICENSES: [&str; 9] = [
    "Apache-2.0",
    "MIT",
    "BSD-2-Clause",
    "BSD-3-Clause",
    "GPL-2.0",
    "GPL-3.0",
    "CC-BY-4.0",
    "CC-BY-SA-4.0",
    "CC-BY-NC-4.0",
];

pub(super) struct ModelScope<'a> {
    pub(super) client: &'a Client,
    pub(super) name: &'a Name,
}

impl ModelScope<'_> {
    fn address(&self, path: &str) -> String {
        format!("{}{path}", (self.name.hub.endpoint)())
    }

    fn api(&self, what: &str) -> String {
        self.address(&format!("/api/v1/repos/models/{}{what}", self.name.id))
    }
}

fn is_object(file: &Source) -> bool {
    let own = file.path().rsplit('/').next().unwrap_or_default();
    let ending = own.rsplit_once('.').map_or("", |(_, ending)| ending);
    file.size() > 0 && !READ.contains(&own) && (file.size() > LARGE || BINARY.contains(&ending))
}

impl Repository for ModelScope<'_> {
    fn find(&self) -> Result<Option<Option<bool>>> {
        let reply = self.client.ask(&self.address(&format!("/api/v1/models/{}", self.name.id)))?;
        let visibility = reply.body.pointer("/Data/Visibility").and_then(Value::as_u64);
        Ok((reply.is_ok() && reply.body["Success"] != false).then(|| visibility.map(|v| v == PUBLIC)))
    }

    fn create(&self, terms: &Terms) -> Result<()> {
        let (owner, own) = self.name.id.split_once('/').unwrap_or_default();
        let license = terms.license.as_deref().unwrap_or_default();
        let license = LICENSES.iter().find(|known| known.eq_ignore_ascii_case(license)).unwrap_or(&"Other");
        let visibility = if terms.private { PRIVATE } else { PUBLIC };
        let asked = json!({"Path": owner, "Name": own, "Visibility": visibility, "License": license});
        let reply = post(self.client, &self.address("/api/v1/models"), &asked)?;
        let is_taken = reply.body["Code"].as_u64().is_some_and(|code| TAKEN.contains(&code));
        if is_taken || (reply.is_ok() && reply.body["Success"] != false) {
            return Ok(());
        }
        Err(refused(self.name, "to make the repository", &reply))
    }

    /// Its API makes none: the commit says whether the branch is there.
    fn branch(&self) -> Result<()> {
        Ok(())
    }

    fn modes(&self, files: &[&Source]) -> Result<Vec<Mode>> {
        let hub = self.name.hub;
        let reply = self.client.ask(&self.address(&(hub.listing)(self.name, Content::Model, 1)))?;
        let there = match reply.is_ok() {
            true => protocol::listing(self.name, &reply.body)?.files,
            // Without a commit there is no list.
            false if reply.status == 404 => Vec::new(),
            false => return Err(refused(self.name, "to list files", &reply)),
        };
        let mode = |file: &&Source| {
            let same = match there.iter().find(|t| t.path == file.path()) {
                Some(there) if there.size == Some(file.size()) => file.is(&there.blob)?,
                _ => false,
            };
            Ok(match is_object(file) {
                _ if same => Mode::Same,
                true => Mode::Object,
                false => Mode::Inline,
            })
        };
        files.iter().map(mode).collect()
    }

    fn objects(&self) -> objects::Place {
        objects::Place { address: self.api("/info/lfs/objects/batch"), branch: None, is_moved: false }
    }

    fn commit(&self, files: &[(&Source, Mode)], message: &str) -> std::result::Result<(), Failure> {
        let mut actions = Vec::new();
        for (file, mode) in files {
            let (kind, sha256, content, encoding) = match mode {
                Mode::Object => ("lfs", file.sha256()?.to_owned(), String::new(), ""),
                _ => ("normal", String::new(), BASE64.encode(file.head(u64::MAX)?), "base64"),
            };
            actions.push(json!({"action": "create", "path": file.path(), "type": kind, "size": file.size(),
                "sha256": sha256, "content": content, "encoding": encoding}));
        }
        let asked = json!({"commit_message": message, "actions": actions}).to_string();
        let address = self.api(&format!("/commit/{}", escaped(&self.name.revision, "")));
        let reply = post_bytes(self.client, &address, &[("content-type", "application/json")], asked.as_bytes())?;
        if reply.body["Code"].as_u64() == Some(RACED) {
            return Err(passing(format!("another commit came between ({})", reply.message)));
        }
        if reply.is_ok() && reply.body["Success"] != false {
            return Ok(());
        }
        Err(refused(self.name, "to make the commit", &reply).into())
    }

    fn page(&self) -> String {
        self.address(&format!("/models/{}", self.name.id))
    }
}
