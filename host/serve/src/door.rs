//! Who is let in: clients that show the key, where there is one; and else those that were not led here by a page of somebody else's.

use axum::http::HeaderMap;
use axum::http::header::{AUTHORIZATION, CONTENT_TYPE, HOST};
use dpo_core::listen::{is_named, is_secret};

use super::refusal::Refusal;

pub(super) struct Door {
    key: Option<String>,
    /// The name that the server was told to listen at.
    name: String,
}

impl Door {
    pub(super) fn new(key: Option<String>, name: String) -> Door {
        Door { key, name }
    }

    /// Refuses a request whose headers do not let it in.
    pub(super) fn check(&self, headers: &HeaderMap, is_post: bool) -> Result<(), Refusal> {
        let header = |name| headers.get(name).and_then(|v| v.to_str().ok()).unwrap_or_default();
        match &self.key {
            Some(key) => {
                let shown = header(AUTHORIZATION).strip_prefix("Bearer ").unwrap_or_default();
                if !is_secret(key, shown) {
                    return Err(Refusal::new(401, "the API key is wrong, or missing: Authorization: Bearer KEY")
                        .code("invalid_api_key"));
                }
            }
            // A name that somebody else gives to this address would make a page of theirs one of this server's.
            None if !is_named(&self.name, header(HOST)) => {
                return Err(Refusal::new(
                    421,
                    "without --api-key this server answers to localhost, to addresses, and to the name in --listen",
                ));
            }
            None => {}
        }
        // Browsers ask before they send JSON to another origin, and are not told yes.
        let kind = header(CONTENT_TYPE).split(';').next().unwrap_or_default().trim().to_ascii_lowercase();
        if is_post && kind != "application/json" {
            return Err(Refusal::new(415, "a request has the header Content-Type: application/json"));
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)] // In a test, a panic is the report.

    use super::*;

    fn headers(of: &[(&'static str, &str)]) -> HeaderMap {
        of.iter().map(|(name, value)| (name.parse().unwrap(), value.parse().unwrap())).collect()
    }

    #[test]
    fn keys() {
        let door = Door::new(Some("secret".into()), String::new());
        let check = |value: &str| door.check(&headers(&[("authorization", value)]), false).is_ok();
        assert!(check("Bearer secret"));
        ["", "secret", "Bearer ", "Bearer secre", "Bearer secrets", "Basic secret"]
            .iter()
            .for_each(|v| assert!(!check(v), "{v}"));
    }

    #[test]
    fn hosts_and_types() {
        let door = Door::new(None, "gpu7".into());
        let check =
            |host: &str, kind: &str| door.check(&headers(&[("host", host), ("content-type", kind)]), true).is_ok();
        for host in ["localhost:8000", "127.0.0.1", "[::1]:8000", "GPU7:8000", "10.0.0.7:1"] {
            assert!(check(host, "application/json; charset=utf-8"), "{host}");
            assert!(!check(host, "text/plain") && !check(host, ""));
        }
        ["", "evil.example:8000", "localhost.evil.example", "gpu8"]
            .iter()
            .for_each(|h| assert!(!check(h, "application/json"), "{h}"));
    }
}
