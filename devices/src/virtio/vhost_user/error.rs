//! Errors of vhost-user back ends.

use std::io::{self, ErrorKind};
use std::path::PathBuf;
use std::time::Duration;

/// Reason for which a vhost-user back end cannot be used, or was lost. Every message names the back end by its socket.
#[derive(Debug, thiserror::Error)]
pub enum VhostUserError {
    /// Guest memory is private, so no other process can map it.
    #[error(
        "{}: guest memory is private to this process, but a vhost-user back end must map it (use shared guest memory)",
        .socket.display()
    )]
    NotShared {
        /// Socket of the back end.
        socket: PathBuf,
    },
    /// The connection could not be made.
    #[error("{}: {source}{}", .socket.display(), connect_hint(.source))]
    Connect {
        /// Socket of the back end.
        socket: PathBuf,
        /// Error of the kernel.
        source: io::Error,
    },
    /// The kernel refused an operation that the connection or the dirty log needs.
    #[error("{}: {what}: {source}", .socket.display())]
    Host {
        /// Socket of the back end.
        socket: PathBuf,
        /// Operation that failed.
        what: &'static str,
        /// Error of the kernel.
        source: io::Error,
    },
    /// The back end closed the connection, or its process ended.
    #[error("{}: the back end closed the connection ({doing})", .socket.display())]
    Closed {
        /// Socket of the back end.
        socket: PathBuf,
        /// Exchange during which the connection ended.
        doing: &'static str,
    },
    /// The back end did not reply in time.
    #[error("{}: no answer within {} s ({doing}; is it a vhost-user back end, and is no other front end connected to it?)", .socket.display(), .limit.as_secs())]
    Silent {
        /// Socket of the back end.
        socket: PathBuf,
        /// Exchange without a reply.
        doing: &'static str,
        /// Time limit for the reply.
        limit: Duration,
    },
    /// The back end replied with an error.
    #[error("{}: the back end refused ({doing})", .socket.display())]
    Refused {
        /// Socket of the back end.
        socket: PathBuf,
        /// Exchange that was refused.
        doing: &'static str,
    },
    /// The reply violates the vhost-user protocol.
    #[error("{}: invalid reply ({doing}): {what} (is it a vhost-user back end?)", .socket.display())]
    ProtocolViolation {
        /// Socket of the back end.
        socket: PathBuf,
        /// Exchange with the invalid reply.
        doing: &'static str,
        /// Description of the violation.
        what: String,
    },
    /// The back end lacks a feature that a disk needs.
    #[error("{}: the back end lacks {what}", .socket.display())]
    Lacks {
        /// Socket of the back end.
        socket: PathBuf,
        /// Missing feature, and what it is needed for.
        what: &'static str,
    },
    /// The back end differs from the one with which the guest was started.
    #[error("{}: the back end has changed: {what}", .socket.display())]
    Changed {
        /// Socket of the back end.
        socket: PathBuf,
        /// Description of the difference.
        what: String,
    },
    /// The back end did not complete its requests in time.
    #[error("{}: requests are still in flight after {} s", .socket.display(), .limit.as_secs())]
    Busy {
        /// Socket of the back end.
        socket: PathBuf,
        /// Time limit for the requests.
        limit: Duration,
    },
    /// The thread that supervises the connection panicked. The connection was closed, because no wait for the back end
    /// would end without that thread.
    #[error("{}: the thread that supervises the connection panicked: {message}", .socket.display())]
    WatchdogPanicked {
        /// Socket of the back end.
        socket: PathBuf,
        /// Panic message.
        message: String,
    },
    /// The back end was lost before, for this reason.
    #[error("the back end is gone: {0}")]
    Gone(String),
}

fn connect_hint(error: &io::Error) -> &'static str {
    match error.kind() {
        ErrorKind::NotFound | ErrorKind::ConnectionRefused => {
            "; start the vhost-user back end first"
        }
        ErrorKind::WouldBlock => {
            "; the back end accepts no connection (is another front end connected to it?)"
        }
        _ => "",
    }
}
