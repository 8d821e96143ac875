//! KVM's dirty log (S22): started, read into the tracker, cleared and stopped for all memory slots of a machine.

mod bitmap;
mod ioctls;
mod mode;

use std::io;

use ept::{GpaRange, Notifier, OpenError, Source};

use bitmap::{runs, set_bits};
pub use ioctls::configure;
pub use mode::DirtyLogMode;

use super::slots::{Slot, SlotError, Slots};
use crate::memory::{GuestRam, MemoryError, byte_len};

/// Reasons why the dirty log cannot be started, read, cleared or stopped.
#[derive(Debug, thiserror::Error)]
pub enum LogError {
    /// KVM rejected a change of a slot's flags.
    #[error(transparent)]
    Slot(#[from] SlotError),
    /// A vCPU did not leave the guest while logging was switched on.
    #[error("stopping the vCPUs to switch the dirty log: {0}")]
    Notifier(#[from] OpenError),
    /// KVM rejected a call that reads or clears the log of a slot.
    #[error("{call} of slot {slot}: {source}")]
    Kvm {
        /// Name of the ioctl.
        call: &'static str,
        /// Number of the slot.
        slot: u32,
        /// Error that KVM returned.
        source: io::Error,
    },
    /// The log was read or cleared while logging was off.
    #[error("the dirty log is off")]
    Off,
    /// The populated pages of guest memory could not be determined.
    #[error(transparent)]
    Memory(#[from] MemoryError),
}

/// KVM's dirty log of one machine.
pub struct DirtyLog {
    mode: DirtyLogMode,
    slots: Vec<SlotLog>,
}

/// Log of one slot as bitmaps: bit `n` is page `n` of the slot.
#[derive(Default)]
struct SlotLog {
    /// Dirty bitmap as KVM returned it last.
    dirty: Vec<u64>,
    /// Pages that KVM reports dirty only because the log started with every page dirty and they were never cleared.
    /// Most of them are not populated, so that there is nothing to send.
    never_cleared: Vec<u64>,
}

impl DirtyLog {
    /// Creates a log that is off. KVM must have been set up for `mode` by [`configure`].
    #[must_use]
    pub fn new(mode: DirtyLogMode) -> Self {
        Self {
            mode,
            slots: Vec::new(),
        }
    }

    /// Returns the mode in which KVM logs.
    #[must_use]
    pub fn mode(&self) -> DirtyLogMode {
        self.mode
    }

    /// Starts logging on every slot. A notifier range holds the vCPUs out of the guest meanwhile, so that a write
    /// either completed before logging started or is logged.
    ///
    /// # Errors
    /// Returns [`LogError::Notifier`] if a vCPU does not stop, and [`LogError::Slot`] if KVM rejects the change.
    pub fn start(&mut self, slots: &Slots, notifier: &Notifier) -> Result<(), LogError> {
        let at_first = if self.mode.starts_all_dirty() {
            u64::MAX
        } else {
            0
        };
        self.slots = slots
            .slots()
            .iter()
            .map(|slot| SlotLog::new(slot, at_first))
            .collect();
        let _open = notifier.open(span(slots))?;
        Ok(slots.start_logging()?)
    }

    /// Stops logging. vCPUs may run, because what is still in the log is discarded.
    ///
    /// # Errors
    /// Returns [`LogError::Slot`] if KVM rejects the change.
    pub fn stop(&mut self, slots: &Slots) -> Result<(), LogError> {
        self.slots.clear();
        Ok(slots.stop_logging()?)
    }

    /// Refuses to read a log that is off: its empty bitmap would be taken for "nothing is dirty".
    fn check_on(&self, slots: &Slots) -> Result<(), LogError> {
        if self.slots.len() == slots.slots().len() {
            Ok(())
        } else {
            Err(LogError::Off)
        }
    }

    /// Reads the log of every slot and marks its dirty pages in the tracker.
    ///
    /// # Errors
    /// Returns [`LogError::Off`] if logging is off, [`LogError::Kvm`] if KVM_GET_DIRTY_LOG fails, and
    /// [`LogError::Memory`] if the populated pages cannot be determined.
    pub fn sync(&mut self, slots: &Slots) -> Result<(), LogError> {
        self.check_on(slots)?;
        for (slot, log) in slots.slots().iter().zip(&mut self.slots) {
            ioctls::get(slots.vm(), slot.id, slot.range.pages(), &mut log.dirty)
                .map_err(|source| kvm_error("KVM_GET_DIRTY_LOG", slot, source))?;
            log.mark_populated(slot, slots.ram())?;
            log.mark_written(slot, slots.ram());
        }
        Ok(())
    }

    /// Clears the dirty bits of those pages of `range` whose bit is set in `dirty` (bit `n` is page `n` of `range`), so
    /// that the next write to them is logged again. Must be called before the pages are read.
    ///
    /// `range` must lie in one slot, and begin at a multiple of 64 pages from the first page of the slot. Its end must
    /// be such a multiple too, or the end of the slot.
    ///
    /// # Errors
    /// Returns [`LogError::Off`] if logging is off, and [`LogError::Kvm`] if KVM_CLEAR_DIRTY_LOG fails.
    pub fn clear(&mut self, slots: &Slots, range: GpaRange, dirty: &[u64]) -> Result<(), LogError> {
        self.check_on(slots)?;
        if !self.mode.needs_clear() {
            return Ok(());
        }
        let logs = slots.slots().iter().zip(&mut self.slots);
        for (slot, log) in logs.filter(|(slot, _)| slot.range.covers(&range)) {
            let first = range.first_page() - slot.range.first_page();
            u32::try_from(range.pages())
                .map_err(io::Error::other)
                .and_then(|pages| ioctls::clear(slots.vm(), slot.id, first, pages, dirty))
                .map_err(|source| kvm_error("KVM_CLEAR_DIRTY_LOG", slot, source))?;
            log.cleared(first, dirty);
        }
        Ok(())
    }
}

impl SlotLog {
    /// Creates the log of one slot. Each word of `never_cleared` starts with this value.
    fn new(slot: &Slot, never_cleared: u64) -> Self {
        let words = usize::try_from(slot.range.pages().div_ceil(64)).unwrap_or(usize::MAX);
        Self {
            dirty: Vec::new(),
            never_cleared: vec![never_cleared; words],
        }
    }

    /// Removes the pages that were never cleared from `dirty`, and marks those of them that are populated.
    ///
    /// The populated pages are queried after the log was read. A page that becomes populated later stays dirty in the
    /// log, because it was not cleared, and is found by the next call.
    fn mark_populated(&mut self, slot: &Slot, ram: &GuestRam) -> Result<(), LogError> {
        let mut never_cleared = Vec::with_capacity(self.dirty.len());
        for (dirty, never) in self.dirty.iter_mut().zip(&self.never_cleared) {
            never_cleared.push(*dirty & never);
            *dirty &= !never;
        }
        // One query of the whole slot is faster than many queries of small runs.
        if runs(&never_cleared).nth(FEW_RUNS).is_some() {
            return self.mark_all_populated(slot, ram, &never_cleared);
        }
        for (first, pages) in runs(&never_cleared) {
            // KVM leaves the bits beyond the last page of the slot zero.
            let run = GpaRange::from_pages(slot.range.first_page() + first, pages);
            let Some(run) = run.ok().and_then(|run| run.intersection(&slot.range)) else {
                continue;
            };
            for populated in ram.populated_in(run)? {
                let bytes = byte_len(&populated);
                ram.tracker().mark(populated.start(), bytes, Source::Vcpu);
            }
        }
        Ok(())
    }

    /// Marks the populated pages of `never_cleared`, by one query of the populated pages of the whole slot.
    fn mark_all_populated(
        &self,
        slot: &Slot,
        ram: &GuestRam,
        never_cleared: &[u64],
    ) -> Result<(), LogError> {
        let mut populated = vec![0_u64; never_cleared.len()];
        for range in ram.populated_in(slot.range)? {
            let first = range.first_page() - slot.range.first_page();
            set_bits(&mut populated, first, range.pages());
        }
        for (word, never) in populated.iter_mut().zip(never_cleared) {
            *word &= never;
        }
        ram.tracker()
            .mark_words(slot.range.start(), &populated, Source::Vcpu);
        Ok(())
    }

    /// Marks the pages in `dirty` in the tracker.
    fn mark_written(&self, slot: &Slot, ram: &GuestRam) {
        ram.tracker()
            .mark_words(slot.range.start(), &self.dirty, Source::Vcpu);
    }

    /// Notes that the pages in `dirty` were cleared in KVM's log. Bit 0 of `dirty` is the page `first_page` of the
    /// slot.
    fn cleared(&mut self, first_page: u64, dirty: &[u64]) {
        let first = usize::try_from(first_page / 64).unwrap_or(usize::MAX);
        for (never, dirty) in self.never_cleared.iter_mut().skip(first).zip(dirty) {
            *never &= !dirty;
        }
    }
}

/// Maximum number of runs whose populated pages are queried one by one.
const FEW_RUNS: usize = 64;

fn kvm_error(call: &'static str, slot: &Slot, source: io::Error) -> LogError {
    LogError::Kvm {
        call,
        slot: slot.id,
        source,
    }
}

/// Returns the smallest range that covers all slots.
fn span(slots: &Slots) -> GpaRange {
    slots
        .slots()
        .iter()
        .map(|slot| slot.range)
        .reduce(|all, next| all.hull(&next))
        .unwrap_or(GpaRange::ALL)
}
