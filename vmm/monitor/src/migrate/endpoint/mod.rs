//! Addresses of a migration, `unix:PATH` and `tcp:HOST:PORT`: connecting to them and listening on them.
//!
//! Plain TCP carries all guest memory unencrypted, to and from whoever connects. It is restricted to loopback until
//! there is TLS.

mod connect;
mod connection;
mod listener;
mod socket_file;
mod url;

use std::io;
use std::path::PathBuf;

use crate::socket_path::SocketPathTooLong;

pub use connection::Connection;
pub use listener::Listener;
pub use socket_file::{SocketFile, listen_unix};
pub use url::Url;

/// Reasons why an address cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum EndpointError {
    /// The text is no address.
    #[error("{0:?} is no migration address: write unix:PATH or tcp:HOST:PORT")]
    Url(String),
    /// The address is not on loopback.
    #[error(
        "tcp:{0} is not on loopback: plain TCP would carry the guest's memory in the clear, and TLS is \
         not there yet; use a tunnel to a loopback port"
    )]
    NotLoopback(String),
    /// The path is too long for a Unix socket.
    #[error(transparent)]
    PathTooLong(#[from] SocketPathTooLong),
    /// The path to listen on is in use.
    #[error("{}: {why}", path.display())]
    Taken {
        /// Path of the socket.
        path: PathBuf,
        /// What is at the path, and what to do.
        why: &'static str,
    },
    /// A system call failed.
    #[error("{doing} {url}: {source}{}", hint(doing, .source))]
    Io {
        /// Operation, for example "connecting to".
        doing: &'static str,
        /// Address.
        url: Url,
        /// Error of the system.
        source: io::Error,
    },
}

fn hint(doing: &str, error: &io::Error) -> &'static str {
    match (doing, error.kind()) {
        (url::CONNECTING, io::ErrorKind::NotFound | io::ErrorKind::ConnectionRefused) => {
            "; is `ferry receive` waiting there?"
        }
        _ => "",
    }
}

#[cfg(test)]
mod tests {
    use std::io::{Read, Write};
    use std::os::unix::net::UnixListener;

    use super::*;
    use crate::socket_path::SOCKET_PATH_MAX;

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
        let error = Url::Unix(directory.path().join("s"))
            .connect(|| false)
            .unwrap_err();
        assert!(error.to_string().contains("ferry receive"), "{error}");
    }

    #[test]
    fn plain_tcp_stays_on_loopback() {
        let url: Url = "tcp:192.0.2.1:4000".parse().unwrap();
        assert!(matches!(
            url.connect(|| false),
            Err(EndpointError::NotLoopback(_))
        ));
        assert!(matches!(url.listen(), Err(EndpointError::NotLoopback(_))));
        let any: Url = "tcp:0.0.0.0:0".parse().unwrap();
        assert!(matches!(any.listen(), Err(EndpointError::NotLoopback(_))));
    }

    #[test]
    fn a_chosen_port_is_told_and_reachable() {
        let listener = "tcp:127.0.0.1:0".parse::<Url>().unwrap().listen().unwrap();
        let url = listener.url().unwrap();
        let (Connection::Tcp(mut near), Connection::Tcp(mut far)) =
            (url.connect(|| false).unwrap(), listener.accept().unwrap())
        else {
            panic!("a TCP address connects by TCP");
        };
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
        assert!(
            url.connect(|| false).is_ok(),
            "the first listener is unharmed"
        );
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
