//! `dpo-host new`: a plugin crate that builds, passes its tests and loads, for its author to change. The crate `dpo-plugin-api`, of which
//! this program has a copy, is written into it, so that it needs no source tree and stays as it is when it is moved.

use std::path::Path;

use clap::ValueEnum;

use dpo_core::error::{Error, IoContext, Result};

/// What a plugin brings.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Kind {
    /// A model family
    Model,
    /// A dataset format
    Format,
    /// An alignment loss
    Loss,
}

/// A file of a new crate and the text it starts from.
type Template = (&'static str, &'static str);

const SHARED: [Template; 2] = [("Cargo.toml", include_str!("templates/Cargo.toml.txt")), (".gitignore", "target/\n")];

macro_rules! plugin_api {
    ($($file:literal)*) => {
        /// The crate `dpo-plugin-api`, but for its Cargo.toml.
        const PLUGIN_API: &[Template] =
            &[$((concat!("plugin-api/src/", $file), include_str!(concat!("../../../plugin-api/src/", $file)))),*];
    };
}

plugin_api! {
    "abi.rs" "builder.rs" "builder/attention.rs" "builder/columns.rs" "builder/experts.rs" "builder/recurrent.rs" "check.rs" "config_keys.rs" "dataset.rs" "decoder.rs" "dual.rs" "error.rs" "export.rs" "graph.rs" "lib.rs" "loss.rs" "mixer.rs" "mla.rs" "model.rs" "moe.rs" "ops.rs" "ops/expand.rs" "ops/experts.rs" "ops/recurrent.rs" "ops/route.rs" "rope.rs" "testing.rs"
}

impl Kind {
    /// The word in package names.
    fn word(self) -> &'static str {
        match self {
            Kind::Model => "model",
            Kind::Format => "format",
            Kind::Loss => "loss",
        }
    }

    /// The word in [`Registry::rows`].
    fn listed_as(self) -> &'static str {
        if self == Kind::Format { "dataset" } else { self.word() }
    }

    fn templates(self) -> &'static [Template] {
        match self {
            Kind::Model => &[
                ("src/lib.rs", include_str!("templates/model/lib.rs")),
                ("example_config.json", include_str!("templates/model/example_config.json")),
            ],
            Kind::Format => &[("src/lib.rs", include_str!("templates/format/lib.rs"))],
            Kind::Loss => &[("src/lib.rs", include_str!("templates/loss/lib.rs"))],
        }
    }
}

/// Writes a crate into `dir`, which must not be there yet, and prints what to do next.
///
/// # Errors
/// Where the name cannot be a plugin's and a crate's, where another plugin has it, where `dir` is there or
/// cannot be written.
pub fn new(kind: Kind, name: &str, dir: &Path) -> Result<()> {
    check_name(kind, name)?;
    let package = format!("dpo-{}-{name}", kind.word());
    let fill =
        |text: &str| text.replace("@package@", &package).replace("@name@", name).replace("@Name@", &camel_case(name));
    if dir.symlink_metadata().is_ok() {
        return Err(Error::input("is there already").at(dir.display()).help("name another folder with --path"));
    }
    let own = SHARED.iter().chain(kind.templates()).map(|(file, text)| (*file, fill(text)));
    let plugin_api = PLUGIN_API.iter().map(|(file, text)| (*file, (*text).to_owned()));
    for (file, text) in own.chain(plugin_api).chain([("plugin-api/Cargo.toml", plugin_api_manifest())]) {
        let path = dir.join(file);
        let folder = path.parent().unwrap_or(dir);
        std::fs::create_dir_all(folder).writing(folder)?;
        std::fs::write(&path, text).writing(&path)?;
    }
    println!("wrote {}; what to change is said in src/lib.rs. Next:", dir.display());
    println!("  cd {}", dir.display());
    println!("  cargo test && cargo build --release");
    println!("  dpo-host list --plugin-dir target/release");
    Ok(())
}

/// Refuses what would be no name of a crate, or would be refused by the registry.
fn check_name(kind: Kind, name: &str) -> Result<()> {
    let plain = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || "-_".contains(c);
    if !name.starts_with(|c: char| c.is_ascii_lowercase()) || !name.chars().all(plain) {
        return Err(Error::input(format!("'{name}' cannot be the name of a plugin"))
            .help("a lower-case letter, then lower-case letters, digits, '-' and '_'"));
    }
    let registry = crate::discover(&[]);
    match registry.rows.iter().find(|r| r.kind == kind.listed_as() && r.name == name) {
        Some(taken) => Err(Error::input(format!("the {} name '{name}' is taken", kind.word()))
            .help(format!("by {} ({}); choose another", taken.package, taken.origin))),
        None => Ok(()),
    }
}

/// The Cargo.toml of `dpo-plugin-api`, with the workspace's values in place of references to them.
fn plugin_api_manifest() -> String {
    let workspace = include_str!("../../../Cargo.toml");
    let own = include_str!("../../../plugin-api/Cargo.toml").replace("\n[lints]\nworkspace = true\n", "");
    let resolved = |line: &str| {
        let key = line.strip_suffix(".workspace = true");
        let value = key.and_then(|key| workspace.lines().find(|l| l.starts_with(&format!("{key} = "))));
        value.unwrap_or(line).to_owned() + "\n"
    };
    own.lines().map(resolved).collect()
}

/// `my-model` as `MyModel`, the way architectures are written.
fn camel_case(name: &str) -> String {
    let words = name.split(['-', '_']).filter_map(|word| word.split_at_checked(1));
    words.map(|(first, rest)| first.to_uppercase() + rest).collect()
}
