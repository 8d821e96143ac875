//! The migration in progress, or the last one: what is reported of it, and whether the guest has followed.

use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};

use migration::{Attempt, Report};

/// One migration of a monitor. Clones are the same.
#[derive(Clone)]
pub(super) struct MigrationRecord {
    pub(super) attempt: Attempt,
    settled: Arc<(Mutex<Settled>, Condvar)>,
}

/// Whether the guest is in the state that follows from the migration.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Settled {
    /// Nothing has begun that would have to be followed, or the guest has followed.
    Yes,
    /// A worker owns the guest.
    NotYet,
}

impl MigrationRecord {
    /// Records an attempt that no worker has begun yet.
    pub(super) fn new(attempt: Attempt) -> Self {
        Self {
            attempt,
            settled: Arc::new((Mutex::new(Settled::Yes), Condvar::new())),
        }
    }

    /// Returns the report. If it reports the end of the migration, the guest is in the state that follows from it: the
    /// call waits for the moment between the end of the engine and that state.
    pub(super) fn report(&self) -> Report {
        let report = self.attempt.report();
        if report.phase.is_active() {
            return report;
        }
        let settled = self
            .settled
            .1
            .wait_while(self.lock(), |settled| *settled == Settled::NotYet);
        drop(settled);
        self.attempt.report()
    }

    /// A worker owns the guest, until the guard is dropped.
    pub(super) fn begin(&self) -> WorkerGuard {
        *self.lock() = Settled::NotYet;
        WorkerGuard(self.clone())
    }

    fn lock(&self) -> MutexGuard<'_, Settled> {
        self.settled
            .0
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }
}

impl WorkerGuard {
    /// Returns the attempt that the worker makes.
    pub(super) fn attempt(&self) -> &Attempt {
        &self.0.attempt
    }
}

/// Marks a migration as settled when the worker drops it, also by a panic.
pub(super) struct WorkerGuard(MigrationRecord);

impl Drop for WorkerGuard {
    fn drop(&mut self) {
        *self.0.lock() = Settled::Yes;
        self.0.settled.1.notify_all();
    }
}
