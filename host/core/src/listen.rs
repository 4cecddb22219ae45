//! Addresses that this program listens at, and who means them.

use std::io::ErrorKind;
use std::net::{IpAddr, SocketAddr, TcpListener, ToSocketAddrs};

use crate::error::{Error, Result};

/// A port that was taken.
pub struct Listening {
    /// Where connections come.
    pub listener: TcpListener,
    /// Its address.
    pub address: SocketAddr,
    /// The name that it was told to listen at.
    pub name: String,
}

/// Takes the port of `ADDR:PORT`, or of a port alone, which is then one of this machine only; `usual` unless something is said. `flag` is
/// what named it.
///
/// # Errors
/// An address that is none, or cannot be had.
pub fn bind(address: Option<&str>, usual: &str, flag: &str) -> Result<Listening> {
    let named = match address {
        Some(port) if port.parse::<u16>().is_ok() => format!("127.0.0.1:{port}"),
        other => other.unwrap_or(usual).to_owned(),
    };
    let places: Vec<SocketAddr> = named.to_socket_addrs().map(Iterator::collect).map_err(|e| {
        Error::input(format!("'{named}' is not an address with a port: {e}"))
            .at(flag)
            .help(format!("such as {usual}, or a port alone"))
    })?;
    let listener = TcpListener::bind(&*places).map_err(|e| {
        let (what, help) = match e.kind() {
            ErrorKind::AddrInUse => ("something listens there already", "name another port, or 0 for a free one"),
            ErrorKind::AddrNotAvailable => ("this machine has no such address", "127.0.0.1, or 0.0.0.0 for all"),
            ErrorKind::PermissionDenied => ("this user may not listen there", "name a port from 1024 on"),
            _ => ("nothing can listen there", "name another address"),
        };
        Error::input(format!("cannot listen at {named}: {what}")).at(flag).help(help)
    })?;
    let failed = |e: std::io::Error| Error::run(format!("cannot listen at {named}: {e}")).at(flag);
    let address = listener.local_addr().map_err(failed)?;
    Ok(Listening { listener, address, name: named.rsplit_once(':').map_or("", |(name, _)| name).to_owned() })
}

/// Whether a `Host` header names a server that was told to listen at `name`. A name that somebody else gives to its address does not, and
/// over an address by itself nobody can be led astray. The port may be another one: that of a tunnel.
pub fn is_named(name: &str, host: &str) -> bool {
    let shown = match host.strip_prefix('[').and_then(|rest| rest.split_once(']')) {
        Some((address, _)) => address,
        None => host.rsplit_once(':').map_or(host, |(name, _)| name),
    };
    let own = ["localhost", name].iter().any(|known| !known.is_empty() && shown.eq_ignore_ascii_case(known));
    own || shown.parse::<IpAddr>().is_ok()
}

/// Whether what is shown is the secret. It takes as long wherever the two differ.
pub fn is_secret(secret: &str, shown: &str) -> bool {
    let differing = secret.bytes().zip(shown.bytes()).fold(0, |differing, (a, b)| differing | (a ^ b));
    secret.len() == shown.len() && differing == 0
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hosts() {
        let known = ["localhost", "LOCALHOST:6868", "127.0.0.1:1", "[::1]:80", "10.0.0.7", "gpu7:6868"];
        known.iter().for_each(|h| assert!(is_named("gpu7", h), "{h}"));
        let foreign =
            ["", ":", "evil.example", "127.0.0.1.evil.example:6868", "localhost.evil.example", "gpu8", "[gpu7"];
        foreign.iter().for_each(|h| assert!(!is_named("gpu7", h), "{h}"));
    }

    #[test]
    fn secrets() {
        assert!(is_secret("abc", "abc"));
        ["", "ab", "abd", "abcd"].iter().for_each(|shown| assert!(!is_secret("abc", shown), "{shown}"));
    }
}
