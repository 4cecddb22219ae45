//! Rows become examples, some thousand at a time: converted, shaped, tokenised, cut to length, counted and written, so that memory
//! does not grow with their number.

use std::collections::HashMap;
use std::path::{Path, PathBuf};

use dpo_plugin_api::dataset::{Record, RecordAnswer, Row, Text};
use dpo_plugin_api::loss::Answers;
use indicatif::ProgressBar;
use rayon::prelude::*;
use serde_json::Value;

use super::chat::ChatTemplate;
use super::columns::{advice, first_columns, note_choices, refuse_lost};
use super::examples::{Examples, Writer};
use super::read::SourceRow;
use super::report::{FileReport, Measure, Report};
use super::shape::{Item, Shaped, add_system, join, refuse, shape};
use super::tokens::{ChatTokenizer, Encoded, MadeTurns};
use super::{DataOptions, Dataset};
use dpo_core::console;
use dpo_core::error::{Error, Kind, Result};
use dpo_core::example::{Answer, Example};
use dpo_core::graph::refuse_foreign_tokens;
use dpo_plugins::{Format, Registry};

/// Rows that are shown to the formats to find out which one it is.
const DETECTION_ROWS: usize = 20;
/// Single answers that are joined and tokenised at once.
const AT_ONCE: usize = 8192;

/// Rows on their way to a data set.
pub(super) struct Pipeline<'a> {
    options: &'a DataOptions,
    registry: &'a Registry,
    tokenizer: &'a ChatTokenizer,
    report: Report,
    measure: Measure,
    writer: Writer,
    /// The file that is read, and its format.
    file: Option<(PathBuf, &'a Format)>,
    /// Single answers of which pairs are made at the end.
    single: Vec<Item>,
    /// The last examples, up to as many as a step has, where answers to other prompts are wanted.
    step: Vec<Example>,
    /// The answer of the example before them.
    before: Option<Vec<u32>>,
    /// How often which token ends an answer.
    endings: HashMap<u32, usize>,
    bar: ProgressBar,
}

impl<'a> Pipeline<'a> {
    /// Without rows.
    pub(super) fn new(options: &'a DataOptions, registry: &'a Registry, tokenizer: &'a ChatTokenizer) -> Pipeline<'a> {
        let template = tokenizer.template();
        let report = Report {
            noun: options.wanted.noun().to_owned(),
            max_length: options.most_tokens(),
            truncation: options.truncation,
            template: template.map(|t| t.origin.clone()),
            template_is_borrowed: template.is_some_and(ChatTemplate::is_borrowed),
            template_reads_clock: template.is_some_and(|t| t.reads_clock),
            ..Report::default()
        };
        Pipeline {
            options,
            registry,
            tokenizer,
            report,
            measure: Measure::new(tokenizer.bos_id()),
            writer: Writer::default(),
            file: None,
            single: Vec::new(),
            step: Vec::new(),
            before: None,
            endings: HashMap::new(),
            bar: console::bar(0, "tokenising  {pos} rows, {per_sec}"),
        }
    }

    /// Takes the next rows of a file.
    ///
    /// # Errors
    /// Rows of no known format, broken JSON, examples with another number of answers than is wanted, under `strict` the first row
    /// that makes no example by its own fault.
    pub(super) fn rows(&mut self, path: &Path, rows: Vec<SourceRow>) -> Result<()> {
        let format = match &self.file {
            Some((of, format)) if of == path => *format,
            _ => self.begin(path, &rows)?,
        };
        // Behind broken JSON nothing in the file can be trusted, so it is no matter of one row.
        if let Some(error) = rows.iter().find_map(|r| r.row.as_ref().err()) {
            return Err(error.clone());
        }
        let file = self.report.files.len() - 1;
        self.report.files[file].rows += rows.len();
        let mut items = Vec::with_capacity(rows.len());
        for Converted { place, implicit, records } in convert(format, rows) {
            match records {
                Ok(mut records) => {
                    if !implicit && !self.options.plain_text {
                        records.iter_mut().for_each(|record| self.make_turns(record));
                    }
                    items.extend(records.into_iter().map(|record| Item { record, file, place: place.clone() }));
                }
                Err(error) => refuse(&mut self.report, error, &place, self.options.strict)?,
            }
        }
        if let Some(system) = &self.options.system {
            items.iter_mut().try_for_each(|item| add_system(item, system))?;
        }
        let Shaped { whole, single } = shape(items, self.options, &mut self.report)?;
        self.single.extend(single);
        self.tokenise(whole)
    }

    fn begin(&mut self, path: &Path, rows: &[SourceRow]) -> Result<&'a Format> {
        let format = choose(self.options, self.registry, path, rows)?;
        note_choices(path, rows);
        let (name, of) = (path.display().to_string(), format.name.clone());
        self.report.files.push(FileReport { path: name, format: of, rows: 0, examples: 0 });
        self.file = Some((path.to_owned(), format));
        Ok(format)
    }

    fn make_turns(&mut self, record: &mut Record) {
        match self.tokenizer.make_turns(record) {
            MadeTurns::Made => self.report.templated += 1,
            MadeTurns::RenderedBefore => self.report.rendered_before += 1,
            MadeTurns::Not => {}
        }
    }

    fn tokenise(&mut self, items: Vec<Item>) -> Result<()> {
        let conversations = items.iter().any(|item| matches!(item.record.prompt, Text::Messages(_)));
        if conversations {
            // Without a template every row would fail for the same reason.
            self.tokenizer.need_template()?;
        }
        self.report.plain_examples += items.iter().filter(|item| matches!(item.record.prompt, Text::Plain(_))).count();
        let (bar, tokenizer) = (&self.bar, self.tokenizer);
        let encode = |item: &Item| {
            bar.inc(1);
            dpo_core::progress::advance();
            match tokenizer.encode_record(&item.record) {
                // What did not come to an end may only have been slow, so it is no matter of one row.
                Err(error) if error.kind == Kind::Run => Err(error.at(&item.place)),
                made => Ok(made),
            }
        };
        let encoded = items.par_iter().map(encode).collect::<Result<Vec<Result<Encoded>>>>()?;
        items.into_iter().zip(encoded).try_for_each(|(item, encoded)| self.take(item, encoded))
    }

    /// Takes an example that can be learned, cut to length; counts another.
    fn take(&mut self, item: Item, encoded: Result<Encoded>) -> Result<()> {
        let (options, tokenizer) = (self.options, self.tokenizer);
        let Item { record, file, place } = item;
        let made = encoded.and_then(|Encoded { prompt, answers, lost }| {
            let answer = |(ids, of): (Vec<u32>, &RecordAnswer)| Answer { ids, label: of.label, detached: of.detached };
            let answers = answers.into_iter().zip(&record.answers).map(answer).collect();
            Ok((Example::new(prompt, answers, place.as_str())?, lost))
        });
        let (mut example, lost) = match made {
            Ok(made) => made,
            Err(error) => return refuse(&mut self.report, error, &place, options.strict),
        };
        if options.wanted.answers == Answers::One {
            example.keep_best();
        }
        if alike(&example) {
            let which = if example.learned().len() == 2 { "both" } else { "all" };
            let same = Error::input(format!("{which} answers are the same")).help("such an example teaches nothing");
            return refuse(&mut self.report, same, &place, options.strict);
        }
        let ends: Vec<Option<u32>> = example.learned().iter().map(|a| tokenizer.ending(&a.ids)).collect();
        let report = &mut self.report;
        match options.truncation.apply(&mut example, options.most_tokens()) {
            Err(cause) => {
                report.drop(&Error::input(cause), &place);
                return Ok(());
            }
            Ok(cut) => {
                report.truncated += usize::from(cut);
                // Kept, as TRL keeps them, so that steps are made of the same examples.
                report.cut_alike += usize::from(alike(&example));
            }
        }
        // No row's fault, but of a tokenizer that is not the model's.
        refuse_foreign_tokens(example.parts().flatten(), options.vocabulary.unwrap_or(usize::MAX))
            .map_err(|e| e.at(&place))?;
        for end in ends {
            report.eos.answers += 1;
            match end {
                Some(id) => *self.endings.entry(id).or_default() += 1,
                None => {
                    report.eos.without += 1;
                    report.eos.first.get_or_insert_with(|| place.clone());
                }
            }
        }
        if !lost.is_empty() {
            report.prompt_prefix.rows += 1;
            report.prompt_prefix.first.get_or_insert_with(|| place.clone());
            report.prompt_prefix.text.get_or_insert_with(|| tokenizer.decode(&lost, true));
        }
        report.files[file].examples += 1;
        if options.wanted.prompt {
            example = example.with_prompt_scored();
        }
        if !options.wanted.mismatched {
            return self.keep(&example);
        }
        self.step.push(example);
        if self.step.len() == options.batch_size.max(2) { self.keep_step() } else { Ok(()) }
    }

    fn keep(&mut self, example: &Example) -> Result<()> {
        self.measure.add(example);
        self.writer.push(example)
    }

    /// Gives every example of a step, detached, the answer of the one before it in the step, and the first of them that of the last, as
    /// TRL's `KTOTrainer` does; where the last step has one example alone, the answer of the one before it.
    fn keep_step(&mut self) -> Result<()> {
        let step = std::mem::take(&mut self.step);
        let Some(last) = step.last().map(|e| e.answers()[0].ids.clone()) else { return Ok(()) };
        let first = if step.len() > 1 { Some(last.clone()) } else { self.before.take() };
        let Some(mut other) = first else {
            let what = format!("'{}' needs two examples and more", self.options.wanted.loss);
            return Err(Error::input(what).at(&step[0].place));
        };
        for example in step {
            let own = example.answers()[0].ids.clone();
            other.truncate(self.options.most_tokens().saturating_sub(example.prompt().len()).max(1));
            self.keep(&example.with_detached(other)?)?;
            other = own;
        }
        self.before = Some(last);
        Ok(())
    }

    /// The data set, once all rows are there; it is kept in the cache under a name, where there is one.
    ///
    /// # Errors
    /// No example at all; a full disk.
    pub(super) fn finish(mut self, name: Option<&str>) -> Result<Dataset> {
        let single = std::mem::take(&mut self.single);
        let mut joined = join(&single, &mut self.report, self.options.strict)?;
        drop(single);
        while !joined.is_empty() {
            let rest = joined.split_off(joined.len().min(AT_ONCE));
            self.tokenise(std::mem::replace(&mut joined, rest))?;
        }
        self.keep_step()?;
        self.bar.finish_and_clear();
        let Pipeline { mut report, measure, writer, endings, tokenizer, options, .. } = self;
        if let Some((id, _)) = endings.into_iter().max_by_key(|(id, count)| (*count, std::cmp::Reverse(*id))) {
            report.eos.token = tokenizer.token(id);
            report.eos.stops = tokenizer.eos_ids().contains(&id);
        }
        measure.report(&mut report, options.wanted.answers == Answers::Labelled, tokenizer);
        if writer.is_empty() {
            return Err(no_examples(&report));
        }
        let examples: Examples = writer.finish(&report, name)?;
        Ok(Dataset { examples, report })
    }
}

/// The named format, or the one that is surest of the first rows.
pub(super) fn choose<'a>(
    options: &DataOptions,
    registry: &'a Registry,
    path: &Path,
    rows: &[SourceRow],
) -> Result<&'a Format> {
    if let Some(name) = &options.format {
        return registry.format(name).map_err(|e| e.at("--dataset-format"));
    }
    let first: Vec<&Row> = rows.iter().filter_map(|r| r.row.as_ref().ok()).take(DETECTION_ROWS).collect();
    if first.is_empty()
        && let Some(Err(error)) = rows.first().map(|r| &r.row)
    {
        return Err(error.clone());
    }
    // A format that fails here is as good as one that says no.
    let sure = |format: &Format| first.iter().map(|row| u32::from(format.recognises(row).unwrap_or(0))).sum::<u32>();
    let best = registry.formats.iter().map(|f| (sure(f), f)).rev().max_by_key(|(sure, _)| *sure);
    match best.filter(|(sure, _)| *sure > 0) {
        Some((_, format)) => Ok(format),
        None => {
            let columns = first_columns(rows);
            let error =
                Error::input(format!("rows of no known dataset format; their columns are {}", columns.join(", ")));
            Err(error.at(path.display()).help(advice(rows, registry)))
        }
    }
}

/// What a row became.
struct Converted {
    place: String,
    /// Whether its prompt is what two texts begin with, and so no question.
    implicit: bool,
    records: Result<Vec<Record>>,
}

/// Records of every row, in order.
fn convert(format: &Format, rows: Vec<SourceRow>) -> Vec<Converted> {
    let records = |row: &Row| {
        let records = format.records(row)?;
        if records.is_empty() {
            return Err(Error::input(format!("the format '{}' makes nothing of it", format.name)));
        }
        refuse_lost(&format.name, row, &records, |other| format.records(other))?;
        Ok(records)
    };
    let of = |SourceRow { row, place }: SourceRow| {
        let texts = |row: &Row| ["chosen", "rejected"].iter().all(|name| row.get(*name).is_some_and(Value::is_string));
        let implicit = row.as_ref().is_ok_and(|row| texts(row) && !row.contains_key("prompt"));
        Converted { place, implicit, records: row.and_then(|row| records(&row)) }
    };
    rows.into_par_iter().map(of).collect()
}

/// Why there is nothing to train on.
fn no_examples(report: &Report) -> Error {
    let rows: usize = report.files.iter().map(|f| f.rows).sum();
    let causes = report.dropped.iter().map(|d| format!("{} ({} rows)", d.cause, d.count));
    let files: Vec<&str> = report.files.iter().map(|f| f.path.as_str()).collect();
    let error =
        Error::input(format!("no {} is left of {rows} rows: {}", report.noun, causes.collect::<Vec<_>>().join("; ")));
    let error = error.at(files.join(", "));
    match report.messages.first() {
        Some(first) => {
            let parts: Vec<&str> = first.lines().map(|l| l.trim_start().trim_start_matches("help: ")).collect();
            error.help(format!("the first one: {}", parts.join("; ")))
        }
        None => error,
    }
}

/// Whether there are several answers, which are all the same.
fn alike(example: &Example) -> bool {
    let answers = example.learned();
    answers.len() > 1 && answers.windows(2).all(|two| two[0].ids == two[1].ids)
}
