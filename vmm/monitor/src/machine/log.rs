//! The dirty logs of a machine: all who write to its memory without the tracker's seeing it, under one name.
//!
//! ```text
//! vCPUs ─ KVM's log of the slots ─ kvm/logging.rs ─┐
//!                                                  ├→ Tracker
//! vhost-user back ends ─ a log each ─ devices ─────┘
//! ```
//!
//! They are started, brought into the tracker and ended together: whoever asks what is dirty cannot forget one.

use std::sync::{MutexGuard, PoisonError};

use ept::{GpaRange, Notifier};

use super::{Machine, Result};
use crate::kvm::dirty_log::DirtyLogMode;
use crate::kvm::logging::DirtyLog;

impl Machine {
    /// Whether all writers can be logged.
    ///
    /// # Errors
    /// The first that cannot, by the device's name.
    pub fn can_log(&self) -> Result<()> {
        Ok(self.devices.can_log()?)
    }

    /// From now on all that is written is logged.
    ///
    /// # Errors
    /// A writer that cannot be logged, a vCPU that does not stop, and KVM's. Some logs may be on then:
    /// [`Self::stop_log`] ends them.
    pub fn start_log(&self) -> Result<()> {
        self.dirty_log().start(&self.slots, &self.notifier)?;
        Ok(self.devices.start_log()?)
    }

    /// Brings what was logged into the tracker.
    ///
    /// # Errors
    /// KVM's; a log that is off.
    pub fn sync_log(&self) -> Result<()> {
        self.dirty_log().sync(&self.slots)?;
        self.devices.sync_log(self.ram().tracker());
        Ok(())
    }

    /// A write to `range` is logged again from now on, for the pages whose bit is set in `dirty` (bit `n`: page `n` of
    /// `range`). For back ends there is nothing to do: what is taken out of their logs is logged again.
    ///
    /// # Errors
    /// KVM's; a log that is off. See [`DirtyLog::clear`] for the range.
    pub fn clear_log(&self, range: GpaRange, dirty: &[u64]) -> Result<()> {
        Ok(self.dirty_log().clear(&self.slots, range, dirty)?)
    }

    /// Ends all logs, whatever comes of one. Idempotent.
    ///
    /// # Errors
    /// The first that could not be ended.
    pub fn stop_log(&self) -> Result<()> {
        let vcpus = self.dirty_log().stop(&self.slots);
        self.devices.stop_log()?;
        Ok(vcpus?)
    }

    /// In which mode KVM logs.
    #[must_use]
    pub fn log_mode(&self) -> DirtyLogMode {
        self.dirty_log().mode()
    }

    /// By which vCPUs are stopped for changes of memory.
    #[must_use]
    pub fn notifier(&self) -> &Notifier {
        &self.notifier
    }

    fn dirty_log(&self) -> MutexGuard<'_, DirtyLog> {
        self.log.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
