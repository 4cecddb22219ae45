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

    /// Frequencies as they are.
    pub fn of(inv_freq: Vec<f64>) -> Rope {
        Rope { inv_freq, attention_scale: 1.0, interleaved: false, position_factor: None, max_positions: None }
    }

    /// The rule a checkpoint's config states: transformers 4 (`rope_theta`, `rope_scaling`) or 5 (`rope_parameters`), with
    /// the types `default`, `linear`, `dynamic`, `llama3` and `yarn`.
    pub fn from_config(config: &Config, head_dim: usize, default_theta: f64) -> Result<Rope> {
        if head_dim > MOST_COLUMNS {
            return bail!("config.json: heads of {head_dim} columns; up to {MOST_COLUMNS} are read");
        }
        let outer_theta = config.opt_float("rope_theta")?;
        let scaling = config.opt_object("rope_parameters")?;
        let scaling = match config.opt_object("rope_scaling")? {
            old if scaling.is_none() => old,
            _ => scaling,
        };
        let Some(rule) = scaling else {
            return Ok(Rope::plain(head_dim, outer_theta.unwrap_or(default_theta)));
        };
        let theta = rule.opt_float("rope_theta")?.or(outer_theta).unwrap_or(default_theta);
        let kind = rule.opt_text("rope_type")?;
        // Old files say `type`; newer ones may say both.
        let kind = rule.opt_text("type")?.filter(|_| kind.is_none()).or(kind).unwrap_or_else(|| "default".into());
        if let Some(partial) = rule.opt_float("partial_rotary_factor")?
            && partial != 1.0
        {
            return bail!("config.json: partial_rotary_factor {partial} is not supported by this family");
        }
        let mut rope = Rope::plain(head_dim, theta);
        let trained = config.opt_int("max_position_embeddings")?;
        match kind.as_str() {
            "default" => {}
            "linear" => rope.linear(rule.float("factor")?),
            "dynamic" => {
                // Up to the trained length the rule is the plain one (transformers, `_compute_dynamic_ntk_parameters`);
                // beyond it frequencies follow the longest row of a batch, which would make a step depend on packing.
                rule.float("factor")?;
                rule.opt_int("original_max_position_embeddings")?;
                rope.max_positions = Some(config.int("max_position_embeddings")?);
            }
            "llama3" => rope.llama3(
                rule.float("factor")?,
                rule.float("low_freq_factor")?,
                rule.float("high_freq_factor")?,
                rule.float("original_max_position_embeddings")?,
            ),
            "yarn" => {
                let original = rule.opt_float("original_max_position_embeddings")?;
                let Some(original) = original.or(trained.map(|n| n as f64)) else {
                    return bail!("config.json: yarn needs original_max_position_embeddings");
                };
                let stretched = trained.map(|n| n as f64 / original);
                let Some(factor) = rule.opt_float("factor")?.or(stretched) else {
                    return bail!("config.json: yarn needs a factor");
                };
                rope.yarn(&rule, head_dim, theta, original, factor)?;
            }
            other => return bail!("config.json: rope type '{other}' is not supported by this family"),
        }
        Ok(rope)
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
        let mscale = |scale: f64, m: f64| if scale <= 1.0 { 1.0 } else { 0.1 * m * scale.ln() + 1.0 };
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
