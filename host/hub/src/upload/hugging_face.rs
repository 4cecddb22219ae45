//! Hugging Face's way (huggingface_hub: `hf_api.py`, `_commit_api.py`, `lfs.py`): a preupload tells which files are objects and
//! what is there, and the commit is a line of JSON for each file.
//!
//! Repositories there are backed by Xet. Clients without it send objects of git LFS, which the hub takes and converts by itself
//! (huggingface.co/docs/hub/xet/legacy-git-lfs).

use base64::Engine;
use base64::engine::general_purpose::STANDARD as BASE64;
use serde_json::{Value, json};

use super::{Mode, Repository, Source, Terms, objects, post, post_bytes, refused};
use crate::Name;
use crate::client::{Client, Failure, passing};
use crate::protocol::escaped;
use dpo_core::error::{Error, Result};

/// Files that one preupload asks for.
const ASKED: usize = 256;
/// Bytes of a file that the hub wants to see before it says how the file goes up.
const SAMPLE: u64 = 512;

pub(super) struct HuggingFace<'a> {
    pub(super) client: &'a Client,
    pub(super) name: &'a Name,
}

impl HuggingFace<'_> {
    fn address(&self, path: &str) -> String {
        format!("{}{path}", (self.name.hub.endpoint)())
    }

    /// An address of the API about this repository.
    fn api(&self, what: &str) -> String {
        self.address(&format!("/api/models/{}{what}", self.name.id))
    }

    fn branch_name(&self) -> String {
        escaped(&self.name.revision, "")
    }
}

impl Repository for HuggingFace<'_> {
    fn find(&self) -> Result<Option<Option<bool>>> {
        let reply = self.client.ask(&self.api(""))?;
        Ok(reply.is_ok().then(|| reply.body["private"].as_bool().map(|private| !private)))
    }

    fn create(&self, terms: &Terms) -> Result<()> {
        let (owner, own) = self.name.id.split_once('/').unwrap_or_default();
        let mut asked = json!({"name": own, "organization": owner, "type": "model"});
        if terms.private {
            asked["visibility"] = json!("private");
        }
        let reply = post(self.client, &self.address("/api/repos/create"), &asked)?;
        // One that this token does not see may be there all the same.
        if reply.is_ok() || reply.status == 409 {
            return Ok(());
        }
        Err(refused(self.name, "to make the repository", &reply))
    }

    fn branch(&self) -> Result<()> {
        if self.name.revision == self.name.hub.revision {
            return Ok(());
        }
        let branch = self.branch_name();
        let reply = self.client.ask(&self.api(&format!("/revision/{branch}")))?;
        if reply.is_ok() {
            return Ok(());
        }
        let reply = post(self.client, &self.api(&format!("/branch/{branch}")), &json!({}))?;
        if reply.is_ok() || reply.status == 409 {
            Ok(())
        } else {
            Err(refused(self.name, "to make the branch", &reply))
        }
    }

    fn modes(&self, files: &[&Source]) -> Result<Vec<Mode>> {
        let mut modes = Vec::new();
        for files in files.chunks(ASKED) {
            let of = |file: &&Source| {
                let sample = BASE64.encode(file.head(SAMPLE)?);
                Ok(json!({"path": file.path(), "sample": sample, "size": file.size()}))
            };
            let asked = json!({"files": files.iter().map(of).collect::<Result<Vec<Value>>>()?});
            let reply = post(self.client, &self.api(&format!("/preupload/{}", self.branch_name())), &asked)?;
            if !reply.is_ok() {
                return Err(refused(self.name, "to write files", &reply));
            }
            let told = reply.body["files"].as_array().cloned().unwrap_or_default();
            for file in files {
                let of_file = told.iter().find(|t| t["path"] == file.path());
                let of_file =
                    of_file.ok_or_else(|| Error::run("the hub does not say how it goes up").at(file.path()))?;
                let is_there = of_file["oid"].as_str().map_or(Ok(false), |oid| file.is(oid))?;
                modes.push(match of_file["uploadMode"].as_str() {
                    _ if of_file["shouldIgnore"] == true => Mode::Ignored,
                    _ if is_there => Mode::Same,
                    // Object storage takes no empty file.
                    Some("lfs") if file.size() > 0 => Mode::Object,
                    _ => Mode::Inline,
                });
            }
        }
        Ok(modes)
    }

    fn objects(&self) -> objects::Place {
        objects::Place {
            address: self.address(&format!("/{}.git/info/lfs/objects/batch", self.name.id)),
            branch: Some(self.name.revision.clone()),
            is_moved: true,
        }
    }

    fn commit(&self, files: &[(&Source, Mode)], message: &str) -> std::result::Result<(), Failure> {
        let mut lines = vec![json!({"key": "header", "value": {"summary": message, "description": ""}})];
        for (file, mode) in files {
            lines.push(match mode {
                Mode::Object => json!({"key": "lfsFile", "value":
                    {"path": file.path(), "algo": "sha256", "oid": file.sha256()?, "size": file.size()}}),
                _ => json!({"key": "file", "value":
                    {"path": file.path(), "content": BASE64.encode(file.head(u64::MAX)?), "encoding": "base64"}}),
            });
        }
        let lines: String = lines.iter().map(|line| format!("{line}\n")).collect();
        let address = self.api(&format!("/commit/{}", self.branch_name()));
        let reply = post_bytes(self.client, &address, &[("content-type", "application/x-ndjson")], lines.as_bytes())?;
        match reply.status {
            200..=299 => Ok(()),
            // Somebody else's commit came between.
            409 | 412 => Err(passing(format!("another commit came between ({})", reply.message))),
            _ => Err(refused(self.name, "to make the commit", &reply).into()),
        }
    }

    fn page(&self) -> String {
        let branch = match &self.name.revision {
            main if main == self.name.hub.revision => String::new(),
            other => format!("/tree/{other}"),
        };
        self.address(&format!("/{}{branch}", self.name.id))
    }
}
