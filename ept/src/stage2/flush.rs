//! What is owed to the hardware after a change.

use core::fmt;

use crate::addr::GpaRange;
use crate::format::{Entry, HardwareFormat};
use crate::stage2::map::replace;
use crate::stage2::order::PlaceId;
use crate::stage2::pool::Chain;
use crate::stage2::{Figures, Never, Stage2, Tally, WriteFault};
use crate::walk::{Action, Outcome, Place, Record, Run, Visitor, Walk};

/// Translations that hardware may still have cached, and the tables that they came from.
///
/// Invalidate what [`Flush::interval`] names (INVEPT or INVVPID, a new ASID, TLBI IPAS2E1IS, HFENCE.GVMA), then
/// call [`Flush::done`]. Dropped instead, the tables in it stay out of use for ever, everybody who changes an
/// overlapping range has to flush all of it, and on Arm what was split or collapsed stays out of the guest's reach.
#[must_use = "the interval is to be flushed before the notifier range closes; then call `done`"]
pub struct Flush<'t, 'm, F> {
    stage2: &'t Stage2<'m, F>,
    interval: Option<GpaRange>,
    tally: Tally,
    detached: Chain,
    /// Where the change stands in the list of those that wait for their flush.
    place: Option<PlaceId>,
    /// Entries were broken, to be made.
    broken: Option<GpaRange>,
    /// Write faults that gave a page back.
    faults: u64,
}

impl<'t, 'm, F: HardwareFormat> Flush<'t, 'm, F> {
    pub(super) fn nothing(stage2: &'t Stage2<'m, F>) -> Self {
        Self {
            stage2,
            interval: None,
            tally: Tally::default(),
            detached: Chain::EMPTY,
            place: None,
            broken: None,
            faults: 0,
        }
    }

    /// What is to be flushed: the smallest range with everything that was changed, and with all that was asked for
    /// where somebody else's flush of it is not done yet. None where nothing is to be flushed. It may be larger than
    /// needed: by a huge leaf across an edge, for example, whose flags somebody else may have taken.
    pub fn interval(&self) -> Option<GpaRange> {
        self.interval
    }

    /// What was changed.
    pub fn tally(&self) -> Tally {
        self.tally
    }

    /// Tables that wait for the flush.
    pub fn tables(&self) -> usize {
        self.detached.len()
    }

    /// The hardware has forgotten the interval: the tables may be used again, and on Arm entries that were broken are
    /// made.
    pub fn done(self) {
        self.make();
        self.stage2.pool.retire(self.detached);
        if let Some(place) = self.place {
            self.stage2.order.flushed(place);
        }
    }

    /// Makes the entries that this change broke.
    fn make(&self) {
        let (Some(range), Some(place)) = (self.broken, self.place) else {
            return;
        };
        let mut making = Making {
            format: self.stage2.format,
            by: place.number(),
        };
        let mut left = Some(range);
        while let Some(range) = left {
            left = match Walk::record(self.stage2, range).run(&mut making) {
                Outcome::Completed => None,
                Outcome::Contended { at } => range.from(at),
                Outcome::Stopped { value, .. } => match value {},
            };
        }
    }

    /// Takes over what the change at `place` has done.
    pub(super) fn at(&mut self, place: PlaceId) {
        self.place = Some(place);
    }

    /// The change is over, and this is what is to be flushed.
    pub(super) fn owe(&mut self, interval: Option<GpaRange>) {
        self.interval = interval;
        if interval.is_none() {
            self.place = None;
        }
    }

    /// The raw value that replaces a live leaf or table by `raw`, the other of the two.
    pub(crate) fn replacing(&self, raw: u64) -> u64 {
        match self.place {
            Some(place) => self.stage2.format.broken(raw, place.number()),
            None => raw,
        }
    }

    /// One entry was changed, which maps `span`.
    #[inline]
    pub(super) fn changed(&mut self, span: GpaRange) {
        self.tally.entries += 1;
        self.touched(span);
    }

    /// Pages of one leaf table were changed.
    #[inline]
    pub(crate) fn changed_pages(&mut self, pages: Pages) {
        if pages.count != 0 {
            self.tally.entries += pages.count;
            self.touched(GpaRange::of(pages.first, pages.last + 1));
        }
    }

    /// A huge leaf was replaced by a table that says the same.
    pub(crate) fn split(&mut self, span: GpaRange) {
        self.tally.splits += 1;
        self.breaks(span);
        self.touched(span);
    }

    /// As [`Flush::split`] where nobody needs to forget the old leaf: the table says the same, and a stale translation
    /// is no worse than the leaf was. Break-before-make does need it.
    pub(super) fn split_unseen(&mut self, span: GpaRange) {
        if F::BREAKS {
            self.split(span);
        } else {
            self.tally.splits += 1;
        }
    }

    /// A write fault at `page` was dealt with. Whoever comes second may have cached the fault as well as the first.
    pub(super) fn fault(&mut self, fault: WriteFault, page: GpaRange) {
        let cached = match fault {
            WriteFault::Released(span) => {
                self.faults += 1;
                span
            }
            WriteFault::Writable => page,
            WriteFault::Denied | WriteFault::Absent => return,
        };
        if F::CACHES_FAULTS {
            self.touched(cached);
        }
    }

    /// What the table's figures have more for it.
    pub(super) fn figures(&self) -> Figures {
        Figures {
            splits: self.tally.splits,
            collapses: self.tally.collapses,
            faults: self.faults,
            longest_turn_ns: 0,
        }
    }

    /// A table was replaced by a huge leaf that says the same.
    pub(super) fn collapsed(&mut self, span: GpaRange) {
        self.tally.collapses += 1;
        self.breaks(span);
        self.changed(span);
    }

    pub(super) fn detached(&mut self) -> &mut Chain {
        &mut self.detached
    }

    fn breaks(&mut self, span: GpaRange) {
        if F::BREAKS {
            self.broken = Some(self.broken.map_or(span, |old| old.hull(&span)));
        }
    }

    /// Translations of `span` may be cached that are not what its entries say.
    pub(super) fn touched(&mut self, span: GpaRange) {
        self.interval = Some(self.interval.map_or(span, |old| old.hull(&span)));
    }
}

/// Changed pages of one leaf table, in order.
#[derive(Clone, Copy, Default)]
pub(crate) struct Pages {
    first: u64,
    last: u64,
    count: u64,
}

impl Pages {
    #[inline]
    pub(crate) fn add(&mut self, page: u64) {
        if self.count == 0 {
            self.first = page;
        }
        self.last = page;
        self.count += 1;
    }
}

/// Makes what one change broke.
struct Making<F> {
    format: F,
    by: u8,
}

impl<'t, 'm, F: HardwareFormat> Visitor<'t, Stage2<'m, F>, Record> for Making<F>
where
    'm: 't,
{
    type Stop = Never;

    fn entry(&mut self, place: &Place<'_, 't, Stage2<'m, F>, Record>) -> Action<Never> {
        let raw = place.raw();
        if self.format.broken_by(raw) == Some(self.by)
            && replace(place.slot(), raw, self.format.made(raw)).is_err()
        {
            return Action::Again;
        }
        match place.entry() {
            // Only entries above level 0 are ever broken.
            Entry::Table(_) if place.level().down().number() > 0 => Action::Continue,
            Entry::Table(_) | Entry::Leaf(_) | Entry::Absent => Action::Skip,
        }
    }

    fn run(&mut self, _: &Run<'_, 't, Stage2<'m, F>, Record>) -> Action<Never> {
        Action::Continue
    }
}

impl<F> fmt::Debug for Flush<'_, '_, F> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Flush")
            .field("interval", &self.interval)
            .field("tally", &self.tally)
            .field("tables", &self.detached.len())
            .finish_non_exhaustive()
    }
}
