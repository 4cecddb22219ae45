//! Dual numbers: write a loss as its formula, get its derivatives exactly.
//!
//! A [`Dual`] is a value with its partial derivatives by the sums an example offers, two of every answer and one of the prompt. The chain rule is
//! applied by every operation (forward-mode differentiation; Griewank and Walther, *Evaluating Derivatives*, chapter 3).

use std::ops::{Add, Div, Mul, Neg, Sub};

/// Most answers of an example.
pub const MAX_ANSWERS: usize = 16;

/// Inputs that a loss is differentiated by: of every answer its weighted sum, then of every answer its plain sum, then the prompt's
/// sum.
pub(crate) const INPUTS: usize = 2 * MAX_ANSWERS + 1;

/// The prompt's sum among them.
pub(crate) const PROMPT: usize = 2 * MAX_ANSWERS;

/// A number and its partial derivatives.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Dual {
    /// The number.
    pub value: f64,
    pub(crate) grad: [f64; INPUTS],
}

impl Dual {
    /// A number that depends on nothing.
    pub fn constant(value: f64) -> Dual {
        Dual { value, grad: [0.0; INPUTS] }
    }

    pub(crate) fn input(value: f64, index: usize) -> Dual {
        let mut dual = Dual::constant(value);
        dual.grad[index] = 1.0;
        dual
    }

    /// `f(self)` for a function with value `value` and derivative `by` at this point.
    pub fn map(self, value: f64, by: f64) -> Dual {
        Dual { value, grad: self.grad.map(|g| g * by) }
    }

    /// The same number, with no derivative.
    pub fn detach(self) -> Dual {
        Dual::constant(self.value)
    }

    /// `eˣ`.
    pub fn exp(self) -> Dual {
        self.map(self.value.exp(), self.value.exp())
    }

    /// `ln x`.
    pub fn ln(self) -> Dual {
        self.map(self.value.ln(), 1.0 / self.value)
    }

    /// `x²`.
    pub fn square(self) -> Dual {
        self.map(self.value * self.value, 2.0 * self.value)
    }

    /// `1 / (1 + e⁻ˣ)`.
    pub fn sigmoid(self) -> Dual {
        let s = sigmoid(self.value);
        self.map(s, s * (1.0 - s))
    }

    /// `ln sigmoid(x)`, exact for large `|x|`.
    pub fn log_sigmoid(self) -> Dual {
        let x = self.value;
        self.map(x.min(0.0) - (-x.abs()).exp().ln_1p(), sigmoid(-x))
    }

    /// `max(x, 0)`; its derivative at 0 is 0, as in torch.
    pub fn relu(self) -> Dual {
        if self.value > 0.0 { self } else { Dual::constant(0.0) }
    }

    /// `min(x, limit)`.
    pub fn min(self, limit: f64) -> Dual {
        if self.value <= limit { self } else { Dual::constant(limit) }
    }
}

fn sigmoid(x: f64) -> f64 {
    // One exponential that cannot overflow serves both signs.
    let e = (-x.abs()).exp();
    if x >= 0.0 { 1.0 / (1.0 + e) } else { e / (1.0 + e) }
}

impl From<f64> for Dual {
    fn from(value: f64) -> Dual {
        Dual::constant(value)
    }
}

impl Neg for Dual {
    type Output = Dual;
    fn neg(self) -> Dual {
        self.map(-self.value, -1.0)
    }
}

/// `$a op $b` for two duals and for a dual and a number, from one rule `(value, d/da, d/db)`.
macro_rules! binary {
    ($trait:ident, $method:ident, |$a:ident, $b:ident| $rule:expr) => {
        impl $trait for Dual {
            type Output = Dual;
            // The chain rule multiplies and adds whatever the operation is.
            #[allow(clippy::suspicious_arithmetic_impl)]
            fn $method(self, other: Dual) -> Dual {
                let ($a, $b) = (self.value, other.value);
                let (value, by_a, by_b): (f64, f64, f64) = $rule;
                let grad = std::array::from_fn(|i| by_a * self.grad[i] + by_b * other.grad[i]);
                Dual { value, grad }
            }
        }
        impl $trait<f64> for Dual {
            type Output = Dual;
            fn $method(self, other: f64) -> Dual {
                $trait::$method(self, Dual::constant(other))
            }
        }
        impl $trait<Dual> for f64 {
            type Output = Dual;
            fn $method(self, other: Dual) -> Dual {
                $trait::$method(Dual::constant(self), other)
            }
        }
    };
}

binary!(Add, add, |a, b| (a + b, 1.0, 1.0));
binary!(Sub, sub, |a, b| (a - b, 1.0, -1.0));
binary!(Mul, mul, |a, b| (a * b, b, a));
binary!(Div, div, |a, b| (a / b, 1.0 / b, -a / (b * b)));

#[cfg(test)]
mod tests {
    use super::*;

    /// Every function against central differences, at points on both sides of its bends.
    #[test]
    fn derivatives_are_central_differences() {
        type Case = (&'static str, fn(Dual) -> Dual);
        let cases: [Case; 9] = [
            ("exp", Dual::exp),
            ("square", Dual::square),
            ("sigmoid", Dual::sigmoid),
            ("log_sigmoid", Dual::log_sigmoid),
            ("relu", Dual::relu),
            ("min", |x| x.min(0.7)),
            ("neg", |x| -x),
            ("quotient", |x| (x * 2.0 + 3.0) / (x.square() + 1.0)),
            ("ln", |x| (x.square() + 0.5).ln()),
        ];
        for (name, f) in cases {
            for x in [-30.0, -2.0, -0.3, 0.4, 1.5, 8.0] {
                let h = 1e-5;
                let numeric = (f(Dual::constant(x + h)).value - f(Dual::constant(x - h)).value) / (2.0 * h);
                let grad = f(Dual::input(x, 2)).grad;
                assert!(
                    (grad[2] - numeric).abs() <= 1e-6 * numeric.abs().max(1.0),
                    "{name} at {x}: {} {numeric}",
                    grad[2]
                );
                assert_eq!(grad[0], 0.0, "{name} depends on an input it was not given");
            }
        }
    }
}
