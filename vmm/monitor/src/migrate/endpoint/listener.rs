//! Sockets on which a destination waits for sources.

use std::io;
use std::net::TcpListener;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::UnixListener;

use super::{Connection, SocketFile, Url};

/// A socket on which sources connect.
#[derive(Debug)]
pub enum Listener {
    /// A Unix socket and its file.
    Unix(UnixListener, SocketFile),
    /// A TCP socket.
    Tcp(TcpListener),
}

impl Listener {
    /// Returns the address. If port 0 was asked for, it has the port that the system chose.
    ///
    /// # Errors
    /// Returns the error of getsockname(2).
    pub fn url(&self) -> io::Result<Url> {
        match self {
            Self::Unix(_, file) => Ok(Url::Unix(file.path.clone())),
            Self::Tcp(listener) => Ok(Url::Tcp(listener.local_addr()?.to_string())),
        }
    }

    /// Refuses further connections, and removes the file of a Unix socket.
    pub fn close(&self) {
        // This fails only if the listener was closed before.
        let _closed = rustix::net::shutdown(self, rustix::net::Shutdown::Read);
        if let Self::Unix(_, file) = self {
            file.remove();
        }
    }

    /// Waits for the next source to connect.
    ///
    /// # Errors
    /// Returns the error of accept(2).
    pub fn accept(&self) -> io::Result<Connection> {
        Ok(match self {
            Self::Unix(listener, _) => Connection::Unix(listener.accept()?.0),
            Self::Tcp(listener) => Connection::Tcp(listener.accept()?.0),
        })
    }
}

impl AsFd for Listener {
    fn as_fd(&self) -> BorrowedFd<'_> {
        match self {
            Self::Unix(listener, _) => listener.as_fd(),
            Self::Tcp(listener) => listener.as_fd(),
        }
    }
}
