//! Errors of the stream and of the frames in it.

use std::io;
use std::time::Duration;

use super::Tag;
use crate::deadlines;
use crate::report::Phase;
use crate::watchdog::Expired;

/// Failure of the stream, or of what came over it. Offsets are in bytes from the start of the stream.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum WireError {
    /// Reading or writing failed.
    #[error("{doing} at offset {offset}: {source}")]
    Io {
        /// "reading" or "writing", and what.
        doing: String,
        /// Offset of the failure.
        offset: u64,
        /// Error of the stream.
        source: io::Error,
    },
    /// The other side did not send a whole message in time.
    #[error("no {what} from the other side for {}", deadlines::text(*limit))]
    NotSent {
        /// Message that was due.
        what: String,
        /// Limit that passed.
        limit: Duration,
    },
    /// The other side did not take a whole message in time.
    #[error("the other side did not take {what} for {}", deadlines::text(*limit))]
    NotTaken {
        /// Message that was being sent.
        what: String,
        /// Limit that passed.
        limit: Duration,
    },
    /// A phase took longer than its limit, while one side waited for the other.
    #[error("phase {phase} took longer than {}, at {what}", deadlines::text(*limit))]
    PhaseTooLong {
        /// The phase.
        phase: Phase,
        /// Message that was due or being sent.
        what: String,
        /// Limit that passed.
        limit: Duration,
    },
    /// The stream ended too early.
    #[error("the stream ends in {section} at offset {offset}")]
    Truncated {
        /// What was expected there.
        section: String,
        /// Offset of the end.
        offset: u64,
    },
    /// A frame has a tag that this version does not know.
    #[error(
        "frame {sequence} at offset {offset}: unknown tag {found:#x}{}",
        if *sequence == 0 { "; is the other side a migration of the same kind?" } else { "" }
    )]
    UnknownTag {
        /// Number of the frame.
        sequence: u32,
        /// Offset of the frame.
        offset: u64,
        /// Tag of the frame.
        found: u32,
    },
    /// A frame is longer than its kind may be.
    #[error(
        "{tag} frame {sequence} at offset {offset}: {found} bytes, at most {limit} are allowed"
    )]
    TooLong {
        /// Kind of the frame.
        tag: Tag,
        /// Number of the frame.
        sequence: u32,
        /// Offset of the frame.
        offset: u64,
        /// Length of its payload.
        found: u32,
        /// Longest payload that the kind allows.
        limit: usize,
    },
    /// A frame is out of order.
    #[error("{tag} frame at offset {offset}: it is number {found}, number {required} was due")]
    Sequence {
        /// Kind of the frame.
        tag: Tag,
        /// Offset of the frame.
        offset: u64,
        /// Number of the frame.
        found: u32,
        /// Number that was due.
        required: u32,
    },
    /// A frame was changed on its way.
    #[error(
        "{tag} frame {sequence} at offset {offset}: checksum {found:#010x}, its contents have \
         {required:#010x}"
    )]
    Checksum {
        /// Kind of the frame.
        tag: Tag,
        /// Number of the frame.
        sequence: u32,
        /// Offset of the frame.
        offset: u64,
        /// Checksum in the frame.
        found: u32,
        /// Checksum of its contents.
        required: u32,
    },
    /// A frame arrived whole, but its contents are invalid.
    #[error("{tag} frame {sequence} at offset {offset}: {why}")]
    Malformed {
        /// Kind of the frame.
        tag: Tag,
        /// Number of the frame.
        sequence: u32,
        /// Offset of the frame.
        offset: u64,
        /// What is wrong.
        why: String,
    },
    /// A frame of another kind was due.
    #[error("{found} frame {sequence} at offset {offset}: {required} was due")]
    Unexpected {
        /// Kind of the frame.
        found: Tag,
        /// Number of the frame.
        sequence: u32,
        /// Offset of the frame.
        offset: u64,
        /// What was due.
        required: String,
    },
    /// The header is not that of a Ferry stream, or not one that this version reads.
    #[error("stream header: {0}")]
    Header(String),
}

impl WireError {
    /// Creates the error for a limit that passed while `what` was due from the other side.
    pub(crate) fn not_sent(what: impl Into<String>, expired: Expired) -> Self {
        let what = what.into();
        match expired {
            Expired::Message(limit) => Self::NotSent { what, limit },
            Expired::Phase(phase, limit) => Self::PhaseTooLong { phase, what, limit },
        }
    }

    /// Creates the error for a limit that passed while the other side took `what`.
    pub(super) fn not_taken(what: impl Into<String>, expired: Expired) -> Self {
        let what = what.into();
        match expired {
            Expired::Message(limit) => Self::NotTaken { what, limit },
            Expired::Phase(phase, limit) => Self::PhaseTooLong { phase, what, limit },
        }
    }
}
