//! Addresses as people write them.

use std::fmt;
use std::io;
use std::net::{SocketAddr, TcpListener, TcpStream, ToSocketAddrs};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::str::FromStr;
use std::time::Duration;

use super::{Connection, EndpointError, Listener, listen_unix};
use crate::socket_path::check_socket_path;

/// Maximum time for a TCP connection to be established.
const CONNECT_LIMIT: Duration = Duration::from_secs(8);

pub(super) const CONNECTING: &str = "connecting to";

/// Address of the other side of a migration.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Url {
    /// Path of a Unix socket.
    Unix(PathBuf),
    /// Host and port.
    Tcp(String),
}

impl fmt::Display for Url {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Unix(path) => write!(f, "unix:{}", path.display()),
            Self::Tcp(address) => write!(f, "tcp:{address}"),
        }
    }
}

impl FromStr for Url {
    type Err = EndpointError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        match text.split_once(':') {
            Some(("unix", path)) if !path.is_empty() => {
                check_socket_path(path.as_ref())?;
                Ok(Self::Unix(path.into()))
            }
            Some(("tcp", address)) if has_port(address) => Ok(Self::Tcp(address.into())),
            _ => Err(EndpointError::Url(text.into())),
        }
    }
}

fn has_port(address: &str) -> bool {
    address
        .rsplit_once(':')
        .is_some_and(|(host, port)| !host.is_empty() && port.parse::<u16>().is_ok())
}

impl Url {
    /// Connects to a destination.
    ///
    /// # Errors
    /// Returns [`EndpointError::NotLoopback`] for TCP beyond this host, and [`EndpointError::Io`] if no process listens
    /// on the address.
    pub fn connect(&self) -> Result<Connection, EndpointError> {
        let connection = match self {
            Self::Unix(path) => UnixStream::connect(path).map(Connection::Unix),
            Self::Tcp(address) => connect_tcp(&loopback(address)?).map(Connection::Tcp),
        };
        connection.map_err(|source| self.failed(CONNECTING, source))
    }

    /// Listens for sources. The file of a Unix socket is removed when the listener is closed or dropped.
    ///
    /// # Errors
    /// Returns [`EndpointError::Taken`] if the path is in use, [`EndpointError::NotLoopback`] for TCP beyond this host,
    /// and [`EndpointError::Io`] if the system refuses.
    pub fn listen(&self) -> Result<Listener, EndpointError> {
        match self {
            Self::Unix(path) => {
                let (listener, file) =
                    listen_unix(path, |source| self.failed("listening on", source))?;
                Ok(Listener::Unix(listener, file))
            }
            Self::Tcp(address) => TcpListener::bind(&loopback(address)?[..])
                .map(Listener::Tcp)
                .map_err(|source| self.failed("listening on", source)),
        }
    }

    fn failed(&self, doing: &'static str, source: io::Error) -> EndpointError {
        EndpointError::Io {
            doing,
            url: self.clone(),
            source,
        }
    }
}

fn connect_tcp(addresses: &[SocketAddr]) -> io::Result<TcpStream> {
    let mut last = io::Error::from(io::ErrorKind::AddrNotAvailable);
    for address in addresses {
        match TcpStream::connect_timeout(address, CONNECT_LIMIT) {
            Ok(stream) => return Ok(stream),
            Err(error) => last = error,
        }
    }
    Err(last)
}

/// Resolves a name, and refuses it unless all of its addresses are on loopback.
fn loopback(address: &str) -> Result<Vec<SocketAddr>, EndpointError> {
    let found: Vec<SocketAddr> = address
        .to_socket_addrs()
        .map_err(|source| EndpointError::Io {
            doing: "looking up",
            url: Url::Tcp(address.into()),
            source,
        })?
        .collect();
    if found.iter().any(|address| !address.ip().is_loopback()) {
        return Err(EndpointError::NotLoopback(address.into()));
    }
    Ok(found)
}
