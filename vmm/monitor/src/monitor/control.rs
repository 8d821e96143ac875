//! Pausing, resuming, and looking at a guest.

use serde::{Deserialize, Serialize};

use super::calls::Call;
use super::state::{Guest, Stage, VmState};
use super::{Monitor, MonitorError};
use crate::config::VmConfig;
use crate::machine::Failed;

/// The answer to `vm.info`.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct VmInfo {
    /// Configuration of the guest.
    pub config: VmConfig,
    /// State of the guest.
    pub state: VmState,
    /// Bytes of guest memory, without those in the balloon.
    pub memory_actual_size: u64,
}

impl Monitor {
    /// Returns the configuration and the state of the guest.
    ///
    /// # Errors
    /// Returns [`MonitorError::Refused`] if there is no guest.
    pub fn info(&self) -> Result<VmInfo, MonitorError> {
        let state = self.allowed(Call::Info)?;
        let guest = state
            .guest()
            .ok_or_else(|| self.refused(Call::Info, &state))?;
        let ballooned = guest.gauges().map_or(0, |gauges| gauges.ballooned_bytes());
        Ok(VmInfo {
            config: guest.config.clone(),
            state: guest.vm_state(),
            memory_actual_size: guest.config.memory.size.saturating_sub(ballooned),
        })
    }

    /// Stops the vCPUs and devices of the guest. Idempotent.
    ///
    /// # Errors
    /// Returns [`MonitorError::Refused`] if the guest is off, [`MonitorError::Migrating`] during a migration, and
    /// [`MonitorError::Machine`] if a vCPU does not stop: the guest runs on then.
    pub fn pause(&self) -> Result<(), MonitorError> {
        let mut state = self.allowed(Call::Pause)?;
        if let Some(guest) = state.guest_mut() {
            guest.pause()?;
        }
        self.events.vm("paused");
        Ok(())
    }

    /// Lets the guest run. Idempotent.
    ///
    /// # Errors
    /// Returns [`MonitorError::Refused`] if the guest is off, [`MonitorError::Migrating`] during a migration, and
    /// [`MonitorError::Machine`] if a disk image is locked by another process: the guest stays paused then.
    pub fn resume(&self) -> Result<(), MonitorError> {
        let mut state = self.allowed(Call::Resume)?;
        if let Some(guest) = state.guest_mut() {
            guest.resume()?;
        }
        self.events.vm("resumed");
        Ok(())
    }

    /// Presses the guest's power button. The guest decides what to do about it.
    ///
    /// # Errors
    /// Returns [`MonitorError::Refused`] if the guest is off or has ended, and [`MonitorError::Migrating`] during a
    /// migration.
    pub fn power_button(&self) -> Result<(), MonitorError> {
        let state = self.allowed(Call::PowerButton)?;
        if let Some(machine) = state.guest().and_then(Guest::machine) {
            machine.power_button()?;
        }
        self.events.vm("power-button");
        Ok(())
    }
}

impl Guest {
    fn pause(&mut self) -> Result<(), MonitorError> {
        let stage = std::mem::replace(&mut self.stage, Stage::Off);
        let (stage, result) = match stage {
            Stage::Running(machine) => match machine.pause() {
                Ok(machine) => (Stage::Paused(machine), Ok(())),
                Err(Failed { machine, error }) => (Stage::Running(machine), Err(error)),
            },
            other => (other, Ok(())),
        };
        self.stage = stage;
        Ok(result?)
    }

    fn resume(&mut self) -> Result<(), MonitorError> {
        let stage = std::mem::replace(&mut self.stage, Stage::Off);
        let (stage, result) = match stage {
            Stage::Paused(machine) => match machine.resume() {
                Ok(machine) => (Stage::Running(machine), Ok(())),
                Err(Failed { machine, error }) => (Stage::Paused(machine), Err(error)),
            },
            other => (other, Ok(())),
        };
        self.stage = stage;
        Ok(result?)
    }
}
