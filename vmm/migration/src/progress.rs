//! How far a migration is: written by the engine, read by [`Attempt::report`](crate::Attempt::report).

use std::fmt;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::Instant;

use crate::report::{Phase, Report};

/// Callback for phase changes. It gets the previous phase and the report after the change.
pub(crate) type OnPhase = Box<dyn Fn(Phase, &Report) + Send + Sync>;

/// Phase and figures of one migration.
pub(crate) struct Progress {
    state: Mutex<State>,
    on_phase: OnceLock<OnPhase>,
}

struct State {
    report: Report,
    began: Option<Instant>,
}

impl Progress {
    /// Creates the progress of a migration with `peer` that is in `phase`.
    pub(crate) fn new(phase: Phase, peer: String) -> Self {
        let report = Report {
            phase,
            url: Some(peer),
            ..Report::default()
        };
        let began = phase.is_active().then(Instant::now);
        Self {
            state: Mutex::new(State { report, began }),
            on_phase: OnceLock::new(),
        }
    }

    /// Registers the callback for phase changes and calls it for the current phase.
    pub(crate) fn observe(&self, on_phase: OnPhase) {
        // Only the first callback counts; see `Attempt::observed`.
        if self.on_phase.set(on_phase).is_ok() {
            self.tell(Phase::None, &self.report());
        }
    }

    /// Returns the figures as they are now.
    pub(crate) fn report(&self) -> Report {
        let state = self.lock();
        let mut report = state.report.clone();
        if let Some(began) = state.began {
            report.total_ms = began.elapsed().as_secs_f64() * 1e3;
        }
        report
    }

    /// Returns the current phase.
    pub(crate) fn phase(&self) -> Phase {
        self.lock().report.phase
    }

    /// Goes on from phase `from` to phase `to`.
    ///
    /// # Errors
    /// Returns the current phase if it is not `from`.
    pub(crate) fn advance(&self, from: Phase, to: Phase) -> Result<(), Phase> {
        self.change(|state| match state.report.phase {
            phase if phase == from => {
                state.report.phase = to;
                state.began.get_or_insert_with(Instant::now);
                Ok(())
            }
            other => Err(other),
        })
    }

    /// Enters `phase`.
    pub(crate) fn enter(&self, phase: Phase) {
        self.change(|state| state.report.phase = phase);
    }

    /// Changes figures. Does not change the phase, and so does not call the callback.
    pub(crate) fn update(&self, change: impl FnOnce(&mut Report)) {
        change(&mut self.lock().report);
    }

    /// Ends the migration in `phase`. A `message` replaces the message of the report; success removes it.
    pub(crate) fn end(&self, phase: Phase, message: Option<String>) {
        self.change(|state| {
            if let Some(began) = state.began.take() {
                state.report.total_ms = began.elapsed().as_secs_f64() * 1e3;
            }
            state.report.phase = phase;
            if message.is_some() || phase == Phase::Completed {
                state.report.message = message;
            }
        });
    }

    /// Ends a migration that is in one of the phases `from`.
    ///
    /// # Errors
    /// Returns the current phase if it is not among `from`.
    pub(crate) fn end_from(
        &self,
        from: &[Phase],
        phase: Phase,
        message: String,
    ) -> Result<(), Phase> {
        self.change(|state| match state.report.phase {
            current if from.contains(&current) => {
                if let Some(began) = state.began.take() {
                    state.report.total_ms = began.elapsed().as_secs_f64() * 1e3;
                }
                state.report.phase = phase;
                state.report.message = Some(message);
                Ok(())
            }
            other => Err(other),
        })
    }

    /// Applies `change` and calls the callback if the phase is another one afterwards.
    fn change<T>(&self, change: impl FnOnce(&mut State) -> T) -> T {
        let mut state = self.lock();
        let before = state.report.phase;
        let answer = change(&mut state);
        if state.report.phase != before {
            let report = state.report.clone();
            // Without the lock, so that the callback may read the report.
            drop(state);
            self.tell(before, &report);
        }
        answer
    }

    fn tell(&self, before: Phase, report: &Report) {
        if let Some(on_phase) = self.on_phase.get() {
            // A callback that panics must not change what becomes of the guest. The panic hook reports it.
            let _panicked = catch_unwind(AssertUnwindSafe(|| on_phase(before, report)));
        }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        // Every field is valid by itself, so a panic of another thread leaves nothing half-changed.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl fmt::Debug for Progress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Progress")
            .field("report", &self.report())
            .finish_non_exhaustive()
    }
}
