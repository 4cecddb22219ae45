//! What ranks say to each other first, from memory. The first byte chooses who speaks: a stranger to a rank that answers, a
//! stranger to a rank that calls, or one who knows the secret and says of itself whatever he likes.
#![no_main]

use std::io::{self, Read, Write};
use std::time::Duration;

use dpo_ranks::handshake::{Hello, Transport, Purpose, Secret, answer, call, read_frame};
use libfuzzer_sys::fuzz_target;

const MAGIC: &[u8; 16] = b"dpo-host ranks 1";

/// A line on which `heard` arrives. With a secret, a caller's proof comes after its opening, made when it is read.
struct Memory<'a> {
    heard: Vec<u8>,
    said: Vec<u8>,
    proves: Option<(&'a Secret, &'a [u8])>,
}

impl Read for Memory<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        if self.heard.is_empty()
            && self.said.len() >= 48
            && let Some((secret, body)) = self.proves.take()
        {
            self.heard = secret.proof(&[b"call", &[7; 32], &self.said[16..48], body]).to_vec();
            self.heard.extend((body.len() as u32).to_le_bytes());
            self.heard.extend(body);
        }
        let count = buffer.len().min(self.heard.len());
        buffer[..count].copy_from_slice(&self.heard[..count]);
        self.heard.drain(..count);
        Ok(count)
    }
}

impl Write for Memory<'_> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.said.extend(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl Transport for Memory<'_> {
    fn wait_at_most(&mut self, _: Duration) -> io::Result<()> {
        Ok(())
    }
}

fn me() -> Hello {
    Hello {
        version: "0.1.0".into(),
        rank: 0,
        size: 3,
        attempt: 0,
        process: "host:1".into(),
        purpose: Purpose::Join,
        port: 1,
    }
}

fuzz_target!(|data: &[u8]| {
    let Some((choice, data)) = data.split_first() else { return };
    let secret = Secret::new(b"of the run");
    let line = |heard: &[u8], proves| Memory { heard: heard.to_vec(), said: Vec::new(), proves };
    match choice % 4 {
        0 => assert!(answer(&mut line(data, None), &secret, |_| Ok(())).is_err(), "a stranger was let in"),
        1 => assert!(call(&mut line(data, None), || Ok(secret.clone()), &me()).is_err(), "a stranger was taken for a rank"),
        2 => {
            let opening = [&MAGIC[..], &[7; 32]].concat();
            if let Ok(hello) = answer(&mut line(&opening, Some((&secret, data))), &secret, |hello| me().check(hello)) {
                assert!(hello.rank < 3 && hello.rank != 0, "{hello:?} was let in");
                assert!(hello.purpose == Purpose::Join || hello.rank == 2, "{hello:?} was let in");
            }
        }
        _ => drop(read_frame(&mut line(data, None), 4096, None)),
    }
});
