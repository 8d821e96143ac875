//! Cancelling a migration, and resolving one whose confirmation was lost.

use migration::{Report, Resolved};
use serde::{Deserialize, Serialize};

use super::calls::Call;
use super::migration_events::Direction;
use super::state::{Stage, State, Unconfirmed};
use super::{Monitor, MonitorError};
use crate::machine::{Failed, Live, Paused, RunState};
use crate::vcpu::GuestEnd;

/// How a person resolves an unconfirmed hand-over.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Resolution {
    /// The guest does not run at the destination: it goes on here.
    Resume,
    /// The guest runs at the destination: the copy here is dropped.
    Discard,
}

impl Monitor {
    /// Returns the progress of the migration into or out of this monitor, or the result of the last one.
    ///
    /// When it reports the end of a migration, the guest is in the state that follows from it.
    #[must_use]
    pub fn migration_progress(&self) -> Report {
        let record = self.migration();
        record.map_or_else(Report::default, |record| record.report())
    }

    /// Cancels the migration. The guest stays at the source, as before.
    ///
    /// # Errors
    /// Returns [`MonitorError::NoMigration`] if there is none, or COMMIT was sent already.
    pub fn cancel_migration(&self) -> Result<(), MonitorError> {
        let state = self.allowed(Call::CancelMigration)?;
        let Some(record) = self.migration() else {
            return Err(self.refused(Call::CancelMigration, &state));
        };
        record
            .attempt
            .cancel()
            .map_err(|late| MonitorError::NoMigration {
                call: Call::CancelMigration,
                phase: late.phase,
            })
    }

    /// Resolves an unconfirmed hand-over by what a person found out. The guest returns to the state that it had when
    /// the migration began, or is dropped.
    ///
    /// # Errors
    /// Returns [`MonitorError::NoMigration`] if no hand-over is unconfirmed, and [`MonitorError::Machine`] if a disk
    /// image is locked by another process or the dirty log cannot be stopped: the hand-over stays unconfirmed then.
    pub fn resolve_migration(&self, resolution: Resolution) -> Result<(), MonitorError> {
        let mut state = self.allowed(Call::ResolveMigration)?;
        let refused = self.refused(Call::ResolveMigration, &state);
        let Some(guest) = state.guest_mut() else {
            return Err(refused);
        };
        let unconfirmed = match std::mem::replace(&mut guest.stage, Stage::Off) {
            Stage::Unconfirmed(unconfirmed) => unconfirmed,
            other => {
                guest.stage = other;
                return Err(refused);
            }
        };
        match resolution {
            Resolution::Resume => {
                let (stage, result) = self.go_on_here(unconfirmed);
                guest.stage = stage;
                result
            }
            Resolution::Discard => {
                self.resolved(&unconfirmed, Resolved::There);
                *self.departed() = Some(Live::Paused(unconfirmed.machine));
                *state = State::Vacated;
                self.end(GuestEnd::HandedOver);
                Ok(())
            }
        }
    }

    fn go_on_here(&self, unconfirmed: Unconfirmed) -> (Stage, Result<(), MonitorError>) {
        // A destination that runs the guest has locked its disk images.
        if let Err(error) = reclaim(&unconfirmed.machine) {
            return (Stage::Unconfirmed(unconfirmed), Err(error));
        }
        self.resolved(&unconfirmed, Resolved::Here);
        if unconfirmed.before == RunState::Paused {
            return (Stage::Paused(unconfirmed.machine), Ok(()));
        }
        match unconfirmed.machine.resume() {
            Ok(machine) => (Stage::Running(machine), Ok(())),
            Err(Failed { machine, error }) => (Stage::Paused(machine), Err(error.into())),
        }
    }

    fn resolved(&self, unconfirmed: &Unconfirmed, side: Resolved) {
        let message = match side {
            Resolved::Here => "resolved: the guest runs here",
            Resolved::There => "resolved: the guest runs there",
        };
        // The state of the guest is held, so that no other call resolves the attempt.
        if unconfirmed.attempt.resolve(side, message).is_ok() {
            self.tell_migration_end(&unconfirmed.attempt, Direction::Send);
        }
    }
}

/// Locks the disk images again and stops the dirty log.
fn reclaim(machine: &Paused) -> Result<(), MonitorError> {
    machine.lock_disks()?;
    Ok(machine.dirty_logs().stop()?)
}
