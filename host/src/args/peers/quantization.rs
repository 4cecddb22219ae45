//! What the tools say of a quantised base, as `--quantization`. All of them leave it to bitsandbytes, or name another program.

use dpo_core::error::{Error, Result};

use super::super::flag::Flag;
use super::combine::is_on;
use super::translation::Translation;

/// How a tool names it.
pub(super) struct Names {
    /// Bits of a weight.
    pub bits: &'static str,
    /// Switches for 4 and for 8 bits. What a tool lacks is empty.
    pub switches: [&'static str; 2],
    /// Which program quantises.
    pub method: &'static str,
    /// Which kind of 4 bits.
    pub kind: &'static str,
    /// Whether scales are quantised, too.
    pub double: &'static str,
}

/// What of it is told in a tool's table.
pub(super) const BECOMES: &str =
    "`--quantization`: 4 bits by bitsandbytes are `nf4`, fp8 is `fp8`; all else is refused";

const INSTEAD: &str = "say --quantization nf4, or fp8, or leave it out";

/// Takes the arguments; those that need no bits mean nothing without.
pub(super) fn quantization(t: &mut Translation, names: &Names) -> Result<()> {
    let by = t.take(names.method);
    let [four, eight] = names.switches.map(|switch| t.take(switch).filter(is_on));
    let (bits, kind) = (t.take(names.bits), t.take(names.kind));
    let double = t.take_value(names.double).0.is_none_or(|value| !value.eq_ignore_ascii_case("false"));
    let says = |flag: &Flag, text: &str| flag.values.first().is_some_and(|value| value.eq_ignore_ascii_case(text));
    let refuse = |flag: &Flag, what: &str| Err(Error::input(what).at(flag.spelled()).help(INSTEAD));
    let small = "frozen weights are kept in nf4, fp8, bf16 or f32";
    if let Some(flag) = by.filter(|flag| !says(flag, "bnb")) {
        if !says(&flag, "fp8") {
            return refuse(&flag, small);
        }
        t.notes.push(format!("{} is --quantization fp8: a scale for each row, not for blocks", flag.spelled()));
        push(t, "fp8", flag);
        return Ok(());
    }
    if let Some(flag) = eight {
        return refuse(&flag, small);
    }
    if let Some(flag) = bits.as_ref().filter(|flag| !says(flag, "4")) {
        return refuse(flag, small);
    }
    let Some(flag) = four.or(bits) else { return Ok(()) };
    if let Some(kind) = kind.filter(|kind| !says(kind, "nf4")) {
        return refuse(&kind, "four bits are those of nf4 here");
    }
    if !double {
        t.notes.push(format!("{}: scales of nf4 are quantised in any case", flag.spelled()));
    }
    push(t, "nf4", flag);
    Ok(())
}

fn push(t: &mut Translation, value: &str, from: Flag) {
    if !t.has("quantization") {
        t.push("quantization", [value], from.place);
    }
}
