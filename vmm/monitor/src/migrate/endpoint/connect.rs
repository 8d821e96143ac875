//! Connecting with a deadline and a way to cancel.

use std::io;
use std::os::fd::OwnedFd;
use std::thread;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::{Errno, ioctl_fionbio};
use rustix::net::addr::SocketAddrArg;
use rustix::net::{self, AddressFamily, SocketFlags, SocketType, sockopt};

/// Time between two questions whether the caller has given up.
const STEP: Duration = Duration::from_millis(50);

/// An address of a stream socket.
pub(super) trait StreamAddress: SocketAddrArg {
    /// Returns the family of the socket.
    fn family(&self) -> AddressFamily;
}

impl StreamAddress for rustix::net::SocketAddrUnix {
    fn family(&self) -> AddressFamily {
        AddressFamily::UNIX
    }
}

impl StreamAddress for std::net::SocketAddr {
    fn family(&self) -> AddressFamily {
        match self {
            Self::V4(_) => AddressFamily::INET,
            Self::V6(_) => AddressFamily::INET6,
        }
    }
}

/// Connects a new stream socket to `address`.
///
/// # Errors
/// Returns `TimedOut` after the deadline, `Interrupted` if `is_cancelled` returns true, and otherwise the error of
/// connect(2).
pub(super) fn connect(
    address: &impl StreamAddress,
    deadline: Instant,
    is_cancelled: &impl Fn() -> bool,
) -> io::Result<OwnedFd> {
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    let socket = net::socket_with(address.family(), SocketType::STREAM, flags, None)?;
    loop {
        match net::connect(&socket, address) {
            Ok(()) => break,
            // The backlog of a Unix socket is full (connect(2)).
            Err(Errno::AGAIN) => thread::sleep(STEP),
            Err(Errno::INPROGRESS | Errno::ALREADY) => {
                if is_writable(&socket)? {
                    sockopt::socket_error(&socket)??;
                    break;
                }
            }
            Err(error) => return Err(error.into()),
        }
        if is_cancelled() {
            return Err(io::ErrorKind::Interrupted.into());
        }
        if Instant::now() >= deadline {
            return Err(io::ErrorKind::TimedOut.into());
        }
    }
    ioctl_fionbio(&socket, false)?;
    Ok(socket)
}

/// Waits for one step until the connection is established or has failed.
fn is_writable(socket: &OwnedFd) -> io::Result<bool> {
    let mut polled = [PollFd::new(socket, PollFlags::OUT)];
    let step = Timespec {
        tv_sec: 0,
        tv_nsec: 50_000_000,
    };
    match poll(&mut polled, Some(&step)) {
        Ok(ready) => Ok(ready > 0),
        Err(Errno::INTR) => Ok(false),
        Err(error) => Err(error.into()),
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::net::{UnixListener, UnixStream};

    use rustix::net::SocketAddrUnix;

    use super::*;

    #[test]
    fn a_full_backlog_is_waited_for_until_the_deadline_or_a_cancel() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("s");
        let socket = net::socket(AddressFamily::UNIX, SocketType::STREAM, None).unwrap();
        let address = SocketAddrUnix::new(&path).unwrap();
        net::bind(&socket, &address).unwrap();
        net::listen(&socket, 0).unwrap();
        let _fills_the_backlog = UnixStream::connect(&path).unwrap();
        let soon = Instant::now() + Duration::from_millis(100);
        let late = connect(&address, soon, &|| false).unwrap_err();
        assert_eq!(late.kind(), io::ErrorKind::TimedOut);
        let far = Instant::now() + Duration::from_secs(600);
        let cancelled = connect(&address, far, &|| true).unwrap_err();
        assert_eq!(cancelled.kind(), io::ErrorKind::Interrupted);
        let listener = UnixListener::from(socket);
        drop(listener.accept().unwrap());
        connect(&address, far, &|| false).unwrap();
    }
}
