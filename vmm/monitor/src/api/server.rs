//! Server of the API: the socket, and one thread for each connection.
//!
//! The number of connections is limited, so that clients that leak connections cost little. A new connection is always
//! accepted while one of the others is idle: the one that has been idle for longest is closed for it. A client that
//! begins a request must finish it within a time limit.

use std::io;
use std::os::unix::net::{UnixListener, UnixStream};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use super::connections::{CONNECTIONS_LIMIT, ConnectionGuard, ConnectionState, Connections};
use super::http::{KeepAlive, Response};
use super::request::{ReceiveBuffer, Request, RequestError, read_request};
use super::request_stream::{REQUEST_LIMIT, RequestStream};
use super::routes::answer;
use crate::migrate::{EndpointError, SocketFile, listen_unix};
use crate::monitor::Monitor;
use crate::panics::panic_message;

/// Maximum time for which dropping the server waits for calls that are being answered.
const FAREWELL_LIMIT: Duration = Duration::from_secs(2);

/// Reasons why the API cannot be served.
#[derive(Debug, thiserror::Error)]
pub enum ServerError {
    /// The path of the socket is in use or invalid.
    #[error("API socket {0}")]
    Taken(#[from] EndpointError),
    /// The system refused to create the socket.
    #[error("API socket {}: {source}", path.display())]
    Io {
        /// Path of the socket.
        path: PathBuf,
        /// Error of the system.
        source: io::Error,
    },
    /// The thread of the server could not be started.
    #[error("API: its thread cannot be started: {0}")]
    Thread(#[source] io::Error),
}

/// Server of the API on one socket. Dropping it waits until calls in progress are answered, for two seconds at most.
pub struct ApiServer {
    _file: Option<SocketFile>,
    connections: Arc<Connections>,
}

impl ApiServer {
    /// Starts to answer calls for `monitor` on a new socket at `path`.
    ///
    /// # Errors
    /// Returns [`ServerError::Taken`] if the path is in use or too long, [`ServerError::Io`] if the system refuses the
    /// socket, and [`ServerError::Thread`] if the thread cannot be started.
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

    /// Starts to answer calls for `monitor` on a socket that is listening already.
    ///
    /// # Errors
    /// Returns [`ServerError::Thread`] if the thread cannot be started.
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

/// Waits until calls in progress are answered. A client that ended the guest thereby receives its answer before the
/// process ends.
impl Drop for ApiServer {
    fn drop(&mut self) {
        let began = Instant::now();
        while self.connections.are_answering() && began.elapsed() < FAREWELL_LIMIT {
            thread::sleep(Duration::from_millis(1));
        }
    }
}

/// Answers the HTTP requests in `bytes` one after the other and returns the bytes of the responses. A monitor can serve
/// the API by this over a transport of its own.
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

/// Accepts connections for as long as the process lives.
fn accept(listener: &UnixListener, monitor: &Arc<Monitor>, connections: &Arc<Connections>) {
    for stream in listener.incoming() {
        // Accepting fails if the client disconnected already, or the process has no free descriptor. The next may
        // succeed.
        let Ok(mut stream) = stream else {
            thread::sleep(Duration::from_millis(10));
            continue;
        };
        let Ok(guard) = connections.enter(&stream) else {
            refuse(&mut stream);
            continue;
        };
        let monitor = Arc::clone(monitor);
        // If no thread can be started, the connection is closed, which the client sees.
        let _closed = thread::Builder::new()
            .name("_api-call".into())
            .spawn(move || serve(stream, &monitor, &guard));
    }
}

/// Answers a connection beyond the limit with status 503.
fn refuse(stream: &mut UnixStream) {
    let why = format!("{CONNECTIONS_LIMIT} calls are in progress; try again when one has ended");
    // The connection is closed whether or not the answer could be sent.
    let _unsent = stream
        .set_nonblocking(true)
        .and_then(|()| Response::error(503, why).write_to(stream, KeepAlive::No));
}

/// Answers the requests of one connection one after the other, until it is closed.
fn serve(mut stream: UnixStream, monitor: &Arc<Monitor>, guard: &ConnectionGuard) {
    let mut received = ReceiveBuffer::default();
    while let Ok(KeepAlive::Yes) = serve_one(&mut stream, &mut received, monitor, guard) {}
}

/// Answers the next request of a connection. Returns whether the client may send another one.
///
/// # Errors
/// Returns an error if the client has disconnected or is idle, or if the connection was closed to make room for another
/// one.
fn serve_one(
    stream: &mut UnixStream,
    received: &mut ReceiveBuffer,
    monitor: &Arc<Monitor>,
    guard: &ConnectionGuard,
) -> io::Result<KeepAlive> {
    stream.set_write_timeout(Some(REQUEST_LIMIT))?;
    let request = read_request(&mut RequestStream::new(stream), received);
    // While a request is being answered, the connection is not closed for another one.
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

/// Answers a request. A panic becomes an answer with status 500, an event and a message on standard error. Later calls
/// are answered as usual.
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
