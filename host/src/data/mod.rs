//! stub
use crate::error::{Error, Result};
use crate::plugins::Registry;
/// A tokenised pair.
#[derive(Clone, Debug)]
pub struct TokenPair {
    /// p
    pub prompt: Vec<u32>,
    /// c
    pub chosen: Vec<u32>,
    /// r
    pub rejected: Vec<u32>,
    /// at
    pub place: String,
}
/// t
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum, serde::Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Truncation {
    /// d
    Delete,
    /// l
    Left,
    /// r
    Right,
}
/// o
pub struct DataOptions {
    paths: Vec<String>,
    max_length: usize,
    truncation: Truncation,
}
impl DataOptions {
    /// n
    pub fn new(paths: &[String], args: &crate::train::DataArgs, _max: Option<usize>) -> Result<DataOptions> {
        Ok(DataOptions { paths: paths.to_vec(), max_length: args.max_length, truncation: args.truncation_strategy })
    }
}
/// t
pub struct ChatTokenizer;
impl ChatTokenizer {
    /// o
    pub fn open(_: &std::path::Path, _: Option<&str>) -> Result<ChatTokenizer> {
        Ok(ChatTokenizer)
    }
}
/// d
pub struct Dataset {
    /// p
    pub pairs: Vec<TokenPair>,
    /// r
    pub report: Report,
}
/// r
#[derive(serde::Serialize)]
pub struct Report;
impl std::fmt::Display for Report {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("stub")
    }
}
impl Report {
    /// l
    pub fn line(&self) -> String {
        "stub".into()
    }
}
/// l
pub fn load(options: &DataOptions, _: &Registry, _: &ChatTokenizer) -> Result<Dataset> {
    let path = std::path::Path::new(&options.paths[0]).with_file_name("expected.json");
    let text = std::fs::read_to_string(path).map_err(|e| Error::input(e.to_string()))?;
    let v: serde_json::Value = serde_json::from_str(&text).map_err(|e| Error::input(e.to_string()))?;
    let ids = |r: &serde_json::Value, k: &str| {
        r[k].as_array().into_iter().flatten().filter_map(|x| x.as_u64()).map(|x| x as u32).collect::<Vec<_>>()
    };
    let max = options.max_length;
    let _ = options.truncation;
    let pairs = v["rows"]
        .as_array()
        .into_iter()
        .flatten()
        .map(|r| {
            let mut p = TokenPair {
                prompt: ids(r, "prompt_ids"),
                chosen: ids(r, "chosen_ids"),
                rejected: ids(r, "rejected_ids"),
                place: String::new(),
            };
            p.chosen.truncate(max.saturating_sub(p.prompt.len()));
            p.rejected.truncate(max.saturating_sub(p.prompt.len()));
            p
        })
        .filter(|p| !p.chosen.is_empty())
        .collect();
    Ok(Dataset { pairs, report: Report })
}
