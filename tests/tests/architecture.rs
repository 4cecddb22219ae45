//! What the compiler does not hold of the house: modules import each other in one direction, files have one job's length, and
//! the command line's parser stays in the command line.
#![allow(clippy::unwrap_used)] // In a test, a panic is the report.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

/// Longest file, in lines.
const LONGEST: usize = 600;

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap().to_owned()
}

/// Folders of this workspace's crates, without those that only serve tests.
fn crates() -> Vec<PathBuf> {
    let host = std::fs::read_dir(root().join("host")).unwrap().map(|e| e.unwrap().path());
    let mut all: Vec<PathBuf> = host.filter(|p| p.join("Cargo.toml").is_file()).collect();
    all.extend([root().join("host"), root().join("plugin-api")]);
    assert!(all.len() > 8, "{all:?}");
    all
}

/// A module by the names that lead to it from the crate's root.
type Module = Vec<String>;

/// Sources of a crate by module: their text without comments and tests.
fn modules(folder: &Path) -> BTreeMap<Module, String> {
    let mut all = BTreeMap::new();
    let mut folders = vec![(folder.join("src"), Module::new())];
    while let Some((folder, path)) = folders.pop() {
        for entry in std::fs::read_dir(&folder).unwrap().map(|e| e.unwrap().path()) {
            let name = entry.file_stem().unwrap().to_str().unwrap().to_owned();
            let within = |name: &str| path.iter().cloned().chain([name.to_owned()]).collect::<Module>();
            match (entry.is_dir(), name.as_str()) {
                (true, "templates") | (_, "tests") => {}
                (true, _) => folders.push((entry, within(&name))),
                (false, _) if entry.extension().is_none_or(|e| e != "rs") => {}
                (false, "lib" | "main") if path.is_empty() => drop(all.insert(Module::new(), source(&entry))),
                (false, "mod") => drop(all.insert(path.clone(), source(&entry))),
                (false, _) => drop(all.insert(within(&name), source(&entry))),
            }
        }
    }
    all
}

fn source(path: &Path) -> String {
    let text = std::fs::read_to_string(path).unwrap();
    let code = text.split("#[cfg(test)]\nmod tests {").next().unwrap();
    code.lines().map(|l| l.split("//").next().unwrap()).collect::<Vec<_>>().join("\n")
}

/// The paths of a use tree or of an expression, from behind its first name: `::a::{b, c::d}` is `[a, b]` and `[a, c, d]`.
fn paths(text: &str) -> Vec<Vec<String>> {
    let Some(rest) = text.strip_prefix("::") else { return vec![Vec::new()] };
    if let Some(list) = rest.strip_prefix('{') {
        let (mut depth, mut end) = (1, 0);
        for (at, c) in list.char_indices() {
            depth += i32::from(c == '{') - i32::from(c == '}');
            if depth == 0 {
                end = at;
                break;
            }
        }
        let mut items = vec![String::new()];
        let mut depth = 0;
        for c in list[..end].chars() {
            depth += i32::from(c == '{') - i32::from(c == '}');
            if c == ',' && depth == 0 { items.push(String::new()) } else { items.last_mut().unwrap().push(c) }
        }
        return items.iter().flat_map(|item| paths(&format!("::{}", item.trim()))).collect();
    }
    let length = rest.find(|c: char| !c.is_alphanumeric() && c != '_').unwrap_or(rest.len());
    let (name, rest) = rest.split_at(length);
    if name.is_empty() || name == "self" {
        return vec![Vec::new()];
    }
    paths(rest).into_iter().map(|path| std::iter::once(name.to_owned()).chain(path).collect()).collect()
}

/// Modules that a module refers to.
fn references(of: &Module, text: &str, all: &BTreeMap<Module, String>) -> BTreeSet<Module> {
    let mut found = BTreeSet::new();
    for word in ["crate", "super", "self"] {
        for (at, _) in text.match_indices(&format!("{word}::")) {
            if text[..at].ends_with(|c: char| c.is_alphanumeric() || c == '_' || c == ':') {
                continue;
            }
            let mut base = if word == "crate" { Module::new() } else { of.clone() };
            let mut rest = &text[at + word.len()..];
            if word == "super" {
                base.pop();
                while let Some(after) = rest.strip_prefix("::super") {
                    base.pop();
                    rest = after;
                }
            }
            found.extend(paths(rest).into_iter().map(|path| target(&base, &path, all)));
        }
    }
    found.remove(of);
    found
}

/// The module that has what a path names: a re-export leads to where it comes from.
fn target(base: &Module, path: &[String], all: &BTreeMap<Module, String>) -> Module {
    let mut at = base.clone();
    for name in path {
        at.push(name.clone());
        if !all.contains_key(&at) {
            at.pop();
            return exported_from(&at, name, all).unwrap_or(at);
        }
    }
    at
}

/// The child from which a module exports a name.
fn exported_from(module: &Module, name: &str, all: &BTreeMap<Module, String>) -> Option<Module> {
    let text = all.get(module)?;
    let children = all.keys().filter(|m| m.len() == module.len() + 1 && m.starts_with(module));
    children.into_iter().find_map(|child| {
        let (own, found) = (child.last().unwrap(), format!("use {}::", child.last().unwrap()));
        let mut exports = text.match_indices(&found).flat_map(|(at, _)| paths(&text[at + 4 + own.len()..]));
        exports.any(|p| p.first().is_some_and(|p| p == name)).then(|| child.clone())
    })
}

/// A circle in a graph, if there is one.
fn circle(graph: &BTreeMap<Module, BTreeSet<Module>>) -> Option<Vec<String>> {
    fn walk(
        at: &Module,
        graph: &BTreeMap<Module, BTreeSet<Module>>,
        path: &mut Vec<Module>,
        done: &mut BTreeSet<Module>,
    ) -> Option<Vec<String>> {
        if let Some(start) = path.iter().position(|m| m == at) {
            return Some(path[start..].iter().chain([at]).map(|m| m.join("::")).collect());
        }
        if !done.insert(at.clone()) {
            return None;
        }
        path.push(at.clone());
        let found = graph.get(at).into_iter().flatten().find_map(|next| walk(next, graph, path, done));
        path.pop();
        found
    }
    let mut done = BTreeSet::new();
    graph.keys().find_map(|start| walk(start, graph, &mut Vec::new(), &mut done))
}

/// What each module refers to. A module and what is inside of it are one room, so that they may know each other.
fn imports(all: &BTreeMap<Module, String>) -> BTreeMap<Module, BTreeSet<Module>> {
    let inside = |a: &Module, b: &Module| a.starts_with(b) || b.starts_with(a);
    let of = |(module, text): (&Module, &String)| {
        let others = references(module, text, all).into_iter().filter(|m| !inside(m, module)).collect();
        (module.clone(), others)
    };
    all.iter().map(of).collect()
}

/// The circles of all crates.
fn circles(graph: impl Fn(BTreeMap<Module, BTreeSet<Module>>) -> BTreeMap<Module, BTreeSet<Module>>) -> Vec<String> {
    let found = |folder: PathBuf| {
        let circle = circle(&graph(imports(&modules(&folder))))?;
        Some(format!("{}: {}", folder.display(), circle.join(" -> ")))
    };
    crates().into_iter().filter_map(found).collect()
}

#[test]
fn no_files_import_each_other_in_a_circle() {
    assert_eq!(circles(|files| files), Vec::<String>::new());
}

#[test]
fn no_rooms_import_each_other_in_a_circle() {
    let room = |m: &Module| m[..m.len().min(1)].to_vec();
    let rooms = |files: BTreeMap<Module, BTreeSet<Module>>| {
        let mut graph: BTreeMap<Module, BTreeSet<Module>> = BTreeMap::new();
        for (module, others) in files.iter().filter(|(m, _)| !m.is_empty()) {
            let own = room(module);
            let others = others.iter().map(room).filter(|other| *other != own && !other.is_empty());
            graph.entry(own.clone()).or_default().extend(others);
        }
        graph
    };
    assert_eq!(circles(rooms), Vec::<String>::new());
}

/// The tests above would find one.
#[test]
fn a_circle_is_found() {
    let text = |t: &str| t.to_owned();
    let all: BTreeMap<Module, String> = [
        (vec![], text("mod a; mod b;")),
        (vec![text("a")], text("use crate::b::Thing;")),
        (vec![text("b")], text("mod c; pub use c::{Other, Thing};")),
        (vec![text("b"), text("c")], text("use super::super::a;")),
    ]
    .into();
    assert_eq!(circle(&imports(&all)).unwrap(), ["a", "b::c", "a"]);
}

#[test]
fn files_have_one_job() {
    let mut folders: Vec<PathBuf> = crates().into_iter().map(|c| c.join("src")).collect();
    while let Some(folder) = folders.pop() {
        for path in std::fs::read_dir(folder).unwrap().map(|e| e.unwrap().path()) {
            if path.is_dir() {
                folders.push(path);
            } else if path.extension().is_some_and(|e| e == "rs") {
                let lines = std::fs::read_to_string(&path).unwrap().lines().count();
                assert!(lines <= LONGEST, "{} has {lines} lines", path.display());
            }
        }
    }
}

#[test]
fn only_the_command_line_knows_clap() {
    for folder in crates().into_iter().filter(|c| *c != root().join("host")) {
        let manifest = std::fs::read_to_string(folder.join("Cargo.toml")).unwrap();
        assert!(!manifest.contains("clap"), "{}", folder.display());
    }
}
