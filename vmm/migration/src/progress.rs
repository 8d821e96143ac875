//! What a migration is doing, for whoever asks while it runs.

use std::fmt;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use serde::{Deserialize, Serialize};

use super::transport::Connection;

/// Where a migration is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Phase {
    /// There is none.
    #[default]
    None,
    /// A destination waits for a source.
    Listening,
    /// Connecting to the destination.
    Connecting,
    /// The destination looks at what would come.
    Agreeing,
    /// Memory is sent while the guest runs.
    Rounds,
    /// The guest is stopped; the rest is sent.
    Switchover,
    /// COMMIT was sent; its confirmation has not come yet.
    Committed,
    /// The other side runs the guest.
    Completed,
    /// The guest runs here as before.
    Failed,
    /// The user stopped it; the guest runs here as before.
    Cancelled,
    /// COMMIT was sent and its confirmation was lost: the guest is stopped here until somebody says
    /// whether it runs there.
    HandedOverUnconfirmed,
}

impl Phase {
    /// True while the engine is at work.
    #[must_use]
    pub fn is_active(self) -> bool {
        matches!(
            self,
            Self::Connecting | Self::Agreeing | Self::Rounds | Self::Switchover | Self::Committed
        )
    }
}

/// One pass over memory. The last is sent while the guest is stopped.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Round {
    /// Pages that were dirty.
    pub pages: u64,
    /// Of these, pages of nothing but zeros.
    pub zero_pages: u64,
    /// Bytes on the wire.
    pub bytes: u64,
    /// How long it took, until the destination had it all.
    pub ms: f64,
    /// Bytes a second that the guest dirtied meanwhile, as the next harvest showed.
    pub dirty_bytes_per_s: f64,
}

/// What is known of a migration. Times are in milliseconds since it began, unless said otherwise.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Snapshot {
    /// Where it is.
    pub phase: Phase,
    /// The address of the other side, or the one that a destination listens on.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub url: Option<String>,
    /// Why it failed, or what the user should know early.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub message: Option<String>,
    /// The rounds so far.
    pub rounds: Vec<Round>,
    /// Pages that the round at work is to send, and has sent.
    pub round_pages: u64,
    /// See `round_pages`.
    pub round_pages_sent: u64,
    /// How much of the time the vCPUs are held so that the rounds converge, in percent.
    #[serde(default)]
    pub throttle_percent: u32,
    /// Bytes on the wire so far.
    pub bytes_sent: u64,
    /// From the beginning to now, or to the end.
    pub total_ms: f64,
    /// How long the guest was stopped; what of it the stop of the vCPUs took, and the digest.
    pub downtime_ms: f64,
    /// See `downtime_ms`.
    pub pause_ms: f64,
    /// See `downtime_ms`.
    pub digest_ms: f64,
    /// The digest of memory at the switchover, if it was asked for; equal on both sides, or the guest
    /// was not handed over.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub digest: Option<String>,
    /// Bytes of guest memory.
    pub memory_bytes: u64,
}

/// A migration's progress: the engine writes, anybody reads.
#[derive(Debug, Default)]
pub struct Progress {
    state: Mutex<State>,
    observer: Observer,
}

/// Told of each change of the phase: the phase before, and what is known now. It must not ask the progress.
pub type OnPhase = Box<dyn Fn(Phase, &Snapshot) + Send + Sync>;

#[derive(Default)]
struct Observer(Option<OnPhase>);

impl fmt::Debug for Observer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Observer").finish_non_exhaustive()
    }
}

#[derive(Debug, Default)]
struct State {
    snapshot: Snapshot,
    began: Option<Instant>,
    cancelled: bool,
    /// Ended by a cancellation: whoever waits for the other side is woken.
    connection: Option<Connection>,
}

impl Progress {
    /// Nothing is going on.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// As [`Self::new`]; `on_phase` is told of each change of the phase.
    #[must_use]
    pub fn observed(on_phase: OnPhase) -> Self {
        Self {
            observer: Observer(Some(on_phase)),
            ..Self::default()
        }
    }

    /// What is known now.
    #[must_use]
    pub fn snapshot(&self) -> Snapshot {
        let state = self.lock();
        let mut snapshot = state.snapshot.clone();
        if let Some(began) = state.began.filter(|_| snapshot.phase.is_active()) {
            snapshot.total_ms = began.elapsed().as_secs_f64() * 1e3;
        }
        snapshot
    }

    /// Stops the migration at the next opportunity: once this has returned well, it will not commit.
    ///
    /// # Errors
    /// The phase, if there is nothing to cancel in it (any more).
    pub fn cancel(&self) -> Result<(), Phase> {
        let mut state = self.lock();
        let now = state.snapshot.phase;
        if !now.is_active() || now == Phase::Committed {
            return Err(now);
        }
        state.cancelled = true;
        if let Some(connection) = &state.connection {
            // It may have ended already.
            let _ended = connection.shut_down();
        }
        Ok(())
    }

    /// Begins a migration: claims the progress, unless one is at work or unresolved.
    ///
    /// # Errors
    /// The phase of the one that is in the way.
    pub fn begin(&self, phase: Phase, url: String) -> Result<(), Phase> {
        let mut state = self.lock();
        let now = state.snapshot.phase;
        if now.is_active() || now == Phase::HandedOverUnconfirmed {
            return Err(now);
        }
        *state = State {
            snapshot: Snapshot {
                phase,
                url: Some(url),
                ..Snapshot::default()
            },
            began: Some(Instant::now()),
            ..State::default()
        };
        self.tell(now, &state);
        Ok(())
    }

    /// A destination waits at `url`; what the attempt before came to stays to be read until the next one.
    pub fn listen(&self, url: String) {
        let mut state = self.lock();
        let before = state.snapshot.phase;
        *state = State {
            snapshot: Snapshot {
                phase: Phase::Listening,
                url: Some(url),
                message: state.snapshot.message.take(),
                ..Snapshot::default()
            },
            ..State::default()
        };
        self.tell(before, &state);
    }

    /// Ends a migration in `phase`, with what there is to say.
    pub fn end(&self, phase: Phase, message: Option<String>) {
        let mut state = self.lock();
        if let Some(began) = state.began.take() {
            state.snapshot.total_ms = began.elapsed().as_secs_f64() * 1e3;
        }
        state.connection = None;
        let before = std::mem::replace(&mut state.snapshot.phase, phase);
        // A warning from the rounds, or the failure before, is over once it has succeeded.
        if message.is_some() || phase == Phase::Completed {
            state.snapshot.message = message;
        }
        self.tell(before, &state);
    }

    /// Resolves an unconfirmed hand-over into `phase`; only one caller can.
    ///
    /// # Errors
    /// The phase, if the hand-over is not unconfirmed (any more).
    pub fn resolve(&self, phase: Phase, message: &str) -> Result<(), Phase> {
        let mut state = self.lock();
        match state.snapshot.phase {
            Phase::HandedOverUnconfirmed => {
                state.snapshot.phase = phase;
                state.snapshot.message = Some(message.into());
                self.tell(Phase::HandedOverUnconfirmed, &state);
                Ok(())
            }
            other => Err(other),
        }
    }

    /// The connection that a cancellation ends.
    pub(super) fn use_connection(&self, connection: Connection) {
        self.lock().connection = Some(connection);
    }

    /// The connection is no longer a cancellation's business, and not kept open by it.
    pub(super) fn drop_connection(&self) {
        self.lock().connection = None;
    }

    /// True once [`Self::cancel`] was called for this migration.
    pub(super) fn is_cancelled(&self) -> bool {
        self.lock().cancelled
    }

    /// Enters [`Phase::Committed`], unless the migration was cancelled: from here on it cannot be.
    pub(super) fn commit(&self) -> bool {
        let mut state = self.lock();
        if !state.cancelled {
            let before = std::mem::replace(&mut state.snapshot.phase, Phase::Committed);
            self.tell(before, &state);
        }
        !state.cancelled
    }

    /// Changes what is known.
    pub(super) fn update(&self, change: impl FnOnce(&mut Snapshot)) {
        let mut state = self.lock();
        let before = state.snapshot.phase;
        change(&mut state.snapshot);
        self.tell(before, &state);
    }

    fn tell(&self, before: Phase, state: &State) {
        if let Some(on_phase) = &self.observer.0
            && before != state.snapshot.phase
        {
            on_phase(before, &state.snapshot);
        }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        // The state is plain values, each valid by itself.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_migration_at_a_time_and_none_over_an_unresolved_one() {
        let progress = Progress::new();
        progress.begin(Phase::Connecting, "unix:/a".into()).unwrap();
        progress.cancel().unwrap();
        assert_eq!(
            progress.begin(Phase::Connecting, "unix:/b".into()),
            Err(Phase::Connecting)
        );
        progress.end(Phase::Failed, Some("no".into()));
        assert_eq!(progress.snapshot().message.as_deref(), Some("no"));
        progress.begin(Phase::Connecting, "unix:/b".into()).unwrap();
        assert!(
            !progress.is_cancelled(),
            "a cancellation is for one migration"
        );
        progress.end(Phase::HandedOverUnconfirmed, None);
        assert_eq!(
            progress.begin(Phase::Connecting, "unix:/c".into()),
            Err(Phase::HandedOverUnconfirmed)
        );
    }

    #[test]
    fn a_migration_is_cancelled_or_committed_and_never_both() {
        let progress = Progress::new();
        assert_eq!(progress.cancel(), Err(Phase::None));
        progress.begin(Phase::Connecting, "unix:/a".into()).unwrap();
        progress.cancel().unwrap();
        assert!(!progress.commit());
        progress.end(Phase::Cancelled, None);
        progress.begin(Phase::Connecting, "unix:/a".into()).unwrap();
        assert!(progress.commit());
        assert_eq!(progress.cancel(), Err(Phase::Committed));
    }

    #[test]
    fn an_unconfirmed_hand_over_is_resolved_once() {
        let progress = Progress::new();
        assert_eq!(progress.resolve(Phase::Failed, "here"), Err(Phase::None));
        progress.begin(Phase::Connecting, "unix:/a".into()).unwrap();
        progress.end(Phase::HandedOverUnconfirmed, None);
        progress.resolve(Phase::Failed, "here").unwrap();
        assert_eq!(
            progress.resolve(Phase::Completed, "there"),
            Err(Phase::Failed)
        );
    }
}
