//! Starting a guest again: after it reset itself, and when a call asks for it.

use std::sync::Arc;

use super::{Guest, Monitor, MonitorError, migrating};
use crate::machine::Machine;
use crate::vcpu::GuestEnd;

/// Makes a guest's machine anew, as it was when it was launched.
pub type Relaunch =
    Box<dyn Fn() -> Result<Arc<Machine>, Box<dyn std::error::Error + Send + Sync>> + Send>;

/// What became of a guest that reset itself.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum AfterReset {
    /// It runs, from its beginning; or it is somewhere else by now.
    GoesOn,
    /// It is over.
    Over,
}

impl Monitor {
    /// Ends the guest without asking it, and starts it again with the same configuration.
    ///
    /// # Errors
    /// No guest, a migration, a guest that cannot be started again, a machine that cannot be made.
    pub fn reboot(&self) -> Result<(), MonitorError> {
        let mut guest = self.guest();
        self.unless_migrating("reboot", &guest)?;
        self.start_again(&mut guest)
    }

    /// Does what is to be done when the guest reset itself: its machine is made anew and runs, if this monitor
    /// launched it. A migration of it is waited for: it fails, because a guest that has ended is not sent.
    ///
    /// # Errors
    /// A machine that cannot be made; a migration that does not end.
    pub fn after_reset(&self) -> Result<AfterReset, MonitorError> {
        let phase = self.cancel_and_wait();
        let mut guest = self.guest();
        match guest.as_ref() {
            // Sent away; or started again by a call meanwhile.
            None => return Ok(AfterReset::GoesOn),
            Some(guest) if !guest.machine.has_ended() => return Ok(AfterReset::GoesOn),
            Some(guest) if guest.relaunch.is_none() => return Ok(AfterReset::Over),
            Some(_) if phase.is_active() => return Err(migrating("reboot", phase)),
            Some(_) => {}
        }
        self.start_again(&mut guest)?;
        Ok(AfterReset::GoesOn)
    }

    /// The old machine goes first: its memory may be needed for the new one. Calls wait meanwhile.
    fn start_again(&self, guest: &mut Option<Guest>) -> Result<(), MonitorError> {
        let relaunch = guest.as_mut().and_then(|guest| guest.relaunch.take());
        let relaunch = relaunch.ok_or(MonitorError::NoReboot)?;
        let old = guest.take().ok_or(MonitorError::NoGuest)?;
        let config = old.config;
        drop(old.machine);
        let started = relaunch().and_then(|machine| {
            machine.resume()?;
            Ok(machine)
        });
        let machine = started.map_err(|error| {
            let failed = MonitorError::Restart(error);
            self.end(GuestEnd::Failed(failed.to_string()));
            failed
        })?;
        *guest = Some(Guest {
            machine,
            config,
            relaunch: Some(relaunch),
            ran: false,
        });
        Ok(())
    }
}
