//! Gives the types of this crate the package name of plugin-api, so that a field's type is all that differs.

fn main() {
    println!("cargo::rustc-env=CARGO_PKG_NAME=dpo-plugin-api");
}
