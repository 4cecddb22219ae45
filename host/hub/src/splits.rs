//! Which files of a dataset are to be trained on: those of its training split, as their paths say.

use dpo_core::console;

/// Words of a path that name the split to train on, and those that name what is held out.
const TRAIN: [&str; 2] = ["train", "training"];
/// Of several training splits that of preferences is meant: `train_prefs`, not `train_sft`.
const PREFERENCES: [&str; 6] = ["prefs", "pref", "preference", "preferences", "dpo", "rm"];
const OTHERS: [&str; 7] = ["sft", "gen", "edit", "feedback", "principle", "rl", "ppo"];

/// Files that are trained on, and the splits that are left out for them.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Splits {
    /// The files, in order.
    pub files: Vec<String>,
    /// Names of splits that are left out.
    pub left_out: Vec<String>,
}

impl Splits {
    /// Of paths with `/`, relative to the dataset's folder. All are taken where none is of a training split.
    pub fn of(paths: &[String]) -> Splits {
        let is_train = |path: &String| words(path).any(|word| TRAIN.contains(&word));
        let mut taken: Vec<&String> = paths.iter().filter(|path| is_train(path)).collect();
        if taken.is_empty() {
            taken = paths.iter().collect();
        }
        // A split or a configuration is one for preferences, or is not one for anything else.
        let has = |names: &'static [&str]| move |path: &&String| words(path).any(|word| names.contains(&word));
        let prefs: Vec<&String> = taken.iter().copied().filter(has(&PREFERENCES)).collect();
        let plain: Vec<&String> = taken.iter().copied().filter(|path| !has(&OTHERS)(path)).collect();
        let taken = [prefs, plain, taken].into_iter().find(|files| !files.is_empty()).unwrap_or_default();
        let mut left_out = Vec::new();
        for path in paths.iter().filter(|path| !taken.contains(path)) {
            let name = split(path);
            if !left_out.contains(&name) {
                left_out.push(name);
            }
        }
        Splits { files: taken.into_iter().cloned().collect(), left_out }
    }

    /// Says what is left out of the dataset at a place, and how it is named to be taken.
    pub fn note_left_out(&self, place: &str) {
        if let (Some(first), false) = (self.files.first(), self.left_out.is_empty()) {
            let (taken, left_out) = (split(first), self.left_out.join(", "));
            console::note(format!(
                "{place}: '{taken}' is trained on; left out: {left_out}; name a file or a folder to take that"
            ));
        }
    }
}

/// The words of a path.
fn words(path: &str) -> impl Iterator<Item = &str> {
    path.split(|c: char| !c.is_ascii_alphanumeric())
}

/// A path without extensions and the number of a shard: `data/train-00000-of-00002.jsonl.gz` is of `data/train`.
fn split(path: &str) -> String {
    let (folder, file) = path.rsplit_once('/').map_or(("", path), |(folder, file)| (folder, file));
    let stem = file.split('.').next().unwrap_or(file);
    let numbered = |part: &str| part == "of" || !part.is_empty() && part.chars().all(|c| c.is_ascii_digit());
    let named: Vec<&str> = stem.split('-').take_while(|part| !numbered(part)).collect();
    match (folder, named.join("-").as_str()) {
        // Shards of a folder that is the split.
        (folder, "" | "data") if !folder.is_empty() => folder.to_owned(),
        ("", name) => name.to_owned(),
        (folder, name) => format!("{folder}/{name}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn taken(paths: &[&str]) -> (Vec<String>, Vec<String>) {
        let paths: Vec<String> = paths.iter().map(|path| (*path).to_owned()).collect();
        let Splits { files, left_out } = Splits::of(&paths);
        (files, left_out)
    }

    #[test]
    fn the_training_split_of_preferences_is_taken() {
        let of = |wanted: &[&str], others: &[&str], left_out: &[&str]| {
            assert_eq!(
                taken(&[wanted, others].concat()),
                (wanted.iter().map(|w| (*w).to_owned()).collect(), left_out.iter().map(|w| (*w).to_owned()).collect(),)
            );
        };
        of(&["a.jsonl", "b.jsonl"], &[], &[]);
        of(&["train_01.jsonl", "train_02.jsonl"], &["test_01.jsonl", "test_02.jsonl"], &["test_01", "test_02"]);
        of(
            &["data/train_prefs-00000-of-00001.parquet"],
            &[
                "data/train_sft-00000-of-00001.parquet",
                "data/train_gen-00000-of-00001.parquet",
                "data/test_prefs-00000-of-00001.parquet",
            ],
            &["data/train_sft", "data/train_gen", "data/test_prefs"],
        );
        of(
            &["preference/train.jsonl.gz"],
            &["edit/train.jsonl.gz", "preference/validation.jsonl.gz"],
            &["edit/train", "preference/validation"],
        );
        of(
            &["train/data-00000-of-00002.arrow", "train/data-00001-of-00002.arrow"],
            &["test/data-00000-of-00001.arrow"],
            &["test"],
        );
        of(&["data/train_sft-00000-of-00001.parquet"], &["data/test_sft-00000-of-00001.parquet"], &["data/test_sft"]);
    }
}
