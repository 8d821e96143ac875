//! Minimal client for QMP, the control protocol of QEMU: JSON lines over a Unix socket.

use std::collections::VecDeque;
use std::io::{self, BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::thread;
use std::time::{Duration, Instant};

use serde_json::{Value, json};

/// Time limit for an answer.
const ANSWER_LIMIT: Duration = Duration::from_secs(30);

/// Why a QMP command has no result.
#[derive(Debug, thiserror::Error)]
pub enum QmpError {
    /// The socket failed, or no answer arrived in time.
    #[error("QMP: {doing}")]
    Socket {
        /// The operation that failed.
        doing: String,
        /// The error of the operating system.
        source: io::Error,
    },
    /// QEMU closed the connection.
    #[error("QMP: QEMU closed the connection while {0}")]
    Closed(String),
    /// A line is not JSON.
    #[error("QMP: not JSON: {line:?}")]
    Malformed {
        /// The line.
        line: String,
        /// The error of the JSON parser.
        source: serde_json::Error,
    },
    /// QEMU refused the command.
    #[error("QMP: {command} refused: {reason}")]
    Refused {
        /// The command.
        command: String,
        /// The message of QEMU.
        reason: String,
    },
}

/// Connection whose capabilities have been negotiated.
#[derive(Debug)]
pub struct Qmp {
    stream: BufReader<UnixStream>,
    events: VecDeque<Value>,
}

impl Qmp {
    /// Waits for the socket to appear, and connects to it.
    ///
    /// # Errors
    /// Returns [`QmpError`] if QEMU does not answer within `limit`.
    pub fn connect(path: &Path, limit: Duration) -> Result<Self, QmpError> {
        let deadline = Instant::now() + limit;
        let stream = loop {
            match UnixStream::connect(path) {
                Ok(stream) => break stream,
                Err(_) if Instant::now() < deadline => thread::sleep(Duration::from_millis(2)),
                Err(source) => {
                    return Err(socket(&format!("connecting to {}", path.display()), source));
                }
            }
        };
        let mut qmp = Self {
            stream: BufReader::new(stream),
            events: VecDeque::new(),
        };
        let greeting = Instant::now() + ANSWER_LIMIT;
        qmp.line("waiting for the greeting", greeting)?;
        qmp.execute("qmp_capabilities", &json!({}))?;
        Ok(qmp)
    }

    /// Runs a command and returns its result.
    ///
    /// # Errors
    /// Returns [`QmpError::Refused`] if QEMU refuses the command, or another [`QmpError`] if the connection fails.
    pub fn execute(&mut self, command: &str, arguments: &Value) -> Result<Value, QmpError> {
        let mut request = json!({"execute": command, "arguments": arguments}).to_string();
        request.push('\n');
        let sent = self.stream.get_mut().write_all(request.as_bytes());
        sent.map_err(|source| socket(&format!("sending {command}"), source))?;
        let deadline = Instant::now() + ANSWER_LIMIT;
        loop {
            let mut answer =
                self.line(&format!("waiting for the answer to {command}"), deadline)?;
            if let Some(result) = answer.get_mut("return") {
                return Ok(result.take());
            }
            if let Some(error) = answer.get("error") {
                let reason = error["desc"]
                    .as_str()
                    .unwrap_or("no reason given")
                    .to_owned();
                return Err(QmpError::Refused {
                    command: command.to_owned(),
                    reason,
                });
            }
            self.events.push_back(answer);
        }
    }

    /// Returns the next event, and waits for one if none has been received yet.
    ///
    /// # Errors
    /// Returns [`QmpError::Socket`] if no event arrives within `limit`.
    pub fn event(&mut self, limit: Duration) -> Result<Value, QmpError> {
        if let Some(event) = self.events.pop_front() {
            return Ok(event);
        }
        self.line("waiting for an event", Instant::now() + limit)
    }

    fn line(&mut self, doing: &str, deadline: Instant) -> Result<Value, QmpError> {
        // A timeout of zero means no timeout.
        let left = deadline
            .saturating_duration_since(Instant::now())
            .max(Duration::from_millis(1));
        let limited = self.stream.get_ref().set_read_timeout(Some(left));
        limited.map_err(|source| socket(doing, source))?;
        let mut line = String::new();
        let count = self
            .stream
            .read_line(&mut line)
            .map_err(|source| socket(doing, source))?;
        if count == 0 {
            return Err(QmpError::Closed(doing.to_owned()));
        }
        serde_json::from_str(&line).map_err(|source| QmpError::Malformed { line, source })
    }
}

fn socket(doing: &str, source: io::Error) -> QmpError {
    QmpError::Socket {
        doing: doing.to_owned(),
        source,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::net::UnixListener;

    /// Stands in for QEMU: sends a greeting, and these lines for each request.
    fn serve(path: &Path, answers: &'static [&'static str]) {
        let listener = UnixListener::bind(path).unwrap();
        thread::spawn(move || {
            let (mut stream, _) = listener.accept().unwrap();
            stream.write_all(b"{\"QMP\":{}}\n").unwrap();
            let mut requests = BufReader::new(stream.try_clone().unwrap()).lines();
            for answer in ["{\"return\":{}}\n"].iter().chain(answers) {
                requests.next().unwrap().unwrap();
                stream.write_all(answer.as_bytes()).unwrap();
            }
        });
    }

    #[test]
    fn answers_are_told_from_events() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("qmp");
        serve(&path, &["{\"event\":\"STOP\"}\n{\"return\":7}\n"]);
        let mut qmp = Qmp::connect(&path, Duration::from_secs(5)).unwrap();
        assert_eq!(qmp.execute("x", &json!({})).unwrap(), 7);
        assert_eq!(qmp.event(Duration::from_secs(5)).unwrap()["event"], "STOP");
    }

    #[test]
    fn a_refusal_carries_the_reason() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("qmp");
        serve(&path, &["{\"error\":{\"desc\":\"no such thing\"}}\n"]);
        let mut qmp = Qmp::connect(&path, Duration::from_secs(5)).unwrap();
        let error = qmp
            .execute("frobnicate", &json!({}))
            .unwrap_err()
            .to_string();
        assert!(
            error.contains("frobnicate") && error.contains("no such thing"),
            "{error}"
        );
        assert!(matches!(
            qmp.execute("x", &json!({})),
            Err(QmpError::Closed(_) | QmpError::Socket { .. })
        ));
    }

    #[test]
    fn nobody_there_is_an_error_with_the_path() {
        let error = Qmp::connect(Path::new("/no/such/socket"), Duration::ZERO).unwrap_err();
        assert!(error.to_string().contains("/no/such/socket"), "{error}");
    }
}
