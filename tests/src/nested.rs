//! Crates outside of this workspace, built by tests.

use std::path::{Path, PathBuf};
use std::process::Command;

/// Where they are built: one folder for all, so that what they share is built once. It lies under the target folder
/// that the running test was built in.
pub fn target_folder() -> PathBuf {
    let exe = std::env::current_exe().expect("a running test has a path");
    let target =
        exe.ancestors().find(|a| a.file_name().is_some_and(|n| n == "deps")).and_then(|d| d.ancestors().nth(2));
    target.expect("tests lie in target/<profile>/deps").join("nested")
}

/// Runs `cargo <command> --release --offline` in a folder and returns everything it printed. A crate without a lock
/// file gets this workspace's, so that it is built of what is downloaded already.
///
/// # Panics
/// With what cargo printed, if it fails.
pub fn cargo(dir: &Path, command: &str) -> String {
    let lock = dir.join("Cargo.lock");
    if !lock.exists() {
        let ours = Path::new(env!("CARGO_MANIFEST_DIR")).join("../Cargo.lock");
        std::fs::copy(ours, lock).expect("this workspace has a lock file");
    }
    let output = Command::new(env!("CARGO"))
        .args([command, "--release", "--offline", "--target-dir"])
        .arg(target_folder())
        .current_dir(dir)
        .output()
        .expect("cargo runs");
    let text = String::from_utf8_lossy(&output.stdout) + String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "cargo {command} in {}:\n{text}", dir.display());
    text.into_owned()
}
