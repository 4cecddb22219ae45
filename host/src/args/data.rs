//! How rows become examples; shared by `train`, `data` and `eval`.

use clap::{ArgAction, Args, ValueEnum};
use dpo_core::error::Result;
use dpo_data::{DataOptions, Truncation, Wanted, parse_columns};
use serde::Serialize;

use super::{ABOVE_0, Auto, refuse_out_of_range};

/// How rows become examples.
#[derive(Args, Clone, Debug, Serialize)]
#[command(next_help_heading = "Model and data")]
pub(crate) struct DataArgs {
    /// Rows: files or folders of jsonl, json, csv, parquet, or hf::owner/name of Hugging Face, ms::owner/name of ModelScope;
    /// #N takes N of them
    #[arg(long, value_name = "PATH[#N]", num_args = 1..)]
    pub(crate) dataset: Vec<String>,
    /// Format of the rows (see `dpo-host list datasets`) [default: detected from the columns]
    #[arg(long, value_name = "NAME")]
    dataset_format: Option<String>,
    /// Columns to rename before a format reads them, as JSON: '{"old": "new"}' [default: none]
    #[arg(long, value_name = "JSON")]
    columns: Option<String>,
    /// Maximum sequence length: prompt plus one answer, in tokens; auto is what the model is made for
    #[arg(long, value_name = "auto|TOKENS", default_value_t = Auto(Some(2048)))]
    max_length: Auto<usize>,
    /// What to do with longer examples
    #[arg(long, value_enum, default_value_t = TruncationArg::Delete)]
    truncation_strategy: TruncationArg,
    /// System message of conversations that have none [default: none]
    #[arg(long, value_name = "TEXT")]
    system: Option<String>,
    /// Leave prompts and answers that are plain text as they are; otherwise the chat template of a checkpoint that has one makes
    /// a turn of the user and one of the assistant of them
    #[arg(long, value_name = "BOOL", num_args = 0..=1, default_value_t = false, default_missing_value = "true", action = ArgAction::Set)]
    plain_text: bool,
    /// Shuffle the examples in every epoch
    #[arg(long, value_name = "BOOL", default_value_t = true, action = ArgAction::Set)]
    shuffle: bool,
    /// Random seed of the shuffling, of the split and of LoRA's A
    #[arg(long, value_name = "N", default_value_t = 42)]
    pub(crate) seed: u64,
    /// Take at most the first N rows of each dataset [default: all]
    #[arg(long, value_name = "N")]
    max_samples: Option<usize>,
    /// End at the first row that cannot be used, instead of skipping it; a file with broken JSON always ends the command
    #[arg(long, value_name = "BOOL", num_args = 0..=1, default_value_t = false, default_missing_value = "true", action = ArgAction::Set)]
    strict: bool,
}

/// Examples of a step, where none are taken.
const USUAL_BATCH: usize = 16;

/// What happens to an example that is longer than `--max-length`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum, Serialize)]
#[serde(rename_all = "lowercase")]
enum TruncationArg {
    /// Drop it
    Delete,
    /// Cut the beginning of the prompt
    Left,
    /// Cut the end of the answers
    Right,
}

impl DataArgs {
    /// What the data side is asked for, with rows from `paths`, for any model, and what the losses want.
    ///
    /// # Errors
    /// `--columns` that is not a JSON object of names.
    pub(crate) fn options(&self, paths: &[String], wanted: &Wanted) -> Result<DataOptions> {
        let samples = self.max_samples.map(|n| n as f64);
        refuse_out_of_range(&[("--max-samples", samples, ABOVE_0, "leave it out to take all rows")])?;
        let columns = self.columns.as_deref().map(parse_columns).transpose()?.unwrap_or_default();
        Ok(DataOptions {
            paths: paths.to_vec(),
            wanted: wanted.clone(),
            batch_size: USUAL_BATCH,
            format: self.dataset_format.clone(),
            columns,
            max_length: self.max_length.0,
            vocabulary: None,
            truncation: match self.truncation_strategy {
                TruncationArg::Delete => Truncation::Delete,
                TruncationArg::Left => Truncation::Left,
                TruncationArg::Right => Truncation::Right,
            },
            strict: self.strict,
            max_samples: self.max_samples,
            system: self.system.clone(),
            plain_text: self.plain_text,
            shuffle: self.shuffle,
            seed: self.seed,
        })
    }
}
