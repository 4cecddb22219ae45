//! The formats of preference rows that are found by their columns. Each is a file; [`row`] has what they share, which are the
//! usual names of columns.
//!
//! A row is of one format: of the first in [`ORDER`] that takes it.

mod compared;
mod hh_rlhf;
mod kto;
mod ms_swift;
mod pairs;
mod ranked;
mod row;
mod sft;
mod trl;

use dpo_plugin_api::prelude::*;

use compared::Compared;
use hh_rlhf::HhRlhf;
use kto::Kto;
use ms_swift::MsSwift;
use pairs::Pairs;
use ranked::Ranked;
use sft::Sft;
use trl::Trl;

/// How surely a row could be of a format, by its columns alone.
type Takes = fn(&Row) -> u8;

/// Formats, those of the most telling columns first: a row with two answers and a label is not one answer with a label.
const ORDER: [(&str, Takes); 8] = [
    ("hh-rlhf", hh_rlhf::takes),
    ("ms-swift", ms_swift::takes),
    ("trl", trl::takes),
    ("pairs", pairs::takes),
    ("compared", compared::takes),
    ("ranked", ranked::takes),
    ("kto", kto::takes),
    ("sft", sft::takes),
];

/// How surely a row is of the format of this name.
fn recognised(name: &str, row: &Row) -> u8 {
    let takes = ORDER.iter().map(|(format, takes)| (*format, takes(row))).find(|(_, sure)| *sure > 0);
    takes.filter(|(format, _)| *format == name).map_or(0, |(_, sure)| sure)
}

plugin! { datasets: [Compared, HhRlhf, Kto, MsSwift, Pairs, Ranked, Sft, Trl] }

#[cfg(test)]
mod tests {
    use dpo_plugin_api::testing::check_format;

    use super::*;

    #[test]
    fn examples() {
        let all: [&dyn DatasetFormat; 8] = [&Compared, &HhRlhf, &Kto, &MsSwift, &Pairs, &Ranked, &Sft, &Trl];
        for format in all {
            check_format(format);
            assert!(ORDER.iter().any(|(name, _)| *name == format.name()));
        }
    }
}
