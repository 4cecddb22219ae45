//! From records to the examples that a loss takes: single answers, pairs, rankings.

use std::collections::HashMap;

use dpo_plugin_api::dataset::{Message, Record, RecordAnswer, Text};
use dpo_plugin_api::loss::{Answers, MAX_ANSWERS};

use super::DataOptions;
use super::report::{Joined, Report};
use dpo_core::error::{Error, Result};

/// A record on its way, with the number of its file.
pub(super) struct Item {
    pub(super) record: Record,
    pub(super) file: usize,
    pub(super) place: String,
}

/// Counts a row that makes no example by its own fault.
///
/// # Errors
/// Under `strict` the row.
pub(super) fn refuse(report: &mut Report, error: Error, place: &str, strict: bool) -> Result<()> {
    if strict {
        return Err(error.at(place));
    }
    report.drop(&error, place);
    Ok(())
}

/// Puts a system message before a conversation that has none.
pub(super) fn add_system(item: &mut Item, system: &str) -> Result<()> {
    match &mut item.record.prompt {
        Text::Messages(messages) if messages.first().is_some_and(|m| m.role == "system") => {}
        Text::Messages(messages) => messages.insert(0, Message::new("system", system)),
        Text::Plain(_) => {
            return Err(Error::input("the prompt is plain text, which takes no system message")
                .at(&item.place)
                .help("leave --system out, or write prompts as messages"));
        }
    }
    Ok(())
}

/// What becomes of records that have the answers that are wanted, or are single ones that are joined when all are there.
pub(super) struct Shaped {
    /// Those that are wanted as they are.
    pub(super) whole: Vec<Item>,
    /// Single answers of which pairs will be made.
    pub(super) single: Vec<Item>,
}

/// Makes the examples that are wanted of the records that there are.
///
/// # Errors
/// A record with another number of answers: rows and loss do not fit, whatever else is in them.
pub(super) fn shape(items: Vec<Item>, options: &DataOptions, report: &mut Report) -> Result<Shaped> {
    let super::Wanted { answers, loss, .. } = &options.wanted;
    match answers {
        Answers::Labelled => {
            Ok(Shaped { whole: items.into_iter().flat_map(each_answer).collect(), single: Vec::new() })
        }
        Answers::One => {
            let mut liked = Vec::new();
            for item in items {
                match learned(&item.record) {
                    [only] if only.label <= 0.0 => {
                        let cause = Error::input("the answer is not liked");
                        let cause = cause.help(format!("'{loss}' learns answers that are"));
                        refuse(report, cause, &item.place, options.strict)?;
                    }
                    _ => liked.push(item),
                }
            }
            Ok(Shaped { whole: liked, single: Vec::new() })
        }
        Answers::Pair | Answers::Ranked => {
            let single = |item: &Item| item.record.answers.len() == 1;
            let (single, whole): (Vec<Item>, Vec<Item>) = items.into_iter().partition(single);
            for Item { record, place, .. } in &whole {
                let (count, all) = (learned(record).len(), record.answers.len());
                if !answers.takes(count) || all > MAX_ANSWERS {
                    let detached =
                        if all > count { format!(" and {} detached ones", all - count) } else { String::new() };
                    let what = format!("{count} answers{detached}, and the loss '{loss}' takes {}", answers.describe());
                    return Err(Error::input(what).at(place).help(match answers {
                        Answers::Pair => {
                            "choose a loss over rankings, such as --loss plackett_luce, or let the format make pairs"
                        }
                        _ => "`dpo-host describe NAME` says what a loss takes",
                    }));
                }
            }
            Ok(Shaped { whole, single })
        }
    }
}

/// The learned answers of a record, a record each. Of answers that were compared, the better half was liked, as TRL unpairs a
/// preference.
fn each_answer(item: Item) -> Vec<Item> {
    let Item { record, file, place } = item;
    let answers = learned(&record);
    let alone = |(at, answer): (usize, &RecordAnswer)| {
        let mut answer = answer.clone();
        if answers.len() > 1 {
            answer.label = f64::from(u8::from(at < answers.len() / 2));
        }
        Record { answers: vec![answer], ..record.clone() }
    };
    answers.iter().enumerate().map(|a| Item { record: alone(a), file, place: place.clone() }).collect()
}

/// The answers of a record that are learned, best first; detached ones come behind them.
pub(super) fn learned(record: &Record) -> &[RecordAnswer] {
    let count = record.answers.iter().position(|a| a.detached).unwrap_or(record.answers.len());
    &record.answers[..count]
}

/// Makes pairs of single answers to the same prompt: the first liked one with the first disliked one, and so on; where one
/// side has fewer, it begins again. So each answer is in a pair, and there are as many as the longer side has.
///
/// # Errors
/// Under `strict`, an answer that has no other to be paired with.
pub(super) fn join(single: &[Item], report: &mut Report, strict: bool) -> Result<Vec<Item>> {
    if single.is_empty() {
        return Ok(Vec::new());
    }
    let mut all = Vec::new();
    let mut groups: Vec<Vec<&Item>> = Vec::new();
    let mut group_of: HashMap<String, usize> = HashMap::new();
    for item in single {
        let Record { prompt, tools, template_args, .. } = &item.record;
        let key = serde_json::to_string(&(prompt, tools, template_args)).unwrap_or_default();
        let group = *group_of.entry(key).or_insert_with(|| {
            groups.push(Vec::new());
            groups.len() - 1
        });
        groups[group].push(item);
    }
    let is_liked = |item: &&Item| item.record.answers.iter().all(|a| a.label > 0.0);
    for group in groups {
        let (liked, disliked): (Vec<&Item>, Vec<&Item>) = group.into_iter().partition(is_liked);
        if liked.is_empty() || disliked.is_empty() {
            for item in liked.iter().chain(&disliked) {
                let cause = Error::input("no answer of the other kind to the same prompt");
                refuse(
                    report,
                    cause.help(
                        "pairs need a liked and a disliked answer to one prompt; --loss sft learns answers that nobody judged, --loss kto single answers that were liked or not",
                    ),
                    &item.place,
                    strict,
                )?;
            }
        }
        let count = liked.len().max(disliked.len());
        for (good, bad) in liked.iter().cycle().zip(disliked.iter().cycle()).take(count) {
            let answers = [&good.record, &bad.record].map(|record| record.answers.clone()).concat();
            let record = Record { answers, ..good.record.clone() };
            all.push(Item { record, file: good.file, place: format!("{} and {}", good.place, bad.place) });
        }
    }
    report.joined = Some(Joined { answers: single.len(), pairs: all.len() });
    Ok(all)
}
