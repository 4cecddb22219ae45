//! What can be done with the adapter of a run: the commands, ready to be copied.

use std::path::{Path, PathBuf};

use dpo_core::storage::Quantization;

/// Commands, by the name that this program was called by, that go on from a run's folder; `rows` are those that it was
/// evaluated on, or `trained` on, `plugins` the folders of plugins that the run named, `ignored` the keys of config.json, and
/// `quantization` what its base is kept as.
pub(super) fn commands(
    output: &Path,
    rows: &[String],
    trained: bool,
    plugins: &[PathBuf],
    ignored: &[String],
    quantization: Option<Quantization>,
) -> String {
    let ignored: String = ignored.iter().map(|key| format!(" --ignore-config-key {}", word(key))).collect();
    let base = quantization.map(|kind| format!(" --quantization {}", kind.name())).unwrap_or_default();
    let plugins = plugins.iter().map(|dir| format!(" --plugin-dir {}", quoted(dir)));
    let program = format!("{}{}", program(), plugins.collect::<String>());
    let adapter = quoted(output);
    let merged = word(&format!("{}-merged", output.display()));
    let rows: Vec<String> = rows.iter().map(|row| word(row)).collect();
    let remark = if trained { "    # on rows that it was trained on" } else { "" };
    format!(
        "next        {program} chat --compare --adapter {adapter}{base}{ignored}\n            \
         {program} eval --adapter {adapter} --dataset {}{base}{ignored}{remark}\n            \
         {program} merge --adapter {adapter} --output-dir {merged}{ignored}",
        rows.join(" ")
    )
}

/// The command that goes on with the run of a folder. Its `args.json` has the flags, those of plugins among them.
pub(super) fn resume(output: &Path, args: &Path) -> String {
    let (program, folder, args) = (program(), quoted(output), quoted(args));
    format!("{program} train --config {args} --output-dir {folder} --resume-from-checkpoint latest")
}

/// The name that this program was called by.
fn program() -> String {
    std::env::args().next().filter(|name| name.contains('/')).map_or_else(|| "dpo-host".into(), |name| word(&name))
}

/// A path as a shell takes it for one word.
fn quoted(path: &Path) -> String {
    word(&path.display().to_string())
}

/// A text as a shell takes it for one word.
fn word(text: &str) -> String {
    let plain = |c: char| c.is_alphanumeric() || "/._-:@%+=,#".contains(c);
    match !text.is_empty() && !text.starts_with('#') && text.chars().all(plain) {
        true => text.to_owned(),
        false => format!("'{}'", text.replace('\'', "'\\''")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_with_spaces_are_words() {
        let text = commands(
            Path::new("out/it's 1"),
            &["a.jsonl#5".into(), "b c".into()],
            false,
            &["my plugins".into()],
            &[],
            None,
        );
        assert!(text.contains(" --plugin-dir 'my plugins' chat "), "{text}");
        assert!(
            text.contains("--adapter 'out/it'\\''s 1'\n") && text.contains("--dataset a.jsonl#5 'b c'\n"),
            "{text}"
        );
        assert!(text.ends_with("--output-dir 'out/it'\\''s 1-merged'"), "{text}");
        let trained = commands(Path::new("run"), &["a.jsonl".into()], true, &[], &[], Some(Quantization::Nf4));
        assert!(
            trained.contains("--dataset a.jsonl --quantization nf4    # on rows that it was trained on\n"),
            "{trained}"
        );
    }
}
