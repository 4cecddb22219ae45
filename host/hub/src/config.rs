//! What a user is told of the keys of a `config.json` that a family did not read, which [`dpo_plugin_api::config_keys`] judges; and
//! quantised checkpoints.

use std::path::Path;

use dpo_core::console::{self, Remark};
use dpo_core::error::{Error, Result};
use dpo_core::quantized::Method;
use dpo_plugin_api::config_keys::{Unread, UnreadKey};
use serde_json::{Map, Value};

/// What should be told of a config, if anything.
#[derive(Debug, Default)]
pub struct Remarks {
    /// Which keys the user says change nothing.
    taken: Option<Remark>,
    /// Which keys nobody knows.
    unknown: Option<Remark>,
}

impl Remarks {
    /// Tells it.
    pub fn tell(&self) {
        self.taken.iter().cloned().for_each(console::note);
        self.unknown.iter().cloned().for_each(console::warning);
    }
}

/// Judges the keys that a family did not read. The user's word, `ignored`, stands against what would be refused or told. What should
/// be told comes back.
///
/// # Errors
/// Keys that may change what the model computes.
pub(super) fn judge(
    (config, unread): (&Map<String, Value>, &[String]),
    (family, claims): (&str, &[String]),
    ignored: &[String],
) -> Result<Remarks> {
    let mut judged = Unread::of(config, unread, claims);
    let is_ignored = |key: &mut UnreadKey| ignored.contains(&key.path);
    let mut taken: Vec<UnreadKey> = judged.refused.extract_if(.., is_ignored).collect();
    taken.extend(judged.unknown.extract_if(.., is_ignored));
    taken.sort_by(|a, b| a.path.cmp(&b.path));
    judged.refuse(family).map_err(|e| {
        let flags: Vec<String> = judged.refused.iter().map(|key| format!("--ignore-config-key {}", key.path)).collect();
        let help = e.help.unwrap_or_default();
        Error::input(e.message).help(format!("{help}; where you know that it changes nothing: {}", flags.join(" ")))
    })?;
    let told = format!("config.json: left out of account, as --ignore-config-key says: {}", UnreadKey::list(&taken));
    Ok(Remarks {
        taken: (!taken.is_empty()).then(|| Remark::from(told)),
        unknown: judged.warning(family).map(|text| {
            Remark::from(text).help(
                "if one of them changes what the model computes, results are wrong; --ignore-config-key NAME says that it does not",
            )
        }),
    })
}

/// How a checkpoint's weights are quantised. One that is in a way that is not read is refused with the name of the one that it was made
/// from, as far as its own tells.
pub(super) fn method_of(
    config: &Map<String, Value>,
    folder: Option<&Path>,
    ignored: &[String],
) -> Result<Option<Method>> {
    let stated = config.get("_name_or_path").and_then(Value::as_str);
    Method::of(config, ignored).map_err(|e| {
        let names = folder.and_then(name_of).into_iter().chain(stated.map(str::to_owned));
        e.help(match names.filter_map(|name| unquantised(&name)).next() {
            Some(name) => format!("take the model that it was made from, in bf16: {name}, by its name"),
            None => "take the model that it was made from, in bf16".to_owned(),
        })
    })
}

/// What a model's folder says of its name: `owner/name` in the caches of hubs, else its own name.
fn name_of(folder: &Path) -> Option<String> {
    let parts = || folder.components().rev().filter_map(|part| part.as_os_str().to_str());
    let cached = parts().find_map(|part| part.strip_prefix("models--")).map(|name| name.replacen("--", "/", 1));
    cached.or_else(|| parts().next().map(|name| name.replace("___", ".")))
}

/// Ends of the names of quantised models.
const QUANTISED_NAMES: &[&str] = &[
    "-unsloth-bnb-4bit",
    "-bnb-4bit",
    "-bnb-8bit",
    "-awq",
    "-gptq",
    "-int4",
    "-int8",
    "-4bit",
    "-8bit",
    "-fp8",
    "-fp8-dynamic",
    "-fp8-block",
    "-nvfp4",
    "-mxfp4",
    "-w4a16",
    "-w8a8",
    "-w8a16",
    "-quantized.w4a16",
    "-quantized.w8a8",
    "-quantized.w8a16",
    "-hqq",
    "-aqlm",
];

/// A name without the ends that quantised models have; none if it has none of them.
fn unquantised(name: &str) -> Option<String> {
    let cut = |name: &str| {
        let lower = name.to_lowercase();
        let end = QUANTISED_NAMES.iter().filter(|end| lower.ends_with(*end)).max_by_key(|end| end.len())?;
        name.get(..name.len() - end.len()).map(str::to_owned)
    };
    let mut short = cut(name)?;
    while let Some(shorter) = cut(&short) {
        short = shorter;
    }
    Some(short)
}
