//! One subcommand a file.

pub(crate) mod bench;
pub(crate) mod chat;
pub(crate) mod data;
pub(crate) mod describe;
pub(crate) mod doctor;
pub(crate) mod eval;
pub(crate) mod list;
pub(crate) mod manual;
pub(crate) mod merge;
pub mod new;
pub(crate) mod plan;
pub(crate) mod push;
pub(crate) mod selftest;
pub(crate) mod serve;
pub(crate) mod train;
pub(crate) mod ui;
