//! The terminal, if there is one: its width, its colours, its lines and its Ctrl-C.

use std::io::{IsTerminal, Write};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use rustyline::config::Config;
use rustyline::error::ReadlineError;
use rustyline::history::MemHistory;
use signal_hook::consts::SIGINT;
use signal_hook::flag;

use dpo_core::error::{Error, Result};

/// Exit code of a command that Ctrl-C ended, as shells have it.
const INTERRUPTED: i32 = 130;

/// Where answers are shown.
pub(super) struct Screen {
    terminal: bool,
    colour: bool,
}

impl Screen {
    /// What stdout is.
    pub(super) fn new() -> Screen {
        let set = |name: &str| std::env::var_os(name).filter(|value| !value.is_empty());
        let terminal = std::io::stdout().is_terminal() && set("TERM").is_none_or(|t| t != "dumb");
        Screen { terminal, colour: terminal && set("NO_COLOR").is_none() }
    }

    /// Whether a person types and reads.
    pub(super) fn is_interactive(&self) -> bool {
        self.terminal && std::io::stdin().is_terminal()
    }

    /// Columns of the terminal; `None` where there is none.
    pub(super) fn width(&self) -> Option<usize> {
        let (width, _) = terminal_size::terminal_size().filter(|_| self.terminal)?;
        Some(width.0.into())
    }

    /// Whether a person reads.
    pub(super) fn is_terminal(&self) -> bool {
        self.terminal
    }

    /// A text that is less than the answer.
    pub(super) fn dim(&self, text: &str) -> String {
        if self.colour { format!("\x1b[2m{text}\x1b[0m") } else { text.to_owned() }
    }

    /// A model's text as it may be shown: on a terminal, without what would command it.
    pub(super) fn safe(&self, text: &str) -> String {
        let command = |c: char| c.is_control() && c != '\n';
        match self.terminal {
            true => text.replace('\t', "    ").replace(command, ""),
            false => text.to_owned(),
        }
    }

    /// Shows a text at once.
    ///
    /// # Errors
    /// Nobody reads any more.
    pub(super) fn show(&self, text: &str) -> Result<()> {
        let mut out = std::io::stdout().lock();
        out.write_all(text.as_bytes()).and_then(|()| out.flush()).map_err(|e| Error::run(format!("cannot print: {e}")))
    }
}

/// Ctrl-C while an answer grows: the first stops it, a second one ends the command.
pub(super) struct Interrupt(Arc<AtomicBool>);

impl Interrupt {
    /// Listens from here on.
    pub(super) fn listen() -> Result<Interrupt> {
        let seen = Arc::new(AtomicBool::new(false));
        let ends = flag::register_conditional_shutdown(SIGINT, INTERRUPTED, seen.clone());
        ends.and_then(|_| flag::register(SIGINT, seen.clone()))
            .map_err(|e| Error::run(format!("cannot listen for signals: {e}")))?;
        Ok(Interrupt(seen))
    }

    /// Whether it came.
    pub(super) fn came(&self) -> bool {
        self.0.load(Ordering::Relaxed)
    }

    /// Forgets it.
    pub(super) fn clear(&self) {
        self.0.store(false, Ordering::Relaxed);
    }
}

/// Lines that a person types, with editing and those typed before.
pub(super) struct Lines(rustyline::Editor<(), MemHistory>);

impl Lines {
    /// On the terminal.
    pub(super) fn new() -> Result<Lines> {
        let config = Config::builder().auto_add_history(true).build();
        let editor = rustyline::Editor::with_history(config, MemHistory::new());
        Ok(Lines(editor.map_err(|e| Error::run(format!("cannot use the terminal: {e}")))?))
    }

    /// The next line; `None` after Ctrl-C or Ctrl-D.
    pub(super) fn next(&mut self) -> Result<Option<String>> {
        match self.0.readline("> ") {
            Ok(line) => Ok(Some(line)),
            Err(ReadlineError::Interrupted | ReadlineError::Eof) => Ok(None),
            Err(e) => Err(Error::run(format!("cannot read from the terminal: {e}"))),
        }
    }
}
