//! AdamW on one flat f32 buffer, with clipping by the global norm; the same arithmetic as `torch.optim.AdamW`.

use std::ops::Range;

/// Numbers of the optimizer.
#[derive(Clone, Copy, Debug)]
pub struct AdamW {
    /// Decay of the first moment.
    pub beta1: f64,
    /// Decay of the second moment.
    pub beta2: f64,
    /// Added to the root of the second moment.
    pub eps: f64,
    /// Decoupled decay of the parameters (Loshchilov and Hutter 2019, algorithm 2).
    pub weight_decay: f64,
    /// LoRA+: how many times the learning rate B has, and decays by (Hayou et al. 2024; PEFT's `create_loraplus_optimizer`). 1 is
    /// plain AdamW.
    pub loraplus_lr_ratio: f64,
}

/// Parameters with one learning rate, as a parameter group of torch.
#[derive(Clone, Debug, PartialEq)]
pub struct Group {
    /// Where they lie in the flat buffer.
    pub range: Range<usize>,
    /// How many times the learning rate they have.
    pub ratio: f64,
}

/// Moments of every parameter.
#[derive(Clone, Debug)]
pub struct Moments {
    /// First moments.
    pub first: Vec<f32>,
    /// Second moments.
    pub second: Vec<f32>,
    /// Steps taken.
    pub steps: u64,
}

impl Moments {
    /// Before the first step.
    pub fn new(parameters: usize) -> Moments {
        Moments { first: vec![0.0; parameters], second: vec![0.0; parameters], steps: 0 }
    }
}

/// What a step's arithmetic needs, in f32.
#[derive(Clone, Copy, Debug)]
pub struct Rates {
    /// Step size, corrected for the first moment's start at zero.
    pub size: f32,
    /// Correction of the second moment's root.
    pub root: f32,
    /// What decay leaves of a parameter.
    pub keep: f32,
    /// Decay of the first moment.
    pub b1: f32,
    /// What a new gradient weighs in the first moment.
    pub r1: f32,
    /// Decay of the second moment.
    pub b2: f32,
    /// What a new gradient's square weighs in the second moment.
    pub r2: f32,
    /// Added to the root of the second moment.
    pub eps: f32,
}

impl AdamW {
    /// The numbers of step `steps`, counted from 1.
    pub fn rates(&self, steps: u64, learning_rate: f64) -> Rates {
        let steps = steps as i32;
        Rates {
            size: (learning_rate / (1.0 - self.beta1.powi(steps))) as f32,
            root: (1.0 - self.beta2.powi(steps)).sqrt() as f32,
            keep: (1.0 - learning_rate * self.weight_decay) as f32,
            b1: self.beta1 as f32,
            r1: (1.0 - self.beta1) as f32,
            b2: self.beta2 as f32,
            r2: (1.0 - self.beta2) as f32,
            eps: self.eps as f32,
        }
    }

    /// One step of all groups at a learning rate. One after which a parameter or a moment would not be finite is not taken: then
    /// nothing changes, and the answer is false.
    pub fn step(
        &self,
        groups: &[Group],
        params: &mut [f32],
        gradient: &[f32],
        moments: &mut Moments,
        learning_rate: f64,
    ) -> bool {
        let rates = groups.iter().map(|group| self.rates(moments.steps + 1, learning_rate * group.ratio));
        let groups: Vec<(Range<usize>, Rates)> = groups.iter().map(|group| group.range.clone()).zip(rates).collect();
        let finite = groups.iter().all(|(range, rates)| {
            let at = |i: usize| rates.after(params[i], gradient[i], moments.first[i], moments.second[i]);
            range.clone().map(at).all(|numbers| numbers.into_iter().all(f32::is_finite))
        });
        if !finite {
            return false;
        }
        moments.steps += 1;
        for (range, rates) in groups {
            let state = moments.first[range.clone()].iter_mut().zip(&mut moments.second[range.clone()]);
            for ((p, g), (m, v)) in params[range.clone()].iter_mut().zip(&gradient[range]).zip(state) {
                [*p, *m, *v] = rates.after(*p, *g, *m, *v);
            }
        }
        true
    }
}

impl Rates {
    /// A parameter and its moments after a step by a gradient.
    fn after(&self, p: f32, g: f32, m: f32, v: f32) -> [f32; 3] {
        let Rates { size, root, keep, b1, r1, b2, r2, eps } = *self;
        let (m, v) = (b1 * m + r1 * g, b2 * v + r2 * g * g);
        [p * keep - size * m / (v.sqrt() / root + eps), m, v]
    }
}

/// What a gradient of this norm is multiplied with, so that it is no longer than `limit`, as `torch.nn.utils.clip_grad_norm_`
/// has it; 0 is no limit.
pub fn clip(norm: f64, limit: f64) -> f64 {
    if limit > 0.0 { (limit / (norm + 1e-6)).min(1.0) } else { 1.0 }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Values printed by torch 2.15: `p = tensor([1., -2.])`, gradients `[.5, -.25]` then `[-1., 3.]`, AdamW(lr=.1,
    /// betas=(.9, .95), weight_decay=.01).
    #[test]
    fn same_as_torch() {
        let adam = AdamW { beta1: 0.9, beta2: 0.95, eps: 1e-8, weight_decay: 0.01, loraplus_lr_ratio: 1.0 };
        let (mut p, mut moments) = (vec![1.0, -2.0], Moments::new(2));
        for gradient in [[0.5, -0.25], [-1.0, 3.0]] {
            adam.step(&ALL, &mut p, &gradient, &mut moments, 0.1);
        }
        for (is, torch) in p.iter().zip(TORCH) {
            assert!((is - torch).abs() < 1e-6, "{is} {torch}");
        }
    }

    const ALL: [Group; 1] = [Group { range: 0..2, ratio: 1.0 }];
    const TORCH: [f32; 2] = [0.934_438_4, -1.963_862_8];

    #[test]
    fn a_step_to_what_is_not_finite_changes_nothing() {
        let adam = AdamW { beta1: 0.9, beta2: 0.95, eps: 0.0, weight_decay: 0.1, loraplus_lr_ratio: 1.0 };
        for (gradient, rate) in [([0.0, 1.0], 0.1), ([1.0, f32::MAX], 0.1), ([1.0, 1.0], 1e39), ([f32::NAN, 1.0], 0.1)]
        {
            let (mut p, mut moments) = (vec![1.0, -2.0], Moments::new(2));
            assert!(!adam.step(&ALL, &mut p, &gradient, &mut moments, rate), "{gradient:?} at {rate}");
            assert_eq!(
                (p, moments.first, moments.second, moments.steps),
                (vec![1.0, -2.0], vec![0.0; 2], vec![0.0; 2], 0)
            );
        }
    }

    #[test]
    fn clipping_keeps_short_gradients() {
        assert_eq!((clip(5.0, 10.0), clip(5.0, 0.0)), (1.0, 1.0));
        assert!((clip(5.0, 1.0) - 0.2).abs() < 1e-6);
    }
}
