//! Connections that are open: so many and no more, and none that is slow is in the way of the others.

use std::io::{self, ErrorKind, Write};
use std::net::{Shutdown, TcpStream};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

/// Connections at once. A further one takes the place of the one that has been open for longest.
const MOST: usize = 32;
/// Threads at once: of connections, and of those that lost their place and are about to notice it.
const THREADS: usize = 2 * MOST;
/// How long an answer may take to arrive.
const ANSWER: Duration = Duration::from_secs(60);

/// The connections of a server.
#[derive(Clone, Default)]
pub(super) struct Connections(Arc<Mutex<Open>>);

#[derive(Default)]
struct Open {
    /// In the order in which they came.
    streams: Vec<Arc<TcpStream>>,
    threads: usize,
}

impl Connections {
    /// Has a thread of its own converse with who has come.
    pub(super) fn serve(
        &self,
        stream: TcpStream,
        converse: impl FnOnce(&TcpStream) -> io::Result<()> + Send + 'static,
    ) {
        while self.lock().threads >= THREADS {
            thread::sleep(Duration::from_millis(5));
        }
        let stream = Arc::new(stream);
        {
            let mut open = self.lock();
            if open.streams.len() >= MOST {
                let _ = open.streams.remove(0).shutdown(Shutdown::Both);
            }
            open.streams.push(stream.clone());
            open.threads += 1;
        }
        let (all, own) = (self.clone(), stream.clone());
        let begun = thread::Builder::new().name("page".into()).spawn(move || {
            let _ = converse(&own);
            all.over(&own);
        });
        if begun.is_err() {
            self.over(&stream);
        }
    }

    fn over(&self, stream: &Arc<TcpStream>) {
        let mut open = self.lock();
        open.streams.retain(|other| !Arc::ptr_eq(other, stream));
        open.threads -= 1;
    }

    fn lock(&self) -> MutexGuard<'_, Open> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Sends an answer, which has to arrive in time however slowly it is read.
pub(super) fn send(mut stream: &TcpStream, mut bytes: &[u8]) -> io::Result<()> {
    let end = Instant::now() + ANSWER;
    while !bytes.is_empty() {
        let left = end.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return Err(ErrorKind::TimedOut.into());
        }
        stream.set_write_timeout(Some(left))?;
        match stream.write(bytes) {
            Ok(0) => return Err(ErrorKind::WriteZero.into()),
            Ok(sent) => bytes = &bytes[sent..],
            Err(e) if e.kind() == ErrorKind::Interrupted => {}
            Err(e) => return Err(e),
        }
    }
    Ok(())
}
