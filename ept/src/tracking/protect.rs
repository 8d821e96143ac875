//! Setting and clearing the protected plane.

use crate::sync::atomic::Ordering;

use crate::addr::{Gpa, GpaRange};
use crate::format::Entry;
use crate::tracking::table::masks;
use crate::tracking::{Never, Plane, Tree};
use crate::walk::{Action, Exhausted, Outcome, Place, Run, Visitor, Walk, Writes};

/// Entries that a protection walk really changed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[must_use = "the interval is to be flushed before the notifier range closes"]
pub struct Changed {
    /// Number of entries that were changed. A huge leaf counts as one.
    pub entries: u64,
    /// Number of pages that these entries map.
    pub pages: u64,
    /// Smallest range that contains all of them; `None` if nothing changed.
    pub interval: Option<GpaRange>,
}

impl Changed {
    fn add(&mut self, entries: u64, part: GpaRange, pages: u64) {
        self.entries += entries;
        self.pages += pages;
        self.interval = Some(self.interval.map_or(part, |old| old.hull(&part)));
    }

    /// Returns the sums of both, and the range around both.
    pub(crate) fn and(mut self, other: Self) -> Self {
        if let Some(part) = other.interval {
            self.add(other.entries, part, other.pages);
        }
        self
    }
}

/// Operation on the protected plane.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Toggle {
    /// Write-protects pages.
    On,
    /// Releases pages.
    Off,
    /// Releases pages. If there is no memory for 4 KiB detail, it releases the whole entry and marks it dirty.
    OffOrWhole,
}

impl Toggle {
    fn protects(self) -> bool {
        self == Self::On
    }
}

impl<const PLANES: usize> Tree<PLANES> {
    /// Applies `toggle` to the pages of `walk`, which must lie in one region. Also returns the address at which it ran out
    /// of tables, if it did.
    pub(crate) fn toggle<'t, A: Writes>(
        &'t self,
        walk: Walk<'t, Self, A>,
        toggle: Toggle,
    ) -> (Changed, Option<Gpa>) {
        let mut toggling = Toggling {
            tree: self,
            range: walk.range(),
            toggle,
            whole: false,
            changed: Changed::default(),
        };
        let mut left = Some(walk.range());
        while let Some(walk) = left.and_then(|range| walk.within(range)) {
            let range = walk.range();
            left = match walk.run_allocating(&mut toggling) {
                Ok(Outcome::Completed) => None,
                Ok(Outcome::Contended { at }) => range.from(at),
                Ok(Outcome::Stopped { value, .. }) => match value {},
                Err(Exhausted { reached }) if toggle == Toggle::OffOrWhole => {
                    toggling.whole = true;
                    range.from(reached)
                }
                Err(Exhausted { reached }) => return (toggling.changed, Some(reached)),
            };
        }
        (toggling.changed, None)
    }
}

/// Flag of a protected entry without detail.
const PROTECTED: u64 = Plane::Protected.flag();

struct Toggling<'t, const PLANES: usize> {
    tree: &'t Tree<PLANES>,
    range: GpaRange,
    toggle: Toggle,
    /// Whether the next entry without detail is released whole.
    whole: bool,
    changed: Changed,
}

impl<'t, const PLANES: usize> Toggling<'t, PLANES> {
    fn undivided<A: Writes>(
        &mut self,
        place: &Place<'_, 't, Tree<PLANES>, A>,
        protected: bool,
    ) -> Action<Never> {
        if protected == self.toggle.protects() {
            return Action::Skip;
        }
        let regions = self.tree.regions();
        if regions.covered(place.span(), self.range) {
            return self.change_whole(place, self.flip(place.raw(), PROTECTED));
        }
        if self.whole {
            self.whole = false;
            // The first write to the other released pages will not fault any more, so they count as written now.
            let raw = self.flip(place.raw(), PROTECTED) | Plane::Dirty.flag();
            return self.change_whole(place, raw);
        }
        match place.entry() {
            Entry::Leaf(_) => Action::Split,
            Entry::Absent | Entry::Table(_) => Action::Descend,
        }
    }

    /// Returns `word` with the bits of `mask` set or cleared.
    fn flip(&self, word: u64, mask: u64) -> u64 {
        if self.toggle.protects() {
            word | mask
        } else {
            word & !mask
        }
    }

    fn change_whole<A: Writes>(
        &mut self,
        place: &Place<'_, 't, Tree<PLANES>, A>,
        new: u64,
    ) -> Action<Never> {
        let (raw, slot) = (place.raw(), place.slot());
        let changed = slot.compare_exchange(raw, new, Ordering::SeqCst, Ordering::Relaxed);
        if changed.is_err() {
            return Action::Again;
        }
        if new & Plane::Dirty.flag() != 0 {
            for (table, index) in place.ancestors() {
                table.set_summary(index);
            }
        }
        let regions = self.tree.regions();
        for (number, (part, _)) in regions.parts(place.span()).enumerate() {
            self.changed.add(u64::from(number == 0), part, part.pages());
        }
        Action::Skip
    }
}

impl<'t, A: Writes, const PLANES: usize> Visitor<'t, Tree<PLANES>, A> for Toggling<'t, PLANES> {
    type Stop = Never;

    fn entry(&mut self, place: &Place<'_, 't, Tree<PLANES>, A>) -> Action<Never> {
        match place.entry() {
            Entry::Table(_) => Action::Continue,
            Entry::Absent => self.undivided(place, false),
            Entry::Leaf(flags) => self.undivided(place, flags.protected()),
        }
    }

    fn run(&mut self, run: &Run<'_, 't, Tree<PLANES>, A>) -> Action<Never> {
        let (base, part) = (run.span().first_page(), run.part());
        let plane = run.live_table().plane(Plane::Protected);
        for (word, mask) in masks(base, part) {
            // A word in which nothing changes is not written.
            let old = plane[word].load(Ordering::SeqCst);
            if self.flip(old, mask) == old {
                continue;
            }
            let changed = if self.toggle.protects() {
                mask & !plane[word].fetch_or(mask, Ordering::SeqCst)
            } else {
                mask & plane[word].fetch_and(!mask, Ordering::SeqCst)
            };
            if changed != 0 {
                let first = base + 64 * word as u64;
                let touched = GpaRange::of(
                    first + u64::from(changed.trailing_zeros()),
                    first + 64 - u64::from(changed.leading_zeros()),
                );
                let pages = u64::from(changed.count_ones());
                self.changed.add(pages, touched, pages);
            }
        }
        Action::Continue
    }
}
