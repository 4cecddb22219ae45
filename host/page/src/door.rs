//! Who is let in, and whose requests may change something.

use rand::TryRngCore;
use rand::rngs::OsRng;

use dpo_core::listen::{is_named, is_secret};

/// The header that a page of another origin cannot send without asking, and is refused.
const OWN_HEADER: &str = "x-dpo-host";

/// Who is let in.
pub(super) struct Door {
    /// Needed by everybody, where the page can be reached from other machines or starts runs.
    token: Option<String>,
    /// The cookie that remembers it; cookies are of a host, not of a port.
    cookie: String,
    /// The name that the server was told to listen at.
    name: String,
}

impl Door {
    /// An open one, of the server that was told to listen at this name and has this port.
    pub(super) fn open(name: &str, port: u16) -> Door {
        Door { token: None, cookie: format!("dpo-host-{port}"), name: name.to_owned() }
    }

    /// One that needs a token.
    pub(super) fn lock(&mut self) -> std::io::Result<()> {
        let mut bytes = [0; 16];
        OsRng.try_fill_bytes(&mut bytes).map_err(|e| std::io::Error::other(e.to_string()))?;
        self.token = Some(bytes.iter().map(|b| format!("{b:02x}")).collect());
        Ok(())
    }

    /// The token.
    pub(super) fn token(&self) -> Option<&str> {
        self.token.as_deref()
    }

    /// The header with which a browser keeps the token.
    pub(super) fn cookie(&self, token: &str) -> String {
        format!("set-cookie: {}={token}; HttpOnly; SameSite=Strict; Path=/\r\n", self.cookie)
    }

    /// Whether a `Host` header names this server.
    pub(super) fn knows(&self, host: &str) -> bool {
        is_named(&self.name, host)
    }

    /// Whether this is the token.
    pub(super) fn opens(&self, shown: &str) -> bool {
        self.token.as_ref().is_some_and(|token| is_secret(token, shown))
    }

    /// Whether who shows these cookies is let in.
    pub(super) fn admits(&self, cookies: &str) -> bool {
        let mut cookies = cookies.split(';').filter_map(|c| c.trim().split_once('='));
        self.token.is_none() || cookies.any(|(name, shown)| name == self.cookie && self.opens(shown))
    }
}

/// Why a request that changes something is not the page's own: status and reason. A cookie alone says nothing, since browsers send
/// it with what pages of other ports of this machine ask for, too.
pub(super) fn foreign<'a>(header: impl Fn(&str) -> Option<&'a str>) -> Option<(u16, &'static str)> {
    let authority = |origin: &'a str| origin.split_once("://").map(|(_, authority)| authority);
    let host = header("host").unwrap_or_default();
    let same = header("origin").and_then(authority).is_some_and(|origin| origin.eq_ignore_ascii_case(host));
    let told = header("sec-fetch-site").is_none_or(|site| site == "same-origin");
    if !same || !told || header(OWN_HEADER).is_none() {
        return Some((403, "this is asked by another page than this one"));
    }
    let kind = header("content-type").unwrap_or_default().split(';').next().unwrap_or_default();
    (!kind.trim().eq_ignore_ascii_case("application/json")).then_some((415, "this takes JSON"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tokens() {
        let door = |token: Option<&str>| Door { token: token.map(str::to_owned), ..Door::open("", 7) };
        assert!(door(Some("abc")).opens("abc"));
        ["", "ab", "abd", "abcd"].iter().for_each(|t| assert!(!door(Some("abc")).opens(t), "{t}"));
        assert!(!door(None).opens(""));
        assert!(door(None).admits("") && door(Some("abc")).admits("a=b; dpo-host-7=abc"));
        ["", "dpo-host-7=abd", "dpo-host-8=abc", "dpo-host-7"]
            .iter()
            .for_each(|c| assert!(!door(Some("abc")).admits(c)));
    }

    #[test]
    fn requests_of_other_pages() {
        let own = [
            ("host", "127.0.0.1:6868"),
            ("origin", "http://127.0.0.1:6868"),
            ("sec-fetch-site", "same-origin"),
            ("content-type", "application/json; charset=utf-8"),
            (OWN_HEADER, "1"),
        ];
        let of = |changed: &str, value: Option<&'static str>| {
            foreign(|name| if name == changed { value } else { own.iter().find(|(n, _)| *n == name).map(|(_, v)| *v) })
        };
        assert_eq!(of("", None), None);
        assert_eq!(of("sec-fetch-site", None), None, "a browser that does not say");
        assert_eq!(of("origin", Some("https://127.0.0.1:6868")), None, "behind a proxy with TLS");
        let others = ["http://127.0.0.1:6869", "http://localhost:6868", "null", "http://evil.example", ""];
        others.iter().for_each(|o| assert_eq!(of("origin", Some(o)).map(|(s, _)| s), Some(403), "{o}"));
        for (name, value, status) in [
            ("origin", None, 403),
            ("sec-fetch-site", Some("same-site"), 403),
            (OWN_HEADER, None, 403),
            ("content-type", Some("text/plain"), 415),
            ("content-type", None, 415),
        ] {
            assert_eq!(of(name, value).map(|(s, _)| s), Some(status), "{name} {value:?}");
        }
    }
}
