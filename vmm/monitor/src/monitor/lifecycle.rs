//! A guest's way from its configuration to its deletion: created, booted, shut down, booted again, deleted.

use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use super::{Guest, Monitor, MonitorError, Power};
use crate::config::{ConfigError, VmConfig};
use crate::machine::Machine;

/// Makes a guest's machine, with the guest at its beginning.
pub type Relaunch =
    Box<dyn Fn() -> Result<Arc<Machine>, Box<dyn std::error::Error + Send + Sync>> + Send>;

/// Looks at a configuration, and says how a guest of this kind is started. It opens and makes nothing yet.
pub type Launcher = Box<dyn Fn(&VmConfig) -> Result<Relaunch, ConfigError> + Send + Sync>;

/// What becomes of a guest that resets its machine.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum OnReset {
    /// It is started again.
    StartAgain,
    /// It is over.
    End,
}

/// How a monitor launches guests.
pub(super) struct Launching {
    pub(super) launcher: Launcher,
    pub(super) on_reset: OnReset,
}

impl Monitor {
    /// From now on guests can be created here. The first that says how is heard.
    pub fn launch_with(&self, launcher: Launcher, on_reset: OnReset) {
        let launching = Launching { launcher, on_reset };
        self.launching.get_or_init(|| launching);
    }

    /// Creates a guest, which is off. `passed` are open taps: one for each interface that names none, in their order.
    ///
    /// # Errors
    /// There is one already; this monitor does not launch guests; a configuration that cannot be, with the field; a
    /// migration.
    pub fn create(&self, mut config: VmConfig, passed: Vec<OwnedFd>) -> Result<(), MonitorError> {
        let mut guest = self.guest();
        self.unless_at_work("create")?;
        let launching = self.launching.get().ok_or_else(|| self.no_launcher())?;
        if guest.is_some() {
            return Err(MonitorError::Exists);
        }
        config.give_taps(&passed)?;
        let relaunch = (launching.launcher)(&config)?;
        *guest = Some(Guest {
            config,
            _passed: passed,
            power: Power::Created,
            relaunch: Some(relaunch),
            ran: false,
        });
        self.events.vm("created");
        Ok(())
    }

    /// Why a monitor that takes guests in creates none.
    fn no_launcher(&self) -> MonitorError {
        match self.has_adopted.load(Ordering::Relaxed) {
            true => MonitorError::HadGuest,
            false => MonitorError::NoLauncher,
        }
    }

    /// Boots the guest that was created, or shut down.
    ///
    /// # Errors
    /// No guest, or one that is on, or came from another monitor; a machine that cannot be made; a migration.
    pub fn boot(&self) -> Result<(), MonitorError> {
        let mut guest = self.guest();
        self.unless_at_work("boot")?;
        let guest = guest.as_mut().ok_or(MonitorError::NoGuest)?;
        if let Power::On(_) = guest.power {
            return Err(MonitorError::Booted);
        }
        self.start(guest, "boot")
    }

    /// Switches the guest off without asking it. It can be booted again.
    ///
    /// # Errors
    /// No guest, or one that is off; a migration.
    pub fn shut_down(&self) -> Result<(), MonitorError> {
        let mut guest = self.guest();
        self.unless_at_work("shutdown")?;
        let guest = guest.as_mut().ok_or(MonitorError::NoGuest)?;
        guest.machine("shutdown")?;
        self.switch_off(guest);
        self.events.vm("shutdown");
        Ok(())
    }

    /// Deletes the guest, after it was switched off. Idempotent: without a guest there is nothing to do.
    ///
    /// # Errors
    /// A migration.
    pub fn delete(&self) -> Result<(), MonitorError> {
        let mut guest = self.guest();
        self.unless_at_work("delete")?;
        if let Some(mut guest) = guest.take() {
            if let Power::On(_) = guest.power {
                self.switch_off(&mut guest);
                self.events.vm("shutdown");
            }
            self.events.vm("deleted");
        }
        Ok(())
    }

    /// Makes the machine of a guest that is off, and lets it run.
    pub(super) fn start(&self, guest: &mut Guest, call: &'static str) -> Result<(), MonitorError> {
        let relaunch = guest.relaunch.as_ref();
        let relaunch = relaunch.ok_or(MonitorError::NoRelaunch(call))?;
        self.events.vm("booting");
        let started = relaunch().and_then(|machine| {
            machine.resume()?;
            Ok(machine)
        });
        let machine = started.map_err(|error| {
            let failed = MonitorError::Launch(error);
            self.events.vm_because("failed", &failed.to_string());
            failed
        })?;
        guest.power = Power::On(machine);
        guest.ask_for_balloon();
        self.events.vm("booted");
        Ok(())
    }

    /// The machine goes, and its memory with it. Calls wait meanwhile.
    pub(super) fn switch_off(&self, guest: &mut Guest) {
        self.measurement.interrupt();
        guest.power = Power::Off;
    }
}
