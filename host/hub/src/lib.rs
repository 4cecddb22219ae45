//! Models and datasets by name: what a hub has is fetched into the cache folder that the hub's own tools use.
//!
//! The hubs' ways to speak are lines of one table in `protocol.rs`, requests are made in `client.rs`, places on the disk are
//! `cache.rs`'s; `upload/` is the other direction. Nothing that a hub says becomes a path or an address before `protocol.rs` has looked at it.

mod cache;
mod client;
mod config;
mod hash;
pub mod model;
mod protocol;
mod splits;
pub mod upload;

use std::path::{Path, PathBuf};

use cache::Cache;
use client::Client;
pub use client::agent;
use dpo_core::console;
use dpo_core::error::{Error, Kind, Result};
use dpo_core::files::free_space;
use dpo_core::memory::size;
use dpo_core::weights::{FILES, INDEX, SINGLE, shard_names};
use protocol::{Hub, Listing, Remote};
pub use splits::Splits;

/// What of a model is needed, in the order of its size.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Need {
    /// `config.json`.
    Config,
    /// All but the weights.
    Tokenizer,
    /// All but the weights, which could be fetched: there are some, and there is room for them.
    WeightsToCome,
    /// Everything.
    Weights,
}

/// What a name is of.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Content {
    Model,
    Dataset,
}

/// `[hub::]owner/name[/folder][@revision]`.
#[derive(Clone, Debug)]
pub struct Name {
    hub: &'static Hub,
    /// `owner/name`.
    id: String,
    /// The file or folder that is meant; everything if empty.
    inside: String,
    revision: String,
}

impl Name {
    /// Reads a name, which without `hub::` is one of Hugging Face; none if it cannot be one.
    pub fn parse(text: &str) -> Option<Name> {
        let (hub, rest) = match text.split_once("::") {
            Some((prefix, rest)) => (protocol::HUBS.iter().find(|h| h.prefix == prefix)?, rest),
            None => (protocol::HUBS.first()?, text),
        };
        let (path, revision) = rest.split_once('@').unwrap_or((rest, hub.revision));
        let parts: Vec<&str> = path.split('/').collect();
        if parts.len() < 2 || !parts.iter().copied().chain(revision.split('/')).all(protocol::plain) {
            return None;
        }
        let (id, inside) = (parts[..2].join("/"), parts[2..].join("/"));
        Some(Name { hub, id, inside, revision: revision.to_owned() })
    }

    /// `owner/name`.
    pub fn id(&self) -> &str {
        &self.id
    }

    /// What stands before `::` in names of its hub.
    pub fn prefix(&self) -> &'static str {
        self.hub.prefix
    }

    /// The revision, unless it is the one that is meant when none is named.
    pub fn revision(&self) -> Option<&str> {
        Some(self.revision.as_str()).filter(|revision| *revision != self.hub.revision)
    }

    /// The page that everybody finds a model of this hub at.
    pub fn page_of(&self, id: &str) -> String {
        format!("{}{id}", self.hub.home)
    }

    /// Whether a part is meant, which a model has none of.
    pub fn is_inside(&self) -> bool {
        !self.inside.is_empty()
    }

    fn place(&self) -> String {
        format!("{}@{} on {}", self.id, self.revision, self.hub.title)
    }
}

/// The folder of a model, with what is needed of it. Weights and all are fetched where they are not in the cache.
///
/// # Errors
/// A name that the hub does not know or does not give away, a hub that cannot be reached and a cache that lacks something, a
/// file that is not what the hub says.
pub fn model(name: &Name, need: Need) -> Result<PathBuf> {
    let cache = Cache::of(name, Content::Model)?;
    // Weights that are to come are here, or the hub is asked for them.
    let (here, after) = match need {
        Need::WeightsToCome => (Need::Weights, Need::Tokenizer),
        need => (need, need),
    };
    let here = |folder: &Path| lacking(folder, here);
    local_or_fetched(name, &cache, here, || {
        let (client, listing) = listing(name, Content::Model)?;
        let have = |file: &str| listing.files.iter().any(|f| f.path == file);
        if !have("config.json") {
            let what = "is not a model that transformers can read: it has no config.json";
            return Err(Error::input(what).at(name.place()));
        }
        if need == Need::WeightsToCome {
            room_for_weights(name, &cache, &listing)?;
        }
        let beside = if need == Need::Config { &FILES[..1] } else { FILES };
        let fetch = |files: &[&str]| fetch(&client, name, &cache, &listing, |f| files.contains(&f.path.as_str()));
        fetch(beside)?;
        if need == Need::Weights && have(SINGLE) {
            fetch(&[SINGLE])?;
        } else if need == Need::Weights && have(INDEX) {
            fetch(&[INDEX])?;
            let shards = shard_names(&cache.view(&listing.commit).join(INDEX))?;
            fetch(&shards.iter().map(String::as_str).collect::<Vec<_>>())?;
        }
        cache.remember(&name.revision, &listing.commit)?;
        let folder = cache.view(&listing.commit);
        match lacking(&folder, after) {
            missing if missing.is_empty() => Ok(folder),
            missing => Err(Error::input(format!("lacks {}", missing.join(", ")))
                .at(name.place())
                .help("models are read whose tokenizer is a tokenizer.json and whose weights are safetensors")),
        }
    })
}

/// Whether a listing has weights that can be read, and the cache room for those that it lacks.
fn room_for_weights(name: &Name, cache: &Cache, listing: &Listing) -> Result<()> {
    let has = |file: &str| listing.files.iter().any(|f| f.path == file);
    // Which shards an index names is known when it is there; they lie beside it.
    let weights: Vec<&Remote> = match has(SINGLE) {
        true => listing.files.iter().filter(|f| f.path == SINGLE).collect(),
        false => listing.files.iter().filter(|f| f.path.ends_with(".safetensors") && !f.path.contains('/')).collect(),
    };
    if !has(SINGLE) && !has(INDEX) {
        return Err(Error::input("has neither model.safetensors nor model.safetensors.index.json")
            .at(name.place())
            .help("only safetensors checkpoints are read; convert .bin files with transformers' save_pretrained"));
    }
    let absent: u64 = weights.into_iter().filter(|f| !cache.has(f)).filter_map(|f| f.size).sum();
    match free_space(cache.folder()).filter(|free| absent > *free) {
        Some(free) => {
            let (absent, free) = (size(absent as usize), size(free as usize));
            Err(Error::input(format!("its weights take {absent} on the disk, where {free} are free"))
                .at(cache.folder().display())
                .help("make room, or move the cache: HF_HOME for Hugging Face, MODELSCOPE_CACHE for ModelScope"))
        }
        None => Ok(()),
    }
}

/// The data files of a dataset: those of its training split if it has splits, of the first of these kinds that it has.
///
/// # Errors
/// As for [`model`], and a dataset that has no file of a known kind.
pub fn dataset(name: &Name, kinds: &[&str]) -> Result<Vec<PathBuf>> {
    let cache = Cache::of(name, Content::Dataset)?;
    let chosen = |folder: &Path| wanted_rows(cache::files(folder), &name.inside, kinds);
    let lacking =
        |folder: &Path| if chosen(folder).files.is_empty() { vec!["its data files".to_owned()] } else { vec![] };
    let mut splits = Splits::default();
    let folder = local_or_fetched(name, &cache, lacking, || {
        let (client, listing) = listing(name, Content::Dataset)?;
        splits = wanted_rows(listing.files.iter().map(|f| f.path.clone()).collect(), &name.inside, kinds);
        if splits.files.is_empty() {
            let what = format!("has no data file{}", if name.inside.is_empty() { "" } else { " there" });
            let kinds = format!("kinds that are read: {}", kinds.join(", "));
            return Err(Error::input(what).at(format!("{}/{}", name.place(), name.inside)).help(kinds));
        }
        fetch(&client, name, &cache, &listing, |f| splits.files.contains(&f.path))?;
        cache.remember(&name.revision, &listing.commit)?;
        Ok(cache.view(&listing.commit))
    })?;
    let splits = if splits.files.is_empty() { chosen(&folder) } else { splits };
    splits.note_left_out(&name.place());
    Ok(splits.files.into_iter().map(|p| folder.join(p)).collect())
}

/// What is in the cache where nothing can be asked, or need not be; otherwise what `fetched` brings.
fn local_or_fetched<M: std::fmt::Display>(
    name: &Name,
    cache: &Cache,
    lacking: impl Fn(&Path) -> Vec<M>,
    fetched: impl FnOnce() -> Result<PathBuf>,
) -> Result<PathBuf> {
    let local = cache.local(&name.revision);
    let missing = local.as_deref().map(&lacking);
    let whole = local.clone().filter(|_| missing.as_ref().is_some_and(Vec::is_empty));
    if client::offline() {
        let what = match (missing, local) {
            (Some(missing), Some(folder)) => {
                let missing: Vec<String> = missing.iter().map(M::to_string).collect();
                format!("the cache has only a part of it: {} missing in {}", missing.join(", "), folder.display())
            }
            _ => format!("is not in the cache {}", cache.folder().display()),
        };
        let help = "HF_HUB_OFFLINE is set: unset it, or copy the files from a machine that has them";
        return whole.ok_or_else(|| Error::input(what).at(name.place()).help(help));
    }
    // What a commit names never changes; of a model it is known what there has to be.
    if let Some(folder) = whole.clone().filter(|_| cache.is_commit(&name.revision) && !cache.of_datasets()) {
        return Ok(folder);
    }
    match (fetched(), whole) {
        // The hub has no answer, which is not the same as an answer that says no.
        (Err(error), Some(folder)) if error.kind == Kind::Run => {
            console::warning(&error);
            console::warning(format!("what the cache has is used: {}", folder.display()));
            Ok(folder)
        }
        (result, _) => result,
    }
}

/// Whether a model's folder has its weights.
pub fn has_weights(folder: &Path) -> bool {
    lacking(folder, Need::Weights).is_empty()
}

/// Files that a model's folder lacks.
fn lacking(folder: &Path, need: Need) -> Vec<String> {
    let mut missing = Vec::new();
    let mut want = |file: &str| {
        if !folder.join(file).is_file() {
            missing.push(file.to_owned());
        }
    };
    want("config.json");
    if need >= Need::Tokenizer {
        want("tokenizer.json");
    }
    if need == Need::Weights && !folder.join(SINGLE).is_file() {
        match shard_names(&folder.join(INDEX)) {
            Ok(shards) => shards.iter().for_each(|shard| want(shard)),
            Err(_) => want(SINGLE),
        }
    }
    missing
}

/// Of a dataset's files those with rows to train on.
fn wanted_rows(all: Vec<String>, inside: &str, kinds: &[&str]) -> Splits {
    let within =
        |p: &str| inside.is_empty() || p == inside || p.strip_prefix(inside).is_some_and(|r| r.starts_with('/'));
    let about =
        |p: &str| p.rsplit('/').next().is_some_and(|file| file.starts_with("dataset_info") || file.starts_with('.'));
    let within: Vec<String> = all.into_iter().filter(|p| within(p) && !about(p)).collect();
    let of = |kind: &&&str| {
        let ending = format!(".{kind}");
        let mut files: Vec<String> = within.iter().filter(|p| p.to_lowercase().ends_with(&ending)).cloned().collect();
        files.sort();
        files
    };
    let files = kinds.iter().map(|k| of(&k)).find(|files| !files.is_empty()).unwrap_or_default();
    Splits::of(&files)
}

/// Most pages of a list of files.
const MOST_PAGES: usize = 500;

fn listing(name: &Name, content: Content) -> Result<(Client, Listing)> {
    let client = Client::of(name.hub)?;
    let page = |number: usize| {
        let address = format!("{}{}", (name.hub.endpoint)(), (name.hub.listing)(name, content, number));
        let reply = client.json(&address).map_err(|e| e.at(name.place()))?;
        protocol::listing(name, &reply).map_err(|e| e.at(name.place()))
    };
    let mut listing = page(1)?;
    if let Some(full) = (name.hub.page)(content) {
        for number in 2.. {
            if listing.entries < full {
                break;
            }
            if number > MOST_PAGES {
                return Err(Error::input(format!("has more than {} files", MOST_PAGES * full))
                    .at(name.place())
                    .help("fetch it with the hub's own tools, and name the folder"));
            }
            let more = page(number)?;
            listing.entries = more.entries;
            listing.files.extend(more.files);
        }
    }
    Ok((client, listing))
}

/// Fetches those files that are wanted and not there.
fn fetch(
    client: &Client,
    name: &Name,
    cache: &Cache,
    listing: &Listing,
    wanted: impl Fn(&Remote) -> bool,
) -> Result<()> {
    let wanted: Vec<&Remote> = listing.files.iter().filter(|f| wanted(f)).collect();
    let absent = wanted.iter().filter(|f| !cache.has(f));
    let (count, bytes) = absent.fold((0, 0), |(n, bytes), f| (n + 1, bytes + f.size.unwrap_or(0)));
    if count > 0 {
        let (what, place) = (size(bytes as usize), cache.folder().display().to_string());
        console::line(format!("fetching    {}: {count} files, {what}, into {place}", name.place()));
    }
    let content = if cache.of_datasets() { Content::Dataset } else { Content::Model };
    for file in wanted {
        // Of many processes one fetches, the others wait for it here.
        let _lock = cache.lock(file)?;
        if !cache.has(file) {
            let address = (name.hub.file)(name, content, &listing.commit, &file.path);
            let address = format!("{}{address}", (name.hub.endpoint)());
            client
                .download(&address, file, &cache.place(file))
                .map_err(|e| e.at(format!("{} of {}", file.path, name.id)))?;
        }
        cache.show(file, &listing.commit)?;
    }
    Ok(())
}
