//! `dpo-host push`: an adapter, a merged model or a GGUF file goes to a hub, with a card.
//!
//! What goes up is chosen by name. Of a run's folder that leaves out what is large and of no use to others, and whatever has texts
//! of the rows: they may be nobody's business.

use std::fs;
use std::path::{Path, PathBuf};

use clap::Args;
use serde_json::{Value, json};

use dpo_core::error::{Error, IoContext, Result};
use dpo_core::memory::size;
use dpo_core::weights::{FILES, INDEX, SINGLE, shard_names};
use dpo_core::{console, files};
use dpo_hub::Name;
use dpo_hub::upload::{self, CARD, Content, Source, Terms};
use dpo_page::{ARGS, Card, PICTURE, Weights};

#[derive(Args)]
pub(crate) struct PushOptions {
    /// Repository: owner/name of Hugging Face, ms::owner/name of ModelScope; it is made if it is not there
    #[arg(value_name = "ID")]
    repository: String,
    /// What goes up: the folder of a run, a checkpoint in it, the folder of a merged model, or a GGUF file
    path: PathBuf,
    /// Make the repository one that its owner alone sees
    #[arg(long)]
    private: bool,
    /// Branch; on Hugging Face it is made if it is not there [default: main, on ModelScope master]
    #[arg(long, value_name = "BRANCH")]
    revision: Option<String>,
    /// Message of the commit
    #[arg(long, value_name = "TEXT")]
    commit_message: Option<String>,
    /// The model that was trained, by its name on the hub, for the card and the adapter's config; by default the one that the adapter names
    #[arg(long, value_name = "ID")]
    base_model: Option<String>,
    /// License that the card states, in the hub's words: apache-2.0, mit, llama3.1, other …
    #[arg(long, value_name = "ID")]
    license: Option<String>,
    /// Run that a merged model or a GGUF file came of, whose settings and curves the card shows
    #[arg(long, value_name = "DIR")]
    run: Option<PathBuf>,
    /// Send report.html as well, which has texts of the rows
    #[arg(long)]
    include_report: bool,
    /// Write over a card in the repository that somebody else wrote or changed
    #[arg(long)]
    overwrite_card: bool,
    /// Say what would be sent, print the card, and send nothing
    #[arg(long)]
    dry_run: bool,
}

const ADAPTER: &str = "adapter_model.safetensors";
const CONFIG: &str = "adapter_config.json";
const REPORT: &str = "report.html";
/// Files beside an adapter that are a whole model's.
const OF_MODELS: [&str; 2] = ["config.json", "generation_config.json"];

/// What of a path goes up.
struct Chosen {
    weights: Weights,
    folder: PathBuf,
    names: Vec<String>,
    left_out: Vec<String>,
}

pub(crate) fn push(options: &PushOptions) -> Result<()> {
    let name = repository(options)?;
    let mut chosen = choose(&options.path, options.include_report)?;
    let base = base(options, &name, &chosen)?;
    if let Some(license) =
        options.license.as_deref().filter(|l| l.contains(|c: char| !c.is_ascii_alphanumeric() && !"-._".contains(c)))
    {
        return Err(Error::input(format!("'{license}' is not a license in the hub's words"))
            .at("--license")
            .help("apache-2.0, mit, other …"));
    }
    let of = |name: &String| Source::new(name.as_str(), Content::File(chosen.folder.join(name)));
    let mut card = Vec::new();
    if let Some(own) = chosen.names.iter().position(|name| name == CARD) {
        console::note("README.md of the folder is the card");
        card.push(of(&chosen.names.remove(own))?);
    } else {
        let (text, picture) = written(options, &name, &chosen, base.as_ref())?;
        card.push(Source::new(CARD, Content::Text(upload::signed_card(&text).into_bytes()))?);
        if let Some(picture) = picture {
            card.push(Source::new(PICTURE, Content::Text(picture.into_bytes()))?);
        }
        if options.dry_run {
            print!("{text}");
        }
    }
    let mut sources = chosen.names.iter().filter(|name| *name != CONFIG).map(of).collect::<Result<Vec<Source>>>()?;
    if let Weights::Adapter { .. } = chosen.weights {
        sources.push(Source::new(CONFIG, config(&chosen.folder, base.as_ref())?)?);
    }
    for file in sources.iter().chain(&card) {
        console::line(format!("file        {}, {}", file.path(), size(file.size() as usize)));
    }
    if !chosen.left_out.is_empty() {
        console::line(format!("left out    {}", chosen.left_out.join(", ")));
    }
    let bytes: u64 = sources.iter().chain(&card).map(Source::size).sum();
    let count = sources.len() + card.len();
    if options.dry_run {
        console::result(format!(
            "dry run     {count} files, {} for {}; nothing is sent",
            size(bytes as usize),
            name.id()
        ));
        return Ok(());
    }
    let what = if matches!(chosen.weights, Weights::Adapter { .. }) { "adapter" } else { "model" };
    let message = options.commit_message.clone().filter(|m| !m.trim().is_empty());
    let terms = Terms {
        private: options.private,
        message: message.unwrap_or_else(|| format!("Upload {what} with dpo-host")),
        license: options.license.clone(),
        overwrite_card: options.overwrite_card,
    };
    let pushed = upload::push(&name, &sources, &card, &terms)?;
    console::result(match pushed.files {
        0 => format!("pushed      nothing: all is there already, {}", pushed.page),
        files => format!("pushed      {files} files: {}", pushed.page),
    });
    Ok(())
}

/// The repository that is meant.
fn repository(options: &PushOptions) -> Result<Name> {
    let text = &options.repository;
    let help =
        "a repository is owner/name of Hugging Face, or ms::owner/name of ModelScope; what goes up is named behind it";
    let wrong = || Error::input(format!("'{text}' is not the name of a repository")).help(help);
    if Path::new(text).is_dir() && !options.path.exists() {
        return Err(Error::input("is a folder, and the repository stands first").at(text).help(help));
    }
    let named = match &options.revision {
        Some(branch) if text.contains('@') && !text.ends_with(&format!("@{branch}")) => {
            return Err(Error::input(format!("{text} names another branch")).at(format!("--revision {branch}")));
        }
        Some(branch) if !text.contains('@') => Name::parse(&format!("{text}@{branch}")),
        _ => Name::parse(text),
    };
    let name = named.ok_or_else(wrong)?;
    let kind = name.id().split('/').next().filter(|owner| ["datasets", "spaces", "models"].contains(owner));
    match (kind, name.is_inside()) {
        (Some("datasets" | "spaces"), _) => Err(wrong().help("a model's repository alone is pushed to")),
        (Some(_), _) | (_, true) => Err(wrong()),
        _ => Ok(name),
    }
}

/// What of a path goes up.
fn choose(path: &Path, with_report: bool) -> Result<Chosen> {
    let file = path.file_name().map(|n| n.to_string_lossy().into_owned()).unwrap_or_default();
    if path.is_file() {
        if !file.ends_with(".gguf") {
            return Err(Error::input("is neither a folder nor a GGUF file").at(path.display()).help(WHAT));
        }
        let folder = path.parent().map(Path::to_owned).unwrap_or_default();
        return Ok(Chosen { weights: Weights::Gguf, folder, names: vec![file], left_out: Vec::new() });
    }
    let entries = fs::read_dir(path).reading(path)?.flatten();
    let mut all: Vec<String> = entries.filter_map(|e| e.file_name().into_string().ok()).collect();
    all.sort();
    let has = |name: &str| all.iter().any(|n| n == name) && path.join(name).is_file();
    let is_gguf = |name: &str| name.ends_with(".gguf");
    let weights = match () {
        () if has(CONFIG) && has(ADAPTER) => of_adapter(path)?,
        () if all.iter().any(|n| is_gguf(n)) => Weights::Gguf,
        () if has("config.json") && (has(SINGLE) || has(INDEX)) => Weights::Checkpoint,
        () => return Err(nothing(path, &all)),
    };
    let shards = match weights {
        Weights::Checkpoint if has(SINGLE) => vec![SINGLE.to_owned()],
        Weights::Checkpoint => shard_names(&path.join(INDEX))?.into_iter().chain([INDEX.to_owned()]).collect(),
        _ => Vec::new(),
    };
    let goes = |name: &str| match weights {
        _ if name == CARD => true,
        _ if name == REPORT => with_report,
        Weights::Adapter { .. } => {
            [CONFIG, ADAPTER].contains(&name) || (FILES.contains(&name) && !OF_MODELS.contains(&name))
        }
        Weights::Checkpoint => FILES.contains(&name) || shards.iter().any(|shard| shard == name),
        Weights::Gguf => is_gguf(name) || name == "Modelfile",
    };
    if let Some(shard) = shards.iter().find(|shard| !path.join(shard).is_file()) {
        return Err(Error::input(format!("{INDEX} names {shard}, which is not there")).at(path.display()));
    }
    let (names, left_out) = all.into_iter().partition(|name| path.join(name).is_file() && goes(name));
    let left_out: Vec<String> = left_out;
    // What is hidden was not meant to be seen in the first place.
    let left_out = left_out.into_iter().filter(|name| !name.starts_with('.')).collect();
    Ok(Chosen { weights, folder: path.to_owned(), names, left_out })
}

const WHAT: &str = "a folder with adapter_model.safetensors (a run, or a checkpoint in it), with a model's safetensors, or with a GGUF file";

/// Why nothing of a folder goes up.
fn nothing(path: &Path, all: &[String]) -> Error {
    let checkpoint = |name: &&String| name.strip_prefix("checkpoint-")?.parse::<u64>().ok();
    match all.iter().filter_map(|name| Some((checkpoint(&name)?, name))).max() {
        Some((_, last)) => Error::input("has no adapter: its run has not come to its end")
            .at(path.display())
            .help(format!("push its last checkpoint: {}", path.join(last).display())),
        None => Error::input("has nothing that could be pushed").at(path.display()).help(WHAT),
    }
}

/// What an adapter's config says of it.
fn of_adapter(folder: &Path) -> Result<Weights> {
    let config = read(&folder.join(CONFIG))?;
    let patterns = config["rank_pattern"].as_object().into_iter().flatten().filter_map(|(_, rank)| rank.as_u64());
    let rank = patterns.chain(config["r"].as_u64()).max().unwrap_or(8);
    let on_experts = config["target_parameters"].as_array().is_some_and(|names| !names.is_empty());
    Ok(Weights::Adapter { rank, on_experts })
}

fn read(path: &Path) -> Result<Value> {
    let text = files::read_text(path)?;
    serde_json::from_str(&text).map_err(|e| Error::input(e.to_string()).at(path.display()))
}

/// The model that was trained, by its name on the hub that it is pushed to.
fn base(options: &PushOptions, to: &Name, chosen: &Chosen) -> Result<Option<Name>> {
    let on_hub = |text: &str| Name::parse(text).filter(|name| name.prefix() == to.prefix() && !name.is_inside());
    if let Some(given) = &options.base_model {
        // Without a prefix it is one of the hub that it is pushed to.
        let text = if given.contains("::") { given.clone() } else { format!("{}::{given}", to.prefix()) };
        let help = "it is owner/name, of the hub that is pushed to";
        return on_hub(&text).map(Some).ok_or_else(|| {
            Error::input(format!("'{given}' is not the name of a model there")).at("--base-model").help(help)
        });
    }
    let named = match chosen.weights {
        Weights::Adapter { .. } => dpo_core::lora::base_model(&chosen.folder)?,
        _ => None,
    };
    let known = named.as_deref().and_then(|named| {
        let is_path = named.starts_with(['/', '.', '~']) || Path::new(named).is_dir();
        if is_path { cached(named).and_then(|id| on_hub(&id)) } else { on_hub(named) }
    });
    if known.is_none() {
        let what = match named {
            Some(_) => "the adapter names its model by a path or another hub: card and config leave it out",
            None => "the card does not say of which model this came",
        };
        console::warning(console::Remark::from(what).help("--base-model owner/name says which model it is on the hub"));
    }
    Ok(known)
}

/// The name of a model whose folder is in Hugging Face's cache: `models--owner--name/snapshots/commit`.
fn cached(path: &str) -> Option<String> {
    let parts: Vec<&str> = path.split('/').collect();
    let at = parts.iter().position(|part| *part == "snapshots")?.checked_sub(1)?;
    let (owner, own) = parts[at].strip_prefix("models--")?.split_once("--")?;
    Some(format!("hf::{owner}/{own}"))
}

/// The adapter's config as others need it: with the model's name on the hub, and without a path of this machine.
fn config(folder: &Path, base: Option<&Name>) -> Result<Content> {
    let path = folder.join(CONFIG);
    let mut config = read(&path)?;
    let name = base.map_or(Value::Null, |base| json!(base.id()));
    let revision = base.and_then(Name::revision);
    if config["base_model_name_or_path"] == name && revision.is_none() {
        return Ok(Content::File(path));
    }
    config["base_model_name_or_path"] = name;
    if let Some(revision) = revision {
        config["revision"] = json!(revision);
    }
    let text = serde_json::to_vec_pretty(&config).map_err(|e| Error::run(e.to_string()).at(path.display()))?;
    Ok(Content::Text(text))
}

/// The card, and its picture.
fn written(
    options: &PushOptions,
    name: &Name,
    chosen: &Chosen,
    base: Option<&Name>,
) -> Result<(String, Option<String>)> {
    let folder = options.run.as_deref().unwrap_or(&chosen.folder);
    if options.run.is_some() && !folder.join(ARGS).is_file() && run_of(folder).is_none() {
        return Err(Error::input("is not the folder of a run: it has no args.json").at(folder.display()));
    }
    let run = run_of(folder);
    let own = name.id().rsplit('/').next().unwrap_or_default();
    let card = Card {
        id: name.id(),
        weights: chosen.weights,
        base: base.map(|base| (base.id(), base.page_of(base.id()))),
        license: options.license.as_deref(),
        run: run.as_ref().map(|(folder, until)| (folder.as_path(), *until)),
        download: (name.prefix() == "ms").then(|| format!("modelscope download {} --local_dir {own}", name.id())),
        prefix: name.prefix(),
    };
    Ok(card.write())
}

/// The folder of the run that a folder is of, and the step of a checkpoint.
fn run_of(folder: &Path) -> Option<(PathBuf, Option<u64>)> {
    if folder.join(ARGS).is_file() {
        return Some((folder.to_owned(), None));
    }
    let folder = folder.canonicalize().ok()?;
    let step = folder.file_name()?.to_str()?.strip_prefix("checkpoint-")?.parse().ok()?;
    let run = folder.parent()?;
    run.join(ARGS).is_file().then(|| (run.to_owned(), Some(step)))
}
