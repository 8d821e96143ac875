//! The life of a guest: created, booted, shut down, rebooted, deleted.

use std::os::fd::OwnedFd;

use super::calls::Call;
use super::launch::{LaunchPlan, OnReset};
use super::state::{Guest, Stage, State, StateKind};
use super::{Monitor, MonitorError};
use crate::config::VmConfig;
use crate::machine::Failed;

/// What became of a guest that reset itself.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum AfterReset {
    /// It runs again, or a call has replaced or removed it meanwhile.
    GoesOn,
    /// It is over.
    Over,
}

impl Monitor {
    /// Creates a guest, which is off. `taps` are open tap descriptors, one for each network interface whose
    /// configuration names neither a tap nor a descriptor, in order.
    ///
    /// # Errors
    /// Returns [`MonitorError::Refused`] if there is a guest already, [`MonitorError::NoLauncher`] or
    /// [`MonitorError::HadGuest`] if this monitor only receives guests, and [`MonitorError::Config`] with the path of
    /// the field if the configuration is invalid.
    pub fn create(&self, mut config: VmConfig, taps: Vec<OwnedFd>) -> Result<(), MonitorError> {
        let mut state = self.allowed(Call::Create).map_err(|error| match error {
            MonitorError::Refused { .. } if self.launcher.is_none() => MonitorError::HadGuest,
            other => other,
        })?;
        let launcher = self.launcher.as_ref().ok_or(match *state {
            State::Vacated => MonitorError::HadGuest,
            _ => MonitorError::NoLauncher,
        })?;
        config.assign_taps(&taps)?;
        let plan = LaunchPlan::new(&config, launcher.dirty_log)?;
        *state = State::Guest(Box::new(Guest {
            config,
            _taps: taps,
            plan: Some(plan),
            stage: Stage::Created,
        }));
        self.events.vm("created");
        Ok(())
    }

    /// Boots a guest that was created or shut down.
    ///
    /// # Errors
    /// Returns [`MonitorError::Refused`] in any other state, and [`MonitorError::Launch`] if no machine can be made.
    pub fn boot(&self) -> Result<(), MonitorError> {
        let mut state = self.allowed(Call::Boot)?;
        match state.guest_mut() {
            Some(guest) => self.start(guest, Call::Boot),
            None => Ok(()),
        }
    }

    /// Switches the guest off without asking it. It can be booted again.
    ///
    /// # Errors
    /// Returns [`MonitorError::Refused`] if the guest is off, and [`MonitorError::Migrating`] during a migration.
    pub fn shut_down(&self) -> Result<(), MonitorError> {
        let mut state = self.allowed(Call::ShutDown)?;
        if let Some(guest) = state.guest_mut() {
            self.switch_off(guest);
            self.events.vm("shutdown");
        }
        Ok(())
    }

    /// Switches the guest off and deletes it. Idempotent: without a guest there is nothing to do.
    ///
    /// # Errors
    /// Returns [`MonitorError::Migrating`] during a migration.
    pub fn delete(&self) -> Result<(), MonitorError> {
        let mut state = self.allowed(Call::Delete)?;
        if let Some(guest) = state.guest_mut() {
            if guest.machine().is_some() {
                self.switch_off(guest);
                self.events.vm("shutdown");
            }
            *state = State::Vacated;
            self.events.vm("deleted");
        }
        Ok(())
    }

    /// Ends the guest without asking it, and boots it again with the same configuration.
    ///
    /// # Errors
    /// Returns [`MonitorError::Refused`] if the guest is off, [`MonitorError::Migrating`] during a migration,
    /// [`MonitorError::NotLaunchedHere`] if the guest arrived by migration, and [`MonitorError::Launch`] if no machine
    /// can be made: the guest is off then.
    pub fn reboot(&self) -> Result<(), MonitorError> {
        let mut state = self.allowed(Call::Reboot)?;
        match state.guest_mut() {
            Some(guest) => self.restart(guest),
            None => Ok(()),
        }
    }

    /// Acts on a guest that reset itself: boots it again if this monitor launched it and is to do so.
    ///
    /// A migration of the guest is cancelled and waited for first.
    pub(super) fn after_reset(&self) -> Result<AfterReset, MonitorError> {
        self.cancel_and_wait();
        let mut state = self.lock();
        if matches!(state.kind(), StateKind::Sending | StateKind::Unconfirmed) {
            return Err(self.refused(Call::Reboot, &state));
        }
        // Deleted, shut down, rebooted or sent away by a call meanwhile.
        let Some(guest) = state.guest_mut() else {
            return Ok(AfterReset::GoesOn);
        };
        if !matches!(guest.stage, Stage::Ended(_)) {
            return Ok(AfterReset::GoesOn);
        }
        let on_reset = self.launcher.as_ref().map(|launcher| launcher.on_reset);
        if guest.plan.is_none() || on_reset != Some(OnReset::Reboot) {
            return Ok(AfterReset::Over);
        }
        self.restart(guest)?;
        Ok(AfterReset::GoesOn)
    }

    /// The old machine goes first, because the host may not have memory for both. Other calls wait meanwhile.
    fn restart(&self, guest: &mut Guest) -> Result<(), MonitorError> {
        if guest.plan.is_none() {
            return Err(MonitorError::NotLaunchedHere(Call::Reboot));
        }
        self.events.vm("rebooting");
        self.switch_off(guest);
        self.start(guest, Call::Reboot)?;
        self.events.vm("rebooted");
        Ok(())
    }

    /// Makes a machine for a guest that has none, and lets it run.
    fn start(&self, guest: &mut Guest, call: Call) -> Result<(), MonitorError> {
        let (Some(plan), Some(launcher)) = (&guest.plan, &self.launcher) else {
            return Err(MonitorError::NotLaunchedHere(call));
        };
        self.events.vm("booting");
        let started = plan.launch(launcher, &self.callbacks).and_then(|machine| {
            machine
                .resume()
                .map_err(|Failed { error, .. }| error.into())
        });
        match started {
            Ok(machine) => guest.stage = Stage::Running(machine),
            Err(error) => {
                let failed = MonitorError::Launch(error);
                self.events.vm_because("failed", &failed.to_string());
                return Err(failed);
            }
        }
        guest.inflate_balloon();
        self.events.vm("booted");
        Ok(())
    }

    /// Releases the machine of a guest, and its memory. Other calls wait meanwhile.
    pub(super) fn switch_off(&self, guest: &mut Guest) {
        self.measurement.interrupt();
        guest.stage = Stage::Off;
    }
}
