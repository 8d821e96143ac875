//! Where a stream goes: `unix:PATH` or `tcp:HOST:PORT`.
//!
//! Plain TCP carries all of a guest's memory in the clear, to and from whoever connects: it stays on
//! loopback until there is TLS.

use std::fmt;
use std::io::{self, IoSlice, Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream, ToSocketAddrs};
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::time::Duration;

/// After this long without a byte the other side counts as gone.
pub const SILENCE_LIMIT: Duration = Duration::from_secs(8);

const CONNECTING: &str = "connecting to";

/// Bytes of `sun_path` without the zero at its end (unix(7)).
pub const SOCKET_PATH_MAX: usize = 107;

/// The address of a migration's other side.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Url {
    /// A Unix socket.
    Unix(PathBuf),
    /// A host and port.
    Tcp(String),
}

/// Why a connection could not be had.
#[derive(Debug, thiserror::Error)]
pub enum TransportError {
    /// Not an address.
    #[error("{0:?} is no migration address: write unix:PATH or tcp:HOST:PORT")]
    Url(String),
    /// TCP beyond this host.
    #[error(
        "tcp:{0} is not on loopback: plain TCP would carry the guest's memory in the clear, and TLS is \
         not there yet; use a tunnel to a loopback port"
    )]
    NotLoopback(String),
    /// No socket can have this path.
    #[error(
        "{}: a socket's path has at most {SOCKET_PATH_MAX} bytes, this one has {}",
        .0.display(), .0.as_os_str().len()
    )]
    PathTooLong(PathBuf),
    /// The path of the socket to listen on is taken.
    #[error("{}: {why}", path.display())]
    Taken {
        /// The path.
        path: PathBuf,
        /// By what.
        why: &'static str,
    },
    /// What the system said.
    #[error("{doing} {url}: {source}{}", hint(doing, .source))]
    Io {
        /// "connecting to" or "listening on".
        doing: &'static str,
        /// Where.
        url: Url,
        /// Why not.
        source: io::Error,
    },
}

fn hint(doing: &str, error: &io::Error) -> &'static str {
    match (doing, error.kind()) {
        (CONNECTING, io::ErrorKind::NotFound | io::ErrorKind::ConnectionRefused) => {
            "; is `ferry receive` waiting there?"
        }
        _ => "",
    }
}

/// Finds a path that no socket can have.
///
/// # Errors
/// It has more than [`SOCKET_PATH_MAX`] bytes.
pub fn check_socket_path(path: &Path) -> Result<(), TransportError> {
    match path.as_os_str().len() {
        0..=SOCKET_PATH_MAX => Ok(()),
        _ => Err(TransportError::PathTooLong(path.into())),
    }
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
    type Err = TransportError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        match text.split_once(':') {
            Some(("unix", path)) if !path.is_empty() => {
                check_socket_path(path.as_ref())?;
                Ok(Self::Unix(path.into()))
            }
            Some(("tcp", address)) if has_port(address) => Ok(Self::Tcp(address.into())),
            _ => Err(TransportError::Url(text.into())),
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
    /// Nobody there, an address beyond loopback.
    pub fn connect(&self) -> Result<Connection, TransportError> {
        let stream = match self {
            Self::Unix(path) => UnixStream::connect(path).map(Connection::Unix),
            Self::Tcp(address) => connect_tcp(&loopback(address)?).map(Connection::Tcp),
        };
        let stream = stream.map_err(|source| self.failed(CONNECTING, source))?;
        stream
            .prepare()
            .map_err(|source| self.failed(CONNECTING, source))?;
        Ok(stream)
    }

    /// Waits for sources. A socket file is removed again when the listener goes.
    ///
    /// # Errors
    /// A path or port in use, an address beyond loopback.
    pub fn listen(&self) -> Result<Listener, TransportError> {
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

    fn failed(&self, doing: &'static str, source: io::Error) -> TransportError {
        TransportError::Io {
            doing,
            url: self.clone(),
            source,
        }
    }
}

fn connect_tcp(addresses: &[SocketAddr]) -> io::Result<TcpStream> {
    let mut last = io::Error::from(io::ErrorKind::AddrNotAvailable);
    for address in addresses {
        match TcpStream::connect_timeout(address, SILENCE_LIMIT) {
            Ok(stream) => return Ok(stream),
            Err(error) => last = error,
        }
    }
    Err(last)
}

/// The addresses behind a name, if all of them are this host's own.
fn loopback(address: &str) -> Result<Vec<SocketAddr>, TransportError> {
    let found: Vec<SocketAddr> = address
        .to_socket_addrs()
        .map_err(|source| TransportError::Io {
            doing: "looking up",
            url: Url::Tcp(address.into()),
            source,
        })?
        .collect();
    if found.iter().any(|address| !address.ip().is_loopback()) {
        return Err(TransportError::NotLoopback(address.into()));
    }
    Ok(found)
}

/// A socket's file, removed when its owner goes, unless another one stands at its path by then.
#[derive(Debug)]
pub struct SocketFile {
    path: PathBuf,
    /// Device and inode.
    identity: Option<(u64, u64)>,
}

/// Listens on a new socket at `path`. A socket that nobody listens on any more is replaced, anything else
/// stays and is an error.
///
/// # Errors
/// The path is in use, too long, or no socket; what the system says, as `failed` makes it an error.
pub fn listen_unix<E: From<TransportError>>(
    path: &Path,
    failed: impl Fn(io::Error) -> E,
) -> Result<(UnixListener, SocketFile), E> {
    check_socket_path(path)?;
    remove_dead_socket(path)?;
    let listener = UnixListener::bind(path).map_err(failed)?;
    let file = SocketFile {
        path: path.to_owned(),
        identity: identity(path),
    };
    Ok((listener, file))
}

fn identity(path: &Path) -> Option<(u64, u64)> {
    let metadata = std::fs::symlink_metadata(path).ok()?;
    Some((metadata.dev(), metadata.ino()))
}

fn remove_dead_socket(path: &Path) -> Result<(), TransportError> {
    let taken = |why| TransportError::Taken {
        path: path.to_owned(),
        why,
    };
    if let Ok(metadata) = std::fs::symlink_metadata(path) {
        if !metadata.file_type().is_socket() {
            return Err(taken(
                "there is something else at this path; choose another, or remove it",
            ));
        }
        if UnixStream::connect(path).is_ok() {
            return Err(taken(
                "the socket is in use by another process; choose another path",
            ));
        }
        std::fs::remove_file(path)
            .map_err(|_| taken("a dead socket is in the way and cannot be removed"))?;
    }
    Ok(())
}

impl SocketFile {
    fn remove(&self) {
        if self.identity.is_some() && identity(&self.path) == self.identity {
            // It may be gone already, and there is nobody left to tell.
            let _gone = std::fs::remove_file(&self.path);
        }
    }
}

impl Drop for SocketFile {
    fn drop(&mut self) {
        self.remove();
    }
}

/// Waits for sources.
#[derive(Debug)]
pub enum Listener {
    /// On a Unix socket.
    Unix(UnixListener, SocketFile),
    /// On a TCP port.
    Tcp(TcpListener),
}

impl Listener {
    /// Where it listens: with the port that the system chose, where port 0 was asked for.
    ///
    /// # Errors
    /// The system's.
    pub fn url(&self) -> io::Result<Url> {
        match self {
            Self::Unix(_, file) => Ok(Url::Unix(file.path.clone())),
            Self::Tcp(listener) => Ok(Url::Tcp(listener.local_addr()?.to_string())),
        }
    }

    /// Takes no more sources: those that come are told at once. The socket's file goes.
    pub fn close(&self) {
        // It fails only for a listener that was closed before.
        let _closed = rustix::net::shutdown(self, rustix::net::Shutdown::Read);
        if let Self::Unix(_, file) = self {
            file.remove();
        }
    }

    /// Waits for the next source.
    ///
    /// # Errors
    /// The system's.
    pub fn accept(&self) -> io::Result<Connection> {
        let connection = match self {
            Self::Unix(listener, _) => Connection::Unix(listener.accept()?.0),
            Self::Tcp(listener) => Connection::Tcp(listener.accept()?.0),
        };
        connection.prepare()?;
        Ok(connection)
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

/// A connection to the other side. Reads and writes fail after [`SILENCE_LIMIT`] without progress.
#[derive(Debug)]
pub enum Connection {
    /// Over a Unix socket.
    Unix(UnixStream),
    /// Over TCP.
    Tcp(TcpStream),
}

impl Connection {
    /// The same connection once more, for the other direction or another thread.
    ///
    /// # Errors
    /// The system's.
    pub fn try_clone(&self) -> io::Result<Self> {
        match self {
            Self::Unix(stream) => stream.try_clone().map(Self::Unix),
            Self::Tcp(stream) => stream.try_clone().map(Self::Tcp),
        }
    }

    /// Ends both directions at once; whoever reads or writes is told.
    ///
    /// # Errors
    /// The system's: it is closed already.
    pub fn shut_down(&self) -> io::Result<()> {
        match self {
            Self::Unix(stream) => stream.shutdown(std::net::Shutdown::Both),
            Self::Tcp(stream) => stream.shutdown(std::net::Shutdown::Both),
        }
    }

    fn prepare(&self) -> io::Result<()> {
        match self {
            Self::Unix(stream) => {
                stream.set_read_timeout(Some(SILENCE_LIMIT))?;
                stream.set_write_timeout(Some(SILENCE_LIMIT))
            }
            Self::Tcp(stream) => {
                stream.set_nodelay(true)?;
                stream.set_read_timeout(Some(SILENCE_LIMIT))?;
                stream.set_write_timeout(Some(SILENCE_LIMIT))
            }
        }
    }
}

impl AsFd for Connection {
    fn as_fd(&self) -> BorrowedFd<'_> {
        match self {
            Self::Unix(stream) => stream.as_fd(),
            Self::Tcp(stream) => stream.as_fd(),
        }
    }
}

impl Read for Connection {
    fn read(&mut self, bytes: &mut [u8]) -> io::Result<usize> {
        match self {
            Self::Unix(stream) => stream.read(bytes),
            Self::Tcp(stream) => stream.read(bytes),
        }
    }
}

impl Write for Connection {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        match self {
            Self::Unix(stream) => stream.write(bytes),
            Self::Tcp(stream) => stream.write(bytes),
        }
    }

    fn write_vectored(&mut self, parts: &[IoSlice<'_>]) -> io::Result<usize> {
        match self {
            Self::Unix(stream) => stream.write_vectored(parts),
            Self::Tcp(stream) => stream.write_vectored(parts),
        }
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_are_read_as_they_are_written() {
        for text in [
            "unix:/run/ferry.sock",
            "tcp:127.0.0.1:4000",
            "tcp:[::1]:0",
            "tcp:localhost:1",
        ] {
            assert_eq!(text.parse::<Url>().unwrap().to_string(), text);
        }
        for text in [
            "",
            "unix:",
            "tcp:",
            "tcp:host",
            "tcp::1",
            "tcp:host:99999",
            "/run/x",
            "udp:a:1",
        ] {
            let error = text.parse::<Url>().unwrap_err();
            assert!(error.to_string().contains("unix:PATH"), "{error}");
        }
    }

    #[test]
    fn a_path_that_is_too_long_for_a_socket_is_refused_with_its_length() {
        let longest = "/".to_owned() + &"x".repeat(SOCKET_PATH_MAX - 1);
        rustix::net::SocketAddrUnix::new(&longest).unwrap();
        format!("unix:{longest}").parse::<Url>().unwrap();
        let error = format!("unix:{longest}x").parse::<Url>().unwrap_err();
        assert!(error.to_string().contains("this one has 108"), "{error}");
    }

    #[test]
    fn where_nobody_waits_the_hint_says_who_should() {
        let directory = tempfile::tempdir().unwrap();
        let error = Url::Unix(directory.path().join("s")).connect().unwrap_err();
        assert!(error.to_string().contains("ferry receive"), "{error}");
    }

    #[test]
    fn plain_tcp_stays_on_loopback() {
        let url: Url = "tcp:192.0.2.1:4000".parse().unwrap();
        assert!(matches!(url.connect(), Err(TransportError::NotLoopback(_))));
        assert!(matches!(url.listen(), Err(TransportError::NotLoopback(_))));
        let any: Url = "tcp:0.0.0.0:0".parse().unwrap();
        assert!(matches!(any.listen(), Err(TransportError::NotLoopback(_))));
    }

    #[test]
    fn a_chosen_port_is_told_and_reachable() {
        let listener = "tcp:127.0.0.1:0".parse::<Url>().unwrap().listen().unwrap();
        let url = listener.url().unwrap();
        let mut near = url.connect().unwrap();
        let mut far = listener.accept().unwrap();
        near.write_all(b"x").unwrap();
        let mut byte = [0];
        far.read_exact(&mut byte).unwrap();
        assert_eq!(&byte, b"x");
    }

    #[test]
    fn a_path_in_use_is_left_alone_and_a_dead_socket_is_replaced() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("s");
        let url = Url::Unix(path.clone());
        let listener = url.listen().unwrap();
        let error = url.listen().unwrap_err().to_string();
        assert!(error.contains("in use"), "{error}");
        assert!(url.connect().is_ok(), "the first listener is unharmed");
        // Closed, its path is free for another one, which it then leaves alone.
        listener.close();
        assert!(!path.exists(), "a listener leaves no socket behind");
        let other = url.listen().unwrap();
        drop(listener);
        assert!(path.exists(), "the other one's socket");
        drop(other);
        assert!(!path.exists());
        // A socket whose process was killed.
        drop(UnixListener::bind(&path).unwrap());
        assert!(path.exists());
        drop(url.listen().unwrap());
        std::fs::write(&path, "precious").unwrap();
        url.listen().unwrap_err();
        assert_eq!(std::fs::read(&path).unwrap(), b"precious");
    }
}
