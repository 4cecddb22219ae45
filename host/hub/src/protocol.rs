//! What hubs are asked and how their answers read, a line of a table each; and what of an answer may become a path.

use serde_json::Value;

use super::hash::Hash;
use super::{Content, Name};
use dpo_core::error::{Error, Result};

/// Of a revision: which commit it is, and its files.
pub(super) struct Listing {
    pub(super) commit: String,
    /// Entries of this page, with folders.
    pub(super) entries: usize,
    pub(super) files: Vec<Remote>,
}

/// A file on a hub.
pub(super) struct Remote {
    pub(super) path: String,
    pub(super) size: Option<u64>,
    pub(super) hash: Option<Hash>,
    /// What a cache may call its content.
    pub(super) blob: String,
}

/// How a cache folder is laid out.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Layout {
    /// Contents under their hashes, and a folder of links a commit.
    Blobs,
    /// Files under their paths, of whatever revision was fetched last.
    Plain,
}

/// A hub and its ways.
#[derive(Debug)]
pub(super) struct Hub {
    /// What stands before `::` in a name.
    pub(super) prefix: &'static str,
    pub(super) title: &'static str,
    /// The revision that is meant when none is named.
    pub(super) revision: &'static str,
    /// What a model's page begins with.
    pub(super) home: &'static str,
    /// The variable with a token.
    pub(super) token: &'static str,
    /// Where a person gets one that may write.
    pub(super) tokens: &'static str,
    /// The cookie that shows a token as well, where some of the hub's requests want it so.
    pub(super) cookie: Option<&'static str>,
    /// Whether other hosts of the hub's domain, to which large files go up, want the token too.
    pub(super) siblings: bool,
    pub(super) layout: Layout,
    pub(super) endpoint: fn() -> String,
    pub(super) secret: fn() -> Option<String>,
    /// The folder of all caches, if one can be told.
    pub(super) cache: fn() -> Option<String>,
    /// Where a list of files is, or a page of it, from 1 on.
    pub(super) listing: fn(&Name, Content, usize) -> String,
    /// Entries of a full page, where there are pages: behind one that is not full there is none.
    pub(super) page: fn(Content) -> Option<usize>,
    /// Where a file of a commit is.
    pub(super) file: fn(&Name, Content, &str, &str) -> String,
    read: fn(&Name, &Value) -> Option<Listing>,
}

/// Entries that ModelScope's own tools ask for at once.
const MODELSCOPE_PAGE: usize = 200;

/// Hubs; a name without a prefix is of the first.
pub(super) const HUBS: &[Hub] = &[
    // huggingface.co/docs/hub/api
    Hub {
        prefix: "hf",
        title: "Hugging Face",
        revision: "main",
        home: "https://huggingface.co/",
        token: "HF_TOKEN",
        tokens: "huggingface.co/settings/tokens; `hf auth login` keeps it",
        cookie: None,
        siblings: false,
        layout: Layout::Blobs,
        endpoint: || variable("HF_ENDPOINT").map_or("https://huggingface.co".into(), trimmed),
        secret: || {
            let file = variable("HF_TOKEN_PATH").or_else(|| Some(hugging_face_home()? + "/token"));
            let saved = || std::fs::read_to_string(file?).ok().map(|t| t.trim().to_owned()).filter(|t| !t.is_empty());
            variable("HF_TOKEN").or_else(|| variable("HUGGING_FACE_HUB_TOKEN")).or_else(saved)
        },
        cache: || variable("HF_HUB_CACHE").or_else(|| Some(hugging_face_home()? + "/hub")),
        page: |_| None,
        listing: |name, content, _| {
            let kind = if content == Content::Dataset { "datasets" } else { "models" };
            format!("/api/{kind}/{}/revision/{}?blobs=true", name.id, escaped(&name.revision, ""))
        },
        file: |name, content, commit, path| {
            let kind = if content == Content::Dataset { "/datasets" } else { "" };
            format!("{kind}/{}/resolve/{commit}/{}", name.id, escaped(path, "/"))
        },
        read: |_, reply| {
            let file = |f: &Value| {
                // Hugging Face's own tools name a blob by the ETag, which is this.
                let (hash, blob) = match (f.pointer("/lfs/sha256"), f.get("blobId")) {
                    (Some(Value::String(sha256)), _) => (Some(Hash::Sha256(sha256.clone())), sha256.clone()),
                    (_, Some(Value::String(id))) => (Hash::of_git(id), id.clone()),
                    _ => return None,
                };
                let path = f.get("rfilename")?.as_str()?.to_owned();
                Some(Remote { path, size: f.get("size").and_then(Value::as_u64), hash, blob })
            };
            let files = reply.get("siblings")?.as_array()?.iter().map(file).collect::<Option<Vec<_>>>()?;
            Some(Listing { commit: reply.get("sha")?.as_str()?.to_owned(), entries: files.len(), files })
        },
    },
    // modelscope/hub/api.py
    Hub {
        prefix: "ms",
        title: "ModelScope",
        revision: "master",
        home: "https://modelscope.cn/models/",
        token: "MODELSCOPE_API_TOKEN",
        tokens: "modelscope.cn/my/myaccesstoken; what `modelscope login` keeps is a pickle of Python, which is not read",
        cookie: Some("m_session_id"),
        siblings: true,
        layout: Layout::Plain,
        endpoint: || {
            let domain = variable("MODELSCOPE_DOMAIN").unwrap_or_else(|| "www.modelscope.cn".into());
            variable("MODELSCOPE_ENDPOINT").map_or_else(|| format!("https://{domain}"), trimmed)
        },
        secret: || variable("MODELSCOPE_API_TOKEN"),
        cache: || variable("MODELSCOPE_CACHE").or_else(|| Some(caches()? + "/modelscope/hub")),
        page: |content| (content == Content::Dataset).then_some(MODELSCOPE_PAGE),
        listing: |name, content, page| {
            let (id, revision) = (&name.id, escaped(&name.revision, ""));
            match content {
                Content::Model => format!("/api/v1/models/{id}/repo/files?Revision={revision}&Recursive=true"),
                Content::Dataset => format!(
                    "/api/v1/datasets/{id}/repo/tree?Revision={revision}&Recursive=True&PageNumber={page}&PageSize={MODELSCOPE_PAGE}"
                ),
            }
        },
        file: |name, content, commit, path| {
            let kind = if content == Content::Dataset { "datasets" } else { "models" };
            let (commit, path) = (escaped(commit, ""), escaped(path, ""));
            format!("/api/v1/{kind}/{}/repo?Revision={commit}&FilePath={path}", name.id)
        },
        read: |name, reply| {
            let file = |f: &Value| {
                let sha256 = f.get("Sha256").and_then(Value::as_str).filter(|s| !s.is_empty()).map(str::to_owned);
                let path = f.get("Path")?.as_str()?.to_owned();
                let blob = sha256.clone().unwrap_or_default();
                Some(Remote { path, size: f.get("Size").and_then(Value::as_u64), hash: sha256.map(Hash::Sha256), blob })
            };
            // A page behind the last one has no list.
            let entries = reply.pointer("/Data/Files")?.as_array().map_or(&[][..], Vec::as_slice);
            let files = entries.iter().filter(|f| f["Type"] != "tree").map(file).collect::<Option<_>>()?;
            Some(Listing { commit: name.revision.clone(), entries: entries.len(), files })
        },
    },
];

/// Reads a hub's list of files.
///
/// # Errors
/// A list that reads otherwise, or that names a file beyond the folder it belongs into.
pub(super) fn listing(name: &Name, reply: &Value) -> Result<Listing> {
    let listing = (name.hub.read)(name, reply).ok_or_else(|| {
        let reason =
            reply.get("Message").or_else(|| reply.get("error")).and_then(Value::as_str).unwrap_or("no list of files");
        Error::run(format!("an unknown kind of answer: {reason}"))
    })?;
    let hash = |text: &str| text.bytes().all(|b| b.is_ascii_alphanumeric());
    let path = |text: &str| text.split('/').all(|p| !["", ".", ".."].contains(&p)) && !text.contains(['\\', ':', '\0']);
    let wrong = |what: &str, is: &str| Err(Error::input(format!("{what} {is:?}, which is refused")));
    if !listing.commit.split('/').all(plain) {
        return wrong("the hub names the commit", &listing.commit);
    }
    for file in &listing.files {
        if !path(&file.path) {
            return wrong("the hub lists a file", &file.path);
        }
        if !hash(&file.blob) || (name.hub.layout == Layout::Blobs && file.blob.is_empty()) {
            return wrong("the hub gives a file the hash", &file.blob);
        }
    }
    Ok(listing)
}

/// Whether a part of a name can be one: letters, digits, `-`, `_`, and `.` but at the start.
pub(super) fn plain(part: &str) -> bool {
    let letter = |c: char| c.is_ascii_alphanumeric() || "-_.".contains(c);
    !part.is_empty() && !part.starts_with('.') && part.chars().all(letter)
}

/// A text as a part of an address, with these letters left as they are.
pub(super) fn escaped(text: &str, kept: &str) -> String {
    let as_is = |b: u8| b.is_ascii_alphanumeric() || b"-_.~".contains(&b) || kept.as_bytes().contains(&b);
    text.bytes().map(|b| if as_is(b) { char::from(b).to_string() } else { format!("%{b:02X}") }).collect()
}

/// A variable of the environment that says something.
pub(super) fn variable(name: &str) -> Option<String> {
    std::env::var(name).ok().filter(|v| !v.is_empty())
}

fn trimmed(address: String) -> String {
    address.trim_end_matches('/').to_owned()
}

fn caches() -> Option<String> {
    variable("XDG_CACHE_HOME").or_else(|| Some(variable("HOME")? + "/.cache"))
}

fn hugging_face_home() -> Option<String> {
    variable("HF_HOME").or_else(|| Some(caches()? + "/huggingface"))
}
