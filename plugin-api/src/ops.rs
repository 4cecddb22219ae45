//! The ops a graph may name, each by its schema: what it reads, which weights and attributes it has, what has to fit.
//!
//! The host computes what is in this table and nothing else; [`check`](crate::check) holds every node against it, in the host and
//! in an author's tests.

mod experts;
mod recurrent;
mod route;

use serde_json::Value;

use crate::graph::Node;
use crate::{Error, Result};

mod expand;

pub use route::AUX_LOSS_COEF;

/// What a graph may say of an op.
pub struct OpSchema {
    /// What graphs call it.
    pub name: &'static str,
    /// What it computes, for `dpo-host list ops`.
    pub formula: &'static str,
    /// How many values it reads.
    pub inputs: usize,
    /// Weights by role, and whether it can do without.
    pub weights: &'static [(&'static str, Presence)],
    /// Attributes.
    pub attrs: &'static [Attr],
    /// Checks widths and weight shapes of a node whose attributes and roles are those above; `widths` are those of its inputs. The
    /// error says what does not fit.
    pub check: fn(&Node, &[usize]) -> std::result::Result<(), String>,
    /// Whether a row of its value depends on where the row lies: on its position, or on other rows. Such an op runs only in
    /// layers: the embedding may be computed for some rows alone, and the head is, for those that predict an answer token.
    pub reads_layout: bool,
}

/// Whether something may be left out.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Presence {
    /// A node without it is refused.
    Required,
    /// A node may leave it out.
    Optional,
}

use Presence::{Optional, Required};

/// An attribute of an op.
#[derive(Clone, Copy)]
pub struct Attr {
    /// Its name.
    pub name: &'static str,
    /// Its kind of value.
    pub kind: AttrKind,
    /// Whether it may be left out.
    pub presence: Presence,
}

/// The kind of an attribute's value.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum AttrKind {
    /// A whole number above 0.
    Count,
    /// A whole number.
    Index,
    /// `true` or `false`.
    Flag,
    /// A finite number.
    Number,
    /// Finite numbers.
    Numbers,
    /// One of these texts.
    OneOf(&'static [&'static str]),
}

use AttrKind::{Count, Flag, Index, Number, Numbers, OneOf};

const fn attr(name: &'static str, kind: AttrKind, presence: Presence) -> Attr {
    Attr { name, kind, presence }
}

/// Activations by PyTorch's names; `gelu` is the exact one, `relu2` the square of relu (So et al. 2021). The last one is no gate.
const ACTIVATIONS: [&str; 7] = ["silu", "gelu", "gelu_tanh", "relu2", "sigmoid", "identity", "clamp"];

/// Those of a gated MLP.
const GATES: &[&str] = ACTIVATIONS.split_at(6).0;

/// Those of experts; `swiglu_oai` is gpt-oss's, `(up + 1) · gate · sigmoid(1.702 · gate)`, both clamped before.
const EXPERT_ACTIVATIONS: &[&str] = &["silu", "gelu", "gelu_tanh", "relu2", "sigmoid", "swiglu_oai"];

const NORM_ATTRS: &[Attr] =
    &[attr("eps", Number, Required), attr("offset", Number, Optional), attr("run", Count, Optional)];

/// All ops.
pub const OPS: &[OpSchema] = &[
    OpSchema {
        name: "embedding",
        formula: "weight[token]",
        inputs: 1,
        weights: &[("weight", Required)],
        attrs: &[],
        check: |node, widths| {
            let rows = node.weights.first().and_then(|w| w.shape.first()).copied().unwrap_or(0);
            same("its input, the token ids,", widths[0], 1)?;
            weight_shape(node, "weight", &[rows, node.width])
        },
        reads_layout: false,
    },
    OpSchema {
        name: "linear",
        formula: "x · weightᵀ + bias (+ LoRA)",
        inputs: 1,
        weights: &[("weight", Required), ("bias", Optional)],
        attrs: &[attr("parameter", Flag, Optional)],
        check: projection,
        reads_layout: false,
    },
    OpSchema {
        name: "rms_norm",
        formula: "(offset + weight) · x / sqrt(mean(x²) + eps), over runs of weight's length or of `run` columns",
        inputs: 1,
        weights: &[("weight", Optional)],
        attrs: NORM_ATTRS,
        check: |node, widths| {
            let run = run(node);
            match node.weight("weight").map(|w| w.shape.as_slice()) {
                None => {}
                Some([own]) if *own == run || *own == node.width => {}
                Some(other) => return Err(format!("a weight of shape {other:?}, needs one of [{run}]")),
            }
            same("the value", node.width, widths[0])?;
            runs_divide(run, node.width)
        },
        reads_layout: false,
    },
    OpSchema {
        name: "layer_norm",
        formula: "(offset + weight) · (x - mean(x)) / sqrt(mean((x - mean(x))²) + eps) + bias, over runs of weight's columns",
        inputs: 1,
        weights: &[("weight", Optional), ("bias", Optional)],
        attrs: NORM_ATTRS,
        check: |node, widths| {
            let run = run(node);
            same("the value", node.width, widths[0])?;
            runs_divide(run, node.width)?;
            let shape = node.weight("weight").map(|w| w.shape.as_slice());
            match shape {
                None => {}
                Some([own]) if *own == run => {}
                Some([runs, own]) if runs.checked_mul(*own) == Some(node.width) => {}
                Some(other) => {
                    return Err(format!("a weight of shape {other:?} for {} columns in runs of {run}", node.width));
                }
            }
            match node.weight("bias").map(|b| b.shape.as_slice()) {
                Some(bias) if Some(bias) != shape => Err(format!("a bias of {bias:?} beside a weight of {shape:?}")),
                _ => Ok(()),
            }
        },
        reads_layout: false,
    },
    OpSchema {
        name: "rope",
        formula: "pairs of every head's columns from start on turned by position · inv_freq[j], times scale",
        inputs: 1,
        weights: &[],
        attrs: &[
            attr("head_dim", Count, Required),
            attr("start", Index, Optional),
            attr("inv_freq", Numbers, Required),
            attr("scale", Number, Required),
            attr("layout", OneOf(&["half", "interleaved"]), Optional),
            attr("position_beta", Number, Optional),
            attr("position_period", Count, Optional),
        ],
        check: |node, widths| {
            let dim = count(node, "head_dim");
            let frequencies = node.attrs.get("inv_freq").and_then(Value::as_array).map_or(0, Vec::len);
            let end = frequencies.saturating_mul(2).saturating_add(count(node, "start"));
            if frequencies == 0 || end > dim || !node.width.is_multiple_of(dim) {
                return Err(format!("{frequencies} frequencies for heads of {dim} in {} columns", node.width));
            }
            match ["position_beta", "position_period"].map(|name| node.attrs.contains_key(name)) {
                [true, true] if frequencies * 2 == dim => {}
                [false, false] => {}
                _ => return Err("position_beta and position_period go together, where all columns turn".into()),
            }
            same("the value", node.width, widths[0])
        },
        reads_layout: true,
    },
    OpSchema {
        name: "attention",
        formula: "softmax(scale · q · kᵀ) · v, causal within an example, answers do not see each other; sinks join the sum",
        inputs: 3,
        weights: &[("sinks", Optional)],
        attrs: &[
            attr("heads", Count, Required),
            attr("kv_heads", Count, Required),
            attr("head_dim", Count, Required),
            attr("value_dim", Count, Optional),
            attr("scale", Number, Required),
            attr("window", Count, Optional),
            attr("softcap", Number, Optional),
        ],
        check: |node, widths| {
            let (heads, kv, dim) = (count(node, "heads"), count(node, "kv_heads"), count(node, "head_dim"));
            if !heads.is_multiple_of(kv) {
                return Err(format!("{heads} heads cannot share {kv} key heads"));
            }
            softcap(node)?;
            weight_shape(node, "sinks", &[heads])?;
            let of_value = if node.attrs.contains_key("value_dim") { count(node, "value_dim") } else { dim };
            same("q", widths[0], heads.saturating_mul(dim))?;
            same("k", widths[1], kv.saturating_mul(dim))?;
            same("v", widths[2], kv.saturating_mul(of_value))?;
            same("the value", node.width, heads.saturating_mul(of_value))
        },
        reads_layout: true,
    },
    OpSchema {
        name: "glu",
        formula: "activation(gate) · up; every column of a narrower gate carries a run of up's",
        inputs: 2,
        weights: &[],
        attrs: &[attr("activation", OneOf(GATES), Required)],
        check: |node, widths| match widths[0] > 0 && widths[1].is_multiple_of(widths[0]) {
            true => same("the value", node.width, widths[1]),
            false => Err(format!("{} columns of the gate do not divide the {} of up", widths[0], widths[1])),
        },
        reads_layout: false,
    },
    route::SCHEMA,
    experts::SCHEMA,
    OpSchema {
        name: "activation",
        formula: "activation(x); clamp is min(max(x, -limit), limit)",
        inputs: 1,
        weights: &[],
        attrs: &[attr("activation", OneOf(&ACTIVATIONS), Required), attr("limit", Number, Optional)],
        check: |node, widths| {
            let clamps = node.attrs.get("activation").is_some_and(|name| name == "clamp");
            match node.attrs.contains_key("limit") {
                true if !clamps => return Err("'limit' is for clamp".into()),
                true if number(node, "limit") <= 0.0 => return Err("limit is not positive".into()),
                false if clamps => return Err("clamp needs its 'limit'".into()),
                _ => {}
            }
            same("the value", node.width, widths[0])
        },
        reads_layout: false,
    },
    OpSchema {
        name: "xielu",
        formula: "x > 0: p·x² + beta·x, else n·(expm1(min(x, eps)) - x) + beta·x; p, n from alpha_p, alpha_n",
        inputs: 1,
        weights: &[("alpha_p", Required), ("alpha_n", Required), ("beta", Required), ("eps", Required)],
        attrs: &[],
        check: |node, widths| {
            one_number(node)?;
            same("the value", node.width, widths[0])
        },
        reads_layout: false,
    },
    OpSchema {
        name: "add",
        formula: "a + b",
        inputs: 2,
        weights: &[],
        attrs: &[],
        check: |node, widths| same("b", widths[1], widths[0]).and(same("the value", node.width, widths[0])),
        reads_layout: false,
    },
    OpSchema {
        name: "scale",
        formula: "factor · x",
        inputs: 1,
        weights: &[("factor", Optional)],
        attrs: &[attr("factor", Number, Optional)],
        check: |node, widths| {
            one_number(node)?;
            if node.weight("factor").is_none() && !node.attrs.contains_key("factor") {
                return Err("needs a factor".into());
            }
            same("the value", node.width, widths[0])
        },
        reads_layout: false,
    },
    OpSchema {
        name: "narrow",
        formula: "columns start to start + length of x, or of each of its heads",
        inputs: 1,
        weights: &[],
        attrs: &[attr("start", Index, Optional), attr("length", Count, Required), attr("heads", Count, Optional)],
        check: |node, widths| {
            let (start, length) = (count(node, "start"), count(node, "length"));
            let (heads, columns) = by_head(node, widths[0])?;
            if start.checked_add(length).is_none_or(|end| end > columns) {
                return Err(format!("{length} columns from {start} on of {columns}"));
            }
            same("the value", node.width, heads.saturating_mul(length))
        },
        reads_layout: false,
    },
    OpSchema {
        name: "cat",
        formula: "columns of a, then those of b, of every head",
        inputs: 2,
        weights: &[],
        attrs: &[attr("heads", Count, Optional)],
        check: |node, widths| {
            widths.iter().try_for_each(|width| by_head(node, *width).map(drop))?;
            same("the value", node.width, widths[0].saturating_add(widths[1]))
        },
        reads_layout: false,
    },
    recurrent::CAUSAL_CONV,
    recurrent::GATED_DELTA,
    recurrent::SSD,
    expand::SCHEMA,
    OpSchema {
        name: "lm_head",
        formula: "log softmax(x · weightᵀ + bias)[token], answer tokens only; softcap bends logits",
        inputs: 1,
        weights: &[("weight", Required), ("bias", Optional)],
        attrs: &[attr("softcap", Number, Optional)],
        check: |node, widths| softcap(node).and_then(|()| projection(node, widths)),
        reads_layout: false,
    },
];

/// The schema of an op.
///
/// # Errors
/// A name that no op has, with the nearest one that some has.
pub fn find(name: &str) -> Result<&'static OpSchema> {
    OPS.iter().find(|o| o.name == name).ok_or_else(|| Error::unknown("op", name, OPS.iter().map(|o| o.name)))
}

/// Checks a node against its op: inputs, weights, attributes, widths. `widths` are those of the values it reads.
///
/// # Errors
/// What does not fit, with the op and the tensor.
pub fn check_node(node: &Node, widths: &[usize]) -> Result<()> {
    let op = find(&node.op)?;
    let tensor = node.weights.first().map(|w| format!(" ({})", w.tensor)).unwrap_or_default();
    op.fits(node, widths).map_err(|e| e.within(&format!("op '{}'{tensor}", op.name)))
}

impl OpSchema {
    fn fits(&self, node: &Node, widths: &[usize]) -> Result<()> {
        let wrong = |what: String| Err(Error::new(what));
        if node.inputs.len() != self.inputs {
            return wrong(format!("{} inputs, needs {}", node.inputs.len(), self.inputs));
        }
        for (name, value) in &node.attrs {
            match self.attrs.iter().find(|a| a.name == name) {
                None => return Err(Error::unknown("attribute", name, self.attrs.iter().map(|a| a.name))),
                Some(attr) if !attr.kind.holds(value) => {
                    return wrong(format!("attribute '{name}' should be {}, is {value}", attr.kind.describe()));
                }
                Some(_) => {}
            }
        }
        if let Some(attr) = self.attrs.iter().find(|a| a.presence == Required && !node.attrs.contains_key(a.name)) {
            return wrong(format!("attribute '{}' is missing", attr.name));
        }
        for weight in &node.weights {
            if !self.weights.iter().any(|(role, _)| *role == weight.role) {
                return Err(Error::unknown("weight role", &weight.role, self.weights.iter().map(|(role, _)| *role)));
            }
        }
        for (role, presence) in self.weights {
            let count = node.weights.iter().filter(|w| w.role == *role).count();
            if count > 1 || (count == 0 && *presence == Required) {
                return wrong(format!("{count} weights of role '{role}'"));
            }
        }
        (self.check)(node, widths).or_else(wrong)
    }
}

impl AttrKind {
    fn holds(self, value: &Value) -> bool {
        let is_finite = |v: &Value| v.as_f64().is_some_and(f64::is_finite);
        match self {
            Count => value.as_u64().is_some_and(|n| n > 0),
            Index => value.as_u64().is_some(),
            Flag => value.is_boolean(),
            Number => is_finite(value),
            Numbers => value.as_array().is_some_and(|l| l.iter().all(is_finite)),
            OneOf(texts) => value.as_str().is_some_and(|t| texts.contains(&t)),
        }
    }

    fn describe(self) -> String {
        match self {
            Count => "a whole number above 0".into(),
            Index => "a whole number".into(),
            Flag => "true or false".into(),
            Number => "a finite number".into(),
            Numbers => "a list of finite numbers".into(),
            OneOf(texts) => format!("one of {}", texts.join(", ")),
        }
    }
}

/// A whole-number attribute of a checked node; 0 where it is left out.
pub fn count(node: &Node, name: &str) -> usize {
    node.attrs.get(name).and_then(Value::as_u64).unwrap_or(0) as usize
}

/// The heads of a value of so many columns, and the columns of each: those that the node names, or one.
fn by_head(node: &Node, columns: usize) -> std::result::Result<(usize, usize), String> {
    let heads = count(node, "heads").max(1);
    match columns.is_multiple_of(heads) {
        true => Ok((heads, columns / heads)),
        false => Err(format!("{columns} columns are not {heads} heads")),
    }
}

/// A number attribute of a checked node; 0 where it is left out.
pub fn number(node: &Node, name: &str) -> f64 {
    node.attrs.get(name).and_then(Value::as_f64).unwrap_or(0.0)
}

/// A flag of a checked node; off where it is left out.
pub fn flag(node: &Node, name: &str) -> bool {
    node.attrs.get(name).and_then(Value::as_bool).unwrap_or(false)
}

/// Whether a node is a linear that PEFT takes for a module of its own. The weight of another is a parameter of a module of another
/// kind, as a router's is, and is adapted only where it is named itself.
pub fn is_module(node: &Node) -> bool {
    node.op == "linear" && !flag(node, "parameter")
}

/// Columns of a run that a norm is taken over: as `run` says, as many as its weight has, or all.
pub fn run(node: &Node) -> usize {
    let of_weight = || node.weight("weight").and_then(|w| w.shape.last().copied()).unwrap_or(node.width);
    if node.attrs.contains_key("run") { count(node, "run") } else { of_weight() }
}

type Fits = std::result::Result<(), String>;

/// Checks `x · Wᵀ + b`.
fn projection(node: &Node, widths: &[usize]) -> Fits {
    weight_shape(node, "weight", &[node.width, widths[0]])?;
    weight_shape(node, "bias", &[node.width])
}

/// Checks the shape of the weight of a role, where the node has it.
fn weight_shape(node: &Node, role: &str, shape: &[usize]) -> Fits {
    match node.weight(role) {
        Some(w) if w.shape != shape => Err(format!("{role} '{}' is {:?}, needs {shape:?}", w.tensor, w.shape)),
        _ => Ok(()),
    }
}

/// Checks that every weight is a scalar.
fn one_number(node: &Node) -> Fits {
    match node.weights.iter().find(|w| w.shape.iter().any(|n| *n != 1)) {
        Some(w) => Err(format!("{} '{}' is {:?}, needs one number", w.role, w.tensor, w.shape)),
        None => Ok(()),
    }
}

fn runs_divide(run: usize, width: usize) -> Fits {
    match run > 0 && width.is_multiple_of(run) {
        true => Ok(()),
        false => Err(format!("runs of {run} do not divide {width} columns")),
    }
}

fn softcap(node: &Node) -> Fits {
    match node.attrs.contains_key("softcap") && number(node, "softcap") <= 0.0 {
        true => Err("softcap is not positive".into()),
        false => Ok(()),
    }
}

/// Checks that a width is what it has to be.
fn same(what: &str, is: usize, needs: usize) -> Fits {
    if is == needs { Ok(()) } else { Err(format!("{what} has {is} columns, needs {needs}")) }
}
