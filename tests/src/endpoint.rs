//! Addresses of migrations as a user types them: `unix:PATH` and `tcp:HOST:PORT`.

use std::fmt;
use std::io::{self, Read, Write};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::PathBuf;
use std::time::{Duration, Instant};

/// Address at which a destination receives a migration.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Endpoint {
    /// A Unix socket.
    Unix(PathBuf),
    /// A TCP address.
    Tcp(SocketAddr),
}

impl Endpoint {
    /// Returns a TCP port on the loopback interface that was free a moment ago.
    ///
    /// # Errors
    /// Returns the error of the operating system if there is no free port.
    pub fn free_tcp() -> io::Result<Self> {
        TcpListener::bind("127.0.0.1:0")?
            .local_addr()
            .map(Self::Tcp)
    }

    /// Connects to the endpoint.
    ///
    /// # Errors
    /// Returns the error of the operating system.
    pub fn connect(&self) -> io::Result<Stream> {
        Ok(match self {
            Self::Unix(path) => Stream::Unix(UnixStream::connect(path)?),
            Self::Tcp(address) => {
                let stream = TcpStream::connect(address)?;
                stream.set_nodelay(true)?;
                Stream::Tcp(stream)
            }
        })
    }

    /// Listens on the endpoint.
    ///
    /// # Errors
    /// Returns the error of the operating system.
    pub fn listen(&self) -> io::Result<Listener> {
        Ok(match self {
            Self::Unix(path) => Listener::Unix(UnixListener::bind(path)?),
            Self::Tcp(address) => Listener::Tcp(TcpListener::bind(address)?),
        })
    }

    /// Waits until a process listens on the endpoint. Does not connect.
    pub fn wait_listening(&self, limit: Duration) -> bool {
        let deadline = Instant::now() + limit;
        while !self.is_listening() {
            if Instant::now() >= deadline {
                return false;
            }
            std::thread::sleep(Duration::from_millis(1));
        }
        true
    }

    /// Reads the socket tables in `/proc/net`. `ferry receive` would take a test connection for a migration.
    fn is_listening(&self) -> bool {
        match self {
            Self::Unix(path) => {
                let path = path.display().to_string();
                lines("/proc/net/unix").any(|line| {
                    // Bit 16 of the flags is set for a listening socket (__SO_ACCEPTCON).
                    line.ends_with(&path) && line.split_whitespace().nth(3) == Some("00010000")
                })
            }
            Self::Tcp(address) => {
                let port = format!(":{:04X}", address.port());
                ["/proc/net/tcp", "/proc/net/tcp6"]
                    .into_iter()
                    .flat_map(lines)
                    .any(|line| {
                        let mut fields = line.split_whitespace().skip(1);
                        let local = fields.next().is_some_and(|field| field.ends_with(&port));
                        local && fields.nth(1) == Some("0A")
                    })
            }
        }
    }
}

fn lines(path: &str) -> impl Iterator<Item = String> {
    let text = std::fs::read_to_string(path).unwrap_or_default();
    text.lines()
        .map(str::to_owned)
        .collect::<Vec<_>>()
        .into_iter()
}

impl fmt::Display for Endpoint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Unix(path) => write!(f, "unix:{}", path.display()),
            Self::Tcp(address) => write!(f, "tcp:{address}"),
        }
    }
}

/// Listening socket, Unix or TCP.
#[derive(Debug)]
pub enum Listener {
    /// A Unix socket.
    Unix(UnixListener),
    /// A TCP socket.
    Tcp(TcpListener),
}

impl Listener {
    /// Accepts the next connection.
    ///
    /// # Errors
    /// Returns the error of the operating system.
    pub fn accept(&self) -> io::Result<Stream> {
        Ok(match self {
            Self::Unix(listener) => Stream::Unix(listener.accept()?.0),
            Self::Tcp(listener) => {
                let stream = listener.accept()?.0;
                stream.set_nodelay(true)?;
                Stream::Tcp(stream)
            }
        })
    }

    /// Returns the address of the socket. If port 0 was asked for, it has the port that was assigned.
    ///
    /// # Errors
    /// Returns the error of the operating system, or an error if a Unix socket has no name.
    pub fn endpoint(&self) -> io::Result<Endpoint> {
        match self {
            Self::Tcp(listener) => listener.local_addr().map(Endpoint::Tcp),
            Self::Unix(listener) => {
                let address = listener.local_addr()?;
                let path = address
                    .as_pathname()
                    .ok_or(io::ErrorKind::AddrNotAvailable)?;
                Ok(Endpoint::Unix(path.to_owned()))
            }
        }
    }
}

/// Connected socket, Unix or TCP.
#[derive(Debug)]
pub enum Stream {
    /// A Unix socket.
    Unix(UnixStream),
    /// A TCP socket.
    Tcp(TcpStream),
}

impl Stream {
    /// Returns a second handle to the same connection.
    ///
    /// # Errors
    /// Returns the error of the operating system.
    pub fn try_clone(&self) -> io::Result<Self> {
        Ok(match self {
            Self::Unix(stream) => Self::Unix(stream.try_clone()?),
            Self::Tcp(stream) => Self::Tcp(stream.try_clone()?),
        })
    }

    /// Shuts down one or both directions.
    pub fn shutdown(&self, how: Shutdown) {
        // Fails only if the peer has closed the connection already.
        let _ = match self {
            Self::Unix(stream) => stream.shutdown(how),
            Self::Tcp(stream) => stream.shutdown(how),
        };
    }

    /// Makes reads fail if no data arrives for `limit`.
    ///
    /// # Errors
    /// Returns the error of the operating system.
    pub fn set_read_timeout(&self, limit: Option<Duration>) -> io::Result<()> {
        match self {
            Self::Unix(stream) => stream.set_read_timeout(limit),
            Self::Tcp(stream) => stream.set_read_timeout(limit),
        }
    }
}

impl Read for Stream {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        match self {
            Self::Unix(stream) => stream.read(buffer),
            Self::Tcp(stream) => stream.read(buffer),
        }
    }
}

impl Write for Stream {
    fn write(&mut self, buffer: &[u8]) -> io::Result<usize> {
        match self {
            Self::Unix(stream) => stream.write(buffer),
            Self::Tcp(stream) => stream.write(buffer),
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
    fn a_listener_is_seen_without_connecting() {
        let folder = tempfile::tempdir().unwrap();
        let ends = [
            Endpoint::Unix(folder.path().join("s")),
            Endpoint::free_tcp().unwrap(),
        ];
        for end in ends {
            assert!(
                !end.wait_listening(Duration::from_millis(5)),
                "{end} before"
            );
            let listener = end.listen().unwrap();
            assert!(
                end.wait_listening(Duration::from_secs(5)),
                "{end} listening"
            );
            drop(listener);
            assert!(!end.wait_listening(Duration::from_millis(5)), "{end} after");
        }
    }

    #[test]
    fn it_reads_as_it_is_typed() {
        assert_eq!(Endpoint::Unix("/run/x".into()).to_string(), "unix:/run/x");
        assert_eq!(
            Endpoint::Tcp(([127, 0, 0, 1], 80).into()).to_string(),
            "tcp:127.0.0.1:80"
        );
    }
}
