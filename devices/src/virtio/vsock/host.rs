//! Host's side of the socket device: the Unix socket on which the host requests connections, and connections to sockets
//! on which the host listens.
//!
//! The protocol is that of Firecracker and Cloud Hypervisor. To connect to the guest, a process connects to PATH, sends
//! `CONNECT port\n`, and reads `OK port\n`. To accept connections from the guest, it listens on PATH_port.

use std::io::{self, ErrorKind, Read};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};

use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType, connect, socket_with};

/// Maximum length of a line. The longest valid one is `CONNECT 4294967295\n`.
const LINE_MAX: usize = 32;

/// Listening socket at PATH. Dropping it removes its file.
pub(super) struct HostSocket {
    pub(super) listener: UnixListener,
    path: PathBuf,
}

impl HostSocket {
    /// Creates the socket at `path`, and listens on it.
    pub(super) fn bind(path: &Path) -> io::Result<Self> {
        let listener = UnixListener::bind(path)?;
        let socket = Self {
            listener,
            path: path.into(),
        };
        socket.listener.set_nonblocking(true)?;
        Ok(socket)
    }

    /// Accepts the next connection. Returns `None` if there is none.
    pub(super) fn accept(&self) -> io::Result<Option<UnixStream>> {
        loop {
            match self.listener.accept() {
                Ok((stream, _)) => {
                    stream.set_nonblocking(true)?;
                    return Ok(Some(stream));
                }
                Err(error) if error.kind() == ErrorKind::WouldBlock => return Ok(None),
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
    }

    /// Connects to the socket at PATH_port. Does not block: a listener whose backlog is full counts as an error.
    pub(super) fn connect(&self, port: u32) -> io::Result<UnixStream> {
        let mut path = self.path.clone().into_os_string();
        path.push(format!("_{port}"));
        let flags = SocketFlags::NONBLOCK | SocketFlags::CLOEXEC;
        let socket = socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None)?;
        connect(&socket, &SocketAddrUnix::new(path)?)?;
        Ok(UnixStream::from(socket))
    }
}

impl Drop for HostSocket {
    fn drop(&mut self) {
        // The call fails if another process has removed the file, which is fine.
        let _gone = std::fs::remove_file(&self.path);
    }
}

/// Connection from the host that has not named a port of the guest yet.
pub(super) struct Handshake {
    pub(super) stream: UnixStream,
    line: Vec<u8>,
}

/// Progress of a handshake.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum HandshakeProgress {
    /// The line is not complete.
    Waiting,
    /// The line requests a connection to this port of the guest.
    Port(u32),
    /// The line is invalid, or the stream has ended.
    Failed,
}

impl Handshake {
    pub(super) fn new(stream: UnixStream) -> Self {
        Self {
            stream,
            line: Vec::new(),
        }
    }

    /// Reads up to the end of the line. What follows the line is data for the guest.
    pub(super) fn read(&mut self) -> HandshakeProgress {
        let mut byte = [0];
        while self.line.len() < LINE_MAX {
            match self.stream.read(&mut byte) {
                Ok(0) => return HandshakeProgress::Failed,
                Ok(_) if byte == *b"\n" => return self.port(),
                Ok(_) => self.line.push(byte[0]),
                Err(error) if error.kind() == ErrorKind::WouldBlock => {
                    return HandshakeProgress::Waiting;
                }
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(_) => return HandshakeProgress::Failed,
            }
        }
        HandshakeProgress::Failed
    }

    /// Decodes the line.
    fn port(&self) -> HandshakeProgress {
        std::str::from_utf8(&self.line)
            .ok()
            .and_then(|line| line.strip_prefix("CONNECT "))
            .and_then(|port| port.trim().parse().ok())
            .map_or(HandshakeProgress::Failed, HandshakeProgress::Port)
    }
}
