//! Subset of HTTP/1.1 that a local API needs: methods and responses.

use std::io::{self, Write};

/// HTTP method of a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Method {
    /// GET, for calls that read.
    Get,
    /// PUT, for calls that change something.
    Put,
}

impl Method {
    /// Returns the name of the method in a request line.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Get => "GET",
            Self::Put => "PUT",
        }
    }
}

/// Whether the connection stays open for another request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum KeepAlive {
    Yes,
    No,
}

const JSON: &str = "application/json";

/// HTTP response.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Response {
    pub(super) status: u16,
    content_type: &'static str,
    /// Method of the call, for the header `Allow` of a response with status 405 (RFC 9110, 15.5.6).
    allow: Option<Method>,
    pub(super) body: String,
}

impl Response {
    /// Returns a response without a body, with status 204.
    pub(super) fn empty() -> Self {
        Self::json(204, String::new())
    }

    /// Returns a response whose body is JSON.
    pub(super) fn json(status: u16, body: String) -> Self {
        Self {
            status,
            content_type: JSON,
            allow: None,
            body,
        }
    }

    /// Returns a response with status 200 whose body is text.
    pub(super) fn text(content_type: &'static str, body: String) -> Self {
        Self {
            content_type,
            ..Self::json(200, body)
        }
    }

    /// Returns an error response. Its body is an array of messages, as in the API of Cloud Hypervisor.
    pub(super) fn error(status: u16, message: impl ToString) -> Self {
        let messages = serde_json::json!([message.to_string()]);
        Self::json(status, messages.to_string())
    }

    /// Returns a response with status 405, for a request whose method is not the one of the call.
    pub(super) fn allow(method: Method, message: impl ToString) -> Self {
        Self {
            allow: Some(method),
            ..Self::error(405, message)
        }
    }

    /// Writes the response to `stream`.
    pub(super) fn write_to(
        &self,
        stream: &mut impl Write,
        keep_alive: KeepAlive,
    ) -> io::Result<()> {
        let connection = match keep_alive {
            KeepAlive::Yes => "keep-alive",
            KeepAlive::No => "close",
        };
        let mut text = format!(
            "HTTP/1.1 {} {}\r\nServer: ferry\r\nConnection: {connection}\r\n",
            self.status,
            reason(self.status)
        );
        if let Some(method) = self.allow {
            text += &format!("Allow: {}\r\n", method.name());
        }
        if self.status != 204 {
            text += &format!(
                "Content-Type: {}\r\nContent-Length: {}\r\n",
                self.content_type,
                self.body.len()
            );
        }
        text += "\r\n";
        text += &self.body;
        stream.write_all(text.as_bytes())?;
        stream.flush()
    }
}

/// Returns the reason phrase of a status.
fn reason(status: u16) -> &'static str {
    match status {
        200 => "OK",
        204 => "No Content",
        400 => "Bad Request",
        404 => "Not Found",
        405 => "Method Not Allowed",
        408 => "Request Timeout",
        409 => "Conflict",
        413 => "Content Too Large",
        501 => "Not Implemented",
        503 => "Service Unavailable",
        _ => "Internal Server Error",
    }
}
