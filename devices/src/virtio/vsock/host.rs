//! The host's side: the socket on which it asks for connections, and those that it listens on.
//!
//! The protocol is Firecracker's and Cloud Hypervisor's. Host to guest: connect to PATH, send
//! `CONNECT port\n`, read `OK port\n`. Guest to host: somebody listens on PATH_port.

use std::io::{self, ErrorKind, Read};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};

use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType, connect, socket_with};

/// The longest line: `CONNECT 4294967295\n`.
const LINE_MAX: usize = 32;

/// The socket at PATH. Its file goes with it.
pub(super) struct HostSocket {
    pub(super) listener: UnixListener,
    path: PathBuf,
}

impl HostSocket {
    pub(super) fn bind(path: &Path) -> io::Result<Self> {
        let listener = UnixListener::bind(path)?;
        let socket = Self {
            listener,
            path: path.into(),
        };
        socket.listener.set_nonblocking(true)?;
        Ok(socket)
    }

    /// The next host that wants something; none when there is no more.
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

    /// A connection to whoever listens on PATH_port. It does not wait: a listener whose backlog is full
    /// refuses.
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
        // Somebody else removed it already, or took its name: there is nobody to tell.
        let _gone = std::fs::remove_file(&self.path);
    }
}

/// A host that has connected and has not said yet what it wants.
pub(super) struct Handshake {
    pub(super) stream: UnixStream,
    line: Vec<u8>,
}

/// How far a handshake is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum HandshakeProgress {
    /// The line is not whole.
    Waiting,
    /// It asks for this port of the guest.
    Port(u32),
    /// It is no such line, or ended too early.
    Failed,
}

impl Handshake {
    pub(super) fn new(stream: UnixStream) -> Self {
        Self {
            stream,
            line: Vec::new(),
        }
    }

    /// Reads on, and nothing beyond the line: what follows is for the guest.
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

    fn port(&self) -> HandshakeProgress {
        std::str::from_utf8(&self.line)
            .ok()
            .and_then(|line| line.strip_prefix("CONNECT "))
            .and_then(|port| port.trim().parse().ok())
            .map_or(HandshakeProgress::Failed, HandshakeProgress::Port)
    }
}
