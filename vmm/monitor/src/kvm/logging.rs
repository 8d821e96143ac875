//! The dirty log of a machine's slots, started, read and cleared; what it says goes into the tracker.

use std::io;
use std::iter;

use ept::{GpaRange, Notifier, OpenError, Source};

use super::dirty_log::{self, DirtyLogMode};
use super::slots::{Slot, SlotError, Slots};
use crate::memory::{GuestRam, MemoryError, byte_len};

/// Why the dirty log could not be used.
#[derive(Debug, thiserror::Error)]
pub enum LogError {
    /// A slot could not be changed.
    #[error(transparent)]
    Slot(#[from] SlotError),
    /// A vCPU did not let go of memory while its log was switched.
    #[error("stopping the vCPUs to switch the dirty log: {0}")]
    Notifier(#[from] OpenError),
    /// KVM refused to read or clear a log.
    #[error("{call} of slot {slot}: {source}")]
    Kvm {
        /// The call's name in the kernel's documentation.
        call: &'static str,
        /// The slot.
        slot: u32,
        /// What KVM said.
        source: io::Error,
    },
    /// The log was read or cleared while it was off.
    #[error("the dirty log is off")]
    Off,
    /// The kernel does not say what is populated.
    #[error(transparent)]
    Memory(#[from] MemoryError),
}

/// The dirty log of one machine.
pub struct DirtyLog {
    mode: DirtyLogMode,
    slots: Vec<SlotLog>,
}

/// What is known of one slot's log, as bitmaps: bit `n` of the whole is the slot's page `n`.
#[derive(Default)]
struct SlotLog {
    /// The log as it was read last.
    dirty: Vec<u64>,
    /// Pages that a log which began all dirty calls dirty only because nobody has cleared them yet. Most
    /// of them hold nothing, and then there is nothing to send.
    never_cleared: Vec<u64>,
}

impl DirtyLog {
    /// A log in `mode`, which KVM has been configured for.
    #[must_use]
    pub fn new(mode: DirtyLogMode) -> Self {
        Self {
            mode,
            slots: Vec::new(),
        }
    }

    /// The mode.
    #[must_use]
    pub fn mode(&self) -> DirtyLogMode {
        self.mode
    }

    /// Begins to log. The vCPUs are out of the guest meanwhile: every write is before the log, or in it.
    ///
    /// # Errors
    /// KVM's, and a vCPU that does not stop.
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

    /// Ends logging.
    ///
    /// # Errors
    /// KVM's. No vCPU needs to stop for it: what is still logged is of no use to anybody.
    pub fn stop(&mut self, slots: &Slots) -> Result<(), LogError> {
        self.slots.clear();
        Ok(slots.stop_logging()?)
    }

    /// What is read from a log that is off would be taken for "nothing is dirty".
    fn check_on(&self, slots: &Slots) -> Result<(), LogError> {
        if self.slots.len() == slots.slots().len() {
            Ok(())
        } else {
            Err(LogError::Off)
        }
    }

    /// Brings every slot's log into the tracker.
    ///
    /// # Errors
    /// KVM's.
    pub fn sync(&mut self, slots: &Slots) -> Result<(), LogError> {
        self.check_on(slots)?;
        for (slot, log) in slots.slots().iter().zip(&mut self.slots) {
            dirty_log::get(slots.vm(), slot.id, slot.range.pages(), &mut log.dirty)
                .map_err(|source| kvm_error("KVM_GET_DIRTY_LOG", slot, source))?;
            log.mark_populated(slot, slots.ram())?;
            log.mark_written(slot, slots.ram());
        }
        Ok(())
    }

    /// What the guest writes to `range` from now on is logged again, for the pages whose bit is set in
    /// `dirty` (bit `n`: page `n` of `range`).
    ///
    /// `range` lies in one slot; it begins at a multiple of 64 pages from the slot's first, and so does
    /// its end, unless the slot ends there.
    ///
    /// # Errors
    /// KVM's.
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
                .and_then(|pages| dirty_log::clear(slots.vm(), slot.id, first, pages, dirty))
                .map_err(|source| kvm_error("KVM_CLEAR_DIRTY_LOG", slot, source))?;
            log.cleared(first, dirty);
        }
        Ok(())
    }
}

impl SlotLog {
    fn new(slot: &Slot, never_cleared: u64) -> Self {
        let words = usize::try_from(slot.range.pages().div_ceil(64)).unwrap_or(usize::MAX);
        Self {
            dirty: Vec::new(),
            never_cleared: vec![never_cleared; words],
        }
    }

    /// Marks the pages that hold something among those that were never cleared, and takes all of those out
    /// of `dirty`.
    ///
    /// The memory is looked at after the log was read: a page that is populated later stays dirty in the
    /// log, because nobody clears it, and is found the next time.
    fn mark_populated(&mut self, slot: &Slot, ram: &GuestRam) -> Result<(), LogError> {
        let mut never_cleared = Vec::with_capacity(self.dirty.len());
        for (dirty, never) in self.dirty.iter_mut().zip(&self.never_cleared) {
            never_cleared.push(*dirty & never);
            *dirty &= !never;
        }
        // Many small holes are looked at together.
        if runs(&never_cleared).nth(FEW_RUNS).is_some() {
            return self.mark_all_populated(slot, ram, &never_cleared);
        }
        for (first, pages) in runs(&never_cleared) {
            // The bits beyond the slot's last page are zero in KVM's log.
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

    /// As the loop above, by one look at all of the slot.
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

    fn mark_written(&self, slot: &Slot, ram: &GuestRam) {
        ram.tracker()
            .mark_words(slot.range.start(), &self.dirty, Source::Vcpu);
    }

    fn cleared(&mut self, first_page: u64, dirty: &[u64]) {
        let first = usize::try_from(first_page / 64).unwrap_or(usize::MAX);
        for (never, dirty) in self.never_cleared.iter_mut().skip(first).zip(dirty) {
            *never &= !dirty;
        }
    }
}

/// Up to so many holes are looked at one by one.
const FEW_RUNS: usize = 64;

/// Sets `count` bits from `first` on; those beyond the bitmap are not there.
fn set_bits(words: &mut [u64], first: u64, count: u64) {
    let end = first + count;
    let mut at = first;
    while at < end {
        let next = (at / 64 + 1) * 64;
        let mut mask = u64::MAX << (at % 64);
        if end < next {
            mask &= (1 << (end % 64)) - 1;
        }
        if let Some(word) = usize::try_from(at / 64)
            .ok()
            .and_then(|index| words.get_mut(index))
        {
            *word |= mask;
        }
        at = next;
    }
}

/// The runs of ones in a bitmap: the first bit of each, and how many.
fn runs(words: &[u64]) -> impl Iterator<Item = (u64, u64)> {
    let total = words.len() as u64 * 64;
    let mut at = 0;
    iter::from_fn(move || {
        let first = next_bit(words, at, 0)?;
        at = next_bit(words, first, u64::MAX).unwrap_or(total);
        Some((first, at - first))
    })
}

/// The first bit from `at` on that differs from those of `skipped`: 0 finds a one, all ones a zero.
fn next_bit(words: &[u64], at: u64, skipped: u64) -> Option<u64> {
    let mut index = usize::try_from(at / 64).ok()?;
    let mut word = (words.get(index)? ^ skipped) & (u64::MAX << (at % 64));
    while word == 0 {
        index += 1;
        word = words.get(index)? ^ skipped;
    }
    Some(index as u64 * 64 + u64::from(word.trailing_zeros()))
}

fn kvm_error(call: &'static str, slot: &Slot, source: io::Error) -> LogError {
    LogError::Kvm {
        call,
        slot: slot.id,
        source,
    }
}

/// The smallest range that has all slots.
fn span(slots: &Slots) -> GpaRange {
    slots
        .slots()
        .iter()
        .map(|slot| slot.range)
        .reduce(|all, next| all.hull(&next))
        .unwrap_or(GpaRange::ALL)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn set_bits_sets_just_those(first in 0..300_u64, count in 0..300_u64) {
            let mut words = [0_u64; 10];
            set_bits(&mut words, first, count);
            let found: Vec<_> = runs(&words).collect();
            let wanted: Vec<_> = (count > 0).then_some((first, count)).into_iter().collect();
            prop_assert_eq!(found, wanted);
        }

        #[test]
        fn runs_are_the_ones_of_the_bitmap(words in proptest::collection::vec(
            prop_oneof![Just(0), Just(u64::MAX), any::<u64>()], 0..6)
        ) {
            let mut found = vec![0_u64; words.len()];
            let mut last_end = None;
            for (first, count) in runs(&words) {
                prop_assert!(count > 0 && last_end < Some(first), "maximal, in order");
                last_end = Some(first + count);
                for bit in first..first + count {
                    found[usize::try_from(bit / 64).unwrap()] |= 1 << (bit % 64);
                }
            }
            prop_assert_eq!(found, words);
        }
    }
}
