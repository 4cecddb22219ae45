//! Sums and gathers over TCP: each rank sends to the next one and receives from the one before, at the same time.
//!
//! A sum goes round twice, in as many parts as there are ranks: once to add, once to hand out (Patarasuk and Yuan 2009).
//! A part is added in the order of the ring and then copied, so that every rank ends with the same bits, whoever is fast.

use std::io::{self, ErrorKind, Read, Write};
use std::net::TcpStream;
use std::ops::Range;
use std::thread;

use dpo_core::error::{Error, Result};

/// Bytes that fit into a socket's buffers, so that they can be sent before anything is received.
const SMALL: usize = 16 << 10;
/// Values that are received at once.
const BLOCK: usize = 16 << 10;
/// Bytes that one rank may give to a gather.
const MOST: u64 = 1 << 36;

/// The connections of a rank to its neighbours.
pub(super) struct Ring {
    rank: usize,
    size: usize,
    /// From the rank before.
    left: TcpStream,
    /// To the next rank.
    right: TcpStream,
}

/// What goes round; ranks that are not at the same point of the program find out instead of adding apples to pears.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Round {
    Values = 1,
    Gather = 2,
    Broadcast = 3,
}

impl Ring {
    pub(super) fn new(rank: usize, size: usize, left: TcpStream, right: TcpStream) -> Result<Ring> {
        for stream in [&left, &right] {
            stream.set_nodelay(true).map_err(|e| Error::run(e.to_string()))?;
        }
        Ok(Ring { rank, size, left, right })
    }

    /// Handles by which another thread can end a round that waits.
    pub(super) fn handles(&self) -> io::Result<[TcpStream; 2]> {
        Ok([self.left.try_clone()?, self.right.try_clone()?])
    }

    /// Puts the sum over ranks into every rank's values.
    pub(super) fn sum(&mut self, values: &mut [f32]) -> io::Result<()> {
        for turn in 0..self.size - 1 {
            self.turn(values, self.rank + self.size - turn, true)?;
        }
        // The first time round has completed the next rank's part here.
        self.hand_out(values, self.rank + 1)
    }

    /// The part of so many values that this rank gives to [`fill`](Self::fill).
    pub(super) fn own(&self, length: usize) -> Range<usize> {
        part(length, self.size, self.rank)
    }

    /// Fills in the other ranks' parts of values of which each rank has its own.
    pub(super) fn fill(&mut self, values: &mut [f32]) -> io::Result<()> {
        self.hand_out(values, self.rank)
    }

    /// Hands the parts round, beginning with the one that this rank has.
    fn hand_out(&mut self, values: &mut [f32], own: usize) -> io::Result<()> {
        (0..self.size - 1).try_for_each(|turn| self.turn(values, own + self.size - turn, false))
    }

    /// Sends a part and receives the one before it, which is added to what is there or replaces it.
    fn turn(&mut self, values: &mut [f32], sent: usize, adds: bool) -> io::Result<()> {
        let parts = [sent, sent - 1].map(|at| part(values.len(), self.size, at % self.size));
        let [out, into] = values.get_disjoint_mut(parts).map_err(io::Error::other)?;
        let send = |stream: &mut TcpStream| {
            announce(stream, Round::Values, 4 * out.len())?;
            let mut bytes = Vec::with_capacity(4 * BLOCK);
            out.chunks(BLOCK).try_for_each(|block| {
                bytes.clear();
                bytes.extend(block.iter().flat_map(|v| v.to_le_bytes()));
                stream.write_all(&bytes)
            })
        };
        self.round(Round::Values, 4 * out.len(), send, |length, stream| {
            if length != 4 * into.len() as u64 {
                return Err(wrong(format!("{} values instead of {}", length / 4, into.len())));
            }
            let mut buffer = [0; 4 * BLOCK];
            for block in into.chunks_mut(BLOCK) {
                let bytes = &mut buffer[..4 * block.len()];
                stream.read_exact(bytes)?;
                for (value, b) in block.iter_mut().zip(bytes.chunks_exact(4)) {
                    let other = f32::from_le_bytes([b[0], b[1], b[2], b[3]]);
                    *value = if adds { *value + other } else { other };
                }
            }
            Ok(())
        })
    }

    /// Every rank's bytes, in the order of ranks.
    pub(super) fn gather(&mut self, own: &[u8]) -> io::Result<Vec<Vec<u8>>> {
        let mut all = vec![Vec::new(); self.size];
        all[self.rank] = own.to_vec();
        for turn in 0..self.size - 1 {
            let sent = (self.rank + self.size - turn) % self.size;
            let received = (sent + self.size - 1) % self.size;
            let out = std::mem::take(&mut all[sent]);
            let send = |stream: &mut TcpStream| send(stream, Round::Gather, &out);
            self.round(Round::Gather, out.len(), send, |length, stream| {
                all[received] = read(stream, length)?;
                Ok(())
            })?;
            all[sent] = out;
        }
        Ok(all)
    }

    /// Rank 0's bytes, at every rank.
    pub(super) fn broadcast(&mut self, bytes: &mut Vec<u8>) -> io::Result<()> {
        if self.rank > 0 {
            let length = header(&mut self.left, Round::Broadcast)?;
            *bytes = read(&mut self.left, length)?;
        }
        if self.rank + 1 < self.size {
            send(&mut self.right, Round::Broadcast, bytes)?;
        }
        Ok(())
    }

    /// Sends so many bytes and receives at once.
    fn round(
        &mut self,
        round: Round,
        bytes: usize,
        send: impl FnOnce(&mut TcpStream) -> io::Result<()> + Send,
        take: impl FnOnce(u64, &mut TcpStream) -> io::Result<()>,
    ) -> io::Result<()> {
        let (left, right) = (&mut self.left, &mut self.right);
        let receive = || header(left, round).and_then(|length| take(length, left));
        if bytes <= SMALL {
            send(right)?;
            return receive();
        }
        let handle = right.try_clone()?;
        thread::scope(|scope| {
            let sender = scope.spawn(|| send(right));
            let received = receive();
            if received.is_err() {
                // Nobody may be left to take what is being sent.
                let _ = handle.shutdown(std::net::Shutdown::Both);
            }
            let sent = sender.join().unwrap_or_else(|_| Err(io::Error::other("sending ended early")));
            received.and(sent)
        })
    }
}

/// The range of a part when `length` values are parted as evenly as can be.
fn part(length: usize, parts: usize, at: usize) -> Range<usize> {
    length * at / parts..length * (at + 1) / parts
}

fn send(stream: &mut TcpStream, round: Round, bytes: &[u8]) -> io::Result<()> {
    announce(stream, round, bytes.len())?;
    stream.write_all(bytes)
}

fn announce(stream: &mut TcpStream, round: Round, bytes: usize) -> io::Result<()> {
    let mut header = [round as u8; 9];
    header[1..].copy_from_slice(&(bytes as u64).to_le_bytes());
    stream.write_all(&header)
}

/// The length of what comes next, which has to be of this round.
fn header(stream: &mut TcpStream, round: Round) -> io::Result<u64> {
    let mut header = [0; 9];
    stream.read_exact(&mut header)?;
    if header[0] != round as u8 {
        return Err(wrong(format!("message {} during {round:?}", header[0])));
    }
    let mut length = [0; 8];
    length.copy_from_slice(&header[1..]);
    Ok(u64::from_le_bytes(length))
}

/// Memory grows with what has arrived, not with what was announced.
fn read(stream: &mut TcpStream, length: u64) -> io::Result<Vec<u8>> {
    if length > MOST {
        return Err(wrong(format!("{length} bytes")));
    }
    let mut bytes = Vec::new();
    stream.take(length).read_to_end(&mut bytes)?;
    if bytes.len() as u64 == length { Ok(bytes) } else { Err(ErrorKind::UnexpectedEof.into()) }
}

fn wrong(what: String) -> io::Error {
    io::Error::new(ErrorKind::InvalidData, format!("sent {what}: the ranks are not at the same point of the run"))
}

#[cfg(test)]
#[allow(clippy::unwrap_used)] // In a test, a panic is the report.
mod tests {
    use std::net::TcpListener;

    use super::*;

    /// Rings of ranks that are threads; `work` is what each does.
    fn ranks<T: Send>(size: usize, work: impl Fn(usize, Ring) -> T + Sync) -> Vec<T> {
        let doors: Vec<TcpListener> = (0..size).map(|_| TcpListener::bind("127.0.0.1:0").unwrap()).collect();
        thread::scope(|scope| {
            let (doors, work) = (&doors, &work);
            let run = move |rank: usize| {
                let right = TcpStream::connect(doors[(rank + 1) % size].local_addr().unwrap()).unwrap();
                let left = doors[rank].accept().unwrap().0;
                work(rank, Ring::new(rank, size, left, right).unwrap())
            };
            let all: Vec<_> = (0..size).map(|rank| scope.spawn(move || run(rank))).collect();
            all.into_iter().map(|t| t.join().unwrap()).collect()
        })
    }

    /// A rank's value at a place: fractions, so that the order of a sum shows in its bits.
    fn value(rank: usize, at: usize) -> f32 {
        ((rank * 7919 + at * 104_729) % 1000) as f32 / 997.0 - 0.3
    }

    #[test]
    fn sums_are_those_of_plain_addition_and_the_same_bits_everywhere() {
        for size in 1..=5 {
            for length in [0, 1, size - 1, size, 2 * size + 1, 1_000_003] {
                let sums = ranks(size, |rank, mut ring| {
                    let mut values: Vec<f32> = (0..length).map(|at| value(rank, at)).collect();
                    // A rank that is late changes nothing.
                    thread::sleep(std::time::Duration::from_millis((rank * 7 % 3) as u64));
                    ring.sum(&mut values).unwrap();
                    values
                });
                for (at, sum) in sums[0].iter().enumerate() {
                    let plain: f64 = (0..size).map(|rank| f64::from(value(rank, at))).sum();
                    assert!((f64::from(*sum) - plain).abs() < 1e-5, "{size} ranks, {length} values, at {at}");
                }
                let bits = |values: &[f32]| values.iter().map(|v| v.to_bits()).collect::<Vec<_>>();
                assert!(sums.iter().all(|s| bits(s) == bits(&sums[0])), "{size} ranks, {length} values");
            }
        }
    }

    #[test]
    fn parts_become_wholes() {
        for size in 1..=4 {
            for length in [0, 1, 2 * size + 1, 300_007] {
                let whole: Vec<f32> = (0..length).map(|at| value(0, at)).collect();
                let filled = ranks(size, |_, mut ring| {
                    let (own, mut values) = (ring.own(length), vec![f32::NAN; length]);
                    values[own.clone()].copy_from_slice(&whole[own]);
                    ring.fill(&mut values).unwrap();
                    values
                });
                assert!(filled.iter().all(|v| *v == whole), "{size} ranks, {length} values");
            }
        }
    }

    #[test]
    fn everyone_has_everyones_bytes() {
        for size in 1..=4 {
            // The last one's are more than sockets hold.
            let of = |rank: usize| vec![rank as u8; if rank + 1 == size { 20_000_000 } else { rank * 3 }];
            for gathered in ranks(size, |rank, mut ring| ring.gather(&of(rank)).unwrap()) {
                assert!(gathered.into_iter().eq((0..size).map(of)), "{size} ranks");
            }
            let given = ranks(size, |rank, mut ring| {
                let mut bytes = if rank == 0 { vec![5; 3_000_000] } else { Vec::new() };
                ring.broadcast(&mut bytes).unwrap();
                bytes
            });
            assert!(given.iter().all(|b| *b == vec![5; 3_000_000]), "{size} ranks");
        }
    }

    #[test]
    fn ranks_at_different_points_find_out() {
        let ended = ranks(2, |rank, mut ring| match rank {
            0 => ring.sum(&mut [0.0; 8]).map(|()| 0),
            _ => ring.gather(&[1; 4]).map(|all| all.len()),
        });
        assert!(ended.iter().all(|e| e.as_ref().is_err_and(|e| e.kind() == ErrorKind::InvalidData)), "{ended:?}");
        let lengths = ranks(2, |rank, mut ring| ring.sum(&mut vec![0.0; 8 + 4 * rank]));
        assert!(lengths.iter().any(|l| l.is_err()), "{lengths:?}");
    }

    #[test]
    fn a_length_that_is_not_meant_takes_no_memory() {
        let ended = ranks(2, |rank, mut ring| match rank {
            0 => ring.gather(&[]).map(|_| ()),
            _ => {
                let mut header = [Round::Gather as u8; 9];
                header[1..].copy_from_slice(&(1_u64 << 35).to_le_bytes());
                ring.right.write_all(&header)
            }
        });
        assert_eq!(ended[0].as_ref().unwrap_err().kind(), ErrorKind::UnexpectedEof);
    }
}
