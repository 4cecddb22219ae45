//! Why a request is not answered, as OpenAI's clients read it.

use dpo_core::error::Error;
use serde_json::{Value, json};

/// Why a request is not answered.
#[derive(Debug)]
pub(super) struct Refusal {
    pub status: u16,
    message: String,
    param: Option<String>,
    code: Option<&'static str>,
}

impl Refusal {
    pub(super) fn new(status: u16, message: impl Into<String>) -> Refusal {
        Refusal { status, message: message.into(), param: None, code: None }
    }

    /// Of a field that is wrong.
    pub(super) fn of(param: &str, message: impl Into<String>) -> Refusal {
        Refusal { param: Some(param.into()), ..Refusal::new(400, message) }
    }

    pub(super) fn status(self, status: u16) -> Refusal {
        Refusal { status, ..self }
    }

    pub(super) fn code(self, code: &'static str) -> Refusal {
        Refusal { code: Some(code), ..self }
    }

    /// Of what failed while it was computed.
    pub(super) fn failed(e: &Error) -> Refusal {
        Refusal::new(500, e.to_string())
    }

    /// Of a server whose loop is over.
    pub(super) fn ends() -> Refusal {
        Refusal::new(503, "the server is about to end")
    }

    /// As clients read it.
    pub(super) fn json(&self) -> Value {
        let kind = match self.status {
            401 => "authentication_error",
            404 => "not_found_error",
            500.. => "server_error",
            _ => "invalid_request_error",
        };
        json!({"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}})
    }
}
