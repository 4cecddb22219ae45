//! The card of a model on a hub: `README.md` as Hugging Face reads it (huggingface.co/docs/hub/model-cards), made from the files of
//! the run that the model came of, and a picture of its curves.
//!
//! A card is public. So it has numbers and names of hubs alone: no row, no text of one, no path of this machine.

use std::fmt::Write;
use std::path::Path;

use serde_json::{Map, Value};

use super::chart::{numbers, picture, short};
use super::{ARGS, FACTS, LOG, excerpt};

/// The picture beside the card.
pub const PICTURE: &str = "curves.svg";

/// What a card is of.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Weights {
    /// LoRA, of its rank; on experts as well.
    Adapter {
        /// The largest rank of a module.
        rank: u64,
        /// Whether it is on parameters that are no linear's.
        on_experts: bool,
    },
    /// A whole model that transformers reads.
    Checkpoint,
    /// A model for llama.cpp.
    Gguf,
}

/// What is said of a model.
pub struct Card<'a> {
    /// `owner/name`.
    pub id: &'a str,
    /// What is pushed.
    pub weights: Weights,
    /// The model that was trained, by its name on the hub, and the page of the hub that it has there.
    pub base: Option<(&'a str, String)>,
    /// A license in the hub's words.
    pub license: Option<&'a str>,
    /// The folder of the run, and the last step that counts.
    pub run: Option<(&'a Path, Option<u64>)>,
    /// The command that fetches the repository, where its id alone is not understood by other programs.
    pub download: Option<String>,
    /// The prefix that names a dataset of this hub.
    pub prefix: &'a str,
}

type Line = Map<String, Value>;

/// Settings that a card tells, of `args.json`: flags that say nothing of paths and texts.
const SETTINGS: &[&str] = &[
    "loss",
    "loss_weights",
    "beta",
    "label_smoothing",
    "rpo_alpha",
    "ld_alpha",
    "f_divergence",
    "learning_rate",
    "lr_scheduler",
    "warmup_ratio",
    "warmup_steps",
    "batch_size",
    "num_epochs",
    "max_steps",
    "max_length",
    "weight_decay",
    "adam_beta1",
    "adam_beta2",
    "max_grad_norm",
    "lora_rank",
    "lora_alpha",
    "lora_dropout",
    "target_modules",
    "use_rslora",
    "use_dora",
    "init_lora_weights",
    "loraplus_lr_ratio",
    "quantization",
    "dtype",
    "seed",
];

/// Losses that are not called DPO, as hubs tag them.
const TAGS: &[(&str, &str)] = &[
    ("sft", "sft"),
    ("kto", "kto"),
    ("bco", "bco"),
    ("orpo", "orpo"),
    ("orpo_prompt", "orpo"),
    ("cpo", "cpo"),
    ("simpo", "simpo"),
];

/// Names of metrics as they are told.
const METRICS: [(&str, &str); 3] =
    [("Loss", "loss"), ("Margin of rewards", "rewards/margins"), ("Accuracy", "rewards/accuracies")];

impl Card<'_> {
    /// `README.md`, and [`PICTURE`] where there are curves.
    pub fn write(&self) -> (String, Option<String>) {
        let object = |name: &str| {
            self.run
                .and_then(|(run, _)| serde_json::from_str::<Value>(&excerpt::read(run, name)).ok())
                .unwrap_or_default()
        };
        let (args, facts) = (object(ARGS), object(FACTS));
        let lines = self.lines();
        let picture = picture(&lines);
        let shown = picture.as_ref().map(|_| format!("\n![Curves of the training]({PICTURE})\n")).unwrap_or_default();
        let name = self.id.rsplit('/').next().unwrap_or(self.id);
        let sections = [
            ("Results", results(&lines)),
            ("Data", self.data(&args, &facts)),
            ("Settings", settings(&args, &facts)),
            ("Use", self.usage(name)),
        ];
        let section = |(title, body): &(&str, String)| format!("\n## {title}\n\n{}\n", body.trim_end());
        let body: String = sections.iter().filter(|(_, body)| !body.is_empty()).map(section).collect();
        (format!("---\n{}---\n\n# {name}\n\n{}\n{shown}{body}", self.front(&args), self.about(&args)), picture)
    }

    fn lines(&self) -> Vec<Line> {
        let Some((run, until)) = self.run else { return Vec::new() };
        let step = |line: &Line| line.get("global_step").and_then(Value::as_u64).unwrap_or(0);
        excerpt::lines(run, LOG).into_iter().filter(|line| until.is_none_or(|until| step(line) <= until)).collect()
    }

    /// What programs read.
    fn front(&self, args: &Value) -> String {
        let mut yaml = String::new();
        let mut tags = vec!["dpo-host".to_owned()];
        if let Some(license) = self.license {
            let _ = writeln!(yaml, "license: {license}");
        }
        let (library, relation) = match self.weights {
            Weights::Adapter { .. } => ("peft", "adapter"),
            Weights::Checkpoint => ("transformers", "finetune"),
            Weights::Gguf => ("gguf", "quantized"),
        };
        if let Some((base, _)) = &self.base {
            let _ = writeln!(yaml, "base_model: {base}\nbase_model_relation: {relation}");
            tags.push(format!("base_model:{relation}:{base}"));
        }
        let _ = writeln!(yaml, "library_name: {library}\npipeline_tag: text-generation");
        let datasets = self.datasets(args);
        if !datasets.is_empty() {
            yaml += "datasets:\n";
            datasets.iter().for_each(|id| yaml += &format!("- {id}\n"));
        }
        tags.extend(["lora".to_owned()]);
        tags.extend(method(args).into_iter().map(str::to_owned));
        yaml += "tags:\n";
        tags.iter().for_each(|tag| yaml += &format!("- {tag}\n"));
        yaml
    }

    fn about(&self, args: &Value) -> String {
        let base = self.base.as_ref().map(|(base, page)| format!("[{base}]({page})"));
        let base = base.unwrap_or_else(|| "a model that its author does not name".into());
        let what = match self.weights {
            Weights::Adapter { .. } => format!("A LoRA adapter of {base}"),
            Weights::Checkpoint => format!("{base}, with a LoRA adapter merged into it"),
            Weights::Gguf => format!("{base}, with a LoRA adapter merged into it, for llama.cpp"),
        };
        let how = match method(args).as_slice() {
            [] => String::new(),
            methods => format!(" by {}", methods.iter().map(|m| m.to_uppercase()).collect::<Vec<_>>().join(" and ")),
        };
        format!("{what}. Trained{how} with dpo-host.")
    }

    /// Datasets of this hub, by their names there.
    fn datasets(&self, args: &Value) -> Vec<String> {
        let id = |text: &Value| {
            let (hub, rest) = text.as_str()?.split_once("::")?;
            let named = rest.split(['#', '@']).next()?;
            let id: Vec<&str> = named.split('/').take(2).collect();
            let is_plain =
                |part: &&str| !part.is_empty() && part.chars().all(|c| c.is_ascii_alphanumeric() || "-_.".contains(c));
            (hub == self.prefix && id.len() == 2 && id.iter().all(is_plain)).then(|| id.join("/"))
        };
        let mut ids: Vec<String> = args["dataset"].as_array().into_iter().flatten().filter_map(id).collect();
        ids.dedup();
        ids
    }

    fn data(&self, args: &Value, facts: &Value) -> String {
        let Some(examples) = facts["examples"].as_u64() else { return String::new() };
        let sources = args["dataset"].as_array().map_or(0, Vec::len);
        let datasets = self.datasets(args);
        let own = sources.saturating_sub(datasets.len());
        let mut named = datasets;
        if own > 0 {
            named.push(if named.is_empty() {
                "data of the author's own".into()
            } else {
                "others of the author's own".into()
            });
        }
        let noun = facts["data"]["noun"]
            .as_str()
            .filter(|noun| noun.bytes().all(|b| b.is_ascii_lowercase()))
            .unwrap_or("example");
        let mut text = format!("{examples} {noun}s from {}", named.join(", "));
        if let Some(held) = facts["validation_examples"].as_u64().filter(|n| *n > 0) {
            let _ = write!(text, "; {held} to evaluate on");
        }
        if let Some(tokens) = facts["data"]["unique_tokens"].as_u64() {
            let _ = write!(text, "; {tokens} tokens an epoch");
        }
        text + ".\n"
    }

    /// How it is used.
    fn usage(&self, name: &str) -> String {
        let fetch = self.download.clone().unwrap_or_else(|| format!("hf download {} --local-dir {name}", self.id));
        // Programs that fetch by themselves are given the id.
        let place = if self.download.is_some() { format!("./{name}") } else { self.id.to_owned() };
        let fetched_first = self.download.is_some() || self.weights == Weights::Gguf;
        let mut text = if fetched_first { fence("", &fetch) } else { String::new() };
        let base = self.base.as_ref().map_or("BASE_MODEL", |(base, _)| base);
        match self.weights {
            Weights::Adapter { rank, on_experts } => {
                text += &fence(
                    "python",
                    &match self.base.is_some() && self.download.is_none() {
                        true => format!(
                            "from peft import AutoPeftModelForCausalLM\n\nmodel = AutoPeftModelForCausalLM.from_pretrained(\"{place}\")"
                        ),
                        false => format!(
                            "from peft import PeftModel\nfrom transformers import AutoModelForCausalLM\n\n\
                         model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(\"{base}\"), \"{place}\")"
                        ),
                    },
                );
                // On experts vLLM reads what `merge --format adapter` writes.
                if !on_experts {
                    let rank = rank.next_power_of_two().max(8);
                    text += &fence(
                        "",
                        &format!(
                            "vllm serve {base} --enable-lora --max-lora-rank {rank} --lora-modules {name}={place}"
                        ),
                    );
                }
                let fetch = if fetched_first { String::new() } else { fetch + "\n" };
                text += &fence(
                    "",
                    &format!(
                        "{fetch}dpo-host chat --compare --adapter {name}\ndpo-host merge --adapter {name} --output-dir {name}-merged"
                    ),
                );
            }
            Weights::Checkpoint => {
                text += &fence(
                    "python",
                    &format!(
                        "from transformers import AutoModelForCausalLM, AutoTokenizer\n\n\
                     model = AutoModelForCausalLM.from_pretrained(\"{place}\")\n\
                     tokenizer = AutoTokenizer.from_pretrained(\"{place}\")"
                    ),
                );
                text += &fence("", &format!("vllm serve {place}"));
            }
            Weights::Gguf => text += &fence("", &format!("llama-cli -m {name}/*.gguf -cnv")),
        }
        text
    }
}

/// A block of code.
fn fence(language: &str, code: &str) -> String {
    format!("```{language}\n{code}\n```\n\n")
}

/// By what it was trained.
fn method(args: &Value) -> Vec<&'static str> {
    let mut methods: Vec<&str> = Vec::new();
    let losses: Vec<&str> = args["loss"].as_array().into_iter().flatten().filter_map(Value::as_str).collect();
    for loss in losses {
        let tag = TAGS.iter().find(|(name, _)| *name == loss).map_or("dpo", |(_, tag)| tag);
        if !methods.contains(&tag) {
            methods.push(tag);
        }
    }
    methods
}

/// Numbers at the beginning, at the end, and of evaluations.
fn results(lines: &[Line]) -> String {
    let mut rows = String::new();
    let best = super::chart::best(lines).map(|[step, _]| step);
    for (title, name) in METRICS {
        let (logged, held) = numbers(lines, name);
        let ([.., last], Some(first)) = (logged.as_slice(), logged.first()) else { continue };
        let cell = |point: Option<&[f64; 2]>| {
            point.map_or_else(|| "–".into(), |[step, value]| format!("{} (step {step})", short(*value)))
        };
        let at_best = held.iter().find(|[step, _]| Some(*step) == best);
        let _ = writeln!(
            rows,
            "| {title} | {} | {} | {} | {} |",
            cell(Some(first)),
            cell(Some(last)),
            cell(held.last()),
            cell(at_best)
        );
    }
    match rows.is_empty() {
        true => rows,
        false => format!("| | first | last | last evaluation | best evaluation |\n|---|---|---|---|---|\n{rows}"),
    }
}

fn settings(args: &Value, facts: &Value) -> String {
    let text = |value: &Value| match value {
        Value::String(text) => text.clone(),
        Value::Array(list) => {
            list.iter().map(|v| v.as_str().map_or_else(|| v.to_string(), str::to_owned)).collect::<Vec<_>>().join(" ")
        }
        value => value.to_string(),
    };
    let told =
        |value: &&Value| !value.is_null() && *value != &Value::Array(Vec::new()) && *value != &Value::from(false);
    // What flags left open: what they came to, and options of losses.
    let resolved = &args["resolved"];
    let option = |name: &str| resolved["losses"].as_array()?.iter().find_map(|loss| loss["options"].get(name));
    let rows = SETTINGS.iter().filter_map(|name| {
        let came = &resolved["settings"][format!("--{}", name.replace('_', "-"))];
        let given = args.get(*name).filter(|value| *value != "auto");
        let value = [given, Some(came), option(name)].into_iter().flatten().find(told)?;
        // A start that is a path of this machine, and patterns, are left out.
        let value = text(value);
        (!value.contains(['/', '|', '\n'])).then(|| format!("| `{name}` | {value} |\n"))
    });
    let rows: String = rows.collect();
    let machine = [("device", "device"), ("version", "dpo-host")];
    let machine = machine.iter().filter_map(|(key, name)| Some(format!("| {name} | {} |\n", facts[*key].as_str()?)));
    match rows.is_empty() {
        true => rows,
        false => format!("| | |\n|---|---|\n{rows}{}", machine.collect::<String>()),
    }
}
