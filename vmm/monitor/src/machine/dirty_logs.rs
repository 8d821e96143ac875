//! The dirty logs of a machine: every writer to guest memory that the tracker does not see by itself.
//!
//! ```text
//! vCPUs ─ KVM's log of the memory slots ─ kvm/dirty_log ─┐
//!                                                        ├→ Tracker
//! vhost-user back ends ─ one log each ─ devices ─────────┘
//! ```
//!
//! They are started, read and stopped together, so that no consumer can forget one.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use devices::virtio::VhostUser;
use ept::{Gpa, GpaRange, Notifier, Source};

use super::Result;
use super::virtio::{DevicesError, back_end_error};
use crate::kvm::dirty_log::{DirtyLog, DirtyLogMode};
use crate::kvm::slots::Slots;
use crate::memory::{DeviceMemory, GuestRam};

/// A vhost-user back end, with the name of its device.
pub(super) type NamedBackEnd = (String, VhostUser<DeviceMemory>);

/// All dirty logs of one machine.
pub struct DirtyLogs {
    slots: Arc<Slots>,
    notifier: Notifier,
    kvm: Mutex<DirtyLog>,
    back_ends: Vec<NamedBackEnd>,
}

impl DirtyLogs {
    pub(super) fn new(
        mode: DirtyLogMode,
        slots: Arc<Slots>,
        notifier: Notifier,
        back_ends: Vec<NamedBackEnd>,
    ) -> Self {
        Self {
            slots,
            notifier,
            kvm: Mutex::new(DirtyLog::new(mode)),
            back_ends,
        }
    }

    /// Checks that every writer can be logged.
    ///
    /// # Errors
    /// Returns [`DevicesError::BackEnd`] for the first back end without a dirty log.
    pub fn check(&self) -> Result<()> {
        Ok(self.each_back_end(VhostUser::can_log)?)
    }

    /// Starts all logs. Every write from now on is logged.
    ///
    /// # Errors
    /// Returns the error of the first log that cannot be started. Some logs may be on then: [`Self::stop`] stops them.
    pub fn start(&self) -> Result<()> {
        self.kvm().start(&self.slots, &self.notifier)?;
        Ok(self.each_back_end(VhostUser::start_log)?)
    }

    /// Reads all logs and marks the dirty pages in the tracker.
    ///
    /// # Errors
    /// Returns the error of KVM, or that logging is off.
    pub fn sync(&self) -> Result<()> {
        self.kvm().sync(&self.slots)?;
        for (_, back_end) in &self.back_ends {
            back_end.take_log(|first, words| {
                self.ram()
                    .tracker()
                    .mark_words(Gpa(first), words, Source::VhostUser);
            });
        }
        Ok(())
    }

    /// Clears the log for those pages of `range` whose bit is set in `dirty` (bit `n` is page `n` of `range`), so that
    /// the next write to them is logged again. The logs of back ends need no clear: reading them clears them.
    ///
    /// # Errors
    /// Returns the error of KVM, or that logging is off. [`DirtyLog::clear`] states what `range` must be.
    pub fn clear(&self, range: GpaRange, dirty: &[u64]) -> Result<()> {
        Ok(self.kvm().clear(&self.slots, range, dirty)?)
    }

    /// Stops all logs, even if one of them fails. Idempotent.
    ///
    /// # Errors
    /// Returns the error of the first log that could not be stopped.
    pub fn stop(&self) -> Result<()> {
        let kvm = self.kvm().stop(&self.slots);
        let stopped: Vec<_> = self
            .back_ends
            .iter()
            .map(|(name, back_end)| back_end.stop_log().map_err(back_end_error(name)))
            .collect();
        stopped
            .into_iter()
            .collect::<std::result::Result<(), _>>()?;
        Ok(kvm?)
    }

    /// Returns the mode of KVM's log.
    #[must_use]
    pub fn mode(&self) -> DirtyLogMode {
        self.kvm().mode()
    }

    /// Returns the guest memory that is logged.
    #[must_use]
    pub fn ram(&self) -> &Arc<GuestRam> {
        self.slots.ram()
    }

    fn each_back_end(
        &self,
        ask: impl Fn(
            &VhostUser<DeviceMemory>,
        ) -> std::result::Result<(), devices::virtio::VhostUserError>,
    ) -> std::result::Result<(), DevicesError> {
        self.back_ends
            .iter()
            .try_for_each(|(name, back_end)| ask(back_end).map_err(back_end_error(name)))
    }

    fn kvm(&self) -> MutexGuard<'_, DirtyLog> {
        self.kvm.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
