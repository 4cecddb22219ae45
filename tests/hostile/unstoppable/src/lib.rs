//! Code that no panic handler stops: a manifest that does what `HOSTILE_MANIFEST` says, and families whose graphs do the same.

use std::time::Duration;

use dpo_plugin_api::prelude::*;

/// Hangs, exits, aborts, or takes all memory.
fn misbehave(how: &str) {
    match how {
        "hangs" => loop {
            std::thread::sleep(Duration::from_secs(1));
        },
        "exits" => std::process::exit(0),
        "aborts" => std::process::abort(),
        "hoards" => drop(std::hint::black_box(vec![1_u8; 1 << 40])),
        _ => {}
    }
}

/// A family whose graph is no graph.
pub struct Unstoppable(&'static str);

impl ModelFamily for Unstoppable {
    fn name(&self) -> &'static str {
        misbehave(&std::env::var("HOSTILE_MANIFEST").unwrap_or_default());
        self.0
    }

    fn summary(&self) -> &'static str {
        "for tests"
    }

    fn claims(&self) -> &'static [&'static str] {
        &["UnstoppableForCausalLM"]
    }

    fn example_config(&self) -> &'static str {
        "{}"
    }

    fn graph(&self, _: &Config) -> Result<ModelGraph> {
        misbehave(self.0);
        bail!("it went on")
    }
}

/// A format that ends the process where it should read a row.
pub struct Quits;

impl DatasetFormat for Quits {
    fn name(&self) -> &'static str {
        "quits"
    }

    fn summary(&self) -> &'static str {
        "for tests"
    }

    fn examples(&self) -> &'static str {
        ""
    }

    fn recognises(&self, _: &Row) -> u8 {
        0
    }

    fn records(&self, _: &Row) -> Result<Vec<Record>> {
        std::process::exit(0)
    }
}

plugin! {
    models: [Unstoppable("hangs"), Unstoppable("exits"), Unstoppable("aborts"), Unstoppable("hoards")],
    datasets: [Quits],
}
