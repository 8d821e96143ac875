//! Unmapping.

use crate::sync::atomic::Ordering;

use crate::addr::{GpaRange, Level};
use crate::format::{Entry, HardwareFormat, TableId, Tables};
use crate::notify::OpenRange;
use crate::stage2::flush::{Flush, Pages};
use crate::stage2::map::replace;
use crate::stage2::pool::Chain;
use crate::stage2::{ChangeError, Stage2, change_entries, settled};
use crate::walk::{Action, Change, Place, Run, Visitor};

impl<'m, F: HardwareFormat> Stage2<'m, F> {
    /// Takes the pages of `range` away from the guest. A table that lies wholly in the range is taken out with
    /// all below it, and counts as one entry; a huge leaf across an edge is split.
    ///
    /// A table that is only emptied, page by page, stays: huge leaves fit there again once all of its span is
    /// unmapped in one call.
    ///
    /// What was dirty is forgotten: [`Stage2::clean`] the range first, under the same open range, where it
    /// matters.
    ///
    /// # Errors
    /// [`ChangeError`], with the [`Flush`] of what was done before it.
    pub fn unmap<'t>(
        &'t self,
        range: GpaRange,
        open: &OpenRange,
    ) -> (Flush<'t, 'm, F>, Result<(), ChangeError>) {
        self.change(range, open, |walk, flush| {
            let stage2 = self;
            let ended = walk.run_allocating_in_turn(&mut Unmapping { stage2, flush });
            settled(ended)
        })
    }

    /// Puts `table`, whose entries are of `level`, and every table below it into `chain`. It goes at most as
    /// deep as there are levels.
    fn detach(&self, chain: &mut Chain, table: TableId, level: Level) {
        if level > Level::PAGE {
            for slot in self.upper(table) {
                let raw = slot.load(Ordering::Acquire);
                if let Entry::Table(below) = self.format.decode(raw, level) {
                    self.detach(chain, below, level.down());
                }
            }
        }
        self.pool.push(chain, table);
    }
}

struct Unmapping<'f, 't, 'm, F> {
    stage2: &'t Stage2<'m, F>,
    flush: &'f mut Flush<'t, 'm, F>,
}

impl<'t, 'm, 'o, F: HardwareFormat> Visitor<'t, Stage2<'m, F>, Change<'o>>
    for Unmapping<'_, 't, 'm, F>
{
    type Stop = super::Never;

    fn replacing(&self, table: u64) -> u64 {
        self.flush.replacing(table)
    }

    fn was_split(&mut self, span: GpaRange) {
        self.flush.split(span);
    }

    fn entry(&mut self, place: &Place<'_, 't, Stage2<'m, F>, Change<'o>>) -> Action<super::Never> {
        let whole = place.part() == place.span();
        match place.entry() {
            Entry::Absent => Action::Skip,
            Entry::Leaf(_) if !whole => Action::Split,
            Entry::Table(_) if !whole => Action::Continue,
            entry => {
                if replace(place.slot(), place.raw(), 0).is_err() {
                    return Action::Again;
                }
                if let Entry::Table(table) = entry {
                    let below = place.level().down();
                    self.stage2.detach(self.flush.detached(), table, below);
                }
                self.flush.changed(place.span());
                Action::Skip
            }
        }
    }

    fn run(&mut self, run: &Run<'_, 't, Stage2<'m, F>, Change<'o>>) -> Action<super::Never> {
        let mut pages = Pages::default();
        // A locked operation only where there is something.
        change_entries(
            run,
            |_| 0,
            |page, slot, _, _| {
                if slot.swap(0, Ordering::SeqCst) != 0 {
                    pages.add(page);
                }
            },
        );
        self.flush.changed_pages(pages);
        Action::Continue
    }
}
