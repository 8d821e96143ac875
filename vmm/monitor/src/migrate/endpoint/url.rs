//! Addresses as people write them.

use std::fmt;
use std::io;
use std::net::{SocketAddr, TcpListener, ToSocketAddrs};
use std::path::PathBuf;
use std::str::FromStr;
use std::time::{Duration, Instant};

use rustix::net::SocketAddrUnix;

use super::connect;
use super::{Connection, EndpointError, Listener, listen_unix};
use crate::socket_path::check_socket_path;

/// Maximum time for a connection to be established.
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
    /// Connects to a destination. Gives up when `is_cancelled` returns true, which is asked several times a second.
    ///
    /// # Errors
    /// Returns [`EndpointError::NotLoopback`] for TCP beyond this host, and [`EndpointError::Io`] if no process listens
    /// on the address, or does not accept the connection within 8 seconds.
    pub fn connect(&self, is_cancelled: impl Fn() -> bool) -> Result<Connection, EndpointError> {
        let deadline = Instant::now() + CONNECT_LIMIT;
        let connection = match self {
            Self::Unix(path) => SocketAddrUnix::new(path)
                .map_err(io::Error::from)
                .and_then(|address| connect::connect(&address, deadline, &is_cancelled))
                .map(|socket| Connection::Unix(socket.into())),
            Self::Tcp(address) => connect_tcp(&loopback(address)?, deadline, &is_cancelled),
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

fn connect_tcp(
    addresses: &[SocketAddr],
    deadline: Instant,
    is_cancelled: &impl Fn() -> bool,
) -> io::Result<Connection> {
    let mut last = io::Error::from(io::ErrorKind::AddrNotAvailable);
    for address in addresses {
        match connect::connect(address, deadline, is_cancelled) {
            Ok(socket) => return Ok(Connection::Tcp(socket.into())),
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
