//! Connections over Unix sockets and TCP, as streams of the migration engine.

use std::io;
use std::net::TcpStream;
use std::os::unix::net::UnixStream;

use migration::{Halves, Stream};

/// A connection to the other side of a migration.
#[derive(Debug)]
pub enum Connection {
    /// A connection over a Unix socket.
    Unix(UnixStream),
    /// A connection over TCP.
    Tcp(TcpStream),
}

impl Stream for Connection {
    fn split(self) -> io::Result<Halves> {
        match self {
            Self::Unix(stream) => stream.split(),
            Self::Tcp(stream) => stream.split(),
        }
    }
}
