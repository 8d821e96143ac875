//! Sending the guest to another monitor.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::time::Duration;

use migration::{
    Attempt, DigestCheck, Limits, Report, SendError, SendOptions, TimeoutStrategy, send,
};
use serde::{Deserialize, Serialize};

use super::calls::Call;
use super::migration_events::Direction;
use super::migration_record::WorkerGuard;
use super::state::{Sending, Stage, State, Unconfirmed};
use super::{Monitor, MonitorError};
use crate::machine::{Live, RunState};
use crate::migrate::{MachineSource, Url};
use crate::panics::panic_message;
use crate::vcpu::GuestEnd;

/// The body of `vm.send-migration`, in the JSON of the Cloud Hypervisor API.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields, expecting = "an object")]
pub struct SendMigrationData {
    /// Address of the destination: `unix:PATH` or `tcp:HOST:PORT`.
    pub destination_url: String,
    /// Maximum downtime in milliseconds.
    #[serde(default = "default_downtime_ms")]
    pub downtime_ms: u64,
    /// Maximum duration of the rounds in seconds.
    #[serde(default = "default_timeout_s")]
    pub timeout_s: u64,
    /// What follows when the rounds have taken `timeout_s`.
    #[serde(default)]
    pub timeout_strategy: TimeoutStrategy,
    /// Maximum share of the time, in percent, for which the vCPUs are held so that the rounds converge. 0 disables
    /// throttling.
    #[serde(default = "default_throttle_max")]
    pub throttle_max: u32,
    /// Compares a digest of all memory before the guest is handed over, within the downtime.
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

/// Maximum of `downtime_ms`.
const DOWNTIME_MS_MAX: u64 = 3_600_000;
/// Maximum of `throttle_max`, in percent.
const THROTTLE_MAX: u32 = 99;
/// Maximum of `timeout_s`.
const TIMEOUT_S_MAX: u64 = 7 * 24 * 3600;

impl Monitor {
    /// Sends the guest away. Returns when the destination runs it, or the reason why it stayed. Meanwhile other
    /// threads can read the progress and cancel the migration.
    ///
    /// # Errors
    /// Returns [`MonitorError::Invalid`] for a value out of range, [`MonitorError::Refused`] without a guest,
    /// [`MonitorError::Migrating`] during another migration, [`MonitorError::Machine`] if a device's writes to memory
    /// cannot be logged, and [`MonitorError::Send`] if the migration failed. The guest is as before, unless the error
    /// is [`SendError::Unconfirmed`].
    pub fn send_migration(&self, wish: &SendMigrationData) -> Result<Report, MonitorError> {
        let url: Url = wish.destination_url.parse()?;
        let options = options(wish)?;
        let (worker, mut source) = self.begin_sending(&url)?;
        let attempt = worker.attempt().clone();
        // The engine catches its own panics; this is for those of the code around it.
        let sent = catch_unwind(AssertUnwindSafe(|| {
            connect_and_send(&mut source, &url, &options, &attempt)
        }))
        .unwrap_or_else(|panic| {
            let message = panic_message(&*panic);
            attempt.fail(message.as_str());
            let phase = attempt.report().phase;
            Err(SendError::Panicked { phase, message }.into())
        });
        self.settle(source, &attempt, &sent);
        drop(worker);
        sent.map(|()| attempt.report())
    }

    /// Moves the machine out of the guest and into a source, in one step with the check that a migration is allowed.
    fn begin_sending(&self, url: &Url) -> Result<(WorkerGuard, MachineSource), MonitorError> {
        let mut state = self.allowed(Call::SendMigration)?;
        let refused = self.refused(Call::SendMigration, &state);
        let Some(guest) = state.guest_mut() else {
            return Err(refused);
        };
        if let Some(machine) = guest.machine() {
            machine.dirty_logs().check()?;
        }
        // A measurement of the dirty rate uses the dirty log, which the migration needs.
        self.measurement.interrupt();
        let Some(machine) = guest.take_live() else {
            return Err(refused);
        };
        let record = self.begin_attempt(Attempt::new(url.to_string()), Direction::Send);
        let (before, gauges) = (machine.run_state(), machine.gauges());
        guest.stage = Stage::Sending(Sending {
            attempt: record.attempt.clone(),
            before,
            gauges,
        });
        Ok((record.begin(), MachineSource::new(machine)))
    }

    /// Puts the guest into the state that follows from the end of the migration, and tells of the end in an event. Both
    /// are one step for other calls.
    fn settle(&self, source: MachineSource, attempt: &Attempt, sent: &Result<(), MonitorError>) {
        let mut state = self.lock();
        let before = source.before();
        let machine = source.into_machine();
        match (sent, machine) {
            (Ok(()), machine) => {
                // Releasing a machine takes a while, which is not the business of this call.
                *self.departed() = machine;
                *state = State::Vacated;
                self.end(GuestEnd::HandedOver);
            }
            (Err(error), Some(machine)) => {
                self.report_end_again(&machine);
                state.return_machine(stage_after(error, machine, attempt, before));
            }
            (Err(error), None) => {
                state.return_machine(Stage::Off);
                self.events.vm_because("failed", &error.to_string());
                self.end(GuestEnd::Failed(error.to_string()));
            }
        }
        let attempt = match sent {
            // The advice of this monitor belongs to the report and to the event, too.
            Err(error) if is_in_doubt(error) => attempt.clone().with_message(error.to_string()),
            _ => attempt.clone(),
        };
        self.tell_migration_end(&attempt, Direction::Send);
    }
}

fn is_in_doubt(error: &MonitorError) -> bool {
    matches!(error, MonitorError::Send(error) if error.is_in_doubt())
}

/// Returns the stage of a guest that was not handed over, or perhaps was.
fn stage_after(error: &MonitorError, machine: Live, attempt: &Attempt, before: RunState) -> Stage {
    match machine {
        Live::Paused(machine) if is_in_doubt(error) => Stage::Unconfirmed(Unconfirmed {
            machine,
            attempt: attempt.clone(),
            before,
        }),
        machine => machine.into(),
    }
}

fn connect_and_send(
    source: &mut MachineSource,
    url: &Url,
    options: &SendOptions,
    attempt: &Attempt,
) -> Result<(), MonitorError> {
    let connection = url
        .connect(|| attempt.is_cancelled())
        .inspect_err(|error| attempt.fail(error.to_string()))?;
    Ok(send(source, connection, options, attempt)?)
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
        digest: match wish.verify {
            true => DigestCheck::Compare,
            false => DigestCheck::Skip,
        },
        ..SendOptions::default()
    })
}
