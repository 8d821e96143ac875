//! How long a side waits for the other one.

use std::time::Duration;

/// Limits on waiting for the other side. They hold for every stream, whatever it is made of.
///
/// A limit holds for a whole message or a whole phase, never for a single read, so that a peer that sends one byte
/// now and then gains nothing. When one passes, the engine ends the half of the stream that it waits for, and
/// the error says what was due and for how long.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Deadlines {
    /// Time for one message: from the moment in which this side begins to wait for it, or to send it, until its
    /// last byte. Noticed up to a sixteenth, at most a quarter of a second, later. 8 seconds.
    ///
    /// A side that works longer without a word counts as dead. The destination says that it is alive while it prepares,
    /// computes a digest or restores. The methods of a [`SourceGuest`](crate::SourceGuest), and
    /// [`DestinationGuest::resume`](crate::DestinationGuest::resume), must return within the other side's limit.
    pub message: Duration,
    /// Time for the whole of [`Phase::Agreeing`](crate::Phase::Agreeing), however often the other side says
    /// that it is still at work. 60 seconds: enough to allocate and clear huge pages for a large guest.
    pub agreeing: Duration,
    /// Time for which a paused guest waits until the destination is ready to run it, however often that says
    /// that it is still at work. If digests are compared, the engine adds four times their estimated duration.
    /// 20 seconds.
    pub ready: Duration,
}

impl Default for Deadlines {
    fn default() -> Self {
        Self {
            message: Duration::from_secs(8),
            agreeing: Duration::from_secs(60),
            ready: Duration::from_secs(20),
        }
    }
}

/// Formats a limit for a message.
pub(crate) fn text(limit: Duration) -> String {
    match (limit.as_secs(), limit.subsec_millis()) {
        (seconds, 0) => format!("{seconds} s"),
        _ => format!("{} ms", limit.as_millis()),
    }
}
