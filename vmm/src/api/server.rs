//! The API's socket and its threads.

use std::io;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use super::http::{KeepAlive, RequestError, read_request};
use super::routes::answer;
use crate::migration::transport::{SocketFile, TransportError, listen_unix};
use crate::monitor::Monitor;

/// Connections at a time; more are closed at once.
const CONNECTIONS_LIMIT: usize = 32;
/// A connection that says nothing for so long is closed.
const IDLE_LIMIT: Duration = Duration::from_secs(60);

/// Why the API is not there.
#[derive(Debug, thiserror::Error)]
pub enum ServerError {
    /// The path of its socket is taken.
    #[error("API socket {0}")]
    Taken(#[from] TransportError),
    /// What the system said.
    #[error("API socket {}: {source}", path.display())]
    Io {
        /// The path of the socket.
        path: PathBuf,
        /// Why not.
        source: io::Error,
    },
}

/// How long an ending monitor waits for its answers to leave.
const FAREWELL_LIMIT: Duration = Duration::from_secs(2);

/// The API on its socket, until it is dropped.
pub struct ApiServer {
    _file: SocketFile,
    answering: Arc<AtomicUsize>,
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
        let answering = Arc::new(AtomicUsize::new(0));
        let count = Arc::clone(&answering);
        thread::Builder::new()
            .name("_api".into())
            .spawn(move || accept(&listener, &monitor, &count))
            .map_err(error)?;
        Ok(Self {
            _file: file,
            answering,
        })
    }
}

/// Waits until the calls at work are answered: whoever asked for the guest's end is told that it came.
impl Drop for ApiServer {
    fn drop(&mut self) {
        let began = Instant::now();
        while self.answering.load(Ordering::SeqCst) > 0 && began.elapsed() < FAREWELL_LIMIT {
            thread::sleep(Duration::from_millis(1));
        }
    }
}

/// Takes connections for as long as the process lives.
fn accept(listener: &UnixListener, monitor: &Arc<Monitor>, answering: &Arc<AtomicUsize>) {
    let open = Arc::new(AtomicUsize::new(0));
    for connection in listener.incoming() {
        // A client that is gone already, or a process out of descriptors: the next may be served.
        let Ok(connection) = connection else {
            thread::sleep(Duration::from_millis(10));
            continue;
        };
        let slot = Counted::one(&open);
        if open.load(Ordering::Relaxed) > CONNECTIONS_LIMIT {
            continue;
        }
        let (monitor, answering) = (Arc::clone(monitor), Arc::clone(answering));
        // Without a thread the connection is closed, which the client sees.
        let _closed = thread::Builder::new()
            .name("_api-call".into())
            .spawn(move || {
                serve(connection, &monitor, &answering);
                drop(slot);
            });
    }
}

/// One of those that are counted, while it lives.
struct Counted(Arc<AtomicUsize>);

impl Counted {
    fn one(of: &Arc<AtomicUsize>) -> Self {
        of.fetch_add(1, Ordering::SeqCst);
        Self(Arc::clone(of))
    }
}

impl Drop for Counted {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::SeqCst);
    }
}

/// Answers the requests of one connection, one after the other.
fn serve(mut connection: UnixStream, monitor: &Arc<Monitor>, answering: &Arc<AtomicUsize>) {
    let limits = [
        connection.set_read_timeout(Some(IDLE_LIMIT)),
        connection.set_write_timeout(Some(IDLE_LIMIT)),
    ];
    if limits.iter().any(Result::is_err) {
        return;
    }
    let mut buffer = Vec::new();
    loop {
        let request = match read_request(&mut connection, &mut buffer) {
            Ok(request) => request,
            Err(RequestError::Bad(response)) => {
                // The connection is closed either way.
                let _gone = response.write_to(&mut connection, KeepAlive::No);
                return;
            }
            Err(RequestError::Closed) => return,
        };
        let _answering = Counted::one(answering);
        let response = answer(monitor, &request);
        let sent = response.write_to(&mut connection, request.keep_alive);
        if sent.is_err() || request.keep_alive == KeepAlive::No {
            return;
        }
    }
}
