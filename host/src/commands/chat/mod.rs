//! `dpo-host chat`: talk to a model, to what an adapter made of it, or to both.

mod columns;
mod screen;

use std::io::BufRead;
use std::path::PathBuf;

use clap::Args;
use dpo_plugin_api::dataset::Message;
use serde_json::{Map, json};

use self::columns::Columns;
use self::screen::{Interrupt, Lines, Screen};
use crate::args::DeviceArg;
use crate::args::model::ModelArgs;
use crate::args::sampling::SamplingArgs;
use crate::args::storage::StorageArgs;
use crate::{backends, demo};
use dpo_core::console;
use dpo_core::decoder::Sequences;
use dpo_core::error::{Error, Result};
use dpo_core::lora::Adapter;
use dpo_core::plan::MemoryOptions;
use dpo_generate::{Answer, Generator, Sampling, Stop, Variant};
use dpo_hub::Need;
use dpo_hub::model::{self, Model};
use dpo_plugins::Registry;

#[derive(Args)]
pub(crate) struct ChatOptions {
    /// Checkpoint: a folder, or a model of a hub: owner/name of Hugging Face, ms::owner/name of ModelScope. By default the one
    /// that the adapter names; without an adapter the demo's
    #[arg(long, value_name = "DIR|ID")]
    model: Option<String>,
    /// PEFT adapter: the output folder of a run, or one of its checkpoints
    #[arg(long, visible_alias = "adapters", value_name = "DIR")]
    adapter: Option<PathBuf>,
    #[command(flatten)]
    reading: ModelArgs,
    /// Also show the answers of the base model, without the adapter
    #[arg(long, requires = "adapter")]
    compare: bool,
    /// System prompt
    #[arg(long, value_name = "TEXT")]
    system: Option<String>,
    /// Prompts to answer, each in a conversation of its own. Without it, lines of stdin are the turns of one conversation
    #[arg(long, value_name = "TEXT", num_args = 1..)]
    prompt: Vec<String>,
    /// Print an object a prompt: {"prompt", "base", "tuned"}, each answer with its text, its tokens and why it ended
    #[arg(long)]
    json: bool,
    /// Where to compute: auto, cpu, cuda or cuda:N
    #[arg(long, value_name = "DEVICE", default_value_t = DeviceArg::Auto)]
    device: DeviceArg,
    #[command(flatten)]
    storage: StorageArgs,
    #[command(flatten)]
    sampling: SamplingArgs,
}

pub(crate) fn chat(registry: &Registry, options: &ChatOptions) -> Result<()> {
    let name = match (&options.model, &options.adapter) {
        (None, None) => demo::write()?.model.display().to_string(),
        (model, adapter) => demo::or_named(model::named(model.as_deref(), adapter.as_deref())?)?,
    };
    // What can be told without weights is told before they are fetched.
    let folder = model::locate(&name, Need::WeightsToCome)?;
    let model = Model::open(registry, &folder, &options.reading.options())?;
    model.warn();
    let adapter = options.adapter.as_ref().map(|folder| Adapter::load(&model.graph, folder)).transpose()?;
    let sampling = Sampling::of(&options.sampling.options(), &folder)?;
    model::locate(&name, Need::Weights)?;
    let variants = match (&adapter, options.compare) {
        (None, _) => vec![Variant::Base],
        (Some(_), false) => vec![Variant::Tuned],
        (Some(_), true) => vec![Variant::Base, Variant::Tuned],
    };
    let memory = options.storage.on(MemoryOptions::default());
    let backend = backends::open(&options.device, None)?;
    let sequences = Sequences::of(variants.len());
    let generator = Generator::open(&model, adapter.into_iter().collect(), backend.as_ref(), sequences, memory)?;
    let screen = Screen::new();
    let interactive = options.prompt.is_empty() && screen.is_interactive();
    let mut chat = Chat {
        generator,
        sampling,
        system: options.system.clone(),
        variants,
        turns: Default::default(),
        json: options.json,
        interrupt: if interactive { Some(Interrupt::listen()?) } else { None },
        screen,
    };
    if interactive {
        console::line(format!("model       {} ({})", folder.display(), model.family.name));
        options.adapter.iter().for_each(|a| console::line(format!("adapter     {}", a.display())));
        console::line(format!("device      {}; /help says what can be typed\n", chat.generator.device()));
        return chat.talk();
    }
    if options.prompt.is_empty() {
        return chat.answer_lines(std::io::stdin().lock());
    }
    for prompt in &options.prompt {
        if options.prompt.len() > 1 && !options.json {
            chat.screen.show(&format!("> {prompt}\n"))?;
        }
        chat.reset();
        chat.ask(prompt)?;
    }
    Ok(())
}

/// A conversation with one variant, or with both.
struct Chat {
    generator: Generator,
    sampling: Sampling,
    system: Option<String>,
    variants: Vec<Variant>,
    /// What each variant and its user have said.
    turns: [Vec<Message>; 2],
    json: bool,
    screen: Screen,
    interrupt: Option<Interrupt>,
}

/// What a line that begins with a slash does; the conversation ends where it is false.
struct Command {
    name: &'static str,
    help: &'static str,
    run: fn(&mut Chat) -> bool,
}

const COMMANDS: &[Command] = &[
    Command {
        name: "/reset",
        help: "begin a new conversation",
        run: |chat| {
            chat.reset();
            console::line("a new conversation");
            true
        },
    },
    Command {
        name: "/help",
        help: "this list",
        run: |_| {
            help();
            true
        },
    },
    Command {
        name: "/quit",
        help: "leave, as Ctrl-C and Ctrl-D do; Ctrl-C while an answer comes stops it",
        run: |_| false,
    },
];

fn help() {
    COMMANDS.iter().for_each(|c| console::line(format!("{:8} {}", c.name, c.help)));
}

impl Chat {
    fn reset(&mut self) {
        self.turns = Default::default();
    }

    /// With a person.
    fn talk(&mut self) -> Result<()> {
        let mut lines = Lines::new()?;
        while let Some(line) = lines.next()? {
            match self.take(&line) {
                Ok(true) => {}
                Ok(false) => break,
                Err(e) => console::line(format!("error: {e}")),
            }
        }
        Ok(())
    }

    /// With whatever writes lines.
    fn answer_lines(&mut self, lines: impl BufRead) -> Result<()> {
        for line in lines.lines() {
            let line = line.map_err(|e| Error::input(format!("cannot read: {e}")).at("stdin"))?;
            if !self.take(&line)? {
                break;
            }
        }
        Ok(())
    }

    /// A line: a command, or what is asked. Answers whether the conversation goes on.
    fn take(&mut self, line: &str) -> Result<bool> {
        let line = line.trim();
        if line.is_empty() {
            return Ok(true);
        }
        match COMMANDS.iter().find(|c| c.name == line) {
            Some(command) => Ok((command.run)(self)),
            None if line.starts_with('/') && !line.contains([' ', '\n']) => {
                Err(Error::unknown("command", line, COMMANDS.iter().map(|c| c.name)))
            }
            None => self.ask(line).map(|()| true),
        }
    }

    /// Shows what is answered; both remember it.
    fn ask(&mut self, prompt: &str) -> Result<()> {
        self.interrupt.iter().for_each(Interrupt::clear);
        for variant in &self.variants {
            let turns = &mut self.turns[*variant as usize];
            if turns.is_empty() {
                turns.extend(self.system.iter().map(|system| Message::new("system", system.as_str())));
            }
            turns.push(Message::new("user", prompt));
        }
        let columns = self.screen.width().filter(|_| self.variants.len() > 1 && !self.json).and_then(Columns::fit);
        let answers = match columns {
            Some(columns) => self.side_by_side(columns),
            None => self.one_by_one(),
        };
        let answers = answers.inspect_err(|_| {
            self.variants.iter().for_each(|variant| drop(self.turns[*variant as usize].pop()));
        })?;
        for answer in &answers {
            self.turns[answer.variant() as usize].push(Message::new("assistant", answer.text()));
        }
        if self.json {
            return self.screen.show(&format!("{}\n", object(prompt, &answers)));
        }
        self.remark(&answers)
    }

    fn begin(&mut self, variant: Variant) -> Result<Answer> {
        self.generator
            .answer(variant.adapter(), &self.turns[variant as usize], &self.sampling)
            .map_err(|e| e.help("/reset begins a new conversation"))
    }

    /// Goes on with an answer; `None` at its end.
    fn step(&mut self, answer: &mut Answer) -> Result<Option<String>> {
        if self.interrupt.as_ref().is_some_and(Interrupt::came) {
            return Ok(self.generator.interrupt(answer));
        }
        self.generator.step(answer)
    }

    fn one_by_one(&mut self) -> Result<Vec<Answer>> {
        let mut answers = Vec::new();
        for variant in self.variants.clone() {
            if self.variants.len() > 1 && !self.json {
                self.screen.show(&format!("{}\n", self.screen.dim(&format!("{}:", variant.name()))))?;
            }
            let mut answer = self.begin(variant)?;
            while let Some(text) = self.step(&mut answer)? {
                if !self.json {
                    self.screen.show(&self.screen.safe(&text))?;
                }
            }
            if !self.json {
                self.screen.show(if answer.text().ends_with('\n') { "\n" } else { "\n\n" })?;
            }
            answers.push(answer);
        }
        Ok(answers)
    }

    fn side_by_side(&mut self, mut columns: Columns) -> Result<Vec<Answer>> {
        let mut answers = [self.begin(Variant::Base)?, self.begin(Variant::Tuned)?];
        let heading = columns.heading([Variant::Base, Variant::Tuned].map(Variant::name));
        self.screen.show(&format!("{}\n", self.screen.dim(&heading)))?;
        while answers.iter().any(|a| a.stop().is_none()) {
            for (side, answer) in answers.iter_mut().enumerate() {
                match self.step(answer)? {
                    Some(text) => columns.push(side, &self.screen.safe(&text)),
                    None => columns.end(side),
                }
                if answer.stop().is_some() {
                    columns.end(side);
                }
            }
            self.screen.show(&columns.draw())?;
        }
        self.screen.show("\n")?;
        Ok(answers.into())
    }

    /// What there is to say of answers: their speed, to a person; why one ended, unless the model ended it.
    fn remark(&self, answers: &[Answer]) -> Result<()> {
        let reason = |answer: &Answer| match answer.stop()? {
            Stop::Turn | Stop::StopString => None,
            Stop::Limit => Some(format!("ended at --max-new-tokens {}", self.sampling.max_new_tokens)),
            Stop::Length => {
                Some("ended at the length that the model is made for; /reset begins a new conversation".into())
            }
            Stop::Interrupt => Some("stopped".into()),
        };
        let mut reasons: Vec<String> = answers.iter().filter_map(reason).collect();
        reasons.dedup();
        if self.screen.is_terminal() {
            let tokens: usize = answers.iter().map(|a| a.ids().len()).sum();
            let start = answers.iter().filter_map(Answer::first).min();
            let seconds = start.map_or(0.0, |start| start.elapsed().as_secs_f64());
            reasons.insert(0, format!("{tokens} tokens, {:.1} tokens/s", tokens as f64 / seconds.max(1e-9)));
            return self.screen.show(&format!("{}\n\n", self.screen.dim(&reasons.join("; "))));
        }
        reasons.iter().for_each(|reason| console::note(reason.as_str()));
        Ok(())
    }
}

/// A prompt with its answers, by variant.
fn object(prompt: &str, answers: &[Answer]) -> serde_json::Value {
    let mut object = Map::from_iter([("prompt".to_owned(), json!(prompt))]);
    for answer in answers {
        let stop = answer.stop().map(Stop::name);
        let value = json!({"text": answer.text(), "tokens": answer.ids().len(), "stop": stop});
        object.insert(answer.variant().name().into(), value);
    }
    object.into()
}
