//! A monitor: at most one guest, and what may be done to it when.
//!
//! Everything that the API and the command line do to a guest goes through here, so that what a running
//! migration forbids is forbidden to all of them.

mod restart;

use std::sync::mpsc::Sender;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};

use crate::carrier::Outgoing;
use crate::config::VmConfig;
use crate::machine::{Machine, MachineError};
use crate::migration::decide::{Limits, TimeoutStrategy};
use crate::migration::progress::{Phase, Progress, Snapshot};
use crate::migration::source::{DigestCheck, SendError, SendOptions, send};
use crate::migration::transport::{TransportError, Url};
use crate::vcpu::GuestEnd;

pub use restart::{AfterReset, Relaunch};

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
    /// Nothing here knows how the guest was started.
    #[error(
        "reboot: this guest cannot be started again here: it came from another monitor, or was to end at a reset"
    )]
    NoReboot,
    /// The guest's machine was ended, and no other could be made.
    #[error("the guest could not be started again: {0}")]
    Restart(#[source] Box<dyn std::error::Error + Send + Sync>),
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
    /// It runs.
    Running,
    /// It is stopped and can be resumed.
    Paused,
    /// It is over.
    Shutdown,
}

/// What `vm.info` tells.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct VmInfo {
    /// The configuration.
    pub config: VmConfig,
    /// The state.
    pub state: VmState,
    /// Bytes of guest memory.
    pub memory_actual_size: u64,
}

/// A wish to send the guest away, in the JSON of the Cloud Hypervisor API.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SendMigrationData {
    /// Where to: `unix:PATH` or `tcp:HOST:PORT`.
    pub destination_url: String,
    /// The downtime to stay within.
    #[serde(default = "default_downtime_ms")]
    pub downtime_ms: u64,
    /// How long the rounds may go on.
    #[serde(default = "default_timeout_s")]
    pub timeout_s: u64,
    /// What to do after that.
    #[serde(default)]
    pub timeout_strategy: TimeoutStrategy,
    /// How much of the time the vCPUs may be held so that the rounds converge, in percent; 0 is never.
    #[serde(default = "default_throttle_max")]
    pub throttle_max: u32,
    /// Compare the digest of all memory before the guest is handed over, within the downtime.
    #[serde(default)]
    pub verify: bool,
}

fn default_downtime_ms() -> u64 {
    300
}

fn default_timeout_s() -> u64 {
    3600
}

fn default_throttle_max() -> u32 {
    80
}

/// The longest downtime and timeout that may be asked for.
const DOWNTIME_MS_MAX: u64 = 3_600_000;
const THROTTLE_MAX: u32 = 99;
const TIMEOUT_S_MAX: u64 = 7 * 24 * 3600;

/// How long an interrupted monitor waits for a migration: longer than any silence of the other side lasts.
const INTERRUPT_LIMIT: Duration = Duration::from_secs(12);

/// How an unconfirmed hand-over is resolved.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Resolution {
    /// The guest does not run at the destination: it goes on here.
    Resume,
    /// The guest runs at the destination: this copy is dropped.
    Discard,
}

/// One monitor.
pub struct Monitor {
    guest: Mutex<Option<Guest>>,
    /// A guest that runs elsewhere, until [`Monitor::release`]: no call can reach it any more, and taking its
    /// machine apart, which takes a while, is not the business of the call that sent it away.
    departed: Mutex<Option<Guest>>,
    progress: Arc<Progress>,
    ends: Sender<GuestEnd>,
}

struct Guest {
    machine: Arc<Machine>,
    config: VmConfig,
    relaunch: Option<Relaunch>,
    /// Whether it ran when the last migration began: what an unconfirmed one goes back to when it is resolved.
    ran: bool,
}

impl Monitor {
    /// A monitor without a guest, that tells `ends` how its guest came to its end.
    #[must_use]
    pub fn new(ends: Sender<GuestEnd>) -> Arc<Self> {
        let progress = Arc::new(Progress::new());
        Arc::new(Self {
            guest: Mutex::new(None),
            departed: Mutex::new(None),
            progress,
            ends,
        })
    }

    /// Takes a guest in. Without `relaunch` it is over when it resets itself.
    pub fn adopt(&self, machine: Arc<Machine>, config: VmConfig, relaunch: Option<Relaunch>) {
        *self.guest() = Some(Guest {
            machine,
            config,
            relaunch,
            ran: false,
        });
    }

    /// Lets the guest go: its vCPUs end, its memory is freed once nobody uses it any more.
    pub fn release(&self) {
        let guests = (self.guest().take(), self.departed().take());
        drop(guests);
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
        let state = match (guest.machine.has_ended(), guest.machine.is_running()) {
            (true, _) => VmState::Shutdown,
            (false, true) => VmState::Running,
            (false, false) => VmState::Paused,
        };
        let memory_actual_size = guest.machine.ram().bytes();
        Ok(VmInfo {
            config: guest.config.clone(),
            state,
            memory_actual_size,
        })
    }

    /// Stops the guest. Idempotent.
    ///
    /// # Errors
    /// No guest, a migration, a vCPU that does not stop.
    pub fn pause(&self) -> Result<(), MonitorError> {
        let guest = self.guest();
        Ok(self.unless_migrating("pause", &guest)?.pause()?)
    }

    /// Lets the guest run. Idempotent.
    ///
    /// # Errors
    /// No guest, a migration.
    pub fn resume(&self) -> Result<(), MonitorError> {
        let guest = self.guest();
        Ok(self.unless_migrating("resume", &guest)?.resume()?)
    }

    /// Presses the guest's power button; what it does about it is its own decision.
    ///
    /// # Errors
    /// No guest, or one that has ended; a migration.
    pub fn power_button(&self) -> Result<(), MonitorError> {
        let guest = self.guest();
        Ok(self
            .unless_migrating("power-button", &guest)?
            .power_button()?)
    }

    /// Ends the guest and the monitor.
    ///
    /// # Errors
    /// A migration is at work or unresolved.
    pub fn shutdown(&self) -> Result<(), MonitorError> {
        self.unless_at_work("shutdown")?;
        self.end(GuestEnd::Stopped);
        Ok(())
    }

    /// Sends the guest away. Returns when the other side runs it, or why it stayed: the progress can be
    /// read, and the migration cancelled, from other threads meanwhile.
    ///
    /// # Errors
    /// No guest, values out of range, another migration; and why this one failed.
    pub fn send_migration(&self, wish: &SendMigrationData) -> Result<Snapshot, MonitorError> {
        let url: Url = wish.destination_url.parse()?;
        let options = options(wish)?;
        let mut outgoing = self.begin(&url)?;
        let sent = self.send(&mut outgoing, &url, &options);
        self.settle(&sent);
        let snapshot = self.migration_progress();
        sent.map(|()| {
            self.end(GuestEnd::HandedOver);
            snapshot
        })
    }

    /// Tells how a migration ended. A guest that was handed over has departed before anybody can read so: no call
    /// can run it here again.
    fn settle(&self, sent: &Result<(), MonitorError>) {
        let mut guest = self.guest();
        let (phase, message) = match sent {
            Ok(()) => (Phase::Completed, None),
            Err(error @ MonitorError::Send(SendError::Cancelled)) => {
                (Phase::Cancelled, Some(error.to_string()))
            }
            Err(error @ MonitorError::Send(SendError::Unconfirmed(_))) => {
                (Phase::HandedOverUnconfirmed, Some(error.to_string()))
            }
            Err(error) => (Phase::Failed, Some(error.to_string())),
        };
        if phase == Phase::Completed {
            *self.departed() = guest.take();
        }
        self.progress.end(phase, message);
    }

    /// Asks a running migration to stop; the guest then runs here as before.
    ///
    /// # Errors
    /// There is none, or COMMIT was sent already.
    pub fn cancel_migration(&self) -> Result<(), MonitorError> {
        self.progress
            .cancel()
            .map_err(|phase| MonitorError::NoMigration {
                call: "cancel-migration",
                why: format!(
                    "the migration is in phase {}, there is nothing to cancel",
                    name(phase)
                ),
            })
    }

    /// Says on which side an unconfirmed guest lives.
    ///
    /// The guest is held until all is done: no other call comes between. It runs again if it ran when the
    /// migration began.
    ///
    /// # Errors
    /// The hand-over is not unconfirmed; the dirty log cannot be switched off, and then it stays unconfirmed.
    pub fn resolve_migration(&self, resolution: Resolution) -> Result<(), MonitorError> {
        let mut guest = self.guest();
        let phase = self.progress.snapshot().phase;
        if phase != Phase::HandedOverUnconfirmed {
            return Err(nothing_to_resolve(phase));
        }
        match resolution {
            Resolution::Resume => {
                let guest = guest.as_ref().ok_or(MonitorError::NoGuest)?;
                // A guest that runs there has them: then it stays unconfirmed.
                guest.machine.take_disks()?;
                guest.machine.with_log(|log, slots, _| log.stop(slots))?;
                self.resolved(Phase::Failed, "resolved: the guest runs here")?;
                if guest.ran {
                    guest.machine.resume()?;
                }
            }
            Resolution::Discard => {
                self.resolved(Phase::Completed, "resolved: the guest runs there")?;
                *self.departed() = guest.take();
                self.end(GuestEnd::HandedOver);
            }
        }
        Ok(())
    }

    fn resolved(&self, phase: Phase, message: &str) -> Result<(), MonitorError> {
        self.progress
            .resolve(phase, message)
            .map_err(nothing_to_resolve)
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

    /// Claims guest and progress in one step: no pause or resume comes between.
    fn begin(&self, url: &Url) -> Result<Outgoing, MonitorError> {
        let mut guest = self.guest();
        let guest = guest.as_mut().ok_or(MonitorError::NoGuest)?;
        self.progress
            .begin(Phase::Connecting, url.to_string())
            .map_err(|phase| migrating("send-migration", phase))?;
        guest.ran = guest.machine.is_running();
        Ok(Outgoing::new(Arc::clone(&guest.machine)))
    }

    fn send(
        &self,
        outgoing: &mut Outgoing,
        url: &Url,
        options: &SendOptions,
    ) -> Result<(), MonitorError> {
        let connection = url.connect()?;
        Ok(send(outgoing, connection, options, &self.progress)?)
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
    ) -> Result<&'a Machine, MonitorError> {
        self.unless_at_work(call)?;
        let guest = guest.as_ref().ok_or(MonitorError::NoGuest)?;
        Ok(&guest.machine)
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

fn options(wish: &SendMigrationData) -> Result<SendOptions, MonitorError> {
    if !(1..=DOWNTIME_MS_MAX).contains(&wish.downtime_ms) {
        let found = wish.downtime_ms;
        return Err(MonitorError::Invalid(format!(
            "downtime_ms: {found} cannot be, from 1 to {DOWNTIME_MS_MAX}"
        )));
    }
    if !(1..=TIMEOUT_S_MAX).contains(&wish.timeout_s) {
        let found = wish.timeout_s;
        return Err(MonitorError::Invalid(format!(
            "timeout_s: {found} cannot be, from 1 to {TIMEOUT_S_MAX}"
        )));
    }
    if wish.throttle_max > THROTTLE_MAX {
        let found = wish.throttle_max;
        return Err(MonitorError::Invalid(format!(
            "throttle_max: {found} cannot be, from 0 to {THROTTLE_MAX} percent"
        )));
    }
    Ok(SendOptions {
        limits: Limits {
            downtime: Duration::from_millis(wish.downtime_ms),
            timeout: Duration::from_secs(wish.timeout_s),
            strategy: wish.timeout_strategy,
            throttle_max: wish.throttle_max,
        },
        digest: if wish.verify {
            DigestCheck::Compare
        } else {
            DigestCheck::Skip
        },
    })
}

fn nothing_to_resolve(phase: Phase) -> MonitorError {
    MonitorError::NoMigration {
        call: "migration-resolve",
        why: format!(
            "the migration is in phase {}, there is nothing to resolve",
            name(phase)
        ),
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
