//! What can go wrong with a back end.

use std::io::{self, ErrorKind};
use std::path::PathBuf;
use std::time::Duration;

/// Why a vhost-user back end cannot be used, or not any more. Each names the back end by its socket.
#[derive(Debug, thiserror::Error)]
pub enum VhostUserError {
    /// Guest memory that no other process can map.
    #[error(
        "{}: guest memory is private to this process, and a vhost-user back end has to map it: leave it shared",
        .socket.display()
    )]
    NotShared {
        /// Its socket.
        socket: PathBuf,
    },
    /// There is no way to it.
    #[error("{}: {source}{}", .socket.display(), connect_hint(.source))]
    Connect {
        /// Its socket.
        socket: PathBuf,
        /// What the kernel said.
        source: io::Error,
    },
    /// A part of its connection or log that the kernel will not give.
    #[error("{}: {what}: {source}", .socket.display())]
    Host {
        /// Its socket.
        socket: PathBuf,
        /// What was tried.
        what: &'static str,
        /// What the kernel said.
        source: io::Error,
    },
    /// It ended, or the connection did.
    #[error("{}: the back end closed the connection ({doing})", .socket.display())]
    Closed {
        /// Its socket.
        socket: PathBuf,
        /// What was being done.
        doing: &'static str,
    },
    /// It does not answer.
    #[error("{}: no answer within {} s ({doing}); is it a vhost-user back end, and does it serve nobody else?", .socket.display(), .limit.as_secs())]
    Silent {
        /// Its socket.
        socket: PathBuf,
        /// What was being done.
        doing: &'static str,
        /// How long it had.
        limit: Duration,
    },
    /// It said no.
    #[error("{}: the back end refused ({doing})", .socket.display())]
    Refused {
        /// Its socket.
        socket: PathBuf,
        /// What was being done.
        doing: &'static str,
    },
    /// Its answer is none of vhost-user's.
    #[error("{}: the answer makes no sense ({doing}): {what}; is it a vhost-user back end?", .socket.display())]
    Nonsense {
        /// Its socket.
        socket: PathBuf,
        /// What was being done.
        doing: &'static str,
        /// What is wrong with it.
        what: String,
    },
    /// It is a back end, but not one that can be used here.
    #[error("{}: the back end lacks {what}", .socket.display())]
    Lacks {
        /// Its socket.
        socket: PathBuf,
        /// What it lacks.
        what: &'static str,
    },
    /// It is another back end than the one that the guest began with.
    #[error("{}: the back end there is another one by now: {what}", .socket.display())]
    Changed {
        /// Its socket.
        socket: PathBuf,
        /// What is different.
        what: String,
    },
    /// It did not end what it had begun.
    #[error("{}: requests are still in flight after {} s", .socket.display(), .limit.as_secs())]
    Busy {
        /// Its socket.
        socket: PathBuf,
        /// How long it had.
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
    /// It is gone.
    #[error("the back end is gone: {0}")]
    Gone(String),
}

fn connect_hint(error: &io::Error) -> &'static str {
    match error.kind() {
        ErrorKind::NotFound | ErrorKind::ConnectionRefused => {
            "; start the vhost-user back end first"
        }
        ErrorKind::WouldBlock => "; it accepts no connection; does it serve somebody else?",
        _ => "",
    }
}
