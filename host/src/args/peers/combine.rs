//! What arguments mean together, where the tools agree: examples of a step, losses with their options, rows, and what
//! transformers' trainer is told.

use std::path::Path;

use dpo_core::error::{Error, Result};
use dpo_ranks::Place;
use serde_json::Value;

use super::super::flag::Flag;
use super::translation::Translation;

/// Most pairs of a step.
const MOST_PAIRS: usize = 1 << 24;
const PER_DEVICE: &str = "per_device_train_batch_size";
const ACCUMULATION: &str = "gradient_accumulation_steps";
/// From how many processes on a machine ms-swift launches them, where no launcher has.
const PER_NODE: &str = "NPROC_PER_NODE";
/// More steps than any run has.
const NEVER: &str = "1000000000";

/// Of arguments whose names do not tell which tool wrote them.
pub(super) fn nobodys(t: &mut Translation) -> Result<()> {
    let names = t.take("loss_type").map(|flag| (flag.values, flag.place));
    losses(t, names, None)?;
    for (theirs, ours) in [("model_name_or_path", "model"), ("ref_model", "ref-model")] {
        if let Some(flag) = t.take(theirs) {
            t.push_as(ours, flag);
        }
    }
    lists(t);
    trainer(t)?;
    batch(t)
}

/// How many processes start, where ms-swift's variable says so and no flag does.
pub(super) fn processes(t: &mut Translation) -> Result<()> {
    if Place::from_environment().ok().flatten().is_some() || t.has("gpus") {
        return Ok(());
    }
    let variable = |name: &str| match std::env::var(name).ok().filter(|v| !v.is_empty()) {
        None => Ok(1_usize),
        Some(text) => text.parse().ok().filter(|n| *n > 0).ok_or_else(|| {
            Error::input(format!("'{text}' should be a whole number above 0")).at(name).help("or unset it: see --gpus")
        }),
    };
    // A process that a launcher has started alone starts no others.
    let (here, nodes) = match std::env::var_os("WORLD_SIZE") {
        Some(_) => (1, 1),
        None => (variable(PER_NODE)?, variable("NNODES")?),
    };
    match nodes {
        1 if here == 1 => Ok(()),
        1 => {
            t.notes.push(format!("{PER_NODE}={here} is taken as --gpus {here}: so many processes are started"));
            t.push("gpus", [here.to_string()], None);
            Ok(())
        }
        _ => Err(Error::input(format!("{nodes} machines, but no launcher has started this process")).at("NNODES").help(
            format!("start it on each with torchrun --no-python --nnodes {nodes} --nproc-per-node {here} and where they meet"),
        )),
    }
}

/// `--batch-size` is of all processes; theirs is of one.
pub(super) fn batch(t: &mut Translation) -> Result<()> {
    let ((each, first), (times, second)) = (t.take_value(PER_DEVICE), t.take_value(ACCUMULATION));
    let flags: Vec<&Flag> = first.iter().chain(&second).collect();
    if each.is_none() && times.is_none() || flags.is_empty() && t.has("batch-size") {
        return Ok(());
    }
    // What is no number is refused when flags are parsed.
    let gpus = || t.ours_of("gpus")?.values.first()?.parse().ok();
    let place = Place::from_environment().ok().flatten();
    let processes: usize = place.map(|place| place.size).or_else(gpus).unwrap_or(1).max(1);
    let number = |value: &Option<String>, flag: &Option<Flag>| match value {
        None => Ok(None),
        Some(value) => value.parse().ok().filter(|n| *n > 0).map(Some).ok_or_else(|| {
            let place = flag.as_ref().map_or(value.clone(), Flag::spelled);
            Error::input("should be a whole number above 0").at(place)
        }),
    };
    let each: usize = number(&each, &first)?.unwrap_or(1);
    let most = each.saturating_mul(processes);
    // ms-swift accumulates up to 16 pairs over all processes where it is not told otherwise.
    let times: usize = number(&times, &second)?.unwrap_or_else(|| 16_usize.div_ceil(most));
    let pairs = most.checked_mul(times).filter(|pairs| *pairs <= MOST_PAIRS).ok_or_else(|| {
        let spelled = second.as_ref().or(first.as_ref()).map_or_else(String::new, Flag::spelled);
        Error::input(format!("{each} x {times} x {processes} processes is more than {MOST_PAIRS} pairs a step"))
            .at(spelled)
            .help("16 to 64 are usual")
    })?;
    t.notes
        .push(format!("--batch-size {pairs}: {PER_DEVICE} {each} x {ACCUMULATION} {times} x world size {processes}"));
    let place = flags.iter().map(|flag| flag.place.clone()).min().flatten();
    t.push("batch-size", [pairs.to_string()], place);
    Ok(())
}

/// Arguments that are options of some losses: name, option, and the losses that have it.
const OPTIONS: &[(&str, &str, &[&str])] = &[
    ("cpo_alpha", "cpo_alpha", &["cpo", "simpo"]),
    ("simpo_gamma", "simpo_gamma", &["simpo"]),
    ("discopop_tau", "discopop_tau", &["discopop"]),
    ("desirable_weight", "desirable_weight", &["kto"]),
    ("undesirable_weight", "undesirable_weight", &["kto"]),
    ("kto_chosen_weight", "desirable_weight", &["kto"]),
    ("kto_rejected_weight", "undesirable_weight", &["kto"]),
    ("f_alpha_divergence_coef", "f_alpha", DIVERGENT),
];

/// Losses with a divergence from the reference.
const DIVERGENT: &[&str] = &[
    "sigmoid",
    "hinge",
    "ipo",
    "exo_pair",
    "nca_pair",
    "robust",
    "bco_pair",
    "sppo_hard",
    "apo_down",
    "discopop",
    "sigmoid_norm",
];

/// The losses, and those of their options that are no flags, beside those that the tool has set.
pub(super) fn losses(
    t: &mut Translation,
    names: Option<(Vec<String>, Option<String>)>,
    set: Option<String>,
) -> Result<()> {
    if let Some((names, place)) = names {
        t.push("loss", names, place);
    }
    for name in ["label_smoothing", "dpo_label_smoothing"] {
        // Not all losses have it.
        if let Some(flag) = t.take(name).filter(|f| f.values.first().and_then(|v| v.parse().ok()) != Some(0.0)) {
            t.push_as("label-smoothing", flag);
        }
    }
    let losses = t.ours_of("loss").map_or_else(|| vec!["sigmoid".to_owned()], |flag| flag.values.clone());
    let (mut values, mut places) = (Vec::from_iter(set), Vec::new());
    for (argument, option, of) in OPTIONS {
        let (value, flag) = t.take_value(argument);
        let Some(value) = value else { continue };
        if losses.iter().any(|loss| of.contains(&loss.as_str())) {
            values.push(format!("{option}={value}"));
            places.push(flag.and_then(|flag| flag.place));
        } else if let Some(flag) = flag {
            t.notes.push(format!("{} is ignored: only the loss {} has it", flag.spelled(), of.join(", ")));
        }
    }
    if !values.is_empty() {
        // Those that the user named count more.
        let named = t.ours_of("loss-option").cloned();
        places.extend(named.iter().map(|flag| flag.place.clone()));
        values.extend(named.into_iter().flat_map(|flag| flag.values));
        t.ours.retain(|flag| flag.name != "--loss-option");
        t.push("loss-option", values, places.into_iter().min().flatten());
    }
    Ok(())
}

/// Lists with commas, as the tools write them on a command line. A file whose name has a comma is one file.
pub(super) fn lists(t: &mut Translation) {
    for flag in &mut t.ours {
        let list = match flag.name.as_str() {
            "--dataset" | "--val-dataset" => |value: &String| !exists(value),
            // A comma of a regular expression stands within braces or parentheses.
            "--target-modules" => |value: &String| !value.contains(['(', '{', '[', '\\', '*']),
            _ => continue,
        };
        let split = |value: &String| match list(value) {
            true => value.split(',').map(str::trim).filter(|v| !v.is_empty()).map(str::to_owned).collect(),
            false => vec![value.clone()],
        };
        flag.values = flag.values.iter().flat_map(split).collect();
    }
}

/// Whether rows that are named so are on the disk.
pub(super) fn exists(rows: &str) -> bool {
    let whole = || rows.rsplit_once('#').map_or(rows, |(path, _)| path);
    Path::new(rows).exists() || Path::new(whole()).exists()
}

/// Whether a text can be `owner/name` of a hub: the kinds of files are no names.
pub(super) fn is_id(text: &str) -> bool {
    let plain = |part: &str| {
        let letter = |c: char| c.is_ascii_alphanumeric() || "-_.".contains(c);
        !part.is_empty() && !part.starts_with('.') && part.chars().all(letter)
    };
    let parts: Vec<&str> = text.split('/').collect();
    let file = [".json", ".jsonl", ".csv", ".parquet", ".gz", ".zst"].iter().any(|kind| text.ends_with(kind));
    parts.len() == 2 && parts.into_iter().all(plain) && !file
}

/// Losses without a reference.
const FREE: &[&str] = &["cpo", "simpo", "orpo"];

/// An adapter to train on. Its reference is the model without it there, unless another one is named; here it would be the adapter
/// as it is at the start.
pub(super) fn start_from(t: &mut Translation, start: Flag) {
    let free = t.ours_of("loss").is_some_and(|flag| flag.values.iter().all(|loss| FREE.contains(&loss.as_str())));
    if !free
        && !t.has("ref-model")
        && !t.has("ref-adapter")
        && let Some(model) = t.ours_of("model").cloned()
    {
        t.notes.push(format!(
            "{}: the reference is the model without it; --ref-adapter names another one",
            start.spelled()
        ));
        t.push_as("ref-model", model);
    }
    t.push_as("init-adapter", start);
}

/// `output_dir`, unless ours is there as well: a launcher tells its ranks so.
pub(super) fn output(t: &mut Translation) {
    if let Some(dir) = t.take("output_dir").filter(|_| !t.has("output-dir")) {
        t.push_as("output-dir", dir);
    }
}

/// What transformers' trainer is told and is not one flag of ours.
pub(super) fn trainer(t: &mut Translation) -> Result<()> {
    dropout(t);
    if let Some(flag) = t.take("max_steps").filter(|flag| !flag.values.first().is_some_and(|v| v.starts_with('-'))) {
        t.push_as("max-steps", flag);
    }
    // Below 1 it is a share of the steps; at 0 warmup_ratio counts.
    if let Some(flag) = t.take("warmup_steps") {
        match flag.values.first().and_then(|v| v.parse::<f64>().ok()) {
            Some(0.0) => {}
            Some(share) if share > 0.0 && share < 1.0 => t.push_as("warmup-ratio", flag),
            Some(steps) if steps.fract() == 0.0 && steps > 0.0 => {
                t.push("warmup-steps", [format!("{steps}")], flag.place);
            }
            _ => t.push_as("warmup-steps", flag),
        }
    }
    schedule(t)?;
    evaluation(t)?;
    report(t);
    match t.take("resume_from_checkpoint").map(|flag| (flag.values.first().cloned(), flag)) {
        Some((Some(value), flag)) if value.eq_ignore_ascii_case("true") => {
            t.push("resume-from-checkpoint", ["latest"], flag.place);
        }
        Some((Some(value), _)) if value.eq_ignore_ascii_case("false") => {}
        Some((_, flag)) => t.push_as("resume-from-checkpoint", flag),
        None => {}
    }
    for name in ["use_cpu", "no_cuda"] {
        if let Some(flag) = t.take(name).filter(is_on) {
            t.push("device", ["cpu"], flag.place);
        }
    }
    if let Some(flag) = t.take("train_sampling_strategy") {
        match flag.values.first().map(String::as_str) {
            Some("sequential") => t.push("shuffle", ["false"], flag.place),
            Some("random") => {}
            _ => t.notes.push(format!("{} is ignored: examples of any lengths are packed", flag.spelled())),
        }
    }
    Ok(())
}

/// Trackers, under the names of transformers and of the tools; those of SwanLab count where it is one.
fn report(t: &mut Translation) {
    let (mut to, mut place) = (Vec::new(), None);
    if let Some(flag) = t.take("report_to") {
        let (known, others): (Vec<String>, Vec<String>) =
            flag.values.iter().cloned().partition(|name| TRACKERS.contains(&name.as_str()));
        if !others.is_empty() {
            let (flag, known) = (flag.spelled(), TRACKERS.join(", "));
            t.notes.push(format!("of {flag} is ignored: {}; trackers are {known}", others.join(" ")));
        }
        (to, place) = (known, flag.place);
    }
    if let Some(flag) = t.take("use_swanlab").filter(is_on) {
        to.push("swanlab".into());
        place = place.or(flag.place);
    }
    let of_swanlab = to.iter().any(|name| name == "swanlab");
    for (theirs, ours) in [("run_name", "run-name"), ("project", "project")] {
        if let Some(flag) = t.take(theirs) {
            t.push_as(ours, flag);
        }
    }
    if of_swanlab {
        if let (Some(project), flag) = t.take_value("swanlab_project") {
            t.push("project", [project], flag.and_then(|flag| flag.place));
        }
        for name in ["swanlab_run_name", "swanlab_exp_name"] {
            if let Some(flag) = t.take(name) {
                t.push_as("run-name", flag);
            }
        }
    }
    if !to.is_empty() {
        t.push("report-to", to, place);
    }
}

/// Trackers that are written, by transformers' names.
const TRACKERS: [&str; 4] = ["tensorboard", "wandb", "swanlab", "mlflow"];

/// Whether a switch is on.
pub(super) fn is_on(flag: &Flag) -> bool {
    flag.values.first().is_none_or(|value| ["true", "1", "yes"].contains(&value.to_lowercase().as_str()))
}

/// A rate of dropout, which none of the tools applies in preference training unless TRL is told so.
fn dropout(t: &mut Translation) {
    let Some(flag) = t.take("lora_dropout") else { return };
    if t.ours_of("disable-dropout").is_some_and(|disable| !is_on(disable)) {
        return t.push_as("lora-dropout", flag);
    }
    t.notes.push(format!(
        "{} is ignored: dropout is off in preference training, as in TRL, LLaMA-Factory and ms-swift; --disable-dropout false applies it",
        flag.spelled()
    ));
}

fn schedule(t: &mut Translation) -> Result<()> {
    let Some(flag) = t.take("lr_scheduler_kwargs") else { return Ok(()) };
    let wrong = |what: String| {
        Err(Error::input(what).at(flag.spelled()).help("min_lr of the schedule cosine_with_min_lr is --min-lr"))
    };
    let text = flag.values.join(" ");
    let Ok(Value::Object(options)) = serde_json::from_str::<Value>(&text) else {
        return wrong("should be a mapping, as JSON".into());
    };
    for (option, value) in options {
        let value = value.as_str().map_or_else(|| value.to_string(), str::to_owned);
        match option.as_str() {
            "min_lr" => t.push("min-lr", [value], flag.place.clone()),
            _ => return wrong(format!("the schedules have no option '{option}'")),
        }
    }
    Ok(())
}

/// When it is evaluated and saved. Transformers evaluates as often as it logs where nothing says when; ms-swift as it saves, as here.
fn evaluation(t: &mut Translation) -> Result<()> {
    let strategy = t.peer.and_then(|peer| peer.argument("eval_strategy"));
    let as_logged = strategy.is_some_and(|argument| argument.default == Some("no"));
    let (evaluate, flag) = t.take_value("eval_strategy");
    let steps = t.take("eval_steps");
    let says = |place: String, what: &str, flag: &str| {
        Err(Error::input(format!("the end of an epoch is no time to {what}"))
            .at(place)
            .help(format!("say {flag} N: an epoch has as many steps as examples / --batch-size")))
    };
    match (evaluate.as_deref(), flag) {
        (Some("epoch"), Some(flag)) => return says(flag.spelled(), "evaluate", "--eval-steps"),
        (Some("no" | "false"), Some(flag)) => {
            let what = "there are no evaluations, so no examples are held out";
            if t.has("split-dataset-ratio") || t.has("val-dataset") {
                t.notes.push(format!("{}: {what}", flag.spelled()));
            }
            t.ours.retain(|flag| !["--split-dataset-ratio", "--val-dataset"].contains(&flag.name.as_str()));
        }
        (Some("steps"), Some(_)) if as_logged && steps.is_none() && !t.has("eval-steps") => {
            let logging = t.ours_of("logging-steps").map(|flag| (flag.values.clone(), flag.place.clone()));
            let default = || t.peer.and_then(|peer| peer.argument("logging_steps")?.default);
            let (values, place) = logging.unwrap_or_else(|| (vec![default().unwrap_or("500").to_owned()], None));
            t.push("eval-steps", values, place);
        }
        _ => {}
    }
    if let Some(flag) = steps {
        t.push_as("eval-steps", flag);
    }
    match t.take("save_strategy").map(|flag| (flag.values.first().cloned().unwrap_or_default(), flag)) {
        Some((value, flag)) if value == "epoch" => return says(flag.spelled(), "save", "--save-steps"),
        Some((value, flag)) if value == "best" => {
            return Err(Error::input("checkpoints are saved by steps")
                .at(flag.spelled())
                .help("say --save-steps N, and --load-best-model-at-end true for the adapter of the best evaluation"));
        }
        Some((value, flag)) if ["no", "false"].contains(&value.as_str()) => {
            if !t.has("eval-steps") && t.has("save-steps") {
                let saves = t.ours_of("save-steps").map(|f| (f.values.clone(), f.place.clone())).unwrap_or_default();
                t.push("eval-steps", saves.0, saves.1);
            }
            t.ours.retain(|flag| flag.name != "--save-steps");
            t.push("save-steps", [NEVER], flag.place);
        }
        _ => {}
    }
    Ok(())
}
