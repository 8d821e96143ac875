//! Client of the API: sends one call to the socket of a monitor and returns the answer.

use std::io::{self, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::Duration;

use super::http::Method;

/// Maximum time for the answer to a call that does not wait for a migration.
const ANSWER_LIMIT: Duration = Duration::from_secs(30);

/// Reasons why a call failed.
#[derive(Debug, thiserror::Error)]
pub enum ClientError {
    /// No process is listening on the socket, or the user may not connect to it.
    #[error("no monitor answers at {}: {source}; {}", path.display(), connect_hint(.source))]
    Connect {
        /// Path of the socket.
        path: PathBuf,
        /// Error of the system.
        source: io::Error,
    },
    /// The connection failed, or the answer could not be parsed.
    #[error("{call}: {why}")]
    Broken {
        /// Name of the call.
        call: String,
        /// Description of the failure.
        why: String,
    },
    /// The monitor refused the call.
    #[error("{message}")]
    Refused {
        /// HTTP status of the answer.
        status: u16,
        /// Error message of the monitor.
        message: String,
    },
}

/// Returns the remedy for a connection that failed.
fn connect_hint(error: &io::Error) -> &'static str {
    match error.kind() {
        io::ErrorKind::PermissionDenied => "you have no permission to use this socket",
        _ => "is a monitor running with this API socket?",
    }
}

/// No time limit for the answer. If the monitor dies, the connection is closed and the call fails.
pub const NO_LIMIT: Option<Duration> = None;
/// Time limit of 30 s for the answer, for calls that do not wait for a migration.
pub const USUAL_LIMIT: Option<Duration> = Some(ANSWER_LIMIT);

/// Sends the call `call`, such as `vm.info`, to the monitor whose API socket is at `path`. Returns the JSON of the
/// answer, or null if the answer has no body.
///
/// # Errors
/// Returns [`ClientError::Connect`] if no monitor is listening, [`ClientError::Broken`] if there is no valid answer
/// within `limit`, and [`ClientError::Refused`] if the monitor refuses the call.
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

/// Returns the metrics of the monitor whose API socket is at `path`, in the text format of Prometheus.
///
/// # Errors
/// Returns [`ClientError::Connect`] if no monitor is listening, [`ClientError::Broken`] if there is no valid answer,
/// and [`ClientError::Refused`] if the answer is not a text with status 200.
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

/// Sends a request and returns the bytes of the answer. The server closes the connection after it.
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

/// Returns the status and the body of an answer.
fn parse(answer: &[u8]) -> Result<(u16, &[u8]), String> {
    let mut headers = [httparse::EMPTY_HEADER; 32];
    let mut response = httparse::Response::new(&mut headers);
    match response.parse(answer) {
        Ok(httparse::Status::Complete(head)) => {
            Ok((response.code.unwrap_or_default(), &answer[head..]))
        }
        Ok(httparse::Status::Partial) => Err("the monitor closed the connection too early".into()),
        Err(error) => Err(format!("the answer is not HTTP: {error}")),
    }
}

/// Returns the messages in the body of an error as one text.
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
