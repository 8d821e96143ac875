//! The API's socket and its threads.
//!
//! Each connection has a thread. There are few at a time, so that clients that leak connections cost little, and a new
//! one always gets in: the one that has been idle for longest makes room for it. A client that begins a request has to
//! finish it soon.

use std::io;
use std::os::unix::net::{UnixListener, UnixStream};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use super::connections::{CONNECTIONS_LIMIT, ConnectionGuard, ConnectionState, Connections};
use super::http::{KeepAlive, ReceiveBuffer, Request, RequestError, Response, read_request};
use super::request_stream::{REQUEST_LIMIT, RequestStream};
use super::routes::answer;
use crate::migrate::{EndpointError, SocketFile, listen_unix};
use crate::monitor::Monitor;
use crate::panics::panic_message;

/// How long an ending monitor waits for its answers to leave.
const FAREWELL_LIMIT: Duration = Duration::from_secs(2);

/// Why the API is not there.
#[derive(Debug, thiserror::Error)]
pub enum ServerError {
    /// The path of its socket is taken.
    #[error("API socket {0}")]
    Taken(#[from] EndpointError),
    /// What the system said.
    #[error("API socket {}: {source}", path.display())]
    Io {
        /// The path of the socket.
        path: PathBuf,
        /// Why not.
        source: io::Error,
    },
    /// No thread for it.
    #[error("API: no thread for it: {0}")]
    Thread(#[source] io::Error),
}

/// The API on its socket, until it is dropped.
pub struct ApiServer {
    _file: Option<SocketFile>,
    connections: Arc<Connections>,
}

impl ApiServer {
    /// Answers calls for `monitor` on a new socket at `path`.
    ///
    /// # Errors
    /// The path is taken, or the system will not have a socket there.
    pub fn start(path: &Path, monitor: Arc<Monitor>) -> Result<Self, ServerError> {
        let error = |source| ServerError::Io {
            path: path.to_owned(),
            source,
        };
        let (listener, file) = listen_unix(path, error)?;
        let mut server = Self::start_on(listener, monitor)?;
        server._file = Some(file);
        Ok(server)
    }

    /// Answers calls for `monitor` on a socket that listens already.
    ///
    /// # Errors
    /// A thread that cannot be had.
    pub fn start_on(listener: UnixListener, monitor: Arc<Monitor>) -> Result<Self, ServerError> {
        let connections = Arc::new(Connections::default());
        let accepted = Arc::clone(&connections);
        thread::Builder::new()
            .name("_api".into())
            .spawn(move || accept(&listener, &monitor, &accepted))
            .map_err(ServerError::Thread)?;
        Ok(Self {
            _file: None,
            connections,
        })
    }
}

/// Waits until the calls at work are answered: whoever asked for the guest's end is told that it came.
impl Drop for ApiServer {
    fn drop(&mut self) {
        let began = Instant::now();
        while self.connections.are_answering() && began.elapsed() < FAREWELL_LIMIT {
            thread::sleep(Duration::from_millis(1));
        }
    }
}

/// Answers the requests that `bytes` are, one after the other: the API for monitors that have another way to their
/// clients than a socket. Returns the answers' bytes.
#[must_use]
pub fn answer_bytes(monitor: &Arc<Monitor>, mut bytes: &[u8]) -> Vec<u8> {
    let (mut received, mut answers) = (ReceiveBuffer::default(), Vec::new());
    loop {
        let (response, keep_alive) = match read_request(&mut bytes, &mut received) {
            Ok(mut request) => (answer(monitor, &mut request), request.keep_alive),
            Err(RequestError::Invalid(response)) => (response, KeepAlive::No),
            Err(RequestError::Closed) => return answers,
        };
        let sent = response.write_to(&mut answers, keep_alive);
        if sent.is_err() || keep_alive == KeepAlive::No {
            return answers;
        }
    }
}

/// Takes connections for as long as the process lives.
fn accept(listener: &UnixListener, monitor: &Arc<Monitor>, connections: &Arc<Connections>) {
    for stream in listener.incoming() {
        // A client that is gone already, or a process out of descriptors: the next may be served.
        let Ok(mut stream) = stream else {
            thread::sleep(Duration::from_millis(10));
            continue;
        };
        let Ok(guard) = connections.enter(&stream) else {
            refuse(&mut stream);
            continue;
        };
        let monitor = Arc::clone(monitor);
        // Without a thread the connection is closed, which the client sees.
        let _closed = thread::Builder::new()
            .name("_api-call".into())
            .spawn(move || serve(stream, &monitor, &guard));
    }
}

fn refuse(stream: &mut UnixStream) {
    let why = format!("{CONNECTIONS_LIMIT} calls are at work; try again when one has ended");
    // It is closed either way.
    let _gone = stream
        .set_nonblocking(true)
        .and_then(|()| Response::error(503, why).write_to(stream, KeepAlive::No));
}

/// Answers the requests of one connection, one after the other.
fn serve(mut stream: UnixStream, monitor: &Arc<Monitor>, guard: &ConnectionGuard) {
    let mut received = ReceiveBuffer::default();
    while let Ok(KeepAlive::Yes) = serve_one(&mut stream, &mut received, monitor, guard) {}
}

/// # Errors
/// The client is done or gone, or the connection had to make room for another one.
fn serve_one(
    stream: &mut UnixStream,
    received: &mut ReceiveBuffer,
    monitor: &Arc<Monitor>,
    guard: &ConnectionGuard,
) -> io::Result<KeepAlive> {
    stream.set_write_timeout(Some(REQUEST_LIMIT))?;
    let request = read_request(&mut RequestStream::new(stream), received);
    // From here on it is not closed to make room.
    guard.set_state(ConnectionState::Answering)?;
    let (response, keep_alive) = match request {
        Ok(mut request) => (answer_or_report(monitor, &mut request), request.keep_alive),
        Err(RequestError::Invalid(response)) => (response, KeepAlive::No),
        Err(RequestError::Closed) => return Err(io::ErrorKind::ConnectionAborted.into()),
    };
    response.write_to(stream, keep_alive)?;
    guard.set_state(ConnectionState::Waiting(Instant::now()))?;
    Ok(keep_alive)
}

/// Answers a request. A panic is reported to the client, in an event and on standard error, and later calls are
/// answered.
fn answer_or_report(monitor: &Arc<Monitor>, request: &mut Request) -> Response {
    let path = request.path.clone();
    catch_unwind(AssertUnwindSafe(|| answer(monitor, request))).unwrap_or_else(|panic| {
        let why = monitor.report_panic(&path, &panic_message(&*panic));
        Response::error(500, why)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bytes_are_answered_as_a_connection_would_be() {
        let monitor = Monitor::new(None, Default::default());
        let requests =
            b"GET /api/v1/vmm.ping HTTP/1.1\r\n\r\nGET / HTTP/1.1\r\nConnection: close\r\n\r\nrest";
        let answers = String::from_utf8(answer_bytes(&monitor, requests)).unwrap();
        assert!(answers.starts_with("HTTP/1.1 200 OK\r\n"), "{answers}");
        assert!(answers.contains("HTTP/1.1 404 Not Found\r\n"), "{answers}");
        assert!(answers.ends_with(']'), "{answers}");
    }
}
