//! Changing the size of a guest's balloon.

use serde::{Deserialize, Serialize};

use super::calls::Call;
use super::state::Guest;
use super::{Monitor, MonitorError};
use crate::config::{BalloonConfig, bytes};

/// The body of `vm.resize`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, expecting = "an object")]
pub struct ResizeData {
    /// Bytes of memory that the guest is asked to put into its balloon.
    #[serde(deserialize_with = "bytes")]
    pub desired_balloon: u64,
}

impl Monitor {
    /// Asks the guest to change the size of its balloon. The guest does so when and if it can. The size lasts over a
    /// reboot.
    ///
    /// # Errors
    /// Returns [`MonitorError::Refused`] if the guest is off, [`MonitorError::Migrating`] during a migration,
    /// [`MonitorError::Invalid`] if the guest has no balloon, and [`MonitorError::Config`] if the size is out of range.
    pub fn resize(&self, wish: &ResizeData) -> Result<(), MonitorError> {
        let mut state = self.allowed(Call::Resize)?;
        let refused = self.refused(Call::Resize, &state);
        let guest = state.guest_mut().ok_or(refused)?;
        let balloon = guest.config.balloon.ok_or_else(|| {
            MonitorError::Invalid(
                "desired_balloon: the guest has no balloon; it gets one when it is created".into(),
            )
        })?;
        let size = wish.desired_balloon;
        let wanted = BalloonConfig { size, ..balloon };
        wanted.check("desired_balloon", guest.config.memory.size)?;
        guest.config.balloon = Some(wanted);
        guest.inflate_balloon();
        self.events.vm("resized");
        Ok(())
    }
}

impl Guest {
    /// Sets the target of the balloon to the size in the configuration.
    pub(super) fn inflate_balloon(&self) {
        let control = self.machine().and_then(|machine| machine.balloon());
        if let (Some(control), Some(config)) = (control, self.config.balloon)
            && control.target() != config.pages()
        {
            control.set_target(config.pages());
        }
    }
}
