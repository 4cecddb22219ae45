//! The other side of [`helper`](crate::helper): a process that lives for one call into a library.

use std::io::{self, Read};
use std::path::Path;

use dpo_core::error::{Error, Result};
use rustix::process::{Resource, Rlimit, setrlimit};

use super::helper::{Answer, COMMAND, MARK, TIME};
use super::library;

/// Address space of the process, in bytes; the host's own code takes some hundred MiB of it.
const MEMORY: u64 = 4 << 30;

/// In a process of [`COMMAND`]: limits itself, calls what its arguments name with the text on standard input, and prints the answer.
///
/// # Errors
/// Arguments that are none of [`COMMAND`]'s.
pub fn answer(args: &[String]) -> Result<()> {
    let [library, what, item] = args else { return Err(Error::input(format!("{COMMAND} is the host's own"))) };
    let item = item.parse().map_err(|_| Error::input(format!("{COMMAND}: '{item}' is not the number of an item")))?;
    for (resource, most) in [(Resource::As, MEMORY), (Resource::Cpu, TIME.as_secs()), (Resource::Core, 0)] {
        // Where a limit cannot be set, that of the time remains.
        let _ = setrlimit(resource, Rlimit { current: Some(most), maximum: Some(most) });
    }
    let mut input = String::new();
    io::stdin().read_to_string(&mut input).map_err(|e| Error::input(format!("{COMMAND}: {e}")))?;
    let answer = match library::call_here(Path::new(library), what, item, &input) {
        Ok(value) => Answer::Value(value),
        Err(e) => Answer::Error { message: e.message().to_owned(), help: e.advice().map(str::to_owned) },
    };
    println!("\n{MARK}{}", serde_json::to_string(&answer).unwrap_or_default());
    Ok(())
}
