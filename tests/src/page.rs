//! Fenced blocks of a page of the documentation, for tests that run what it shows.

/// A block: the words behind its fence, and its text.
#[derive(Debug)]
pub struct Fenced {
    /// Such as `sh`, or `rust src/lib.rs`: a language, then the file that it is.
    pub info: String,
    /// What is between the fences.
    pub text: String,
}

impl Fenced {
    /// The file that the block is, where it is one.
    pub fn file(&self) -> Option<&str> {
        self.info.split_once(' ').map(|(_, file)| file)
    }

    /// The commands of the block, each as its words; a line may go on after a backslash.
    pub fn commands(&self) -> Vec<Vec<String>> {
        self.text.replace("\\\n", " ").lines().flat_map(commands).collect()
    }
}

/// The commands of a line of a shell, each as its words: without quotes, comments, redirections, and the prompt before them.
pub fn commands(line: &str) -> Vec<Vec<String>> {
    let (mut all, mut words, mut word, mut quote) = (Vec::new(), Vec::new(), None::<String>, None);
    for character in line.trim_start().trim_start_matches("$ ").chars() {
        match character {
            c if quote == Some(c) => quote = None,
            c if quote.is_some() => word.get_or_insert_default().push(c),
            '\'' | '"' => {
                quote = Some(character);
                word.get_or_insert_default();
            }
            '#' if word.is_none() => break,
            c if c.is_whitespace() => words.extend(word.take()),
            c => word.get_or_insert_default().push(c),
        }
    }
    words.extend(word);
    for part in words.split(|word| ["&&", "||", "|", ";"].contains(&word.as_str())) {
        let end = part.iter().position(|word| word.starts_with('>')).unwrap_or(part.len());
        all.extend((end > 0).then(|| part[..end].to_vec()));
    }
    all
}

/// A page without its fenced blocks.
pub fn prose(page: &str) -> String {
    let mut inside = false;
    let outside = page.lines().filter(|line| {
        let fence = line.trim_start().starts_with("```");
        inside ^= fence;
        !inside && !fence
    });
    outside.collect::<Vec<_>>().join("\n")
}

/// What stands in code within the lines of a page, outside of its blocks.
pub fn spans(page: &str) -> Vec<String> {
    prose(page).lines().flat_map(|line| line.split('`').skip(1).step_by(2).map(str::to_owned)).collect()
}

/// The anchor of a heading, as GitHub and mdbook make it.
pub fn anchor(heading: &str) -> String {
    let text = heading.trim_start_matches('#').trim().to_lowercase();
    let kept = text.chars().filter(|c| c.is_alphanumeric() || [' ', '-', '_'].contains(c));
    kept.map(|c| if c == ' ' { '-' } else { c }).collect()
}

/// The text of a page in `docs`.
pub fn page(name: &str) -> String {
    let path = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("../docs").join(name);
    std::fs::read_to_string(path).expect("a page of the documentation")
}

/// The blocks of a page, in its order.
pub fn fenced(page: &str) -> Vec<Fenced> {
    let mut blocks = Vec::new();
    let mut lines = page.lines();
    while let Some(line) = lines.next() {
        if let Some(info) = line.strip_prefix("```") {
            let text: Vec<&str> = lines.by_ref().take_while(|l| *l != "```").collect();
            blocks.push(Fenced { info: info.into(), text: text.join("\n") + "\n" });
        }
    }
    blocks
}
