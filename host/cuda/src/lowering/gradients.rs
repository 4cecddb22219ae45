//! Places of gradients: in the place of another one wherever that is not read any more, side by side where their values are.

use super::super::program::{Slice, Step};
use super::super::sum::{sum, zero};
use super::{Bundle, Lowering, whole};
use dpo_core::error::Result;

impl Lowering<'_> {
    /// The gradient of a node's value, which the node's backward steps use up. `None` for one that nothing reads: then what made
    /// it has no gradient either.
    pub(crate) fn take_gradient(&mut self, index: usize) -> Option<Slice> {
        self.gradients[index + 1].take()
    }

    /// Where all gradients of values lie that were placed together.
    pub(crate) fn gradients_together(&self, value: usize) -> Option<Slice> {
        let bundle = self.bundles.iter().find(|b| b.values.contains(&value))?;
        bundle.gradient.map(|buffer| Slice::whole(buffer, bundle.width))
    }

    /// The value whose gradient a value's gradient becomes in place.
    fn source(&self, mut value: usize) -> usize {
        while let Some(maker) = value.checked_sub(1).filter(|m| self.ops[*m].in_place) {
            let from = self.nodes[maker].inputs[0];
            if self.only_consumer(from).is_none() {
                break;
            }
            value = from;
        }
        value
    }

    /// Whether all that reads a value are parts of it that have no columns in common.
    pub(crate) fn is_parted(&self, value: usize) -> bool {
        let parts: Option<Vec<_>> = self.consumers(value).map(|c| (self.ops[c].part)(&self.nodes[c])).collect();
        let Some(mut parts) = parts.filter(|_| value != self.output) else { return false };
        parts.sort_unstable();
        parts.windows(2).all(|pair| pair[0].0 + pair[0].1 <= pair[1].0)
    }

    /// The value that a value is a part of, where that one's parts have their gradients in its; and the first column.
    fn whole_of(&self, value: usize) -> Option<(usize, usize)> {
        let maker = value.checked_sub(1)?;
        let (start, _) = (self.ops[maker].part)(&self.nodes[maker])?;
        let whole = self.nodes[maker].inputs[0];
        self.is_parted(whole).then_some((whole, start))
    }

    /// Where the gradient of a value lies in which its parts have theirs.
    fn place_of_parts(&mut self, whole: usize) -> Slice {
        let place = self.of_parts[whole].unwrap_or_else(|| self.destination(whole));
        self.of_parts[whole] = Some(place);
        place
    }

    /// Makes the gradients of a value's parts its own: they lie in it, and columns that have none are zero.
    pub(crate) fn join_parts(&mut self, whole: usize) -> Result<()> {
        let nodes: Vec<usize> = self.consumers(whole).collect();
        if nodes.iter().all(|n| self.gradients[n + 1].is_none()) {
            return Ok(());
        }
        let all = self.place_of_parts(whole);
        let mut parts = Vec::new();
        for node in nodes {
            let gradient = self.gradients[node + 1].take();
            parts.extend((self.ops[node].part)(&self.nodes[node]).zip(gradient));
        }
        parts.sort_unstable_by_key(|((start, _), _)| *start);
        self.gradients[whole] = Some(all);
        self.making.push(whole);
        let mut end = 0;
        for ((start, width), gradient) in parts {
            if end < start {
                self.push(zero(all.part(end, start - end)))?;
            }
            self.copy(gradient, all.part(start, width))?;
            end = start + width;
        }
        if end < all.width { self.push(zero(all.part(end, all.width - end))) } else { Ok(()) }
    }

    /// Where the gradient of a value has to lie, if that is not free to choose.
    fn fixed_place(&mut self, value: usize) -> Option<Slice> {
        let value = self.source(value);
        if let Some((whole, start)) = self.whole_of(value) {
            return Some(self.place_of_parts(whole).part(start, self.nodes[value - 1].width));
        }
        let at = self.bundles.iter().position(|b| b.values.contains(&value))?;
        let (width, behind, before) = (self.bundles[at].width, self.bundles[at].behind, self.bundles[at].gradient);
        let buffer = before.unwrap_or_else(|| self.buffer(width, behind).buffer);
        self.bundles[at].gradient = Some(buffer);
        self.homes[value].map(|home| Slice { buffer, ..home })
    }

    /// Where the gradient of a value is written that has none yet.
    fn destination(&mut self, value: usize) -> Slice {
        if let Some(fixed) = self.fixed_place(value) {
            return fixed;
        }
        let source = self.source(value);
        let width = self.homes[source].map_or_else(|| whole(self.nodes[source - 1].width), |h| h.width);
        self.buffer(width, self.gradient_behind[source])
    }

    /// A further part of a value's gradient: what is added to, and where the sum goes. That is the same place unless another
    /// value's gradient lies there too, or what is `read` meanwhile.
    pub(crate) fn accumulate(&mut self, value: usize, read: Option<Slice>) -> (Option<Slice>, Slice) {
        let (before, to) = match self.gradients[value] {
            None => (None, self.destination(value)),
            Some(before) => {
                let others = self.gradients.iter().enumerate().filter(|(v, _)| *v != value).filter_map(|(_, g)| *g);
                let taken = others.chain(read).any(|g| g.overlaps(before));
                (Some(before), if taken { self.destination(value) } else { before })
            }
        };
        self.gradients[value] = Some(to);
        self.making.push(value);
        (before, to)
    }

    /// Gives a value a gradient by a step that cannot add: where it writes, and the step that adds afterwards.
    pub(crate) fn write_gradient(&mut self, value: usize) -> (Slice, Option<Step>) {
        let (before, to) = self.accumulate(value, None);
        match before {
            None => (to, None),
            Some(before) => {
                let part = self.buffer(to.width, 0);
                (part, Some(sum(before, part, to)))
            }
        }
    }

    /// Where a value's gradient, or a part of it, is written that is made of another gradient element by element: in that one's
    /// place, unless it is another value's too.
    pub(crate) fn place_over_gradient(&mut self, value: usize, gradient: Slice) -> Slice {
        if !self.gradients.iter().flatten().any(|g| g.overlaps(gradient)) {
            return gradient;
        }
        match self.gradients[value] {
            Some(_) => self.buffer(gradient.width, 0),
            None => self.destination(value),
        }
    }

    /// Passes a gradient on to a value as it is.
    pub(crate) fn pass_on(&mut self, value: usize, gradient: Slice) -> Result<()> {
        if self.gradients[value].is_some() {
            if let (Some(before), to) = self.accumulate(value, None) {
                self.push(sum(before, gradient, to))?;
            }
            return Ok(());
        }
        let to = self.fixed_place(value).unwrap_or(gradient);
        self.gradients[value] = Some(to);
        self.making.push(value);
        self.copy(gradient, to)
    }

    /// Values that are read for the last time where their gradients are made: those may take their place, where both lie
    /// together.
    pub(crate) fn reuse_places(&mut self, values: &[usize]) {
        if !values.iter().all(|v| self.is_consumed(*v)) {
            return;
        }
        let same = |b: &&mut Bundle| {
            b.gradient.is_none() && b.values.len() == values.len() && b.values.iter().all(|v| values.contains(v))
        };
        if let Some(bundle) = self.bundles.iter_mut().find(same) {
            bundle.gradient = Some(bundle.buffer);
        }
        let Some((whole, _)) = self.whole_of(values[0]) else { return };
        let all = values.iter().all(|v| self.over[*v] == Some(whole)) && self.consumers(whole).count() == values.len();
        let made = whole.checked_sub(1).is_some_and(|m| !self.ops[m].backward_reads.value && !self.ops[m].in_place);
        let alone = self.over[whole].is_none() && !self.bundles.iter().any(|b| b.values.contains(&whole));
        if all && made && alone && self.of_parts[whole].is_none() {
            self.of_parts[whole] = self.homes[whole];
        }
    }
}
