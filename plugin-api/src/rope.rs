//! Rotary frequencies: every scaling rule is arithmetic of the plugin, the host sees only the table.
//!
//! Formulas as in transformers' `modeling_rope_utils.py`; the papers are named at each rule.

use std::f64::consts::PI;

use crate::model::Config;
use crate::{Result, bail};

/// Most columns of a head; published models have up to 512.
const MOST_COLUMNS: usize = 1 << 16;

/// Angle per position for each pair of columns, and the factor on the rotated values.
#[derive(Clone, Debug, PartialEq)]
pub struct Rope {
    /// Radians per position, one for each pair of columns that turns.
    pub inv_freq: Vec<f64>,
    /// Factor on cos and sin; 1 but for YaRN and LongRoPE.
    pub attention_scale: f64,
    /// Whether column `2j` turns with `2j + 1` (GLM, Cohere, ERNIE), not column `j` with `j + n` of n frequencies.
    pub interleaved: bool,
    /// Beta and period of `1 + beta · ln(1 + floor(position / period))`, a factor on what is turned (Llama 4, Ministral 3).
    pub position_factor: Option<(f64, usize)>,
    /// Longest row for which the table holds, where the rule depends on the length.
    pub max_positions: Option<usize>,
}

impl Rope {
    /// The plain rule: `theta^(-2j / head_dim)` (Su et al. 2021, section 3.3.2).
    pub fn plain(head_dim: usize, theta: f64) -> Rope {
        Rope::of((0..head_dim / 2).map(|j| theta.powf(-((2 * j) as f64) / head_dim as f64)).collect())
    }

    /// A table for the whole head, of which only a part of the pairs turns, the fast ones (transformers,
    /// `_compute_proportional_rope_parameters`).
    pub fn proportional(head_dim: usize, theta: f64, partial: f64) -> Rope {
        let mut rope = Rope::plain(head_dim, theta);
        let turning = (partial * head_dim as f64 / 2.0) as usize;
        rope.inv_freq.iter_mut().skip(turning).for_each(|f| *f = 0.0);
        rope
    }

    /// Frequencies as they are.
    pub fn of(inv_freq: Vec<f64>) -> Rope {
        Rope { inv_freq, attention_scale: 1.0, interleaved: false, position_factor: None, max_positions: None }
    }

    /// The rule that a checkpoint's config states for all layers.
    pub fn from_config(config: &Config, head_dim: usize, default_theta: f64) -> Result<Rope> {
        Rope::of_layers(config, None, head_dim, default_theta)
    }

    /// The rule of a kind of layer (`sliding_attention`, `full_attention`), where `rope_parameters` has one for each, else that of
    /// all layers. Files of transformers 4 have `rope_theta`, `partial_rotary_factor` and `rope_scaling` in its place.
    ///
    /// # Errors
    /// A kind of rule that is none of `default`, `linear`, `dynamic`, `llama3`, `yarn`, `longrope` and `proportional`; one whose
    /// numbers are missing.
    pub fn of_layers(config: &Config, layer_type: Option<&str>, head_dim: usize, default_theta: f64) -> Result<Rope> {
        let outer = config.opt_float("rope_theta")?.unwrap_or(default_theta);
        let outer_partial = config.opt_float("partial_rotary_factor")?.unwrap_or(1.0);
        let stated = stated(config)?;
        let of_layers = |c: &Config| c.has("full_attention") || c.has("sliding_attention");
        let rule = match (stated, layer_type) {
            (Some(all), Some(kind)) if of_layers(&all) => all.opt_object(kind)?,
            (Some(all), None) if of_layers(&all) => {
                return bail!("config.json: rope_parameters by layer types are not supported by this family");
            }
            (stated, _) => stated,
        };
        Rope::of_rule(config, rule, head_dim, outer, outer_partial)
    }

    /// What a rule with `mscale_all_dim` multiplies scores by, beside what it multiplies cosines and sines by (DeepSeek's latent
    /// attention; transformers, `yarn_apply_mscale`).
    ///
    /// # Errors
    /// A rule with `mscale_all_dim` and without a factor.
    pub fn score_scale(config: &Config) -> Result<f64> {
        let Some(rule) = stated(config)? else { return Ok(1.0) };
        let all_dims = rule.opt_float("mscale_all_dim")?.filter(|m| *m != 0.0);
        match (kind(&rule)?.as_str(), all_dims) {
            ("default", _) | (_, None) => Ok(1.0),
            (_, Some(all_dims)) => Ok(mscale(rule.float("factor")?, all_dims).powi(2)),
        }
    }

    /// Those of layers with a window and of the others, where each kind has its own (Gemma 3, OLMo 3): from `rope_parameters` by layer types
    /// in files of transformers 5; in older ones a scaling is of the layers without a window, and `rope_local_base_freq` the base of
    /// those with one.
    pub fn sliding_and_full(
        config: &Config,
        head_dim: usize,
        sliding_theta: f64,
        full_theta: f64,
    ) -> Result<[Rope; 2]> {
        let sliding_theta = config.opt_float("rope_local_base_freq")?.unwrap_or(sliding_theta);
        let sliding = match config.has("rope_parameters") {
            true => Rope::of_layers(config, Some("sliding_attention"), head_dim, sliding_theta)?,
            false => Rope::plain(head_dim, sliding_theta),
        };
        Ok([sliding, Rope::of_layers(config, Some("full_attention"), head_dim, full_theta)?])
    }

    /// The rule of an object like `rope_parameters`, or the plain one. `theta` and `partial` count where it has none of its own.
    pub fn of_rule(config: &Config, rule: Option<Config>, head_dim: usize, theta: f64, partial: f64) -> Result<Rope> {
        if head_dim > MOST_COLUMNS {
            return bail!("config.json: heads of {head_dim} columns; up to {MOST_COLUMNS} are read");
        }
        let turning = |partial: f64| match (head_dim as f64 * partial) as usize / 2 * 2 {
            turning if (2..=head_dim).contains(&turning) => Ok(turning),
            _ => bail!("config.json: partial_rotary_factor {partial} of heads of {head_dim} columns"),
        };
        let Some(rule) = rule else { return Ok(Rope::plain(turning(partial)?, theta)) };
        let theta = rule.opt_float("rope_theta")?.unwrap_or(theta);
        let partial = rule.opt_float("partial_rotary_factor")?.unwrap_or(partial);
        let kind = kind(&rule)?;
        let dim = turning(partial)?;
        let mut rope = Rope::plain(dim, theta);
        let trained = config.opt_int("max_position_embeddings")?;
        // Phi 3 says it outside of the rule, and means it.
        let original = match config.opt_float("original_max_position_embeddings")? {
            Some(outside) => Some(outside),
            None => rule.opt_float("original_max_position_embeddings")?,
        };
        let original = original.or(trained.map(|n| n as f64));
        let factor = rule.opt_float("factor")?;
        let needs = |what: &str, value: Option<f64>| match value {
            Some(value) if value > 0.0 => Ok(value),
            _ => bail!("config.json: rope of type '{kind}' needs {what} above 0"),
        };
        let stretched = original.zip(trained).map(|(original, trained)| trained as f64 / original);
        match kind.as_str() {
            "default" => {}
            "linear" => rope.linear(needs("a factor", factor)?),
            "dynamic" => match rule.opt_float("alpha")?.filter(|alpha| *alpha != 0.0) {
                // A fixed alpha makes the base larger once and for all (transformers, `modeling_hunyuan_v1_dense.py`).
                Some(alpha) => {
                    for of_other_rules in ["beta_fast", "beta_slow", "mscale", "mscale_all_dim"] {
                        rule.opt_float(of_other_rules)?;
                    }
                    rope = Rope::plain(dim, theta * alpha.powf(dim as f64 / (dim as f64 - 2.0)));
                }
                // Up to the trained length the rule is the plain one (transformers, `_compute_dynamic_ntk_parameters`);
                // beyond it frequencies follow the longest row of a batch, which would make a step depend on packing.
                None => {
                    needs("a factor", factor)?;
                    rope.max_positions = Some(config.int("max_position_embeddings")?);
                }
            },
            "llama3" => rope.llama3(
                needs("a factor", factor)?,
                rule.float("low_freq_factor")?,
                rule.float("high_freq_factor")?,
                needs("original_max_position_embeddings", original)?,
            ),
            "yarn" => {
                let original = needs("original_max_position_embeddings", original)?;
                let factor = needs("a factor", factor.or(stretched))?;
                rope.yarn(&rule, dim, theta, original, factor)?;
            }
            "longrope" | "su" => {
                let original = needs("original_max_position_embeddings", original)?;
                let factor = needs("a factor", factor.or(stretched))?;
                rope.longrope(&rule, original, factor)?;
            }
            "proportional" => {
                rope = Rope::proportional(head_dim, theta, partial);
                rope.linear(factor.unwrap_or(1.0));
            }
            other => return bail!("config.json: rope type '{other}' is not supported"),
        }
        if let Some(beta) = rule.opt_float("llama_4_scaling_beta")? {
            let period = needs("original_max_position_embeddings", original)?;
            rope.position_factor = Some((beta, period as usize));
        }
        // Transformers writes it beside the rule that it was made of.
        rule.opt_int("max_position_embeddings")?;
        rule.flag("finetuned", true)?;
        Ok(rope)
    }

    /// LongRoPE (Ding et al. 2024): a factor for each frequency. There is one list for rows up to the original length and one for
    /// batches with longer rows; rows up to that length are taken, so that a step does not depend on packing.
    fn longrope(&mut self, rule: &Config, original: f64, factor: f64) -> Result<()> {
        let wanted = self.inv_freq.len();
        let numbers = |key: &str| {
            let list: Option<Vec<f64>> =
                rule.get(key).and_then(|v| v.as_array()?.iter().map(serde_json::Value::as_f64).collect());
            match list {
                Some(list) if list.len() == wanted && list.iter().all(|f| *f > 0.0) => Ok(list),
                _ => bail!("config.json: rope of type 'longrope' needs {wanted} numbers above 0 as {key}"),
            }
        };
        numbers("long_factor")?;
        self.inv_freq.iter_mut().zip(numbers("short_factor")?).for_each(|(f, factor)| *f /= factor);
        let stretch = || if factor <= 1.0 { 1.0 } else { (1.0 + factor.ln() / original.ln()).sqrt() };
        self.attention_scale = rule.opt_float("attention_factor")?.unwrap_or_else(stretch);
        self.max_positions = Some(original as usize);
        Ok(())
    }

    /// Position interpolation (Chen et al. 2023).
    fn linear(&mut self, factor: f64) {
        self.inv_freq.iter_mut().for_each(|f| *f /= factor);
    }

    /// Llama 3.1: long waves are divided by `factor`, short ones kept, those between interpolated.
    fn llama3(&mut self, factor: f64, low: f64, high: f64, original: f64) {
        for f in &mut self.inv_freq {
            let wavelength = 2.0 * PI / *f;
            if wavelength > original / low {
                *f /= factor;
            } else if wavelength >= original / high {
                let smooth = (original / wavelength - low) / (high - low);
                *f = (1.0 - smooth) * *f / factor + smooth * *f;
            }
        }
    }

    /// YaRN (Peng et al. 2023, eq. 22-25 and section 3.4).
    fn yarn(&mut self, rule: &Config, dim: usize, theta: f64, original: f64, factor: f64) -> Result<()> {
        let (fast, slow) = (rule.opt_float("beta_fast")?.unwrap_or(32.0), rule.opt_float("beta_slow")?.unwrap_or(1.0));
        let (m, m_all) = (rule.opt_float("mscale")?, rule.opt_float("mscale_all_dim")?);
        self.attention_scale = match (rule.opt_float("attention_factor")?, m, m_all) {
            (Some(stated), _, _) => stated,
            (None, Some(m), Some(all)) if m != 0.0 && all != 0.0 => mscale(factor, m) / mscale(factor, all),
            _ => mscale(factor, 1.0),
        };
        // Column at which a wave makes `turns` turns over the original length.
        let column = |turns: f64| dim as f64 * (original / (turns * 2.0 * PI)).ln() / (2.0 * theta.ln());
        let (mut low, mut high) = (column(fast), column(slow));
        if rule.flag("truncate", true)? {
            (low, high) = (low.floor(), high.ceil());
        }
        low = low.max(0.0);
        high = high.min(dim as f64 - 1.0);
        if low == high {
            high += 0.001;
        }
        for (j, f) in self.inv_freq.iter_mut().enumerate() {
            let ramp = ((j as f64 - low) / (high - low)).clamp(0.0, 1.0);
            *f = *f / factor * ramp + *f * (1.0 - ramp);
        }
        Ok(())
    }
}

/// The object that states the rule. Where both are there, transformers takes the old one.
fn stated(config: &Config) -> Result<Option<Config>> {
    match config.opt_object("rope_scaling")? {
        Some(old) => {
            config.get("rope_parameters");
            Ok(Some(old))
        }
        None => config.opt_object("rope_parameters"),
    }
}

/// The kind of a rule. Old files say `type`; newer ones may say both.
fn kind(rule: &Config) -> Result<String> {
    let (old, new) = (rule.opt_text("type")?, rule.opt_text("rope_type")?);
    Ok(new.or(old).unwrap_or_else(|| "default".into()))
}

/// YaRN's factor on attention, of a text that is `scale` times as long.
fn mscale(scale: f64, m: f64) -> f64 {
    if scale <= 1.0 { 1.0 } else { 0.1 * m * scale.ln() + 1.0 }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)] // In a test, a panic is the report.

    use super::*;

    /// DeepSeek-V3's: `0.1 · ln 40 + 1`, squared; cosines and sines are as they are.
    #[test]
    fn a_rule_may_multiply_scores() {
        let rule = |more: &str| {
            let text = format!(
                r#"{{"rope_scaling": {{"rope_type": "yarn", "factor": 40, "original_max_position_embeddings": 4096 {more}}}}}"#
            );
            Config::parse(&text).unwrap()
        };
        let config = rule(r#", "mscale": 1.0, "mscale_all_dim": 1.0"#);
        assert!((Rope::score_scale(&config).unwrap() - 1.368_887_945_411_393_6_f64.powi(2)).abs() < 1e-12);
        assert_eq!(Rope::from_config(&config, 64, 1e4).unwrap().attention_scale, 1.0);
        for config in [rule(""), rule(r#", "mscale_all_dim": 0.0"#), Config::parse("{}").unwrap()] {
            assert_eq!(Rope::score_scale(&config).unwrap(), 1.0);
        }
    }
}
