//! How ranks find each other: everyone calls rank 0, rank 0 tells everyone where the others are, each calls the next.
//!
//! Every rank keeps its door open for as long as it lives: who comes late or is no rank is told so, and a second run
//! cannot take the port meanwhile.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpListener, TcpStream, ToSocketAddrs};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};

use super::environment::Place;
use super::handshake::{self, Hello, PATIENCE, Purpose, RINGS, Refused, Secret, plain, read_frame, write_frame};
use super::ring::Ring;
use crate::console;
use crate::error::{Error, Result};

/// Callers that are listened to at once; ranks call again.
const CALLERS: usize = 256;
/// Bytes of the list of ranks.
const MOST: usize = 1 << 24;

/// Ranks that have met.
pub(super) struct Met {
    pub(super) rings: [Ring; RINGS],
    /// At rank 0 a connection to every other rank, elsewhere one to rank 0.
    pub(super) sides: Vec<(usize, TcpStream)>,
    /// `host:pid` of every rank.
    pub(super) processes: Vec<String>,
}

#[derive(Clone, Debug, Serialize, Deserialize)]
struct Member {
    /// As rank 0 sees it.
    address: SocketAddr,
    process: String,
}

/// What rank 0 sends to everyone: all ranks, or why there is no run.
type List = std::result::Result<Vec<Member>, String>;

/// Brings the ranks of a run together, or says who did not come within `patience`.
pub(super) fn meet(place: &Place, patience: Duration) -> Result<Met> {
    let deadline = Instant::now() + patience;
    let process = process();
    if place.rank == 0 {
        let door = Door::open(listen(place)?, place, &process)?;
        let guests = door.guests(place, patience, deadline)?;
        let mut list = vec![Member { address: door.address, process }];
        for (stream, hello) in &guests {
            let ip = stream.peer_addr().map_err(|e| gone(hello.rank, &hello.process, &e))?.ip();
            list.push(Member { address: SocketAddr::new(ip, hello.port), process: hello.process.clone() });
        }
        let sides = guests.into_iter().map(|(stream, hello)| (hello.rank, stream)).collect::<Vec<_>>();
        tell(&sides, &Ok(list.clone()))?;
        return close_rings(place, &door, list, sides, Instant::now() + patience);
    }
    let mut stream = Door::call_rank_0(place, &process, deadline)?;
    let at = stream.0.peer_addr().map_err(|e| gone(0, &place.host, &e))?;
    // Rank 0 has not waited longer than this rank will from now on, and says when it gives up.
    let deadline = Instant::now() + patience + PATIENCE;
    let received = read_frame(&mut stream.0, MOST, Some(deadline)).map_err(|e| gone(0, &at.to_string(), &e))?;
    let list: List = serde_json::from_slice(&received)
        .map_err(|e| Error::run(format!("rank 0 sent a list of ranks that cannot be read: {e}")).at(at))?;
    let mut list = list.map_err(|text| Error::run(text).at("rank 0"))?;
    if list.len() != place.size {
        return Err(Error::run(format!("rank 0 lists {} ranks of {}", list.len(), place.size)).at(at));
    }
    for member in &mut list {
        // What reaches rank 0 from its own host may be known to it by a loopback address.
        if member.address.ip().is_loopback() {
            member.address.set_ip(at.ip());
        }
    }
    list[0].address = at;
    close_rings(place, &stream.1, list, vec![(0, stream.0)], Instant::now() + patience)
}

/// Calls the next rank and waits for the one before, once for each ring.
fn close_rings(
    place: &Place,
    door: &Door,
    list: Vec<Member>,
    sides: Vec<(usize, TcpStream)>,
    deadline: Instant,
) -> Result<Met> {
    let next = (place.rank + 1) % place.size;
    let before = (place.rank + place.size - 1) % place.size;
    let ring = |at: usize| {
        let right = call_next(next, &list[next], &place.secret, &door.hello(place, Purpose::Ring(at)), deadline)?;
        let left = door.wait(deadline, |seats| seats.left[at].take()).ok_or_else(|| {
            Error::run(format!("rank {before} ({}) never called", list[before].process)).help("look at what it printed")
        })?;
        Ring::new(place.rank, place.size, left, right)
    };
    let rings = [ring(0)?, ring(1)?];
    Ok(Met { rings, sides, processes: list.into_iter().map(|m| m.process).collect() })
}

/// Calls the next rank until it answers.
fn call_next(next: usize, member: &Member, secret: &Secret, hello: &Hello, deadline: Instant) -> Result<TcpStream> {
    loop {
        match call(member.address, secret, hello) {
            Ok(stream) => return Ok(stream),
            Err(Refused::ByRank(text) | Refused::ByStranger(text)) => {
                return Err(Error::run(format!("rank {next} refuses this rank: {text}")).at(member.address));
            }
            Err(Refused::Absent(text)) if Instant::now() >= deadline => {
                return Err(Error::run(format!("rank {next} ({}) {text}", member.process))
                    .at(member.address)
                    .help("ranks reach each other on ports that the system chooses: a firewall between them must let these pass"));
            }
            Err(Refused::Absent(_)) => thread::sleep(Duration::from_millis(50)),
        }
    }
}

fn tell(sides: &[(usize, TcpStream)], list: &List) -> Result<()> {
    let text = serde_json::to_vec(list).map_err(|e| Error::run(e.to_string()))?;
    for (_, stream) in sides {
        // Who is gone is found out by the watchdog, which begins next.
        let _ = stream.try_clone().and_then(|mut s| write_frame(&mut s, &text));
    }
    Ok(())
}

fn gone(rank: usize, process: &str, e: &std::io::Error) -> Error {
    Error::run(format!("rank {rank} ({process}) {} before the run began", plain(e))).help("look at what it printed")
}

fn call(address: SocketAddr, secret: &Secret, hello: &Hello) -> std::result::Result<TcpStream, Refused> {
    let mut stream = TcpStream::connect_timeout(&address, PATIENCE)?;
    stream.set_nodelay(true)?;
    handshake::call(&mut stream, secret, hello)?;
    stream.set_read_timeout(None)?;
    Ok(stream)
}

/// Rank 0's listener, on the first port that is free.
fn listen(place: &Place) -> Result<TcpListener> {
    let mut last = None;
    for port in place.ports.clone() {
        match bind(place, port) {
            Ok(listener) => return Ok(listener),
            Err(e) => last = Some(e),
        }
    }
    let cause =
        last.map(|e| if e.kind() == std::io::ErrorKind::AddrInUse { "is in use".into() } else { e.to_string() });
    let (first, end) = (place.ports.start(), place.ports.end());
    let ports = if first == end { first.to_string() } else { format!("{first}-{end}") };
    Err(Error::input(format!("the port where ranks meet {}", cause.unwrap_or_default()))
        .at(format!("{}:{ports}", place.host))
        .help(format!("another run or program has it: set {} to a free port, for every rank", place.port_variable)))
}

/// On the loopback device if the ranks meet there, else on all.
fn bind(place: &Place, port: u16) -> std::io::Result<TcpListener> {
    if place.host == "localhost" || place.host.parse::<IpAddr>().is_ok_and(|ip| ip.is_loopback()) {
        return TcpListener::bind((place.host.as_str(), port));
    }
    TcpListener::bind((Ipv4Addr::UNSPECIFIED, port)).or_else(|e| match e.kind() {
        std::io::ErrorKind::AddrInUse => Err(e),
        _ => TcpListener::bind((Ipv6Addr::UNSPECIFIED, port)),
    })
}

/// `host:pid` of this process.
fn process() -> String {
    let name = std::fs::read_to_string("/proc/sys/kernel/hostname").ok().or_else(|| std::env::var("HOSTNAME").ok());
    format!("{}:{}", name.as_deref().map_or("localhost", str::trim), std::process::id())
}

/// Where a rank takes connections.
struct Door {
    address: SocketAddr,
    process: String,
    seats: Arc<Seats>,
}

struct Seats {
    taken: Mutex<Taken>,
    changed: Condvar,
}

#[derive(Default)]
struct Taken {
    /// `host:pid` of the ranks that have come.
    joined: Vec<Option<String>>,
    guests: Vec<(TcpStream, Hello)>,
    /// `host:pid` of the rank before, and its connections, by ring.
    before: [Option<String>; RINGS],
    left: [Option<TcpStream>; RINGS],
}

impl Seats {
    fn lock(&self) -> MutexGuard<'_, Taken> {
        self.taken.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Taken {
    fn seat(&mut self, hello: &Hello) -> &mut Option<String> {
        match hello.purpose {
            Purpose::Join => &mut self.joined[hello.rank],
            Purpose::Ring(at) => &mut self.before[at],
        }
    }
}

impl Door {
    fn open(listener: TcpListener, place: &Place, process: &str) -> Result<Door> {
        let failed = |e: std::io::Error| Error::run(format!("cannot take connections: {e}"));
        let address = listener.local_addr().map_err(failed)?;
        let taken = Taken { joined: vec![None; place.size], ..Taken::default() };
        let seats = Arc::new(Seats { taken: Mutex::new(taken), changed: Condvar::new() });
        let door = Door { address, process: process.into(), seats: seats.clone() };
        let me = door.hello(place, Purpose::Join);
        let secret = place.secret.clone();
        let callers = Arc::new(AtomicUsize::new(0));
        let take = move || {
            for stream in listener.incoming().flatten() {
                if callers.fetch_add(1, Ordering::Relaxed) < CALLERS {
                    let (seats, me, secret, callers) = (seats.clone(), me.clone(), secret.clone(), callers.clone());
                    let hear = move || {
                        hear(stream, &seats, &me, &secret);
                        callers.fetch_sub(1, Ordering::Relaxed);
                    };
                    let _ = thread::Builder::new().name("caller".into()).spawn(hear);
                } else {
                    callers.fetch_sub(1, Ordering::Relaxed);
                }
            }
        };
        thread::Builder::new().name("door".into()).spawn(take).map_err(failed)?;
        Ok(door)
    }

    fn hello(&self, place: &Place, purpose: Purpose) -> Hello {
        Hello {
            version: env!("CARGO_PKG_VERSION").into(),
            rank: place.rank,
            size: place.size,
            attempt: place.generation,
            process: self.process.clone(),
            purpose,
            port: self.address.port(),
        }
    }

    /// Waits until something is there, at most to a deadline.
    fn wait<T>(&self, deadline: Instant, mut found: impl FnMut(&mut Taken) -> Option<T>) -> Option<T> {
        let mut seats = self.seats.lock();
        loop {
            if let Some(found) = found(&mut seats) {
                return Some(found);
            }
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return None;
            }
            seats = self.seats.changed.wait_timeout(seats, left).unwrap_or_else(PoisonError::into_inner).0;
        }
    }

    /// All other ranks, in order.
    fn guests(&self, place: &Place, patience: Duration, deadline: Instant) -> Result<Vec<(TcpStream, Hello)>> {
        let others = place.size - 1;
        let all = |seats: &mut Taken| (seats.guests.len() == others).then(|| std::mem::take(&mut seats.guests));
        if let Some(mut guests) = self.wait(deadline, all) {
            guests.sort_by_key(|(_, hello)| hello.rank);
            return Ok(guests);
        }
        let mut seats = self.seats.lock();
        let missing: Vec<String> =
            (1..place.size).filter(|r| seats.joined[*r].is_none()).map(|r| r.to_string()).collect();
        let (ranks, list) = (if missing.len() == 1 { "rank" } else { "ranks" }, missing.join(", "));
        let text = format!("{ranks} {list} of {} did not come within {} s", place.size, patience.as_secs());
        let came = seats.guests.drain(..).map(|(stream, hello)| (hello.rank, stream)).collect::<Vec<_>>();
        tell(&came, &Err(text.clone()))?;
        Err(Error::run(text)
            .at(format!("{}:{}", place.host, self.address.port()))
            .help("look at what they printed; --rendezvous SECONDS waits longer"))
    }

    /// Calls rank 0 until it answers. The door is of the address that reaches rank 0.
    fn call_rank_0(place: &Place, process: &str, deadline: Instant) -> Result<(TcpStream, Door)> {
        let any: IpAddr = match place.host.as_str() {
            "localhost" => Ipv4Addr::LOCALHOST.into(),
            host => match host.parse::<IpAddr>() {
                Ok(ip) if ip.is_loopback() => ip,
                Ok(IpAddr::V6(_)) => Ipv6Addr::UNSPECIFIED.into(),
                _ => Ipv4Addr::UNSPECIFIED.into(),
            },
        };
        let listener = TcpListener::bind((any, 0)).map_err(|e| Error::run(format!("cannot take connections: {e}")))?;
        let door = Door::open(listener, place, process)?;
        let hello = door.hello(place, Purpose::Join);
        let mut last = format!("{} is not known", place.host);
        while Instant::now() < deadline {
            for port in place.ports.clone() {
                for address in (place.host.as_str(), port).to_socket_addrs().into_iter().flatten() {
                    let at = |e: Error| e.at(address).help("every rank needs the same command line and environment");
                    match call(address, &place.secret, &hello) {
                        Ok(stream) => return Ok((stream, door)),
                        // After a restart the ranks of the attempt before may still be on their way out.
                        Err(Refused::ByRank(text)) if place.attempt == 0 => {
                            return Err(at(Error::run(format!("rank 0 refuses this rank: {text}"))));
                        }
                        Err(Refused::ByStranger(text)) if place.attempt == 0 && place.ports.len() == 1 => {
                            return Err(at(Error::run(format!("what should be rank 0 {text}"))));
                        }
                        Err(Refused::ByRank(text) | Refused::ByStranger(text) | Refused::Absent(text)) => {
                            last = format!("{address} {text}");
                        }
                    }
                }
            }
            thread::sleep(Duration::from_millis(50));
        }
        Err(Error::run(format!("rank 0 was not found: {last}"))
            .at(format!("{}:{}", place.host, place.ports.start()))
            .help("it listens at MASTER_ADDR; look at what it printed; --rendezvous SECONDS waits longer"))
    }
}

/// Hears a caller out, and seats or refuses it.
fn hear(mut stream: TcpStream, seats: &Seats, me: &Hello, secret: &Secret) {
    let mut seated = None;
    let judge = |hello: &Hello| {
        me.judge(hello)?;
        let mut taken = seats.lock();
        let seat = taken.seat(hello);
        match seat {
            Some(process) => Err(format!("rank {} is there already: {process}", hello.rank)),
            None => {
                *seat = Some(hello.process.clone());
                seated = Some(hello.clone());
                Ok(())
            }
        }
    };
    let _ = stream.set_nodelay(true);
    let heard = handshake::answer(&mut stream, secret, judge);
    let mut taken = seats.lock();
    match heard {
        Ok(hello) => {
            let _ = stream.set_read_timeout(None);
            match hello.purpose {
                Purpose::Join => taken.guests.push((stream, hello)),
                Purpose::Ring(at) => taken.left[at] = Some(stream),
            }
            seats.changed.notify_all();
        }
        Err(text) => {
            if let Some(hello) = seated {
                *taken.seat(&hello) = None;
            }
            let from = stream.peer_addr().map_or_else(|_| "a caller".into(), |a| a.to_string());
            console::note(format!("{from} was refused as a rank: {text}"));
        }
    }
}
