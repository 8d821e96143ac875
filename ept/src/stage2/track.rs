//! Tracking by write faults: the right to write is withheld, and given back page by page at each first write.

use crate::addr::{Gpa, GpaRange, Level};
use crate::format::{Entry, HardwareFormat, Permissions};
use crate::notify::OpenRange;
use crate::stage2::flush::Flush;
use crate::stage2::map::replace;
use crate::stage2::protect::Rewriting;
use crate::stage2::{ChangeError, Stage2, entries_of, settled};
use crate::sync::atomic::{AtomicU64, Ordering};
use crate::walk::{Action, Outcome, Place, Record, Run, Visitor, Walk};

/// What a write fault was about.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum WriteFault {
    /// The right to write was withheld. This range, usually the one page, is writable again and was recorded; let the
    /// guest try again.
    Released(GpaRange),
    /// The page is writable: somebody else was faster, or the fault is older than a change. Let the guest try again.
    Writable,
    /// The guest may not write here.
    Denied,
    /// Nothing is mapped here.
    Absent,
}

impl<'m, F: HardwareFormat> Stage2<'m, F> {
    /// Withholds the right to write from every page of `range` that has it, so that the first write to each faults:
    /// pass those faults to [`Stage2::write_fault`]. Huge leaves stay huge until they are written to; one across an
    /// edge is split.
    ///
    /// A harvest by write faults is: open → `track_writes` → flush → take what was recorded → close. What the guest
    /// wrote before the flush is recorded by then or faults again.
    ///
    /// # Errors
    /// [`ChangeError`], with the [`Flush`] of what was done before it.
    pub fn track_writes<'t>(
        &'t self,
        range: GpaRange,
        open: &OpenRange,
    ) -> (Flush<'t, 'm, F>, Result<(), ChangeError>) {
        self.rewrite(range, open, |raw, level| {
            self.format.with_write_tracked(raw, level)
        })
    }

    /// Gives back the right to write wherever in `range` it is withheld. A huge leaf across an edge is split.
    ///
    /// No notifier range is needed: the guest may only do more than before. Nothing that it writes from here on is
    /// recorded.
    ///
    /// # Errors
    /// [`ChangeError`], with the [`Flush`] of what was done before it.
    pub fn untrack_writes<'t>(
        &'t self,
        range: GpaRange,
    ) -> (Flush<'t, 'm, F>, Result<(), ChangeError>) {
        self.in_turn(range, |flush| {
            let mut releasing = Rewriting {
                format: &self.format,
                rule: |raw, level| self.format.with_write_released(raw, level),
                flush,
            };
            let ended = Walk::record(self, range).run_allocating_in_turn(&mut releasing);
            settled(ended)
        })
    }

    /// The guest's write to `gpa` faulted. Where the right to write is withheld it is given back, and `record` is
    /// told what became writable: after that, so that no harvest can take the record and leave the page writable, and
    /// before anybody else changes the page, so that a harvest that withholds the right again finds the record.
    /// `record` must not change the page itself: it would wait for its own end. A huge leaf is split down to 4 KiB for
    /// the page; where no table is left it is released whole.
    ///
    /// No notifier range is needed: the guest may only do more than before. The flush has an interval where hardware
    /// may have cached that the write faults ([`HardwareFormat::CACHES_FAULTS`]; it is enough to flush where the guest
    /// faulted), where a split needs break-before-make, and where somebody else's flush of the page is not done yet.
    ///
    /// # Errors
    /// [`ChangeError::Beyond`], [`ChangeError::Contended`], [`ChangeError::Unflushed`]; nothing was released.
    pub fn write_fault<'t>(
        &'t self,
        gpa: Gpa,
        record: impl FnOnce(GpaRange),
    ) -> (Flush<'t, 'm, F>, Result<WriteFault, ChangeError>) {
        let range = GpaRange::of(gpa.page(), gpa.page() + 1);
        let mut found = WriteFault::Absent;
        let (flush, result) = self.in_turn(range, |flush| {
            let mut smallest = Level::PAGE;
            loop {
                let mut releasing = Releasing {
                    format: &self.format,
                    flush,
                    smallest,
                };
                match Walk::record(self, range).run_allocating_in_turn(&mut releasing) {
                    Ok(Outcome::Completed) => break Ok(()),
                    Ok(Outcome::Stopped { value, .. }) => {
                        found = value;
                        flush.fault(value, range);
                        break Ok(());
                    }
                    Ok(Outcome::Contended { at }) => {
                        break Err(ChangeError::Contended { reached: at });
                    }
                    // The next huge leaf is released as it is.
                    Err(_) => smallest = self.geometry.root_level(),
                }
            }
            .inspect(|()| {
                if let WriteFault::Released(span) = found {
                    record(span);
                }
            })
        });
        (flush, result.map(|()| found))
    }
}

/// Releases one page.
struct Releasing<'f, 't, 'm, F> {
    format: &'t F,
    flush: &'f mut Flush<'t, 'm, F>,
    /// Leaves up to this level are released as they are.
    smallest: Level,
}

impl<F: HardwareFormat> Releasing<'_, '_, '_, F> {
    /// What a fault at an entry that maps `span` is about; `None` where it changed meanwhile.
    fn release(
        &self,
        slot: &AtomicU64,
        raw: u64,
        level: Level,
        span: GpaRange,
    ) -> Option<WriteFault> {
        let Entry::Leaf(leaf) = self.format.decode(raw, level) else {
            return Some(WriteFault::Absent);
        };
        if leaf.permissions.allows(Permissions::WRITE) {
            return Some(WriteFault::Writable);
        }
        if !leaf.write_tracked {
            return Some(WriteFault::Denied);
        }
        let new = self.format.with_write_released(raw, level);
        let released = replace(slot, raw, new).is_ok();
        released.then_some(WriteFault::Released(span))
    }
}

impl<'t, 'm, F: HardwareFormat> Visitor<'t, Stage2<'m, F>, Record> for Releasing<'_, 't, 'm, F> {
    type Stop = WriteFault;

    fn replacing(&self, table: u64) -> u64 {
        self.flush.replacing(table)
    }

    fn was_split(&mut self, span: GpaRange) {
        self.flush.split_unseen(span);
    }

    fn entry(&mut self, place: &Place<'_, 't, Stage2<'m, F>, Record>) -> Action<WriteFault> {
        match place.entry() {
            Entry::Table(_) => Action::Continue,
            Entry::Leaf(leaf) if leaf.write_tracked && place.level() > self.smallest => {
                Action::Split
            }
            Entry::Absent | Entry::Leaf(_) => {
                let (slot, raw) = (place.slot(), place.raw());
                match self.release(slot, raw, place.level(), place.span()) {
                    Some(found) => Action::Stop(found),
                    None => Action::Again,
                }
            }
        }
    }

    fn run(&mut self, run: &Run<'_, 't, Stage2<'m, F>, Record>) -> Action<WriteFault> {
        let Some((page, slot)) = entries_of(run).next() else {
            return Action::Continue;
        };
        let raw = slot.load(Ordering::SeqCst);
        let span = GpaRange::of(page, page + 1);
        match self.release(slot, raw, Level::PAGE, span) {
            Some(found) => Action::Stop(found),
            None => Action::Again,
        }
    }
}
