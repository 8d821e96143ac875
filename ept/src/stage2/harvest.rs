//! Recording and clearing the flags that hardware sets.

use crate::sync::atomic::{AtomicU64, Ordering};

use crate::addr::{GpaRange, Level};
use crate::format::{Entry, HardwareFormat, Leaf};
use crate::notify::OpenRange;
use crate::stage2::flush::Flush;
use crate::stage2::{ChangeError, Never, Stage2, entries_of, settled};
use crate::walk::{Action, Change, Place, Run, Visitor};

impl<'m, F: HardwareFormat> Stage2<'m, F> {
    /// Makes every dirty page of `range` clean and gives `record` what was dirty, in ascending order: runs of
    /// pages, and huge leaves with their true spans. It allocates nothing and cannot fail for memory. `record` must not
    /// change the range: it would wait for its own end.
    ///
    /// What is written before the flush may or may not be recorded by this call: it stays dirty then. Leaves
    /// whose format keeps no dirty flag for them are recorded while they may be written.
    ///
    /// # Errors
    /// [`ChangeError`], with the [`Flush`] of what was done before it.
    pub fn clean<'t>(
        &'t self,
        range: GpaRange,
        open: &OpenRange,
        record: impl FnMut(GpaRange),
    ) -> (Flush<'t, 'm, F>, Result<(), ChangeError>) {
        let dirty = Flag {
            is_set: |leaf| leaf.dirty,
            bits: F::dirty_bits,
        };
        self.take(range, open, dirty, record)
    }

    /// Makes every page of `range` unused and gives `record` what was used, as [`Stage2::clean`] does for what
    /// was written. What is dirty stays dirty.
    ///
    /// # Errors
    /// As [`Stage2::clean`].
    pub fn age<'t>(
        &'t self,
        range: GpaRange,
        open: &OpenRange,
        record: impl FnMut(GpaRange),
    ) -> (Flush<'t, 'm, F>, Result<(), ChangeError>) {
        let accessed = Flag {
            is_set: |leaf| leaf.accessed,
            bits: F::accessed_bits,
        };
        self.take(range, open, accessed, record)
    }

    fn take<'t>(
        &'t self,
        range: GpaRange,
        open: &OpenRange,
        flag: Flag<F>,
        record: impl FnMut(GpaRange),
    ) -> (Flush<'t, 'm, F>, Result<(), ChangeError>) {
        self.change(range, open, |walk, flush| {
            let mut taking = Taking {
                format: &self.format,
                flag,
                flush,
                pending: None,
                record,
            };
            let ended = walk.run_in_turn(&mut taking);
            if let Some(last) = taking.pending.take() {
                (taking.record)(last);
            }
            settled(Ok(ended))
        })
    }
}

/// Accessed, or dirty.
struct Flag<F> {
    is_set: fn(&Leaf) -> bool,
    bits: fn(&F, u64) -> u64,
}

struct Taking<'f, 't, 'm, F, R> {
    format: &'t F,
    flag: Flag<F>,
    flush: &'f mut Flush<'t, 'm, F>,
    /// A run that may go on.
    pending: Option<GpaRange>,
    record: R,
}

impl<F: HardwareFormat, R: FnMut(GpaRange)> Taking<'_, '_, '_, F, R> {
    /// Takes the flag of a leaf that maps `span`.
    fn take(&mut self, slot: &AtomicU64, raw: u64, level: Level, span: GpaRange) {
        let Entry::Leaf(leaf) = self.format.decode(raw, level) else {
            return;
        };
        if !(self.flag.is_set)(&leaf) {
            return;
        }
        self.hand_over_unless_met(span);
        let bits = (self.flag.bits)(self.format, raw);
        if raw & bits != 0 {
            // What hardware sets meanwhile, and what is another flag's, stays.
            slot.fetch_and(!bits, Ordering::SeqCst);
            self.flush.changed(span);
        }
        self.pending = Some(self.pending.map_or(span, |run| run.hull(&span)));
    }

    /// Gives the run away if `span` does not go on with it: before the flag of `span` is cleared, so that a closure
    /// that panics leaves nothing clean that it was not given.
    fn hand_over_unless_met(&mut self, span: GpaRange) {
        if let Some(run) = self.pending
            && run.end_page() != span.first_page()
        {
            self.pending = None;
            (self.record)(run);
        }
    }
}

impl<'t, 'm, 'o, F: HardwareFormat, R: FnMut(GpaRange)> Visitor<'t, Stage2<'m, F>, Change<'o>>
    for Taking<'_, 't, 'm, F, R>
{
    type Stop = Never;

    fn entry(&mut self, place: &Place<'_, 't, Stage2<'m, F>, Change<'o>>) -> Action<Never> {
        match place.entry() {
            Entry::Table(_) => Action::Continue,
            Entry::Absent => Action::Skip,
            Entry::Leaf(_) => {
                if place.part() != place.span() {
                    // Whoever harvests another part of it may have taken the flag, and not flushed yet.
                    self.flush.touched(place.span());
                }
                self.take(place.slot(), place.raw(), place.level(), place.span());
                Action::Skip
            }
        }
    }

    fn run(&mut self, run: &Run<'_, 't, Stage2<'m, F>, Change<'o>>) -> Action<Never> {
        for (page, slot) in entries_of(run) {
            let raw = slot.load(Ordering::SeqCst);
            self.take(slot, raw, Level::PAGE, GpaRange::of(page, page + 1));
        }
        Action::Continue
    }
}
