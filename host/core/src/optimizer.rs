//! AdamW on one flat f32 buffer, with clipping by the global norm; the same arithmetic as `torch.optim.AdamW`.

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

    /// One step at a learning rate. One after which a parameter or a moment would not be finite is not taken: then nothing
    /// changes, and the answer is false.
    pub fn step(&self, params: &mut [f32], gradient: &[f32], moments: &mut Moments, learning_rate: f64) -> bool {
        let Rates { size, root, keep, b1, r1, b2, r2, eps } = self.rates(moments.steps + 1, learning_rate);
        let after = |p: f32, g: f32, m: f32, v: f32| {
            let (m, v) = (b1 * m + r1 * g, b2 * v + r2 * g * g);
            (p * keep - size * m / (v.sqrt() / root + eps), m, v)
        };
        let state = moments.first.iter().zip(&moments.second);
        let mut numbers = params.iter().zip(gradient).zip(state).map(|((p, g), (m, v))| after(*p, *g, *m, *v));
        if !numbers.all(|(p, m, v)| p.is_finite() && m.is_finite() && v.is_finite()) {
            return false;
        }
        moments.steps += 1;
        let state = moments.first.iter_mut().zip(&mut moments.second);
        for ((p, g), (m, v)) in params.iter_mut().zip(gradient).zip(state) {
            (*p, *m, *v) = after(*p, *g, *m, *v);
        }
        true
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
        let adam = AdamW { beta1: 0.9, beta2: 0.95, eps: 1e-8, weight_decay: 0.01 };
        let (mut p, mut moments) = (vec![1.0, -2.0], Moments::new(2));
        for gradient in [[0.5, -0.25], [-1.0, 3.0]] {
            adam.step(&mut p, &gradient, &mut moments, 0.1);
        }
        for (is, torch) in p.iter().zip(TORCH) {
            assert!((is - torch).abs() < 1e-6, "{is} {torch}");
        }
    }

    const TORCH: [f32; 2] = [0.934_438_4, -1.963_862_8];

    #[test]
    fn a_step_to_what_is_not_finite_changes_nothing() {
        let adam = AdamW { beta1: 0.9, beta2: 0.95, eps: 0.0, weight_decay: 0.1 };
        for (gradient, rate) in [([0.0, 1.0], 0.1), ([1.0, f32::MAX], 0.1), ([1.0, 1.0], 1e39), ([f32::NAN, 1.0], 0.1)]
        {
            let (mut p, mut moments) = (vec![1.0, -2.0], Moments::new(2));
            assert!(!adam.step(&mut p, &gradient, &mut moments, rate), "{gradient:?} at {rate}");
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
