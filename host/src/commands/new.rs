//! `dpo-host new`: a plugin crate that builds, passes its tests and loads, for its author to change.

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
    let fill = |text: &str| {
        text.replace("@package@", &package)
            .replace("@plugin_api@", &plugin_api())
            .replace("@name@", name)
            .replace("@Name@", &camel_case(name))
    };
    if dir.symlink_metadata().is_ok() {
        return Err(Error::input("is there already").at(dir.display()).help("name another folder with --path"));
    }
    for (file, text) in SHARED.iter().chain(kind.templates()) {
        let path = dir.join(file);
        let folder = path.parent().unwrap_or(dir);
        std::fs::create_dir_all(folder).writing(folder)?;
        std::fs::write(&path, fill(text)).writing(&path)?;
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

/// How the crate depends on `dpo-plugin-api`: on the sources this binary was built from while they are there, so that
/// it builds offline and against the same version; else on the published crate.
fn plugin_api() -> String {
    let sources = Path::new(env!("CARGO_MANIFEST_DIR")).join("../plugin-api");
    match sources.canonicalize() {
        Ok(path) if path.join("Cargo.toml").is_file() => {
            format!("{{ path = {} }}", toml::Value::from(path.to_string_lossy().into_owned()))
        }
        _ => "\"1\"".into(),
    }
}

/// `my-model` as `MyModel`, the way architectures are written.
fn camel_case(name: &str) -> String {
    let words = name.split(['-', '_']).filter_map(|word| word.split_at_checked(1));
    words.map(|(first, rest)| first.to_uppercase() + rest).collect()
}
