//! The end of a guest, and of the monitor with it.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::time::{Duration, Instant};

use super::calls::Call;
use super::lifecycle::AfterReset;
use super::state::{State, StateKind};
use super::{Monitor, MonitorError};
use crate::complain::complain;
use crate::events::EventSource;
use crate::panics::panic_message;
use crate::vcpu::GuestEnd;

/// Maximum time that an interrupted monitor waits for a migration. It is longer than the engine waits for a silent
/// peer.
const INTERRUPT_LIMIT: Duration = Duration::from_secs(12);

impl Monitor {
    /// Waits until the guest is over, and returns how it ended. A guest that resets itself is booted again meanwhile,
    /// if the monitor launched it and is to do so.
    ///
    /// Only one thread may wait at a time.
    #[must_use]
    pub fn wait_for_end(&self) -> GuestEnd {
        let ends = self
            .ends
            .1
            .lock()
            .unwrap_or_else(std::sync::PoisonError::into_inner);
        loop {
            // The sender lives as long as the monitor.
            let Ok(end) = ends.recv() else {
                return GuestEnd::Stopped;
            };
            match self.after(end) {
                None => {}
                Some(end) => return end,
            }
        }
    }

    /// Tells of the end in an event, releases the guest, and waits until the events are written.
    pub fn finish(&self, end: &GuestEnd) {
        self.tell_end(end);
        self.replace_state(State::Closed);
        self.events.flush();
    }

    /// Ends the guest, if there is one, and the monitor.
    ///
    /// # Errors
    /// Returns [`MonitorError::Migrating`] during a migration and while one is unconfirmed.
    pub fn end_all(&self) -> Result<(), MonitorError> {
        let mut state = self.allowed(Call::ShutDownMonitor)?;
        if state.guest().is_none() {
            *state = State::Closed;
        }
        self.end(GuestEnd::Stopped);
        Ok(())
    }

    /// Ends the guest and the monitor on a signal, or on a command from the guest's terminal. A migration is cancelled
    /// first. If COMMIT was sent already, its end is waited for, because the guest may not be here any more.
    pub fn interrupt(&self) {
        self.cancel_and_wait();
        let mut state = self.lock();
        let record = self.migration();
        let committed = record.is_some_and(|record| record.attempt.is_committed());
        match state.kind() {
            StateKind::Sending | StateKind::Unconfirmed if committed => self.end(GuestEnd::Failed(
                "ended while the hand-over was unconfirmed: the guest may run at the destination, \
                 the copy here is gone"
                    .into(),
            )),
            StateKind::Empty | StateKind::Vacated => {
                *state = State::Closed;
                self.end(GuestEnd::Stopped);
            }
            _ => self.end(GuestEnd::Stopped),
        }
    }

    /// Releases the guest: its vCPU threads end, and its memory is freed.
    pub fn release(&self) {
        self.replace_state(State::Vacated);
    }

    fn replace_state(&self, new: State) {
        let mut state = self.lock();
        // While the state is locked no other measurement begins.
        self.measurement.interrupt();
        let old = std::mem::replace(&mut *state, new);
        drop(state);
        let departed = self.departed().take();
        drop((old, departed));
    }

    /// Reports a panic of the thread that carried out `what`, in an event and on standard error. Returns the report,
    /// which names the state that the guest is in now.
    pub(crate) fn report_panic(&self, what: &str, why: &str) -> String {
        let report = format!("{what}: {why}; the guest is now: {:?}", self.lock().kind());
        complain(&report);
        let properties = serde_json::json!({ "reason": report });
        self.events.tell(EventSource::Vmm, "failed", properties);
        report
    }

    /// Cancels a migration, or waits for the end of one that cannot be cancelled any more, for at most
    /// [`INTERRUPT_LIMIT`].
    pub(super) fn cancel_and_wait(&self) {
        let Some(record) = self.migration() else {
            return;
        };
        // This fails if there is nothing to cancel.
        let _too_late = record.attempt.cancel();
        let began = Instant::now();
        while record.report().phase.is_active() && began.elapsed() < INTERRUPT_LIMIT {
            std::thread::sleep(Duration::from_millis(1));
        }
    }

    /// Reports an end to whoever waits for it.
    pub(super) fn end(&self, end: GuestEnd) {
        // The receiver lives as long as the monitor.
        let _received = self.ends.0.send(end);
    }

    /// Acts on an end that was reported. Returns it if the guest is over.
    fn after(&self, end: GuestEnd) -> Option<GuestEnd> {
        match end {
            GuestEnd::Reset => match catch_unwind(AssertUnwindSafe(|| self.after_reset())) {
                Ok(Ok(AfterReset::GoesOn)) => None,
                Ok(Ok(AfterReset::Over)) => Some(end),
                Ok(Err(error)) => Some(GuestEnd::Failed(error.to_string())),
                Err(panic) => Some(GuestEnd::Failed(panic_message(&*panic))),
            },
            // Unless a call has switched the guest off or booted it again meanwhile.
            GuestEnd::PowerOff | GuestEnd::DebugExit(_) => {
                (self.lock().kind() == StateKind::Ended).then_some(end)
            }
            GuestEnd::Stopped | GuestEnd::HandedOver | GuestEnd::Failed(_) => Some(end),
        }
    }

    fn tell_end(&self, end: &GuestEnd) {
        match end {
            GuestEnd::DebugExit(status) => self
                .events
                .vm_because("shutdown", &format!("debug exit with status {status}")),
            GuestEnd::Reset => self.events.vm_because("shutdown", "reset"),
            GuestEnd::PowerOff => self.events.vm_because("shutdown", "power off"),
            GuestEnd::Stopped if self.lock().guest().is_some() => {
                self.events.vm_because("shutdown", "ended by the monitor");
            }
            GuestEnd::Failed(why) => self.events.vm_because("failed", why),
            GuestEnd::Stopped | GuestEnd::HandedOver => {}
        }
        let nothing = serde_json::Value::Null;
        self.events.tell(EventSource::Vmm, "shutdown", nothing);
    }
}
