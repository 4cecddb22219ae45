//! How ranks find each other: everyone calls rank 0, rank 0 tells everyone where the others are, each calls the next.
//!
//! Every rank listens for as long as it lives: a peer that comes late or is not a rank of this run is told so, and a second
//! run cannot take the port meanwhile.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpListener, TcpStream, ToSocketAddrs};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};

use super::environment::Place;
use super::handshake::{
    self, HANDSHAKE_TIMEOUT, Hello, Purpose, RINGS, Refused, Secret, plain, read_frame, write_frame,
};
use super::ring::Ring;
use dpo_core::console;
use dpo_core::error::{Error, Result};

/// Handshakes at once; ranks retry.
const CALLERS: usize = 256;
/// Largest list of ranks, in bytes.
const LARGEST_LIST: usize = 1 << 24;

/// Ranks that have met.
pub(super) struct Met {
    pub(super) rings: [Ring; RINGS],
    /// Control connections: at rank 0 one to every other rank, elsewhere one to rank 0.
    pub(super) control: Vec<(usize, TcpStream)>,
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

/// Brings the ranks of a run together, or says who did not come within `timeout`.
pub(super) fn meet(place: &Place, timeout: Duration) -> Result<Met> {
    let deadline = Instant::now() + timeout;
    let process = process();
    if place.rank == 0 {
        let listener = listen(place)?;
        let offered = place.secret.offer()?;
        let peers_in = PeerListener::open(listener, place, &process, &offered.secret)?;
        let peers = peers_in.peers(place, timeout, deadline)?;
        let mut list = vec![Member { address: peers_in.address, process }];
        for (stream, hello) in &peers {
            let ip = stream.peer_addr().map_err(|e| gone(hello.rank, &hello.process, &e))?.ip();
            list.push(Member { address: SocketAddr::new(ip, hello.port), process: hello.process.clone() });
        }
        let control = peers.into_iter().map(|(stream, hello)| (hello.rank, stream)).collect::<Vec<_>>();
        tell(&control, &Ok(list.clone()))?;
        return close_rings(place, &peers_in, list, control, Instant::now() + timeout);
    }
    let listener = TcpListener::bind((any_address(place), 0)).map_err(|e| cannot_listen(&e))?;
    let (mut stream, secret) = call_rank_0(place, &hello(place, &process, &listener)?, deadline)?;
    let peers_in = PeerListener::open(listener, place, &process, &secret)?;
    let at = stream.peer_addr().map_err(|e| gone(0, &place.host, &e))?;
    // Rank 0 has not waited longer than this rank will from now on, and says when it gives up.
    let deadline = Instant::now() + timeout + HANDSHAKE_TIMEOUT;
    let received = read_frame(&mut stream, LARGEST_LIST, Some(deadline)).map_err(|e| gone(0, &at.to_string(), &e))?;
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
    close_rings(place, &peers_in, list, vec![(0, stream)], Instant::now() + timeout)
}

/// Calls the next rank and waits for the one before, once for each ring.
fn close_rings(
    place: &Place,
    peers_in: &PeerListener,
    list: Vec<Member>,
    control: Vec<(usize, TcpStream)>,
    deadline: Instant,
) -> Result<Met> {
    let next = (place.rank + 1) % place.size;
    let before = (place.rank + place.size - 1) % place.size;
    let ring = |at: usize| {
        let hello = Hello { purpose: Purpose::Ring(at), ..peers_in.hello.clone() };
        let right = call_next(next, &list[next], &peers_in.secret, &hello, deadline)?;
        let left = peers_in.wait(deadline, |slots| slots.left[at].take()).ok_or_else(|| {
            Error::run(format!("rank {before} ({}) never called", list[before].process)).help("look at what it printed")
        })?;
        Ring::new(place.rank, place.size, left, right)
    };
    let rings = [ring(0)?, ring(1)?];
    Ok(Met { rings, control, processes: list.into_iter().map(|m| m.process).collect() })
}

/// Calls the next rank until it answers.
fn call_next(next: usize, member: &Member, secret: &Secret, hello: &Hello, deadline: Instant) -> Result<TcpStream> {
    loop {
        match call(member.address, || Ok(secret.clone()), hello) {
            Ok((stream, _)) => return Ok(stream),
            Err(Refused::ByRank(text) | Refused::Unauthenticated(text)) => {
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

fn tell(control: &[(usize, TcpStream)], list: &List) -> Result<()> {
    let text = serde_json::to_vec(list).map_err(|e| Error::run(e.to_string()))?;
    for (_, stream) in control {
        // Who is gone is found out by the watchdog, which begins next.
        let _ = stream.try_clone().and_then(|mut s| write_frame(&mut s, &text));
    }
    Ok(())
}

/// The address at which the ranks before this one reach it.
fn any_address(place: &Place) -> IpAddr {
    match place.host.as_str() {
        "localhost" => Ipv4Addr::LOCALHOST.into(),
        host => match host.parse::<IpAddr>() {
            Ok(ip) if ip.is_loopback() => ip,
            Ok(IpAddr::V6(_)) => Ipv6Addr::UNSPECIFIED.into(),
            _ => Ipv4Addr::UNSPECIFIED.into(),
        },
    }
}

/// What a rank that takes connections at a listener says of itself to rank 0.
fn hello(place: &Place, process: &str, listener: &TcpListener) -> Result<Hello> {
    Ok(Hello {
        version: env!("CARGO_PKG_VERSION").into(),
        rank: place.rank,
        size: place.size,
        attempt: place.generation,
        process: process.into(),
        purpose: Purpose::Join,
        port: listener.local_addr().map_err(|e| cannot_listen(&e))?.port(),
    })
}

fn cannot_listen(e: &std::io::Error) -> Error {
    Error::run(format!("cannot take connections: {e}"))
}

/// Calls rank 0 until it answers.
fn call_rank_0(place: &Place, hello: &Hello, deadline: Instant) -> Result<(TcpStream, Secret)> {
    let mut last = format!("{} is not known", place.host);
    while Instant::now() < deadline {
        for port in place.ports.clone() {
            for address in (place.host.as_str(), port).to_socket_addrs().into_iter().flatten() {
                let at = |e: Error| e.at(address).help("every rank needs the same command line and environment");
                match call(address, || place.secret.find(), hello) {
                    Ok(called) => return Ok(called),
                    // After a restart the ranks of the attempt before may still be on their way out.
                    Err(Refused::ByRank(text)) if place.attempt == 0 => {
                        return Err(at(Error::run(format!("rank 0 refuses this rank: {text}"))));
                    }
                    Err(Refused::Unauthenticated(text)) if place.attempt == 0 && place.ports.len() == 1 => {
                        return Err(at(Error::run(format!("what should be rank 0 {text}"))));
                    }
                    Err(Refused::ByRank(text) | Refused::Unauthenticated(text) | Refused::Absent(text)) => {
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

fn gone(rank: usize, process: &str, e: &std::io::Error) -> Error {
    Error::run(format!("rank {rank} ({process}) {} before the run began", plain(e))).help("look at what it printed")
}

fn call(
    address: SocketAddr,
    secret: impl FnOnce() -> std::result::Result<Secret, Refused>,
    hello: &Hello,
) -> std::result::Result<(TcpStream, Secret), Refused> {
    let mut stream = TcpStream::connect_timeout(&address, HANDSHAKE_TIMEOUT)?;
    stream.set_nodelay(true)?;
    let secret = handshake::call(&mut stream, secret, hello)?;
    stream.set_read_timeout(None)?;
    Ok((stream, secret))
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
    if place.on_loopback() {
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
struct PeerListener {
    address: SocketAddr,
    /// What this rank says of itself to those it calls.
    hello: Hello,
    secret: Secret,
    slots: Arc<Slots>,
}

struct Slots {
    taken: Mutex<Taken>,
    changed: Condvar,
}

#[derive(Default)]
struct Taken {
    /// `host:pid` of the ranks that have come.
    joined: Vec<Option<String>>,
    peers: Vec<(TcpStream, Hello)>,
    /// `host:pid` of the rank before, and its connections, by ring.
    before: [Option<String>; RINGS],
    left: [Option<TcpStream>; RINGS],
}

impl Slots {
    fn lock(&self) -> MutexGuard<'_, Taken> {
        self.taken.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Taken {
    fn slot(&mut self, hello: &Hello) -> &mut Option<String> {
        match hello.purpose {
            Purpose::Join => &mut self.joined[hello.rank],
            Purpose::Ring(at) => &mut self.before[at],
        }
    }
}

impl PeerListener {
    fn open(listener: TcpListener, place: &Place, process: &str, secret: &Secret) -> Result<PeerListener> {
        let address = listener.local_addr().map_err(|e| cannot_listen(&e))?;
        let me = hello(place, process, &listener)?;
        let taken = Taken { joined: vec![None; place.size], ..Taken::default() };
        let slots = Arc::new(Slots { taken: Mutex::new(taken), changed: Condvar::new() });
        let peers_in = PeerListener { address, hello: me.clone(), secret: secret.clone(), slots: slots.clone() };
        let secret = secret.clone();
        let callers = Arc::new(AtomicUsize::new(0));
        let take = move || {
            for stream in listener.incoming().flatten() {
                if callers.fetch_add(1, Ordering::Relaxed) < CALLERS {
                    let (slots, me, secret, callers) = (slots.clone(), me.clone(), secret.clone(), callers.clone());
                    let admit = move || {
                        admit(stream, &slots, &me, &secret);
                        callers.fetch_sub(1, Ordering::Relaxed);
                    };
                    let _ = thread::Builder::new().name("caller".into()).spawn(admit);
                } else {
                    callers.fetch_sub(1, Ordering::Relaxed);
                }
            }
        };
        thread::Builder::new().name("listener".into()).spawn(take).map_err(|e| cannot_listen(&e))?;
        Ok(peers_in)
    }

    /// Waits until something is there, at most to a deadline.
    fn wait<T>(&self, deadline: Instant, mut found: impl FnMut(&mut Taken) -> Option<T>) -> Option<T> {
        let mut slots = self.slots.lock();
        loop {
            if let Some(found) = found(&mut slots) {
                return Some(found);
            }
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return None;
            }
            slots = self.slots.changed.wait_timeout(slots, left).unwrap_or_else(PoisonError::into_inner).0;
        }
    }

    /// All other ranks, in order.
    fn peers(&self, place: &Place, timeout: Duration, deadline: Instant) -> Result<Vec<(TcpStream, Hello)>> {
        let others = place.size - 1;
        let all = |slots: &mut Taken| (slots.peers.len() == others).then(|| std::mem::take(&mut slots.peers));
        if let Some(mut peers) = self.wait(deadline, all) {
            peers.sort_by_key(|(_, hello)| hello.rank);
            return Ok(peers);
        }
        let mut slots = self.slots.lock();
        let missing: Vec<String> =
            (1..place.size).filter(|r| slots.joined[*r].is_none()).map(|r| r.to_string()).collect();
        let (ranks, list) = (if missing.len() == 1 { "rank" } else { "ranks" }, missing.join(", "));
        let text = format!("{ranks} {list} of {} did not come within {} s", place.size, timeout.as_secs());
        let came = slots.peers.drain(..).map(|(stream, hello)| (hello.rank, stream)).collect::<Vec<_>>();
        tell(&came, &Err(text.clone()))?;
        Err(Error::run(text)
            .at(format!("{}:{}", place.host, self.address.port()))
            .help("look at what they printed; --rendezvous SECONDS waits longer"))
    }
}

/// Hears a caller out, and slots or refuses it.
fn admit(mut stream: TcpStream, slots: &Slots, me: &Hello, secret: &Secret) {
    let mut admitted = None;
    let check = |hello: &Hello| {
        me.check(hello)?;
        let mut taken = slots.lock();
        let slot = taken.slot(hello);
        match slot {
            Some(process) => Err(format!("rank {} is there already: {process}", hello.rank)),
            None => {
                *slot = Some(hello.process.clone());
                admitted = Some(hello.clone());
                Ok(())
            }
        }
    };
    let _ = stream.set_nodelay(true);
    let shaken = handshake::answer(&mut stream, secret, check);
    let mut taken = slots.lock();
    match shaken {
        Ok(hello) => {
            let _ = stream.set_read_timeout(None);
            match hello.purpose {
                Purpose::Join => taken.peers.push((stream, hello)),
                Purpose::Ring(at) => taken.left[at] = Some(stream),
            }
            slots.changed.notify_all();
        }
        Err(text) => {
            if let Some(hello) = admitted {
                *taken.slot(&hello) = None;
            }
            let from = stream.peer_addr().map_or_else(|_| "a caller".into(), |a| a.to_string());
            console::note(format!("{from} was refused as a rank: {text}"));
        }
    }
}
