//! Families whose graphs this host cannot run, each for one reason, and one that it can.

use dpo_plugin_api::prelude::*;

/// A family by its name and what it does to a sound graph.
pub struct Spoiled {
    name: &'static str,
    spoil: fn(&mut ModelGraph),
}

impl ModelFamily for Spoiled {
    fn name(&self) -> &'static str {
        self.name
    }

    fn summary(&self) -> &'static str {
        "for tests"
    }

    fn claims(&self) -> &'static [&'static str] {
        &["HostileForCausalLM"]
    }

    fn example_config(&self) -> &'static str {
        "{}"
    }

    fn graph(&self, config: &Config) -> Result<ModelGraph> {
        let mut graph = GraphBuilder::decoder(8, 16);
        graph.embed(|b, tokens| b.embedding("embed.weight", tokens, 16, 8));
        let block = graph.block("decoder", |b, x| {
            let h = b.rms_norm("norm", x, 1e-6);
            let h = b.linear("up", h, 24);
            let h = b.linear("down", h, 8);
            b.add(x, h)
        });
        graph.layer(block, "layers.0.");
        graph.head(|b, x| b.lm_head("head.weight", x, 16));
        let mut graph = graph.finish(config)?;
        (self.spoil)(&mut graph);
        Ok(graph)
    }
}

plugin! { models: [
    Spoiled { name: "sound", spoil: |_| {} },
    Spoiled { name: "panics", spoil: |_| panic!("no graph comes to mind") },
    Spoiled { name: "unknown-op", spoil: |g| g.blocks[0].nodes[0].op = "hyper_norm".into() },
    Spoiled {
        name: "unknown-attribute",
        spoil: |g| drop(g.blocks[0].nodes[0].attrs.insert("momentum".into(), json!(0.9))),
    },
    // The builder would not let these widths pass, so the plain data is edited.
    Spoiled { name: "wrong-widths", spoil: |g| g.blocks[0].nodes[2].width = 9 },
    Spoiled { name: "unknown-feature", spoil: |g| g.requires.push("telepathy".into()) },
] }
