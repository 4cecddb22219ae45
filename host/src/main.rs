//! The `dpo-host` binary.

use std::process::ExitCode;

fn main() -> ExitCode {
    dpo_host::main(std::env::args_os().collect())
}
