//! Changing what a running guest has.

use serde::{Deserialize, Serialize};

use super::{Guest, Monitor, MonitorError};
use crate::config::{BalloonConfig, bytes};

/// The body of `vm.resize`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, expecting = "an object")]
pub struct ResizeData {
    /// Bytes that the guest is asked to have in its balloon.
    #[serde(deserialize_with = "bytes")]
    pub desired_balloon: u64,
}

impl Monitor {
    /// Asks the guest for another size of its balloon; it does so when and if it can. The size lasts over a reboot.
    ///
    /// # Errors
    /// No guest that is on, one without a balloon, a size that cannot be, a migration.
    pub fn resize(&self, wish: &ResizeData) -> Result<(), MonitorError> {
        let mut guest = self.guest();
        self.unless_at_work("resize")?;
        let guest = guest.as_mut().ok_or(MonitorError::NoGuest)?;
        guest.machine("resize")?;
        let balloon = guest.config.balloon.ok_or_else(|| {
            MonitorError::Invalid(
                "desired_balloon: the guest has no balloon; it gets one when it is created".into(),
            )
        })?;
        let size = wish.desired_balloon;
        let wanted = BalloonConfig { size, ..balloon };
        wanted.check("desired_balloon", guest.config.memory.size)?;
        guest.config.balloon = Some(wanted);
        guest.ask_for_balloon();
        self.events.vm("resized");
        Ok(())
    }
}

impl Guest {
    /// Has the balloon ask the guest for what the configuration says.
    pub(super) fn ask_for_balloon(&self) {
        let control = self.machine("resize").ok().and_then(|m| m.balloon());
        if let (Some(control), Some(config)) = (control, self.config.balloon)
            && control.target() != config.pages()
        {
            control.set_target(config.pages());
        }
    }

    /// Bytes that the guest says are in its balloon.
    pub(super) fn ballooned(&self) -> u64 {
        let machine = self.machine("info").ok();
        let control = machine.and_then(|machine| machine.balloon());
        control.map_or(0, |control| u64::from(control.actual()) * ept::PAGE_SIZE)
    }
}
