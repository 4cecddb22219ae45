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

    /// The command lines of the block, each as its words; a line may go on after a backslash.
    pub fn commands(&self) -> Vec<Vec<String>> {
        let joined = self.text.replace("\\\n", " ");
        joined.lines().map(|l| l.split_whitespace().map(str::to_owned).collect()).collect()
    }
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
