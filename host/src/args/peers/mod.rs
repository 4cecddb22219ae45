//! Arguments of other tools as ours: of ms-swift's `swift rlhf`, of LLaMA-Factory and of TRL.
//!
//! A tool is a table of all arguments that it has, each with what becomes of it: it is obeyed (the same happens here), named (it
//! changes nothing here, and a note says why), or refused (it asks for what is not done here; its default never is). The
//! translation, the tables in docs/ and the tests read the same table. What several arguments mean together is a function of
//! each tool; what the tools have in common is in `combine.rs` and `quantization.rs`.

mod combine;
mod dataset_info;
mod llama_factory;
mod quantization;
mod swift;
mod table;
mod trainer;
mod translation;
mod trl;

pub use table::{Argument, Kind, Peer};

use clap::Command;
use dpo_core::error::Result;

use super::flag::Flag;
use translation::Translation;

/// What makes flags of ours of arguments that mean something together.
type Combine = fn(&mut Translation) -> Result<()>;

/// The tools. Names that several have are taken as the first of them means them, where nothing tells which tool it is.
const TOOLS: [(&Peer, Combine); 3] =
    [(&swift::PEER, swift::combine), (&llama_factory::PEER, llama_factory::combine), (&trl::PEER, trl::combine)];

/// The tools whose arguments are taken.
pub static PEERS: [&Peer; 3] = [TOOLS[0].0, TOOLS[1].0, TOOLS[2].0];

/// Rewrites the flags of a command; returns what the user should know about them as well.
pub(super) fn translate(flags: Vec<Flag>, command: &Command) -> Result<(Vec<Flag>, Vec<String>)> {
    let mut translation = Translation::new(&flags, command, &PEERS);
    for flag in flags {
        translation.flag(flag)?;
    }
    combine::processes(&mut translation)?;
    let tool = TOOLS.iter().find(|(peer, _)| translation.peer.is_some_and(|own| own.name == peer.name));
    tool.map_or(combine::nobodys as Combine, |(_, combine)| *combine)(&mut translation)?;
    translation.end()
}
