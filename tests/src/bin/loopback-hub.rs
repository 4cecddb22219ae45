//! The hub of the tests as a program, for clients of other languages: prints its address, and ends with its standard input.

fn main() {
    let hub = dpo_tests::hub::Hub::start(Vec::new());
    if let Some(part) = std::env::args().nth(1).and_then(|size| size.parse().ok()) {
        hub.state.lock().expect("no thread has panicked").part = Some(part);
    }
    println!("{}", hub.address);
    let _ = std::io::copy(&mut std::io::stdin(), &mut std::io::sink());
}
