//! A monitor: at most one guest, and what may be done to it when.
//!
//! Everything that the API and the command line do to a guest goes through here, so that what a running
//! migration forbids is forbidden to all of them.

mod counters;
mod dirty_rate;
mod lifecycle;
mod migrate;
mod resize;
mod restart;

use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::Sender;
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};

use crate::config::{ConfigError, VmConfig};
use crate::events::{EventSource, Events};
use crate::machine::{Machine, MachineError};
use crate::vcpu::GuestEnd;
use migration::progress::{Phase, Progress, Snapshot};
use migration::source::SendError;
use migration::transport::TransportError;

pub use counters::{Counters, source_name};
pub use dirty_rate::{DirtyRate, DirtyRateData, DirtyRateError, INTERVAL_MS};
pub use lifecycle::{Launcher, OnReset, Relaunch};
pub use migrate::{Resolution, SendMigrationData};
pub use resize::ResizeData;
pub use restart::AfterReset;

use dirty_rate::Measurement;
use lifecycle::Launching;

/// How long an interrupted monitor waits for a migration: longer than any silence of the other side lasts.
const INTERRUPT_LIMIT: Duration = Duration::from_secs(12);

/// Why something was not done to the guest.
#[derive(Debug, thiserror::Error)]
pub enum MonitorError {
    /// There is no guest.
    #[error("there is no guest here")]
    NoGuest,
    /// A migration is in the way.
    #[error("{call} cannot be done while a migration is in phase {phase}{hint}")]
    Migrating {
        /// What was asked for.
        call: &'static str,
        /// Where the migration is.
        phase: String,
        /// What would help.
        hint: &'static str,
    },
    /// There is no migration for which this could be done.
    #[error("{call}: {why}")]
    NoMigration {
        /// What was asked for.
        call: &'static str,
        /// What there is instead.
        why: String,
    },
    /// A value that cannot be.
    #[error("{0}")]
    Invalid(String),
    /// There is a guest already.
    #[error("create: there is a guest already; delete it first")]
    Exists,
    /// The guest is not on.
    #[error("{0}: the guest is not booted; boot it first")]
    NotBooted(&'static str),
    /// The guest is on.
    #[error("boot: the guest is booted already")]
    Booted,
    /// This monitor only takes guests in that others send.
    #[error(
        "create: this monitor waits for a guest that another one sends; `ferry run --api-socket PATH` makes them"
    )]
    NoLauncher,
    /// This monitor has had the guest that it waited for.
    #[error(
        "create: this monitor only takes a guest that another one sends, and has had it; end it with `ferry ctl \
         shutdown-vmm`, and start another with `ferry run --api-socket PATH`"
    )]
    HadGuest,
    /// A configuration that cannot be.
    #[error(transparent)]
    Config(#[from] ConfigError),
    /// Nothing here knows how the guest was started.
    #[error("{0}: this guest cannot be started again here: it came from another monitor")]
    NoRelaunch(&'static str),
    /// No machine could be made for the guest, which is off.
    #[error("the guest could not be started: {0}")]
    Launch(#[source] Box<dyn std::error::Error + Send + Sync>),
    /// How fast the guest dirties memory could not be measured.
    #[error("dirty-rate: {0}")]
    DirtyRate(#[from] DirtyRateError),
    /// The address of the destination.
    #[error(transparent)]
    Transport(#[from] TransportError),
    /// The machine.
    #[error(transparent)]
    Machine(#[from] MachineError),
    /// The guest was not handed over.
    #[error("the guest was not handed over: {0}")]
    Send(#[from] SendError),
}

/// The states of a guest, as the Cloud Hypervisor API names them.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum VmState {
    /// It was created and has not been booted yet.
    Created,
    /// It runs.
    Running,
    /// It is stopped and can be resumed.
    Paused,
    /// It is off.
    Shutdown,
}

/// What `vm.info` tells.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct VmInfo {
    /// The configuration.
    pub config: VmConfig,
    /// The state.
    pub state: VmState,
    /// Bytes of guest memory, without those in its balloon.
    pub memory_actual_size: u64,
}

/// One monitor.
pub struct Monitor {
    guest: Mutex<Option<Guest>>,
    /// A guest that runs elsewhere, until [`Monitor::release`]: no call can reach it any more, and taking its
    /// machine apart, which takes a while, is not the business of the call that sent it away.
    departed: Mutex<Option<Guest>>,
    launching: OnceLock<Launching>,
    /// A guest came from another monitor. Written while `guest` is held.
    has_adopted: AtomicBool,
    measurement: Measurement,
    progress: Arc<Progress>,
    events: Events,
    ends: Sender<GuestEnd>,
}

struct Guest {
    config: VmConfig,
    /// The taps that its configuration names by their numbers: open as long as it can be booted again.
    _passed: Vec<OwnedFd>,
    power: Power,
    /// None for a guest that came from another monitor.
    relaunch: Option<Relaunch>,
    /// Whether it ran when the last migration began: what an unconfirmed one goes back to when it is resolved.
    ran: bool,
}

/// Whether a guest has a machine.
enum Power {
    /// It has not had one yet.
    Created,
    /// It has none any more.
    Off,
    On(Arc<Machine>),
}

impl Guest {
    /// Its machine, if it is on, for `call`.
    fn machine(&self, call: &'static str) -> Result<&Arc<Machine>, MonitorError> {
        match &self.power {
            Power::On(machine) => Ok(machine),
            Power::Created | Power::Off => Err(MonitorError::NotBooted(call)),
        }
    }
}

impl Monitor {
    /// A monitor without a guest, that tells `ends` how its guest came to its end, and `events` of all that happens.
    #[must_use]
    pub fn new(ends: Sender<GuestEnd>, events: Events) -> Arc<Self> {
        let progress = Arc::new(Progress::observed(migrate::observer(events.clone())));
        Arc::new(Self {
            guest: Mutex::new(None),
            departed: Mutex::new(None),
            launching: OnceLock::new(),
            has_adopted: AtomicBool::new(false),
            measurement: Measurement::default(),
            progress,
            events,
            ends,
        })
    }

    /// Takes in a guest that arrived. It is over when it resets itself.
    ///
    /// Its balloon is as large as its source wanted it, whatever `config` says.
    pub fn adopt(&self, machine: Arc<Machine>, mut config: VmConfig) {
        if let (Some(control), Some(balloon)) = (machine.balloon(), &mut config.balloon) {
            balloon.size = u64::from(control.target()) * ept::PAGE_SIZE;
        }
        let mut guest = self.guest();
        self.has_adopted.store(true, Ordering::Relaxed);
        *guest = Some(Guest {
            config,
            _passed: Vec::new(),
            power: Power::On(machine),
            relaunch: None,
            ran: false,
        });
    }

    /// Lets the guest go: its vCPUs end, its memory is freed once nobody uses it any more. Another one may be adopted.
    pub fn release(&self) {
        self.measurement.interrupt();
        let mut guest = self.guest();
        self.has_adopted.store(false, Ordering::Relaxed);
        let guests = (guest.take(), self.departed().take());
        drop(guest);
        drop(guests);
    }

    /// Where its events go.
    #[must_use]
    pub fn events(&self) -> &Events {
        &self.events
    }

    /// The progress of the migration into or out of this monitor.
    #[must_use]
    pub fn progress(&self) -> &Arc<Progress> {
        &self.progress
    }

    /// What there is to know of the guest.
    ///
    /// # Errors
    /// There is none.
    pub fn info(&self) -> Result<VmInfo, MonitorError> {
        let guest = self.guest();
        let guest = guest.as_ref().ok_or(MonitorError::NoGuest)?;
        let state = match &guest.power {
            Power::Created => VmState::Created,
            Power::Off => VmState::Shutdown,
            Power::On(machine) if machine.has_ended() => VmState::Shutdown,
            Power::On(machine) if machine.is_running() => VmState::Running,
            Power::On(_) => VmState::Paused,
        };
        Ok(VmInfo {
            config: guest.config.clone(),
            state,
            memory_actual_size: guest.config.memory.size.saturating_sub(guest.ballooned()),
        })
    }

    /// Stops the guest. Idempotent.
    ///
    /// # Errors
    /// No guest that is on, a migration, a vCPU that does not stop.
    pub fn pause(&self) -> Result<(), MonitorError> {
        let guest = self.guest();
        self.unless_migrating("pause", &guest)?.pause()?;
        self.events.vm("paused");
        Ok(())
    }

    /// Lets the guest run. Idempotent.
    ///
    /// # Errors
    /// No guest that is on, a migration.
    pub fn resume(&self) -> Result<(), MonitorError> {
        let guest = self.guest();
        self.unless_migrating("resume", &guest)?.resume()?;
        self.events.vm("resumed");
        Ok(())
    }

    /// Presses the guest's power button; what it does about it is its own decision.
    ///
    /// # Errors
    /// No guest that is on, or one that has ended; a migration.
    pub fn power_button(&self) -> Result<(), MonitorError> {
        let guest = self.guest();
        self.unless_migrating("power-button", &guest)?
            .power_button()?;
        self.events.vm("power-button");
        Ok(())
    }

    /// Ends the guest, if there is one, and the monitor.
    ///
    /// # Errors
    /// A migration is at work or unresolved.
    pub fn end_all(&self) -> Result<(), MonitorError> {
        self.unless_at_work("vmm.shutdown")?;
        self.end(GuestEnd::Stopped);
        Ok(())
    }

    /// Whether `end`, of which a machine told, is the end of the guest that there is now: not if it was shut down or
    /// booted anew since.
    #[must_use]
    pub fn is_over(&self, end: &GuestEnd) -> bool {
        if !matches!(end, GuestEnd::PowerOff | GuestEnd::DebugExit(_)) {
            return true;
        }
        match self.guest().as_ref().map(|guest| &guest.power) {
            Some(Power::On(machine)) => machine.has_ended(),
            Some(Power::Created | Power::Off) | None => false,
        }
    }

    /// Tells of the end of the guest, and the monitor with it.
    pub fn tell_end(&self, end: &GuestEnd) {
        match end {
            GuestEnd::DebugExit(status) => self
                .events
                .vm_because("shutdown", &format!("debug exit with status {status}")),
            GuestEnd::Reset => self.events.vm_because("shutdown", "reset"),
            GuestEnd::PowerOff => self.events.vm_because("shutdown", "power off"),
            GuestEnd::Stopped if self.guest().is_some() => {
                self.events.vm_because("shutdown", "ended by the monitor");
            }
            GuestEnd::Failed(why) => self.events.vm_because("failed", why),
            GuestEnd::Stopped | GuestEnd::HandedOver => {}
        }
        let nothing = serde_json::Value::Null;
        self.events.tell(EventSource::Vmm, "shutdown", nothing);
    }

    /// Ends the guest and the monitor from outside of the API: on a signal, or from the guest's terminal. A
    /// migration is cancelled first; one that is past that is waited for, because the guest is not this one's to
    /// end any more.
    pub fn interrupt(&self) {
        let phase = self.cancel_and_wait();
        if phase == Phase::HandedOverUnconfirmed || phase == Phase::Committed {
            self.end(GuestEnd::Failed(
                "ended while the hand-over was unconfirmed: the guest may run at the destination, \
                 the copy here is gone"
                    .into(),
            ));
        } else if phase != Phase::Completed || self.guest().is_some() {
            self.end(GuestEnd::Stopped);
        }
    }

    /// Cancels a migration, or waits for the end of one that is past that, but not for ever. Returns its phase.
    fn cancel_and_wait(&self) -> Phase {
        // It fails where there is nothing to cancel.
        let _nothing = self.progress.cancel();
        let began = Instant::now();
        let mut phase = self.progress.snapshot().phase;
        while phase.is_active() && began.elapsed() < INTERRUPT_LIMIT {
            std::thread::sleep(Duration::from_millis(1));
            phase = self.progress.snapshot().phase;
        }
        phase
    }

    /// Where the migration is.
    #[must_use]
    pub fn migration_progress(&self) -> Snapshot {
        self.progress.snapshot()
    }

    fn end(&self, end: GuestEnd) {
        // Nobody listens any more only when the monitor is ending already.
        let _ending = self.ends.send(end);
    }

    /// The machine of `guest`, which is held, so that no migration begins meanwhile.
    fn unless_migrating<'a>(
        &self,
        call: &'static str,
        guest: &'a Option<Guest>,
    ) -> Result<&'a Arc<Machine>, MonitorError> {
        self.unless_at_work(call)?;
        guest.as_ref().ok_or(MonitorError::NoGuest)?.machine(call)
    }

    fn unless_at_work(&self, call: &'static str) -> Result<(), MonitorError> {
        let phase = self.progress.snapshot().phase;
        if phase.is_active() || phase == Phase::HandedOverUnconfirmed {
            return Err(migrating(call, phase));
        }
        Ok(())
    }

    fn departed(&self) -> MutexGuard<'_, Option<Guest>> {
        self.departed.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn guest(&self) -> MutexGuard<'_, Option<Guest>> {
        self.guest.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn migrating(call: &'static str, phase: Phase) -> MonitorError {
    let hint = match phase {
        Phase::HandedOverUnconfirmed => ": say with migration-resolve where the guest is",
        Phase::Committed => "",
        _ => ": wait for it, or cancel-migration first",
    };
    MonitorError::Migrating {
        call,
        phase: name(phase),
        hint,
    }
}

/// A phase's name in the API.
fn name(phase: Phase) -> String {
    match serde_json::to_value(phase) {
        Ok(serde_json::Value::String(name)) => name,
        _ => format!("{phase:?}"),
    }
}
