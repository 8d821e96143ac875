//! Starting a guest again: after it reset itself, and when a call asks for it.

use super::{Guest, Monitor, MonitorError, OnReset, Power, migrating};

/// What became of a guest that reset itself.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum AfterReset {
    /// It runs, from its beginning; or it is off, or somewhere else by now.
    GoesOn,
    /// It is over.
    Over,
}

impl Monitor {
    /// Ends the guest without asking it, and starts it again with the same configuration.
    ///
    /// # Errors
    /// No guest that is on, a migration, a guest that cannot be started again, a machine that cannot be made: then
    /// the guest is off.
    pub fn reboot(&self) -> Result<(), MonitorError> {
        let mut guest = self.guest();
        self.unless_migrating("reboot", &guest)?;
        let guest = guest.as_mut().ok_or(MonitorError::NoGuest)?;
        self.start_again(guest)
    }

    /// Does what is to be done when the guest reset itself: its machine is made anew and runs, if this monitor
    /// launched it. A migration of it is waited for: it fails, because a guest that has ended is not sent.
    ///
    /// # Errors
    /// A machine that cannot be made; a migration that does not end.
    pub fn after_reset(&self) -> Result<AfterReset, MonitorError> {
        let phase = self.cancel_and_wait();
        let mut guest = self.guest();
        // Sent away, or deleted.
        let Some(guest) = guest.as_mut() else {
            return Ok(AfterReset::GoesOn);
        };
        match &guest.power {
            Power::On(machine) if machine.has_ended() => {}
            // Shut down, or started again, by a call meanwhile.
            Power::On(_) | Power::Created | Power::Off => return Ok(AfterReset::GoesOn),
        }
        let on_reset = self.launching.get().map(|launching| launching.on_reset);
        if guest.relaunch.is_none() || on_reset != Some(OnReset::StartAgain) {
            return Ok(AfterReset::Over);
        }
        if phase.is_active() {
            return Err(migrating("reboot", phase));
        }
        self.start_again(guest)?;
        Ok(AfterReset::GoesOn)
    }

    /// The old machine goes first: its memory may be needed for the new one. Calls wait meanwhile.
    fn start_again(&self, guest: &mut Guest) -> Result<(), MonitorError> {
        if guest.relaunch.is_none() {
            return Err(MonitorError::NoRelaunch("reboot"));
        }
        self.events.vm("rebooting");
        self.switch_off(guest);
        self.start(guest, "reboot")?;
        self.events.vm("rebooted");
        Ok(())
    }
}
