//! One call to a monitor's API, as `ferry ctl` and `ferry demo` make it.

use std::io::{self, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::Duration;

use super::http::Method;

/// How long an answer may take, unless the call waits for a migration.
const ANSWER_LIMIT: Duration = Duration::from_secs(30);

/// Why a call got no good answer.
#[derive(Debug, thiserror::Error)]
pub enum ClientError {
    /// Nobody listens there.
    #[error("no monitor answers at {}: {source}; {}", path.display(), connect_hint(.source))]
    Connect {
        /// The socket.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// The connection broke, or what came over it was no answer.
    #[error("{call}: {why}")]
    Broken {
        /// The call.
        call: String,
        /// What happened.
        why: String,
    },
    /// The monitor said no.
    #[error("{message}")]
    Refused {
        /// The status of the answer.
        status: u16,
        /// The reason in words.
        message: String,
    },
}

fn connect_hint(error: &io::Error) -> &'static str {
    match error.kind() {
        io::ErrorKind::PermissionDenied => "you may not use this socket",
        _ => "is it running with this --api-socket?",
    }
}

/// Waits for an answer however long it takes: the other side's death is noticed all the same.
pub const NO_LIMIT: Option<Duration> = None;
/// Waits for an answer as long as any call but one that waits for a migration may take.
pub const USUAL_LIMIT: Option<Duration> = Some(ANSWER_LIMIT);

/// Calls `call` (such as `vm.info`) of the monitor whose API socket is at `path`. Returns the answer's
/// JSON, null where it has none.
///
/// # Errors
/// Nobody there, and the monitor's own refusals.
pub fn call(
    path: &Path,
    method: Method,
    call: &str,
    body: Option<&serde_json::Value>,
    limit: Option<Duration>,
) -> Result<serde_json::Value, ClientError> {
    let broken = |why: String| ClientError::Broken {
        call: call.into(),
        why,
    };
    let target = format!("/api/v1/{call}");
    let (status, body) = exchange(path, method, &target, body, limit)?;
    let value = match body.as_slice() {
        [] => serde_json::Value::Null,
        body => serde_json::from_slice(body).map_err(|error| broken(error.to_string()))?,
    };
    if (200..300).contains(&status) {
        return Ok(value);
    }
    Err(ClientError::Refused {
        status,
        message: message(status, &value),
    })
}

/// The figures of the monitor whose API socket is at `path`, in Prometheus' text format.
///
/// # Errors
/// Nobody there, or no such answer.
pub fn metrics(path: &Path) -> Result<String, ClientError> {
    let target = "/metrics";
    let (status, body) = exchange(path, Method::Get, target, None, USUAL_LIMIT)?;
    match (status, String::from_utf8(body)) {
        (200, Ok(text)) => Ok(text),
        (status, _) => Err(ClientError::Refused {
            status,
            message: message(status, &serde_json::Value::Null),
        }),
    }
}

/// Sends a request and returns the answer's status and body.
fn exchange(
    path: &Path,
    method: Method,
    target: &str,
    body: Option<&serde_json::Value>,
    limit: Option<Duration>,
) -> Result<(u16, Vec<u8>), ClientError> {
    let mut stream = UnixStream::connect(path).map_err(|source| ClientError::Connect {
        path: path.to_owned(),
        source,
    })?;
    let broken = |why: String| ClientError::Broken {
        call: target.into(),
        why,
    };
    let answer = converse(&mut stream, method, target, body, limit)
        .map_err(|error| broken(error.to_string()))?;
    let (status, body) = parse(&answer).map_err(broken)?;
    Ok((status, body.to_vec()))
}

fn converse(
    stream: &mut UnixStream,
    method: Method,
    target: &str,
    body: Option<&serde_json::Value>,
    limit: Option<Duration>,
) -> io::Result<Vec<u8>> {
    stream.set_read_timeout(limit)?;
    stream.set_write_timeout(limit)?;
    let body = body.map(ToString::to_string).unwrap_or_default();
    let head = format!(
        "{} {target} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\
         Content-Type: application/json\r\nContent-Length: {}\r\n\r\n",
        method.name(),
        body.len()
    );
    stream.write_all(head.as_bytes())?;
    stream.write_all(body.as_bytes())?;
    let mut answer = Vec::new();
    stream.read_to_end(&mut answer)?;
    Ok(answer)
}

fn parse(answer: &[u8]) -> Result<(u16, &[u8]), String> {
    let mut headers = [httparse::EMPTY_HEADER; 32];
    let mut response = httparse::Response::new(&mut headers);
    match response.parse(answer) {
        Ok(httparse::Status::Complete(head)) => {
            Ok((response.code.unwrap_or_default(), &answer[head..]))
        }
        Ok(httparse::Status::Partial) => Err("the monitor closed the connection too early".into()),
        Err(error) => Err(format!("the answer is no HTTP: {error}")),
    }
}

fn message(status: u16, value: &serde_json::Value) -> String {
    let parts: Vec<&str> = value
        .as_array()
        .into_iter()
        .flatten()
        .filter_map(|v| v.as_str())
        .collect();
    match parts.is_empty() {
        true => format!("the monitor answered with status {status}"),
        false => parts.join(": "),
    }
}
