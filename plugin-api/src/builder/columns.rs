//! Columns that are taken, put together and repeated.

use serde_json::json;

use super::{BlockBuilder, Var};

impl BlockBuilder {
    /// Columns `[start, start + length)`: a part of a fused projection.
    pub fn narrow(&mut self, x: Var, start: usize, length: usize) -> Var {
        self.narrow_heads(x, 1, start, length)
    }

    /// Of each of so many heads, its columns `[start, start + length)`.
    pub fn narrow_heads(&mut self, x: Var, heads: usize, start: usize, length: usize) -> Var {
        let columns = self.columns_of_heads("narrow", x, heads);
        if start.checked_add(length).is_none_or(|end| end > columns) || length == 0 {
            self.fail(format!("narrow: {length} columns from {start} on of {columns}"));
        }
        let mut attrs = vec![("start", json!(start)), ("length", json!(length))];
        attrs.extend((heads > 1).then(|| ("heads", json!(heads))));
        self.op("narrow", &[x], vec![], &attrs, heads * length)
    }

    /// Columns side by side, one part after another, of these widths.
    pub fn split<const N: usize>(&mut self, x: Var, widths: [usize; N]) -> [Var; N] {
        self.split_heads(x, 1, widths)
    }

    /// The columns of each of so many heads, one part after another, of these widths.
    pub fn split_heads<const N: usize>(&mut self, x: Var, heads: usize, widths: [usize; N]) -> [Var; N] {
        let mut start = 0;
        widths.map(|width| {
            let part = self.narrow_heads(x, heads, start, width);
            start += width;
            part
        })
    }

    /// Columns of `a`, then those of `b`.
    pub fn cat(&mut self, a: Var, b: Var) -> Var {
        self.cat_heads(a, b, 1)
    }

    /// For every one of so many heads the columns of `a`'s, then those of `b`'s.
    pub fn cat_heads(&mut self, a: Var, b: Var, heads: usize) -> Var {
        [a, b].iter().for_each(|part| {
            self.columns_of_heads("cat", *part, heads);
        });
        let attrs: Vec<_> = (heads > 1).then(|| ("heads", json!(heads))).into_iter().collect();
        self.op("cat", &[a, b], vec![], &attrs, a.width + b.width)
    }

    /// `x` for every one of so many heads, side by side.
    pub fn expand(&mut self, x: Var, heads: usize) -> Var {
        self.op("expand", &[x], vec![], &[("heads", json!(heads))], x.width * heads)
    }

    fn columns_of_heads(&mut self, op: &str, x: Var, heads: usize) -> usize {
        if heads == 0 || !x.width.is_multiple_of(heads) {
            self.fail(format!("{op}: {} columns are not {heads} heads", x.width));
        }
        x.width / heads.max(1)
    }
}
