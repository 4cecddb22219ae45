//! Rotary frequencies as llama.cpp's metadata state them, and whether it would compute the same ones from that.

use std::f64::consts::PI;

use dpo_core::console::Remark;
use dpo_core::error::{Error, Result};
use serde_json::Value as Json;

use crate::architecture::{Architecture, RopeScaling};
use crate::facts::{Facts, Frequencies};
use crate::file::{Metadata, Value};

/// How far frequencies may be from those of the graph, relative to these: a thousandth of a turn after ten thousand radians.
const CLOSE: f64 = 1e-6;

/// What becomes of frequencies: keys without the architecture's name before them, tensors by name, and what the user should know.
#[derive(Default)]
pub(crate) struct Stated {
    pub(crate) keys: Metadata,
    pub(crate) tensors: Vec<(&'static str, Vec<f32>)>,
    pub(crate) remarks: Vec<Remark>,
}

/// Numbers of a config that state a rule (`rope_parameters`, in files of transformers 4 `rope_scaling` and keys beside it).
struct Rule<'a> {
    /// The object that has them; null where there is none.
    own: &'a Json,
    /// What is around it.
    config: &'a Json,
}

impl Rule<'_> {
    fn number(&self, name: &str) -> Option<f64> {
        self.own.get(name).or_else(|| self.config.get(name)).and_then(Json::as_f64)
    }

    fn list(&self, name: &str) -> Option<Vec<f64>> {
        self.own.get(name)?.as_array()?.iter().map(Json::as_f64).collect()
    }

    fn kind(&self) -> &str {
        let named = |name: &str| self.own.get(name).and_then(Json::as_str);
        named("rope_type").or_else(|| named("type")).unwrap_or("default")
    }

    fn original(&self) -> Option<f64> {
        let outside = self.config.get("original_max_position_embeddings").and_then(Json::as_f64);
        outside.or_else(|| self.number("original_max_position_embeddings")).or(self.number("max_position_embeddings"))
    }
}

/// Keys, and where an architecture reads them tensors, from which llama.cpp computes a graph's frequencies.
///
/// # Errors
/// Frequencies that it cannot be brought to compute.
pub(crate) fn stated(architecture: &Architecture, facts: &Facts, config: &Json) -> Result<Stated> {
    let object = |name: &str| config.get(name).filter(|value| value.is_object());
    let rule = object("rope_scaling").or_else(|| object("rope_parameters")).unwrap_or(&Json::Null);
    let of_kind = |kind: &str| rule.get(kind).filter(|value| value.is_object());
    let global = Rule { own: of_kind("full_attention").unwrap_or(rule), config };
    let with_window = |layer: usize| facts.windows.get(layer).is_some_and(Option::is_some);
    let two = architecture.rope == RopeScaling::TwoBases;
    let kinds = |local: bool| {
        let own = facts.ropes.iter().enumerate().filter(move |(layer, _)| !two || with_window(*layer) == local);
        own.filter_map(|(_, rope)| rope.as_ref())
    };
    let Some(frequencies) = kinds(false).next().or_else(|| kinds(true).next()) else {
        return Err(refused("a model without rotary embedding"));
    };
    if kinds(false).any(|other| other != frequencies) {
        return Err(refused("layers with different rotary frequencies"));
    }
    let dimensions = 2 * frequencies.inv_freq.len();
    if dimensions != facts.head_dim && architecture.rope != RopeScaling::LongRope {
        return Err(refused(&format!("{dimensions} of {} columns of a head that turn", facts.head_dim)));
    }
    let theta = global.number("rope_theta").unwrap_or_else(|| base(frequencies));
    let mut stated = Stated::default();
    stated.keys.push(("rope.dimension_count".into(), Value::U32(dimensions as u32)));
    stated.keys.push(("rope.freq_base".into(), Value::F32(theta as f32)));
    scaled(architecture, &global, (theta, frequencies), &mut stated)?;
    if let (true, Some(local)) = (two, kinds(true).next()) {
        let theta = base(local);
        if kinds(true).any(|other| other != local) || !close(&plain(dimensions, theta), local) {
            return Err(refused("scaled frequencies of layers with a window"));
        }
        stated.keys.push(("rope.freq_base_swa".into(), Value::F32(theta as f32)));
    }
    Ok(stated)
}

/// What is said of frequencies that are scaled.
fn scaled(
    architecture: &Architecture,
    rule: &Rule<'_>,
    (theta, frequencies): (f64, &Frequencies),
    stated: &mut Stated,
) -> Result<()> {
    let inv_freq = &frequencies.inv_freq;
    let mut key = |name: &str, value: Value| stated.keys.push((format!("rope.{name}"), value));
    let original = || rule.original().ok_or_else(|| refused("a scaling whose original length is not stated"));
    if architecture.rope == RopeScaling::LongRope {
        key("scaling.original_context_length", Value::U32(original()? as u32));
    }
    match rule.kind() {
        "yarn" => {
            let original = original()?;
            let stretched = rule.number("max_position_embeddings").map(|most| most / original);
            let factor = rule.number("factor").or(stretched).unwrap_or(1.0);
            let beta = |name: &str, usual: f64| rule.number(name).unwrap_or(usual);
            let (fast, slow) = (beta("beta_fast", 32.0), beta("beta_slow", 1.0));
            key("scaling.type", Value::Text("yarn".into()));
            key("scaling.factor", Value::F32(factor as f32));
            key("scaling.original_context_length", Value::U32(original as u32));
            key("scaling.yarn_beta_fast", Value::F32(fast as f32));
            key("scaling.yarn_beta_slow", Value::F32(slow as f32));
            let theirs = yarn(2 * inv_freq.len(), theta, (original, factor), (fast, slow));
            let is_untruncated = rule.own.get("truncate").and_then(Json::as_bool) == Some(false);
            if (theirs.scale - frequencies.scale).abs() > CLOSE {
                return Err(refused(&format!("YaRN with a factor of {} on attention", frequencies.scale)));
            }
            if !close(&theirs.inv_freq, frequencies) {
                if !is_untruncated {
                    return Err(refused("these frequencies of YaRN"));
                }
                stated.remarks.push(Remark::from(
                    "llama.cpp rounds the columns between which YaRN passes from one frequency to the other, which this model does not",
                ));
            }
            Ok(())
        }
        "longrope" | "su" => {
            let (short, long) = (rule.list("short_factor"), rule.list("long_factor"));
            let (Some(short), Some(long), RopeScaling::LongRope) = (short, long, architecture.rope) else {
                return Err(refused("LongRoPE in this architecture"));
            };
            let theirs: Vec<f64> =
                plain(2 * inv_freq.len(), theta).iter().zip(&short).map(|(plain, factor)| plain / factor).collect();
            if !close(&theirs, frequencies) || long.len() != short.len() {
                return Err(refused("these frequencies of LongRoPE"));
            }
            key("scaling.attn_factor", Value::F32(frequencies.scale as f32));
            let original = original()? as u64;
            stated.remarks.push(
                Remark::from(format!(
                    "llama.cpp takes the frequencies for long texts whenever its context is of more than {original} tokens, also for short ones"
                ))
                .help(format!("run it with -c {original}, in ollama with PARAMETER num_ctx {original}, for what was trained")),
            );
            let narrow = |list: Vec<f64>| list.into_iter().map(|factor| factor as f32).collect();
            stated.tensors.push(("rope_factors_long.weight", narrow(long)));
            stated.tensors.push(("rope_factors_short.weight", narrow(short)));
            Ok(())
        }
        kind => {
            if frequencies.scale != 1.0 {
                return Err(refused(&format!("a factor of {} on what turns", frequencies.scale)));
            }
            let factors: Vec<f64> =
                plain(2 * inv_freq.len(), theta).iter().zip(inv_freq).map(|(plain, own)| plain / own).collect();
            let is_all = |factor: f64| factors.iter().all(|own| (own / factor - 1.0).abs() < CLOSE);
            if is_all(1.0) {
                return Ok(());
            }
            if is_all(factors[0]) {
                key("scaling.type", Value::Text("linear".into()));
                key("scaling.factor", Value::F32(factors[0] as f32));
                return Ok(());
            }
            if architecture.rope != RopeScaling::Factors {
                return Err(refused(&format!("frequencies scaled by the rule '{kind}'")));
            }
            stated.tensors.push(("rope_freqs.weight", factors.iter().map(|factor| *factor as f32).collect()));
            Ok(())
        }
    }
}

/// Frequencies that are not scaled.
fn plain(dimensions: usize, theta: f64) -> Vec<f64> {
    (0..dimensions / 2).map(|j| theta.powf(-((2 * j) as f64) / dimensions as f64)).collect()
}

/// The base of frequencies that are plain, or all scaled by one factor.
fn base(frequencies: &Frequencies) -> f64 {
    match frequencies.inv_freq[..] {
        [first, second, ..] => (first / second).powf(frequencies.inv_freq.len() as f64).round(),
        _ => 10_000.0,
    }
}

/// What llama.cpp computes (`ggml.c`, `ggml_rope_yarn_corr_dims`; `ops.cpp`, `rope_yarn`).
fn yarn(dimensions: usize, theta: f64, (original, factor): (f64, f64), (fast, slow): (f64, f64)) -> Frequencies {
    let column = |turns: f64| dimensions as f64 * (original / (turns * 2.0 * PI)).ln() / (2.0 * theta.ln());
    let low = column(fast).floor().max(0.0);
    let high = column(slow).ceil().min(dimensions as f64 - 1.0);
    let ramp = |j: usize| ((j as f64 - low) / (high - low).max(0.001)).clamp(0.0, 1.0);
    let own = plain(dimensions, theta).into_iter().enumerate();
    let inv_freq = own.map(|(j, f)| f / factor * ramp(j) + f * (1.0 - ramp(j))).collect();
    Frequencies { inv_freq, scale: 1.0 + 0.1 * factor.ln() }
}

fn close(theirs: &[f64], own: &Frequencies) -> bool {
    theirs.len() == own.inv_freq.len()
        && theirs.iter().zip(&own.inv_freq).all(|(theirs, own)| (theirs / own - 1.0).abs() < CLOSE)
}

fn refused(what: &str) -> Error {
    Error::input(format!("llama.cpp does not compute {what}")).at("--format gguf")
}
