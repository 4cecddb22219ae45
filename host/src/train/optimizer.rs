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

impl AdamW {
    /// One step at a learning rate.
    pub fn step(&self, params: &mut [f32], gradient: &[f32], moments: &mut Moments, learning_rate: f64) {
        moments.steps += 1;
        let steps = moments.steps as i32;
        let size = (learning_rate / (1.0 - self.beta1.powi(steps))) as f32;
        let root = (1.0 - self.beta2.powi(steps)).sqrt() as f32;
        let keep = (1.0 - learning_rate * self.weight_decay) as f32;
        let (b1, b2, eps) = (self.beta1 as f32, self.beta2 as f32, self.eps as f32);
        let (r1, r2) = ((1.0 - self.beta1) as f32, (1.0 - self.beta2) as f32);
        let state = moments.first.iter_mut().zip(&mut moments.second);
        for ((p, g), (m, v)) in params.iter_mut().zip(gradient).zip(state) {
            *p *= keep;
            *m = b1 * *m + r1 * g;
            *v = b2 * *v + r2 * g * g;
            *p -= size * *m / (v.sqrt() / root + eps);
        }
    }
}

/// The gradient's norm before clipping; scales it to `limit` where it is longer, as `torch.nn.utils.clip_grad_norm_`.
pub fn clip(gradient: &mut [f32], limit: f64) -> f64 {
    let norm = gradient.iter().map(|g| f64::from(*g).powi(2)).sum::<f64>().sqrt();
    let scale = limit / (norm + 1e-6);
    if limit > 0.0 && scale < 1.0 {
        gradient.iter_mut().for_each(|g| *g *= scale as f32);
    }
    norm
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
    fn clipping_keeps_short_gradients() {
        let mut gradient = vec![3.0, 4.0];
        assert_eq!(clip(&mut gradient, 10.0), 5.0);
        assert_eq!(gradient, [3.0, 4.0]);
        assert_eq!(clip(&mut gradient, 1.0), 5.0);
        assert!((gradient[0] - 0.6).abs() < 1e-6 && (gradient[1] - 0.8).abs() < 1e-6);
    }
}
