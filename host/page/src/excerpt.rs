//! A run's file as it is shown: whole where it is short, else some of its lines, in memory that does not grow with the file.
//!
//! Whoever writes into a run's folder may not have others' files shown, nor have the page wait: only regular files are opened.

use std::fs::{self, File, Metadata};
use std::io::{self, BufRead, BufReader, Read, Seek, SeekFrom};
use std::path::Path;

use serde_json::{Map, Value};

use super::{ANSWERS, ARGS, CONSOLE, FACTS, GENERATED, LOG, REMARKS, SAMPLES};
use dpo_core::files;

/// How a file is shown.
#[derive(Clone, Copy)]
enum Shown {
    /// Whole.
    Whole,
    /// So many of its lines at most, of evaluations and others.
    Lines(usize),
    /// Its end: what was printed last says how things are.
    End,
}

/// Files that are shown.
const FILES: &[(&str, Shown)] = &[
    (ARGS, Shown::Whole),
    (FACTS, Shown::Whole),
    (LOG, Shown::Lines(1000)),
    (REMARKS, Shown::Lines(500)),
    (SAMPLES, Shown::Lines(40)),
    (ANSWERS, Shown::Lines(40)),
    (GENERATED, Shown::Lines(40)),
    (CONSOLE, Shown::End),
];
/// Bytes that are read of a file with lines: its end, where it has more.
const READ: u64 = 64 << 20;
/// Bytes of the longest line that is shown, and of the longest file that is shown whole.
const LONGEST: u64 = 1 << 20;
/// Bytes that are shown of the end of a text.
const END: u64 = 16 << 10;
/// Bytes that are shown of a file, of evaluations and others.
const SHOWN: usize = 2 << 20;

/// Names of the files that are shown.
pub(super) fn names() -> impl Iterator<Item = &'static str> {
    FILES.iter().map(|(name, _)| *name)
}

/// What is known of a file without opening it, where it is there and would be opened.
pub(super) fn metadata(folder: &Path, name: &str) -> Option<Metadata> {
    fs::symlink_metadata(folder.join(name)).ok().filter(Metadata::is_file)
}

/// What is not shown of a run's files.
pub(super) fn left_out(folder: &Path) -> Vec<String> {
    let what = |(name, shown): &(&str, Shown)| {
        let length = metadata(folder, name)?.len();
        match shown {
            Shown::Lines(_) if length > READ => Some(format!("of {name} the last {} MiB are shown", READ >> 20)),
            Shown::Whole if length > LONGEST => {
                Some(format!("{name} has more than {} MiB and is not shown", LONGEST >> 20))
            }
            _ => None,
        }
    };
    FILES.iter().filter_map(what).collect()
}

/// A file as it is shown; nothing of one that cannot be.
pub(super) fn read(folder: &Path, name: &str) -> String {
    let shown = FILES.iter().find(|(known, _)| *known == name).map_or(Shown::Whole, |(_, shown)| *shown);
    let opened = files::open_regular(&folder.join(name));
    let shown = opened.and_then(|file| match shown {
        Shown::Whole => whole(file),
        Shown::Lines(most) => end(file, READ).and_then(|text| thinned(text, most)),
        Shown::End => end(file, END).and_then(|mut text| {
            let mut end = Vec::new();
            text.read_to_end(&mut end).map(|_| end)
        }),
    });
    String::from_utf8_lossy(&shown.unwrap_or_default()).into_owned()
}

/// The whole lines of a file, as objects.
pub(super) fn lines(folder: &Path, name: &str) -> Vec<Map<String, Value>> {
    read(folder, name).lines().filter_map(|l| serde_json::from_str(l).ok()).collect()
}

fn whole(file: File) -> io::Result<Vec<u8>> {
    let mut text = Vec::new();
    file.take(LONGEST + 1).read_to_end(&mut text)?;
    if text.len() as u64 > LONGEST { Ok(Vec::new()) } else { Ok(text) }
}

/// The lines at the end of a file, of so many bytes.
fn end(mut file: File, bytes: u64) -> io::Result<impl BufRead> {
    let before = file.metadata()?.len().saturating_sub(bytes);
    file.seek(SeekFrom::Start(before))?;
    let mut text = BufReader::new(file).take(bytes);
    if before > 0 {
        text.skip_until(b'\n')?;
    }
    Ok(text)
}

/// Of a text with many lines every second, fourth and so on, always the first and the last; of evaluations' lines by
/// themselves, which are rare among the others. A last line without its end is being written.
fn thinned(mut text: impl BufRead, most: usize) -> io::Result<Vec<u8>> {
    let (mut rare, mut usual) = (Spaced::new(most), Spaced::new(most));
    let mut line = Vec::new();
    for place in 0_u64.. {
        line.clear();
        if (&mut text).take(LONGEST).read_until(b'\n', &mut line)? == 0 {
            break;
        }
        if !line.ends_with(b"\n") {
            text.skip_until(b'\n')?;
            continue;
        }
        let evaluation = line.windows(EVALUATION.len()).any(|w| w == EVALUATION);
        if evaluation { &mut rare } else { &mut usual }.push(place, &line);
    }
    let mut kept = [rare.lines(), usual.lines()].concat();
    kept.sort_unstable_by_key(|(place, _)| *place);
    Ok(kept.into_iter().map(|(_, line)| line).collect::<Vec<_>>().concat())
}

/// What the line of an evaluation has: `eval_loss`, or that of an evaluation set with a name.
const EVALUATION: &[u8] = b"\"eval_";

/// Lines with their places.
type Lines = Vec<(u64, Vec<u8>)>;

/// Evenly spaced ones of all lines that come, and the last: at most so many, and as many bytes as are shown.
struct Spaced {
    most: usize,
    stride: u64,
    came: u64,
    kept: Lines,
    bytes: usize,
    last: (u64, Vec<u8>),
}

impl Spaced {
    fn new(most: usize) -> Spaced {
        Spaced { most, stride: 1, came: 0, kept: Vec::new(), bytes: 0, last: (0, Vec::new()) }
    }

    fn push(&mut self, place: u64, line: &[u8]) {
        if self.came.is_multiple_of(self.stride) {
            self.kept.push((place, line.to_vec()));
            self.bytes += line.len();
        }
        self.came += 1;
        self.last.0 = place;
        self.last.1.clear();
        self.last.1.extend_from_slice(line);
        while self.kept.len() > self.most || self.bytes > SHOWN {
            let mut stays = [true, false].into_iter().cycle();
            self.kept.retain(|_| stays.next() == Some(true));
            self.bytes = self.kept.iter().map(|(_, line)| line.len()).sum();
            self.stride *= 2;
        }
    }

    fn lines(mut self) -> Lines {
        if self.kept.last().is_some_and(|(place, _)| *place != self.last.0) {
            self.kept.push(self.last);
        }
        self.kept
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)] // In a test, a panic is the report.
mod tests {
    use super::*;

    fn thin(text: &str, most: usize) -> String {
        String::from_utf8(thinned(text.as_bytes(), most).unwrap()).unwrap()
    }

    #[test]
    fn long_files_are_thinned_and_their_ends_stay() {
        let text: String = (0..1000).map(|i| format!("{i}\n")).collect();
        let thin_text = thin(&text, 100);
        assert_eq!(thin_text.lines().count(), 64, "{thin_text}");
        assert!(thin_text.starts_with("0\n16\n") && thin_text.ends_with("992\n999\n"), "{thin_text}");
        assert_eq!(thin("1\n{\"eval_loss\":2}\n3\nhalf", 2), "1\n{\"eval_loss\":2}\n3\n");
        assert_eq!(thin("", 2), "");
    }

    #[test]
    fn long_lines_are_few_or_none() {
        let line = |letter: &str, length: u64| letter.repeat(length as usize) + "\n";
        let text = line("a", 10) + &line("b", LONGEST) + &line("c", 10);
        assert_eq!(thin(&text, 100), line("a", 10) + &line("c", 10));
        let text = line("d", LONGEST / 2).repeat(40);
        assert!(thin(&text, 100).len() <= SHOWN + LONGEST as usize);
    }

    #[test]
    fn of_a_longer_file_the_end_is_read() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join(LOG);
        // A hole takes no room on the disk.
        File::create(&path).unwrap().set_len(2 * READ).unwrap();
        let mut file = File::options().append(true).open(&path).unwrap();
        io::Write::write_all(&mut file, b"\n{\"global_step\":1}\n{\"global_step\":2}\n").unwrap();
        assert_eq!(read(folder.path(), LOG), "{\"global_step\":1}\n{\"global_step\":2}\n");
        assert_eq!(left_out(folder.path()), ["of logging.jsonl the last 64 MiB are shown"]);
    }
}
