//! Decides between cancel and COMMIT: exactly one of them happens.

use std::fmt;
use std::sync::{Mutex, MutexGuard, PoisonError};

use crate::panic::caught;

/// Arbitrates between the thread that cancels a migration and the thread that commits it.
///
/// Both ask under one lock: the first wins and the other one is refused. A cancel also wakes the engine if it
/// waits for the peer.
#[derive(Default)]
pub(crate) struct CommitArbiter {
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    decision: Decided,
    /// Ends the streams of the running engine.
    wake: Option<Box<dyn FnOnce() + Send>>,
}

/// What was decided.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) enum Decided {
    /// Nothing yet.
    #[default]
    Open,
    /// The migration will not commit.
    Cancelled,
    /// The migration cannot be cancelled any more.
    Committed,
}

impl CommitArbiter {
    /// Decides for cancel and wakes the engine. Cancelling twice is allowed.
    ///
    /// # Errors
    /// Returns [`AlreadyCommitted`] if COMMIT won.
    pub(crate) fn cancel(&self) -> Result<(), AlreadyCommitted> {
        let mut state = self.lock();
        if state.decision == Decided::Committed {
            return Err(AlreadyCommitted);
        }
        state.decision = Decided::Cancelled;
        let wake = state.wake.take();
        drop(state);
        if let Some(wake) = wake {
            // A stream that panics here does not make the cancel fail: the engine sees it at the next opportunity.
            let _panicked = caught(wake);
        }
        Ok(())
    }

    /// Decides for COMMIT. Returns false if the migration was cancelled before.
    #[must_use]
    pub(crate) fn commit(&self) -> bool {
        let mut state = self.lock();
        if state.decision == Decided::Open {
            state.decision = Decided::Committed;
        }
        state.decision == Decided::Committed
    }

    /// Returns the decision as it is now.
    pub(crate) fn decided(&self) -> Decided {
        self.lock().decision
    }

    /// Registers how a cancel wakes the engine. Calls `wake` at once if the cancel came first.
    pub(crate) fn on_cancel(&self, wake: impl FnOnce() + Send + 'static) {
        let mut state = self.lock();
        if state.decision == Decided::Cancelled {
            drop(state);
            let _panicked = caught(wake);
        } else {
            state.wake = Some(Box::new(wake));
        }
    }

    /// Drops what [`Self::on_cancel`] registered, and with it the hold on the streams.
    pub(crate) fn release(&self) {
        self.lock().wake = None;
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        // Both fields are replaced as a whole, so a panic of another thread leaves nothing half-changed.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// COMMIT came before the cancel.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct AlreadyCommitted;

impl fmt::Debug for CommitArbiter {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("CommitArbiter")
            .field(&self.decided())
            .finish()
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicUsize, Ordering};
    use std::sync::{Arc, Barrier};
    use std::thread;

    use super::*;

    #[test]
    fn a_cancel_wakes_the_engine_whichever_comes_first() {
        for cancel_first in [true, false] {
            let woken = Arc::new(AtomicUsize::new(0));
            let arbiter = CommitArbiter::default();
            let wake = {
                let woken = Arc::clone(&woken);
                move || {
                    woken.fetch_add(1, Ordering::SeqCst);
                }
            };
            if cancel_first {
                arbiter.cancel().unwrap();
                arbiter.on_cancel(wake);
            } else {
                arbiter.on_cancel(wake);
                arbiter.cancel().unwrap();
            }
            assert!(!arbiter.commit());
            assert_eq!(woken.load(Ordering::SeqCst), 1);
        }
    }

    #[test]
    fn of_a_cancel_and_a_commit_at_once_exactly_one_wins() {
        for _ in 0..200 {
            let arbiter = Arc::new(CommitArbiter::default());
            let start = Arc::new(Barrier::new(2));
            let canceller = {
                let (arbiter, start) = (Arc::clone(&arbiter), Arc::clone(&start));
                thread::spawn(move || {
                    start.wait();
                    arbiter.cancel().is_ok()
                })
            };
            start.wait();
            let committed = arbiter.commit();
            assert_ne!(canceller.join().unwrap(), committed);
        }
    }
}
