//! A monitor: at most one guest, and the calls that change it.
//!
//! Everything that the API and the command line do to a guest goes through here. What the guest has is one value, its
//! state; which call is allowed in which state is one table, [`refusal`]. While a guest is sent or received, a worker
//! owns its machine, and no call can reach it.

mod calls;
mod control;
mod counters;
mod dirty_rate;
mod end;
mod error;
mod launch;
mod lifecycle;
mod migration_events;
mod migration_record;
mod receive;
mod resize;
mod resolve;
mod send;
mod state;

use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use serde_json::json;

use crate::complain::complain;
use crate::events::{EventSource, Events};
use crate::machine::{Live, Machine};
use crate::vcpu::GuestEnd;

pub use calls::{Call, Refusal, refusal};
pub use control::VmInfo;
pub use counters::{Counters, source_name};
pub use dirty_rate::{DirtyRate, DirtyRateData, DirtyRateError, INTERVAL_MS};
pub use error::MonitorError;
pub use launch::{Launcher, OnReset};
pub use receive::Reception;
pub use resize::ResizeData;
pub use resolve::Resolution;
pub use send::SendMigrationData;
pub use state::{StateKind, VmState};

use dirty_rate::Measurement;
use launch::Callbacks;
use migration_record::MigrationRecord;
use state::State;

/// One monitor.
pub struct Monitor {
    state: Mutex<State>,
    /// The migration in progress, or the last one. May be locked while the state is.
    migration: Mutex<Option<MigrationRecord>>,
    /// Machine of a guest that runs elsewhere, until [`Monitor::release`]. Releasing a machine takes a while, which
    /// must not hold up the call that sent the guest away.
    departed: Mutex<Option<Live>>,
    /// `None` in a monitor that only receives guests.
    launcher: Option<Launcher>,
    callbacks: Callbacks,
    measurement: Measurement,
    events: Events,
    ends: (Sender<GuestEnd>, Mutex<Receiver<GuestEnd>>),
}

impl Monitor {
    /// Creates a monitor without a guest. Without a `launcher` it can only receive guests.
    #[must_use]
    pub fn new(launcher: Option<Launcher>, events: Events) -> Arc<Self> {
        let (sender, receiver) = channel();
        Arc::new(Self {
            state: Mutex::new(State::Empty),
            migration: Mutex::new(None),
            departed: Mutex::new(None),
            launcher,
            callbacks: callbacks(sender.clone(), events.clone()),
            measurement: Measurement::default(),
            events,
            ends: (sender, Mutex::new(receiver)),
        })
    }

    /// Returns the sink of the monitor's events.
    #[must_use]
    pub fn events(&self) -> &Events {
        &self.events
    }

    /// Returns the state that the monitor and its guest are in.
    #[must_use]
    pub fn state_kind(&self) -> StateKind {
        self.lock().kind()
    }

    /// Locks the state, if `call` is allowed in it.
    fn allowed(&self, call: Call) -> Result<MutexGuard<'_, State>, MonitorError> {
        let state = self.lock();
        match refusal(call, state.kind()) {
            None => Ok(state),
            Some(_) => Err(self.refused(call, &state)),
        }
    }

    /// Returns the error for a call that is not allowed in `state`.
    fn refused(&self, call: Call, state: &State) -> MonitorError {
        let refusal = refusal(call, state.kind()).unwrap_or(Refusal::NoGuest);
        let phase = || {
            let record = self.migration();
            record.map_or(migration::Phase::None, |record| {
                record.attempt.report().phase
            })
        };
        match refusal {
            Refusal::Migrating => MonitorError::Migrating {
                call,
                phase: phase(),
            },
            Refusal::NoMigration => MonitorError::NoMigration {
                call,
                phase: phase(),
            },
            refusal => MonitorError::Refused { call, refusal },
        }
    }

    /// Locks the state, whatever it is.
    fn lock(&self) -> MutexGuard<'_, State> {
        // A panic during a change leaves the guest off, which is a valid state.
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        state.notice_end();
        state
    }

    fn migration(&self) -> Option<MigrationRecord> {
        let record = self.migration.lock();
        record.unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Reports the end of the guest once more, if it ended while a worker owned it: the report that its vCPU made was
    /// not for the state that the guest was in.
    fn report_end_again(&self, machine: &Machine) {
        if let Some(end) = machine.end() {
            self.end(end.clone());
        }
    }

    fn departed(&self) -> MutexGuard<'_, Option<Live>> {
        self.departed.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// What each machine of a monitor reports: its end to whoever waits for it, and a lost back end as an event and a
/// message.
fn callbacks(ends: Sender<GuestEnd>, events: Events) -> Callbacks {
    Callbacks {
        on_end: Arc::new(move |end| {
            // The receiver lives as long as the monitor. Without a monitor nobody needs to know.
            let _received = ends.send(end);
        }),
        on_loss: Arc::new(move |device, why| {
            complain(format_args!(
                "{device}: {why}; the guest goes on without it until it resets it, or is rebooted"
            ));
            let properties = json!({ "id": device, "reason": why });
            events.tell(EventSource::Vm, "device-failed", properties);
        }),
    }
}
