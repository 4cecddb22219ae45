//! The `dpo-host` binary.

use std::process::ExitCode;

use dpo_host::allocator::Blocks;

#[global_allocator]
static ALLOCATOR: Blocks = Blocks::new();

fn main() -> ExitCode {
    dpo_host::main(std::env::args_os().collect())
}
