//! `dpo-host new`: each template builds, passes its own tests, loads, and never overwrites anything.

#![allow(clippy::unwrap_used)] // In a test, a panic is the report.

use std::path::{Path, PathBuf};

use dpo_host::commands::new::{Kind, new};
use dpo_plugins::Registry;
use dpo_tests::nested::{cargo, target_folder};

#[test]
fn a_new_crate_builds_passes_its_tests_and_loads() {
    let folder = tempfile::tempdir().unwrap();
    // A library is loaded once under its path, so one that an earlier test run has built would hide the new one.
    let libraries = std::fs::read_dir(target_folder().join("release")).into_iter().flatten().map(|e| e.unwrap().path());
    for stale in
        libraries.filter(|p| p.extension().is_some_and(|e| e == "so") && p.to_string_lossy().contains("scaffold"))
    {
        std::fs::remove_file(stale).unwrap();
    }
    for (kind, word, name) in [
        (Kind::Model, "model", "scaffold-model"),
        (Kind::Format, "dataset", "scaffold-format"),
        (Kind::Loss, "loss", "scaffold_loss"),
    ] {
        let dir = folder.path().join(name);
        new(kind, name, &dir).unwrap();
        let tests = cargo(&dir, "test");
        assert!(tests.contains("test result: ok") && !tests.contains("warning"), "{tests}");
        cargo(&dir, "build");
        let registry = Registry::discover(&[target_folder().join("release")], None);
        let row = registry.rows.iter().find(|r| r.kind == word && r.name == name);
        let row = row.unwrap_or_else(|| panic!("{name} is not listed: {:?} {:?}", registry.rows, registry.refusals));
        assert_eq!(row.version, "0.1.0");
    }
}

/// Files of a folder and of those in it, from there on.
fn files(folder: &Path) -> Vec<PathBuf> {
    let mut all = Vec::new();
    for path in std::fs::read_dir(folder).unwrap().map(|e| e.unwrap().path()) {
        let name = PathBuf::from(path.file_name().unwrap());
        match path.is_dir() {
            true => all.extend(files(&path).into_iter().map(|inner| name.join(inner))),
            false => all.push(name),
        }
    }
    all.sort();
    all
}

#[test]
fn a_new_crate_needs_no_source_tree() {
    let folder = tempfile::tempdir().unwrap();
    let dir = folder.path().join("fresh");
    new(Kind::Loss, "fresh", &dir).unwrap();
    let ours = Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap();
    let (original, copy) = (ours.join("plugin-api/src"), dir.join("plugin-api/src"));
    assert_eq!(files(&original), files(&copy));
    for file in files(&original) {
        assert_eq!(std::fs::read(original.join(&file)).unwrap(), std::fs::read(copy.join(&file)).unwrap(), "{file:?}");
    }
    for manifest in ["Cargo.toml", "plugin-api/Cargo.toml"] {
        let text = std::fs::read_to_string(dir.join(manifest)).unwrap();
        assert!(!text.contains(&*ours.to_string_lossy()) && !text.contains("workspace = true"), "{manifest}:\n{text}");
    }
}

#[test]
fn what_is_there_stays() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("precious");
    std::fs::write(&file, "text").unwrap();
    for taken in [folder.path(), &file] {
        let error = new(Kind::Loss, "fresh", taken).unwrap_err().to_string();
        assert!(error.contains("is there already") && error.contains("--path"), "{error}");
    }
    assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 1);
    assert_eq!(std::fs::read_to_string(file).unwrap(), "text");
}

#[test]
fn names_that_could_not_load_are_refused() {
    let cases = [
        (Kind::Loss, "", "lower-case letter"),
        (Kind::Loss, "My", "lower-case letter"),
        (Kind::Loss, "3d", "lower-case letter"),
        (Kind::Format, "../up", "lower-case letter"),
        (Kind::Format, "a\"b", "lower-case letter"),
        (Kind::Loss, "sigmoid", "by dpo-losses (built-in)"),
        (Kind::Model, "qwen2", "by dpo-model-qwen2 (built-in)"),
    ];
    for (kind, name, part) in cases {
        let dir = Path::new("/no/such/folder");
        let error = new(kind, name, dir).unwrap_err().to_string();
        assert!(error.contains(part), "{name}: {error}");
    }
}
