//! The API's socket and its threads.
//!
//! Each connection has a thread. There are few at a time, so that clients that leak connections cost little, and a new
//! one always gets in: the one that has been idle for longest makes room for it. A client that begins a request has to
//! finish it soon.

use std::io::{self, IoSliceMut};
use std::mem::MaybeUninit;
use std::net::Shutdown;
use std::os::fd::OwnedFd;
use std::os::unix::net::{UnixListener, UnixStream};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use rustix::net::{RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, recvmsg};

use super::http::{
    Ahead, Begun, DESCRIPTORS_LIMIT, KeepAlive, Request, RequestError, Response, Source,
    read_request,
};
use super::routes::answer;
use crate::migrate::{EndpointError, SocketFile, listen_unix};
use crate::monitor::Monitor;
use crate::panics::panic_message;

/// Connections at a time.
const CONNECTIONS_LIMIT: usize = 32;
/// A connection that says nothing for so long is closed.
const IDLE_LIMIT: Duration = Duration::from_secs(60);
/// From the first byte of a request to its last, and for an answer to leave.
const REQUEST_LIMIT: Duration = Duration::from_secs(5);
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
    let (mut ahead, mut answers) = (Ahead::default(), Vec::new());
    loop {
        let (response, keep_alive) = match read_request(&mut bytes, &mut ahead) {
            Ok(mut request) => (answer(monitor, &mut request), request.keep_alive),
            Err(RequestError::Bad(response)) => (response, KeepAlive::No),
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

/// The connections that there are.
#[derive(Default)]
struct Connections {
    open: Mutex<Vec<Open>>,
}

struct Open {
    /// To end it. Its address tells it from the others.
    stream: Arc<UnixStream>,
    state: State,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum State {
    /// For a request, since then.
    Waiting(Instant),
    Answering,
}

/// Registration of a connection, until it is dropped.
struct ConnectionGuard {
    connections: Arc<Connections>,
    stream: Arc<UnixStream>,
}

impl Connections {
    /// Registers a new connection. If there are too many, the one that has been idle for longest is closed.
    ///
    /// # Errors
    /// Returns `ResourceBusy` if all connections are being answered, and the error of dup(2).
    fn enter(self: &Arc<Self>, stream: &UnixStream) -> io::Result<ConnectionGuard> {
        let stream = Arc::new(stream.try_clone()?);
        let mut open = self.lock();
        if open.len() >= CONNECTIONS_LIMIT {
            let idlest = idlest(&open).ok_or(io::ErrorKind::ResourceBusy)?;
            let gone = open.swap_remove(idlest);
            // Its client may have gone already.
            let _gone = gone.stream.shutdown(Shutdown::Both);
        }
        open.push(Open {
            stream: Arc::clone(&stream),
            state: State::Waiting(Instant::now()),
        });
        Ok(ConnectionGuard {
            connections: Arc::clone(self),
            stream,
        })
    }

    fn are_answering(&self) -> bool {
        self.lock().iter().any(|one| one.state == State::Answering)
    }

    fn lock(&self) -> MutexGuard<'_, Vec<Open>> {
        self.open.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn idlest(open: &[Open]) -> Option<usize> {
    let waiting = open
        .iter()
        .enumerate()
        .filter_map(|(index, one)| match one.state {
            State::Waiting(since) => Some((since, index)),
            State::Answering => None,
        });
    waiting.min().map(|(_, index)| index)
}

impl ConnectionGuard {
    /// Notes what the connection does.
    ///
    /// # Errors
    /// It had to make room for another one.
    fn note(&self, state: State) -> io::Result<()> {
        let mut open = self.connections.lock();
        let own = open
            .iter_mut()
            .find(|one| Arc::ptr_eq(&one.stream, &self.stream));
        own.ok_or(io::ErrorKind::ConnectionAborted)?.state = state;
        Ok(())
    }
}

impl Drop for ConnectionGuard {
    fn drop(&mut self) {
        let mut open = self.connections.lock();
        open.retain(|one| !Arc::ptr_eq(&one.stream, &self.stream));
    }
}

/// Answers the requests of one connection, one after the other.
fn serve(mut stream: UnixStream, monitor: &Arc<Monitor>, guard: &ConnectionGuard) {
    let mut ahead = Ahead::default();
    while let Ok(KeepAlive::Yes) = serve_one(&mut stream, &mut ahead, monitor, guard) {}
}

/// # Errors
/// The client is done or gone, or the connection had to make room for another one.
fn serve_one(
    stream: &mut UnixStream,
    ahead: &mut Ahead,
    monitor: &Arc<Monitor>,
    guard: &ConnectionGuard,
) -> io::Result<KeepAlive> {
    stream.set_write_timeout(Some(REQUEST_LIMIT))?;
    let mut client = Client {
        stream: &*stream,
        deadline: None,
        descriptors: Vec::new(),
    };
    let request = read_request(&mut client, ahead);
    // From here on it is not closed to make room.
    guard.note(State::Answering)?;
    let (response, keep_alive) = match request {
        Ok(mut request) => (answer_or_report(monitor, &mut request), request.keep_alive),
        Err(RequestError::Bad(response)) => (response, KeepAlive::No),
        Err(RequestError::Closed) => return Err(io::ErrorKind::ConnectionAborted.into()),
    };
    response.write_to(stream, keep_alive)?;
    guard.note(State::Waiting(Instant::now()))?;
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

/// A client from which one request is read.
struct Client<'a> {
    stream: &'a UnixStream,
    /// For the rest of the request that it began.
    deadline: Option<Instant>,
    /// What came with the bytes that were read last.
    descriptors: Vec<OwnedFd>,
}

impl Client<'_> {
    /// Bytes, and the descriptors that come with them.
    fn receive(&mut self, bytes: &mut [u8]) -> io::Result<usize> {
        const SPACE: usize = rustix::cmsg_space!(ScmRights(DESCRIPTORS_LIMIT + 1));
        let mut space = [MaybeUninit::uninit(); SPACE];
        let mut ancillary = RecvAncillaryBuffer::new(&mut space);
        let mut parts = [IoSliceMut::new(bytes)];
        let flags = RecvFlags::CMSG_CLOEXEC;
        let count = recvmsg(self.stream, &mut parts, &mut ancillary, flags)?.bytes;
        for message in ancillary.drain() {
            if let RecvAncillaryMessage::ScmRights(came) = message {
                self.descriptors.extend(came);
            }
        }
        Ok(count)
    }
}

impl Source for Client<'_> {
    fn read(&mut self, bytes: &mut [u8], begun: Begun) -> io::Result<usize> {
        let limit = match begun {
            Begun::No => IDLE_LIMIT,
            Begun::Yes => self
                .deadline
                .get_or_insert_with(|| Instant::now() + REQUEST_LIMIT)
                .saturating_duration_since(Instant::now()),
        };
        if limit.is_zero() {
            return Err(io::ErrorKind::TimedOut.into());
        }
        self.stream.set_read_timeout(Some(limit))?;
        self.receive(bytes).map_err(|error| match error.kind() {
            io::ErrorKind::WouldBlock => io::ErrorKind::TimedOut.into(),
            _ => error,
        })
    }

    fn take_descriptors(&mut self) -> Vec<OwnedFd> {
        std::mem::take(&mut self.descriptors)
    }
}

#[cfg(test)]
mod tests {
    use std::fs::File;
    use std::io::{IoSlice, Read, Write};
    use std::os::fd::AsFd;

    use rustix::io::{FdFlags, fcntl_getfd};
    use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags, sendmsg};

    use super::*;

    fn pair(connections: &Arc<Connections>) -> (UnixStream, io::Result<ConnectionGuard>) {
        let (near, far) = UnixStream::pair().unwrap();
        let place = connections.enter(&near);
        (far, place)
    }

    #[test]
    fn the_idlest_makes_room_and_what_is_answered_stays() {
        let connections = Arc::new(Connections::default());
        let mut all: Vec<_> = (0..CONNECTIONS_LIMIT)
            .map(|_| pair(&connections))
            .map(|(far, guard)| (far, guard.unwrap()))
            .collect();
        all[0].1.note(State::Answering).unwrap();
        let newest = pair(&connections);
        assert!(newest.1.is_ok());
        assert!(all[0].1.note(State::Answering).is_ok());
        // The oldest of those that waited is closed, and is not answered any more.
        assert!(all[1].1.note(State::Answering).is_err());
        assert_eq!(all[1].0.read(&mut [0]).unwrap(), 0);
        assert!(all[2].1.note(State::Answering).is_ok());
    }

    #[test]
    fn all_at_work_leave_no_room_until_one_is_done() {
        let connections = Arc::new(Connections::default());
        let mut all: Vec<_> = (0..CONNECTIONS_LIMIT)
            .map(|_| pair(&connections))
            .map(|(far, guard)| (far, guard.unwrap()))
            .collect();
        for (_, guard) in &all {
            guard.note(State::Answering).unwrap();
        }
        assert!(pair(&connections).1.is_err());
        all.pop();
        assert!(pair(&connections).1.is_ok());
        drop(all);
        assert!(!connections.are_answering());
    }

    #[test]
    fn a_request_that_does_not_end_is_answered_with_408() {
        let (near, mut far) = UnixStream::pair().unwrap();
        far.write_all(b"GET /half").unwrap();
        let mut client = Client {
            stream: &near,
            deadline: Some(Instant::now()),
            descriptors: Vec::new(),
        };
        let mut ahead = Ahead::default();
        ahead.append(b"G");
        match read_request(&mut client, &mut ahead) {
            Err(RequestError::Bad(response)) => assert_eq!(response.status, 408),
            other => panic!("{other:?}"),
        }
    }

    /// Sends a whole request with so many descriptors, and reads it.
    fn with_descriptors(count: usize) -> Result<Vec<OwnedFd>, RequestError> {
        let (near, far) = UnixStream::pair().unwrap();
        let files: Vec<_> = (0..count)
            .map(|_| File::open("/dev/null").unwrap())
            .collect();
        let files: Vec<_> = files.iter().map(AsFd::as_fd).collect();
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(64))];
        let mut ancillary = SendAncillaryBuffer::new(&mut space);
        assert!(ancillary.push(SendAncillaryMessage::ScmRights(&files)));
        let head = IoSlice::new(b"PUT /x HTTP/1.1\r\nContent-Length: 2\r\n\r\n");
        let sent = sendmsg(&far, &[head], &mut ancillary, SendFlags::empty());
        assert_eq!(sent.unwrap(), head.len());
        (&far).write_all(b"{}").unwrap();
        let mut client = Client {
            stream: &near,
            deadline: None,
            descriptors: Vec::new(),
        };
        let request = read_request(&mut client, &mut Ahead::default())?;
        assert_eq!(request.body, b"{}");
        Ok(request.descriptors)
    }

    #[test]
    fn descriptors_come_with_a_request_up_to_a_limit() {
        for count in [1, 2, DESCRIPTORS_LIMIT] {
            let came = with_descriptors(count).unwrap();
            assert_eq!(came.len(), count);
            let info = fcntl_getfd(&came[0]).unwrap();
            assert!(info.contains(FdFlags::CLOEXEC));
        }
        for count in [DESCRIPTORS_LIMIT + 1, 60] {
            match with_descriptors(count) {
                Err(RequestError::Bad(response)) => assert_eq!(response.status, 400),
                other => panic!("{count}: {other:?}"),
            }
        }
    }

    #[test]
    fn descriptors_belong_to_the_request_that_they_came_with() {
        let (near, far) = UnixStream::pair().unwrap();
        (&far).write_all(b"PUT /first HTTP/1.1\r\n\r\n").unwrap();
        let file = File::open("/dev/null").unwrap();
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
        let mut ancillary = SendAncillaryBuffer::new(&mut space);
        let files = [file.as_fd()];
        assert!(ancillary.push(SendAncillaryMessage::ScmRights(&files)));
        let head = IoSlice::new(b"PUT /second HTTP/1.1\r\n\r\n");
        sendmsg(&far, &[head], &mut ancillary, SendFlags::empty()).unwrap();
        (&far).write_all(b"PUT /third HTTP/1.1\r\n\r\n").unwrap();
        let mut ahead = Ahead::default();
        for (path, count) in [("/first", 0), ("/second", 1), ("/third", 0)] {
            let mut client = Client {
                stream: &near,
                deadline: None,
                descriptors: Vec::new(),
            };
            let request = read_request(&mut client, &mut ahead).unwrap();
            assert_eq!(
                (request.path.as_str(), request.descriptors.len()),
                (path, count)
            );
        }
    }

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
