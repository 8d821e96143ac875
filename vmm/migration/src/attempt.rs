//! One migration, as the thread that runs it shares it with those that watch or cancel it.

use std::sync::Arc;

use crate::arbiter::{CommitArbiter, Decided};
use crate::progress::{OnPhase, Progress};
use crate::report::{Phase, Report};

/// One migration, from its beginning to its end. Clones share the same migration.
///
/// The thread that runs the migration passes the attempt to [`send`](crate::send) or
/// [`receive`](crate::receive), which keep its report up to date and end it on every path. Other threads read
/// [`Self::report`] and call [`Self::cancel`] meanwhile. An attempt is used once: a second try needs a new one.
#[derive(Clone, Debug)]
pub struct Attempt(Arc<Shared>);

#[derive(Debug)]
struct Shared {
    side: Side,
    progress: Progress,
    arbiter: CommitArbiter,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Side {
    Source,
    Destination,
}

/// The migration cannot be cancelled, because it has not begun, has committed or has ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("there is nothing to cancel in phase {phase}")]
pub struct TooLate {
    /// Phase of the migration.
    pub phase: Phase,
}

/// The migration is not in [`Phase::HandedOverUnconfirmed`], so there is nothing to resolve.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("there is nothing to resolve in phase {phase}")]
pub struct NotUnconfirmed {
    /// Phase of the migration.
    pub phase: Phase,
}

/// Which side has the guest of an unconfirmed hand-over.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Resolved {
    /// This side.
    Here,
    /// The other side.
    There,
}

impl Attempt {
    /// Creates the attempt of a source that connects to `peer`, in [`Phase::Connecting`].
    #[must_use]
    pub fn new(peer: impl Into<String>) -> Self {
        Self::begin(Side::Source, Phase::Connecting, peer.into())
    }

    /// Creates the attempt of a destination that waits for a source on `peer`, in [`Phase::Listening`].
    #[must_use]
    pub fn arriving(peer: impl Into<String>) -> Self {
        Self::begin(Side::Destination, Phase::Listening, peer.into())
    }

    fn begin(side: Side, phase: Phase, peer: String) -> Self {
        Self(Arc::new(Shared {
            side,
            progress: Progress::new(phase, peer),
            arbiter: CommitArbiter::default(),
        }))
    }

    /// Registers `on_phase`, which is called with the previous phase and the report at each change of the
    /// phase, on the thread that changes it, and once at once: with [`Phase::None`] and the current report.
    ///
    /// Only the first callback of an attempt counts. The callback may call the methods of this attempt.
    #[must_use]
    pub fn observed(self, on_phase: impl Fn(Phase, &Report) + Send + Sync + 'static) -> Self {
        let on_phase: OnPhase = Box::new(on_phase);
        self.0.progress.observe(on_phase);
        self
    }

    /// Sets the message of the report: for instance, why the destination's attempt before this one failed.
    #[must_use]
    pub fn with_message(self, message: impl Into<String>) -> Self {
        self.0
            .progress
            .update(|report| report.message = Some(message.into()));
        self
    }

    /// Cancels the migration. Once this has returned `Ok` the migration will not commit, and the engine stops
    /// at the next opportunity: also if it waits for the peer. Cancelling twice is allowed.
    ///
    /// # Errors
    /// Returns [`TooLate`] if the migration has not begun, has committed or has ended.
    pub fn cancel(&self) -> Result<(), TooLate> {
        let phase = self.0.progress.phase();
        if !phase.is_active() {
            return Err(TooLate { phase });
        }
        self.0.arbiter.cancel().map_err(|_| {
            // The engine enters the phase a moment after it has committed.
            let phase = match self.0.progress.phase() {
                active if active.is_active() => Phase::Committed,
                ended => ended,
            };
            TooLate { phase }
        })
    }

    /// Returns true once [`Self::cancel`] has succeeded.
    #[must_use]
    pub fn is_cancelled(&self) -> bool {
        self.0.arbiter.decided() == Decided::Cancelled
    }

    /// Returns true once the migration cannot be cancelled any more, because COMMIT was sent or received.
    #[must_use]
    pub fn is_committed(&self) -> bool {
        self.0.arbiter.decided() == Decided::Committed
    }

    /// Returns the figures of the migration as they are now.
    #[must_use]
    pub fn report(&self) -> Report {
        self.0.progress.report()
    }

    /// Ends an attempt that never reached [`send`](crate::send) or [`receive`](crate::receive), because no
    /// stream could be had. Ends it in [`Phase::Cancelled`] if it was cancelled, otherwise in
    /// [`Phase::Failed`] with the message `why`. Does nothing if the attempt has begun or ended.
    pub fn fail(&self, why: impl Into<String>) {
        let (phase, message) = match self.is_cancelled() {
            true => (Phase::Cancelled, "cancelled".into()),
            false => (Phase::Failed, why.into()),
        };
        let waiting = [Phase::Connecting, Phase::Listening];
        // In any other phase the engine ends the attempt, or has ended it.
        let _begun = self.0.progress.end_from(&waiting, phase, message);
    }

    /// Ends an unconfirmed hand-over, after somebody has found out which side has the guest. Of several
    /// callers only one succeeds.
    ///
    /// The attempt ends in [`Phase::Completed`] if the destination has the guest and in [`Phase::Failed`] if
    /// the source has it. The engine does nothing else: to let the guest go on at the source, call
    /// [`SourceGuest::stop_log`](crate::SourceGuest::stop_log) and
    /// [`SourceGuest::resume`](crate::SourceGuest::resume).
    ///
    /// # Errors
    /// Returns [`NotUnconfirmed`] if the migration is not in [`Phase::HandedOverUnconfirmed`] (any more).
    pub fn resolve(
        &self,
        resolved: Resolved,
        message: impl Into<String>,
    ) -> Result<(), NotUnconfirmed> {
        let phase = match (self.0.side, resolved) {
            (Side::Source, Resolved::Here) | (Side::Destination, Resolved::There) => Phase::Failed,
            (Side::Source, Resolved::There) | (Side::Destination, Resolved::Here) => {
                Phase::Completed
            }
        };
        self.0
            .progress
            .end_from(&[Phase::HandedOverUnconfirmed], phase, message.into())
            .map_err(|phase| NotUnconfirmed { phase })
    }

    /// Claims the attempt for `send`.
    pub(crate) fn begin_sending(&self) -> Result<(), Phase> {
        match self.0.side {
            Side::Source => self.0.progress.advance(Phase::Connecting, Phase::Agreeing),
            Side::Destination => Err(self.0.progress.phase()),
        }
    }

    /// Claims the attempt for `receive`.
    pub(crate) fn begin_receiving(&self) -> Result<(), Phase> {
        self.0.progress.advance(Phase::Listening, Phase::Agreeing)
    }

    pub(crate) fn progress(&self) -> &Progress {
        &self.0.progress
    }

    pub(crate) fn arbiter(&self) -> &CommitArbiter {
        &self.0.arbiter
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Mutex;

    use super::*;

    #[test]
    fn an_attempt_is_used_once() {
        let attempt = Attempt::new("unix:/a");
        attempt.begin_sending().unwrap();
        assert_eq!(attempt.begin_sending(), Err(Phase::Agreeing));
        attempt.cancel().unwrap();
        attempt.progress().end(Phase::Failed, Some("no".into()));
        assert_eq!(attempt.report().message.as_deref(), Some("no"));
        assert_eq!(attempt.begin_sending(), Err(Phase::Failed));
        let next = Attempt::new("unix:/b");
        assert!(!next.is_cancelled(), "a cancel is for one attempt");
        next.progress().end(Phase::HandedOverUnconfirmed, None);
        assert_eq!(next.begin_sending(), Err(Phase::HandedOverUnconfirmed));
        let arriving = Attempt::arriving("unix:/c");
        assert_eq!(arriving.begin_sending(), Err(Phase::Listening));
        arriving.begin_receiving().unwrap();
        assert_eq!(arriving.report().phase, Phase::Agreeing);
    }

    #[test]
    fn a_migration_is_cancelled_or_committed_and_never_both() {
        let attempt = Attempt::arriving("unix:/a");
        let phase = Phase::Listening;
        assert_eq!(attempt.cancel(), Err(TooLate { phase }));
        let attempt = Attempt::new("unix:/a");
        attempt.cancel().unwrap();
        attempt.cancel().unwrap();
        assert!(attempt.is_cancelled() && !attempt.is_committed());
        assert!(!attempt.arbiter().commit());
        let attempt = Attempt::new("unix:/a");
        assert!(attempt.arbiter().commit());
        let phase = Phase::Committed;
        assert_eq!(attempt.cancel(), Err(TooLate { phase }));
        assert!(attempt.is_committed() && !attempt.is_cancelled());
        attempt.progress().end(Phase::Completed, None);
        let phase = Phase::Completed;
        assert_eq!(attempt.cancel(), Err(TooLate { phase }));
    }

    #[test]
    fn an_unconfirmed_hand_over_is_resolved_once() {
        let attempt = Attempt::new("unix:/a");
        let phase = Phase::Connecting;
        assert_eq!(
            attempt.resolve(Resolved::Here, "here"),
            Err(NotUnconfirmed { phase })
        );
        attempt.progress().end(Phase::HandedOverUnconfirmed, None);
        attempt.resolve(Resolved::Here, "here").unwrap();
        let phase = Phase::Failed;
        assert_eq!(
            attempt.resolve(Resolved::There, "there"),
            Err(NotUnconfirmed { phase })
        );
        assert_eq!(attempt.report().message.as_deref(), Some("here"));
        for (resolved, phase) in [
            (Resolved::Here, Phase::Completed),
            (Resolved::There, Phase::Failed),
        ] {
            let attempt = Attempt::arriving("unix:/a");
            attempt.progress().end(Phase::HandedOverUnconfirmed, None);
            attempt.resolve(resolved, "said so").unwrap();
            assert_eq!(attempt.report().phase, phase);
        }
    }

    #[test]
    fn an_attempt_without_a_stream_fails_or_is_cancelled() {
        let attempt = Attempt::new("unix:/a");
        attempt.fail("nobody listens");
        attempt.fail("a second reason");
        let report = attempt.report();
        assert_eq!(report.phase, Phase::Failed);
        assert_eq!(report.message.as_deref(), Some("nobody listens"));
        let attempt = Attempt::new("unix:/a");
        attempt.cancel().unwrap();
        attempt.fail("nobody listens");
        assert_eq!(attempt.report().phase, Phase::Cancelled);
    }

    #[test]
    fn the_callback_sees_every_phase_and_may_read_the_report() {
        let seen = Arc::new(Mutex::new(Vec::new()));
        let attempt = Attempt::new("unix:/a");
        let reader = attempt.clone();
        let attempt = attempt.observed({
            let seen = Arc::clone(&seen);
            move |before, report| {
                assert_eq!(reader.report().phase, report.phase);
                seen.lock().unwrap().push((before, report.phase));
            }
        });
        attempt.begin_sending().unwrap();
        attempt.progress().end(Phase::Failed, None);
        assert_eq!(
            *seen.lock().unwrap(),
            [
                (Phase::None, Phase::Connecting),
                (Phase::Connecting, Phase::Agreeing),
                (Phase::Agreeing, Phase::Failed),
            ]
        );
    }

    #[test]
    fn a_callback_that_panics_changes_nothing() {
        let attempt = Attempt::new("unix:/a").observed(|_, report| {
            assert_eq!(report.phase, Phase::Connecting, "injected");
        });
        attempt.begin_sending().unwrap();
        attempt.progress().end(Phase::Completed, None);
        assert_eq!(attempt.report().phase, Phase::Completed);
    }
}
