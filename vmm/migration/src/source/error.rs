//! Why a guest was not handed over.

use crate::digest::Digest;
use crate::guest::GuestError;
use crate::pages::{MemoryAccess, SendPagesError};
use crate::replies::ReplyError;
use crate::report::Phase;
use crate::wire::WireError;

/// Why a guest was not handed over. It goes on at the source as before, except in the cases for which
/// [`SendError::is_in_doubt`] returns true and in [`SendError::Twice`].
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum SendError {
    /// The destination refused the guest, for this reason.
    #[error("the destination refused: {0}")]
    Refused(String),
    /// The stream failed, a deadline passed, or the destination sent something invalid.
    #[error("the connection failed: {0}")]
    Wire(#[from] WireError),
    /// The stream could not be split, or a thread for it could not be started.
    #[error("preparing the connection: {0}")]
    Stream(#[source] std::io::Error),
    /// A method of the guest returned an error.
    #[error("{doing}: {source}")]
    Guest {
        /// What the method was to do.
        doing: &'static str,
        /// Error of the method.
        source: GuestError,
    },
    /// Guest memory could not be read.
    #[error(transparent)]
    Memory(#[from] MemoryAccess),
    /// The tracker has no room for one more consumer.
    #[error("dirty tracking: {0}")]
    Epoch(#[from] ept::EpochError),
    /// The host has no memory to record which pages are dirty.
    #[error("dirty tracking: {0}")]
    Harvest(#[from] ept::HarvestError),
    /// The migration was cancelled.
    #[error("cancelled")]
    Cancelled,
    /// The rounds did not converge in time.
    #[error("gave up: {0}")]
    GaveUp(String),
    /// Source and destination hold different memory.
    #[error("the digests of memory differ: {source_digest} here, {destination_digest} there")]
    DigestsDiffer {
        /// Digest at the source.
        source_digest: Digest,
        /// Digest at the destination.
        destination_digest: Digest,
    },
    /// The attempt was used before, or is one of a destination. The guest was not touched.
    #[error("the attempt is in phase {0}: a new migration needs a new attempt")]
    AttemptUsed(Phase),
    /// The engine, a method of the guest, or the stream panicked before COMMIT.
    #[error("a panic in phase {phase}: {message}")]
    Panicked {
        /// Phase of the migration.
        phase: Phase,
        /// Message of the panic.
        message: String,
    },
    /// The migration failed, and then the guest could not be put back as it was.
    #[error("{first}; and after that: {second}")]
    Twice {
        /// Why the migration failed.
        first: Box<SendError>,
        /// Why the guest was not put back.
        second: Box<SendError>,
    },
    /// COMMIT was sent and its confirmation was lost: the destination may run the guest, so it stays paused at
    /// the source.
    #[error(
        "COMMIT was sent and its confirmation was lost ({0}): the guest may run at the destination, and stays \
         paused here"
    )]
    Unconfirmed(String),
}

impl SendError {
    /// Returns true if the destination may have the guest: it stays paused at the source until
    /// [`Attempt::resolve`](crate::Attempt::resolve).
    #[must_use]
    pub fn is_in_doubt(&self) -> bool {
        matches!(self, Self::Unconfirmed(_))
    }
}

impl From<SendPagesError> for SendError {
    fn from(error: SendPagesError) -> Self {
        match error {
            SendPagesError::Wire(error) => Self::Wire(error),
            SendPagesError::Memory(error) => Self::Memory(error),
        }
    }
}

impl From<ReplyError> for SendError {
    fn from(error: ReplyError) -> Self {
        match error {
            ReplyError::Refused(reason) => Self::Refused(reason),
            ReplyError::Wire(error) => Self::Wire(error),
        }
    }
}
