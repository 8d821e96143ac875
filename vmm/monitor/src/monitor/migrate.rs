//! Sending the guest away: the wish, the engine's run, and what a hand-over in doubt needs of a person.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use serde::{Deserialize, Serialize};
use serde_json::json;

use super::{Monitor, MonitorError, migrating, name};
use crate::carrier::Outgoing;
use crate::events::{EventSource, Events};
use crate::vcpu::GuestEnd;
use migration::decide::{Limits, TimeoutStrategy};
use migration::progress::{OnPhase, Phase, Snapshot};
use migration::source::{DigestCheck, SendError, SendOptions, send};
use migration::transport::Url;

/// A wish to send the guest away, in the JSON of the Cloud Hypervisor API.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields, expecting = "an object")]
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

/// How an unconfirmed hand-over is resolved.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Resolution {
    /// The guest does not run at the destination: it goes on here.
    Resume,
    /// The guest runs at the destination: this copy is dropped.
    Discard,
}

impl Monitor {
    /// Sends the guest away. Returns when the other side runs it, or why it stayed: the progress can be
    /// read, and the migration cancelled, from other threads meanwhile.
    ///
    /// # Errors
    /// No guest, values out of range, another migration, a device whose writes to memory cannot be logged; and why
    /// this one failed.
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
                let machine = guest.machine("migration-resolve")?;
                // A guest that runs there has them: then it stays unconfirmed.
                machine.take_disks()?;
                machine.stop_log()?;
                self.resolved(Phase::Failed, "resolved: the guest runs here")?;
                if guest.ran {
                    machine.resume()?;
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

    /// Claims guest and progress in one step: no pause or resume comes between.
    fn begin(&self, url: &Url) -> Result<Outgoing, MonitorError> {
        let mut guest = self.guest();
        let guest = guest.as_mut().ok_or(MonitorError::NoGuest)?;
        let machine = Arc::clone(guest.machine("send-migration")?);
        machine.can_log()?;
        self.progress
            .begin(Phase::Connecting, url.to_string())
            .map_err(|phase| migrating("send-migration", phase))?;
        // It would use the dirty log, which is the migration's from now on.
        self.measurement.interrupt();
        guest.ran = machine.is_running();
        Ok(Outgoing::new(machine))
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
}

/// Tells of a migration's phases as events.
pub(super) fn observer(events: Events) -> OnPhase {
    let receiving = AtomicBool::new(false);
    Box::new(move |before, now| {
        match (before, now.phase) {
            (_, Phase::Connecting) => receiving.store(false, Ordering::Relaxed),
            (Phase::Listening, Phase::Agreeing) => receiving.store(true, Ordering::Relaxed),
            _ => {}
        }
        let kind = match receiving.load(Ordering::Relaxed) {
            true => "migration-receive",
            false => "migration",
        };
        tell_phase(&events, kind, before, now);
    })
}

fn tell_phase(events: &Events, kind: &str, before: Phase, now: &Snapshot) {
    let (what, properties) = match now.phase {
        Phase::None | Phase::Listening => return,
        Phase::Connecting => ("started", json!({ "url": now.url })),
        Phase::Agreeing if before == Phase::Listening => ("started", json!({ "url": now.url })),
        Phase::Completed => (
            "finished",
            json!({
                "total_ms": now.total_ms,
                "downtime_ms": now.downtime_ms,
                "bytes_sent": now.bytes_sent,
                "rounds": now.rounds.len(),
                "message": now.message,
            }),
        ),
        Phase::Failed | Phase::Cancelled => (
            "failed",
            json!({ "phase": now.phase, "reason": now.message }),
        ),
        Phase::HandedOverUnconfirmed => ("unconfirmed", json!({ "reason": now.message })),
        phase => ("phase", json!({ "phase": phase })),
    };
    events.tell(EventSource::Vm, &format!("{kind}-{what}"), properties);
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
