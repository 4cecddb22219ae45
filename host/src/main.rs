//! The `dpo-host` binary.
fn main() {
    let r = dpo_host::plugins::Registry::discover(&[std::path::PathBuf::from("target/release")]);
    for row in &r.rows {
        println!("{row:?}");
    }
    for row in &r.refusals {
        println!("{row:?}");
    }
}
