//! `dpo-host` itself, under a name that cargo builds for this crate's tests.

use std::process::ExitCode;

fn main() -> ExitCode {
    dpo_host::main(std::env::args_os().collect())
}
