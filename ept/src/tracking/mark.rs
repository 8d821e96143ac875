//! Marking pages dirty. It never fails: if there is no memory for 4 KiB detail, the whole entry is marked.

use crate::sync::atomic::{AtomicU64, Ordering, fence};

use crate::addr::{GpaRange, Level};
use crate::format::{Entry, Tables};
use crate::tracking::table::{LeafTable, UpperTable, masks};
use crate::tracking::way::Way;
use crate::tracking::{Bits, Never, PLANE_WORDS, Plane, Tree, count};
use crate::walk::{Action, Exhausted, Outcome, Place, Record, Run, Visitor, Walk};

/// Figures of a mark.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct MarkTally {
    /// Number of pages that were clean before.
    pub(crate) newly: u64,
    /// Number of entries that were marked whole because memory for 4 KiB detail was short.
    pub(crate) coarse: u64,
}

impl MarkTally {
    /// Returns the sums of both.
    pub(crate) fn and(self, other: Self) -> Self {
        Self {
            newly: self.newly + other.newly,
            coarse: self.coarse + other.coarse,
        }
    }
}

impl<const PLANES: usize> Tree<PLANES> {
    /// Marks one page, which must lie in a region, and returns whether it was clean before. Returns `None`, and marks
    /// nothing, if the page has no leaf table. Inlined for trees whose root holds entries of 1 GiB, which guests of 1 to
    /// 512 GiB have.
    #[inline]
    pub(crate) fn mark_page(&self, page: u64) -> Option<bool> {
        if self.uppers() == 2 {
            return self.mark_page_below::<2>(page);
        }
        self.mark_page_in_other(page)
    }

    #[inline(never)]
    fn mark_page_in_other(&self, page: u64) -> Option<bool> {
        match self.uppers() {
            1 => self.mark_page_below::<1>(page),
            2 => self.mark_page_below::<2>(page),
            3 => self.mark_page_below::<3>(page),
            4 => self.mark_page_below::<4>(page),
            _ => self.mark_page_below::<5>(page),
        }
    }

    #[inline]
    fn mark_page_below<const UPPERS: usize>(&self, page: u64) -> Option<bool> {
        let way = Way::<PLANES, UPPERS>::down(self, page)?;
        let word = &way.leaf().plane(Plane::Dirty)[word_of(page)];
        let bit = 1 << (page % 64);
        let was_clean = word.fetch_or(bit, Ordering::SeqCst) & bit == 0;
        summarise(way.up());
        Some(was_clean)
    }

    /// Marks the pages of `bits` that lie in `range`. All of `range` must lie in regions.
    #[inline]
    pub(crate) fn mark<B: Bits>(&self, range: GpaRange, bits: &B) -> MarkTally {
        if range.pages() > Level::PAGE.up().pages() {
            return self.mark_walking(range, bits);
        }
        // The range meets at most two leaf tables. Going down to each of them is shorter than a walk.
        let edge = Level::PAGE.up().span_at(range.first_page()).end_page();
        if range.end_page() <= edge {
            return self.mark_in_table(range, bits);
        }
        let first = self.mark_in_table(GpaRange::of(range.first_page(), edge), bits);
        first.and(self.mark_in_table(GpaRange::of(edge, range.end_page()), bits))
    }

    /// As [`Tree::mark`], for a range in the span of one leaf table.
    #[inline]
    fn mark_in_table<B: Bits>(&self, range: GpaRange, bits: &B) -> MarkTally {
        let tally = match self.uppers() {
            1 => self.mark_below::<1, B>(range, bits),
            2 => self.mark_below::<2, B>(range, bits),
            3 => self.mark_below::<3, B>(range, bits),
            4 => self.mark_below::<4, B>(range, bits),
            _ => self.mark_below::<5, B>(range, bits),
        };
        tally.unwrap_or_else(|| self.mark_walking(range, bits))
    }

    /// Marks in the leaf table of `range` without a walk. Returns `None` if there is no such table.
    #[inline]
    fn mark_below<const UPPERS: usize, B: Bits>(
        &self,
        range: GpaRange,
        bits: &B,
    ) -> Option<MarkTally> {
        let way = Way::<PLANES, UPPERS>::down(self, range.first_page())?;
        let base = Level::PAGE.up().span_at(range.first_page()).first_page();
        Some(MarkTally {
            newly: mark_words(way.leaf(), base, range, bits, way.up()),
            coarse: 0,
        })
    }

    /// Returns the number of levels above the leaf tables: 1 to 5.
    #[inline]
    fn uppers(&self) -> u8 {
        self.geometry().root_level().number()
    }

    #[inline(never)]
    fn mark_walking<B: Bits>(&self, range: GpaRange, bits: &B) -> MarkTally {
        let mut marking = Marking {
            tree: self,
            range,
            bits,
            tally: MarkTally::default(),
            whole: false,
        };
        let mut left = Some(range);
        while let Some(range) = left {
            let outcome = Walk::record(self, range).run_allocating(&mut marking);
            left = match outcome {
                Ok(Outcome::Completed) => None,
                Ok(Outcome::Contended { at }) => range.from(at),
                Ok(Outcome::Stopped { value, .. }) => match value {},
                Err(Exhausted { reached }) => {
                    marking.whole = true;
                    range.from(reached)
                }
            };
        }
        marking.tally
    }
}

/// Marks the pages of `part` in `leaf`, the leaf table of page `base` below `uppers`. Returns how many were clean before.
///
/// A bit is always written with a locked operation, even if it is set already, because this operation orders the caller's
/// data before the mark. The alternative is the fence of [`confirm`], which costs as much.
#[inline]
fn mark_words<'t, B: Bits, const PLANES: usize>(
    leaf: LeafTable<'t, PLANES>,
    base: u64,
    part: GpaRange,
    bits: &B,
    uppers: impl Iterator<Item = (&'t UpperTable, usize)>,
) -> u64 {
    let plane = leaf.plane(Plane::Dirty);
    let (mut newly, mut marked) = (0, false);
    for (word, mask) in masks(base, part) {
        let bits = bits.word(base + 64 * word as u64, mask);
        if bits != 0 {
            newly += count(bits & !set_bits(&plane[word], bits));
            marked = true;
        }
    }
    if marked {
        summarise(uppers);
    }
    newly
}

struct Marking<'b, 't, B, const PLANES: usize> {
    tree: &'t Tree<PLANES>,
    range: GpaRange,
    bits: &'b B,
    tally: MarkTally,
    /// Whether the next entry without detail is marked whole, because there was no memory to split it.
    whole: bool,
}

impl<'t, B: Bits, const PLANES: usize> Marking<'_, 't, B, PLANES> {
    /// Marks in an entry without detail: the whole entry, or a part of it after a split.
    #[cold]
    fn undivided(&mut self, place: &Place<'_, 't, Tree<PLANES>, Record>) -> Action<Never> {
        if !self.bits.any(place.part()) {
            return Action::Skip;
        }
        if let Entry::Leaf(flags) = place.entry()
            && flags.dirty()
        {
            return confirm(place);
        }
        let span = place.span();
        let mut tracked = self.tree.regions().parts(span);
        let whole = tracked.all(|(part, _)| self.range.covers(&part) && self.bits.all(part));
        if whole || self.whole {
            return self.mark_whole(place);
        }
        match place.entry() {
            Entry::Leaf(_) => Action::Split,
            Entry::Absent | Entry::Table(_) => Action::Descend,
        }
    }

    fn mark_whole(&mut self, place: &Place<'_, 't, Tree<PLANES>, Record>) -> Action<Never> {
        let raw = place.raw();
        let marked = place.slot().compare_exchange(
            raw,
            raw | Plane::Dirty.flag(),
            Ordering::SeqCst,
            Ordering::Relaxed,
        );
        if marked.is_err() {
            return Action::Again;
        }
        if self.whole {
            self.whole = false;
            self.tally.coarse += 1;
        }
        self.tally.newly += self.tree.regions().pages_in(place.span());
        summarise(place.ancestors());
        Action::Skip
    }
}

/// Handles an entry that was read as dirty already. If it is still dirty after a full fence, nothing needs to be written:
/// the caller's data is then visible before the flag is cleared, and a harvester that clears the flag passes a full fence
/// before it reads the data. Without the fence, the processor could read the flag before the data has left its store
/// buffer.
fn confirm<const PLANES: usize>(place: &Place<'_, '_, Tree<PLANES>, Record>) -> Action<Never> {
    fence(Ordering::SeqCst);
    if place.slot().load(Ordering::SeqCst) != place.raw() {
        return Action::Again;
    }
    // The marker that set the flag may not have reached the root yet.
    summarise(place.ancestors());
    Action::Skip
}

/// Sets bits and returns the old word. A full word is exchanged: on x86 that is one instruction, while a `fetch_or` whose
/// result is used is a loop.
#[inline]
fn set_bits(word: &AtomicU64, bits: u64) -> u64 {
    if bits == u64::MAX {
        word.swap(u64::MAX, Ordering::SeqCst)
    } else {
        word.fetch_or(bits, Ordering::SeqCst)
    }
}

/// Returns the index of a page's word in the planes of its leaf table.
#[inline]
fn word_of(page: u64) -> usize {
    usize::try_from(page / 64 % PLANE_WORDS as u64).unwrap_or(0)
}

/// Sets the summary bits of every level up to the root, lowest first.
#[inline]
fn summarise<'t>(ancestors: impl Iterator<Item = (&'t UpperTable, usize)>) {
    for (table, index) in ancestors {
        table.set_summary(index);
    }
}

impl<'t, B: Bits, const PLANES: usize> Visitor<'t, Tree<PLANES>, Record>
    for Marking<'_, 't, B, PLANES>
{
    type Stop = Never;

    #[inline]
    fn entry(&mut self, place: &Place<'_, 't, Tree<PLANES>, Record>) -> Action<Never> {
        match place.entry() {
            Entry::Table(_) => Action::Continue,
            Entry::Absent | Entry::Leaf(_) => self.undivided(place),
        }
    }

    #[inline]
    fn run(&mut self, run: &Run<'_, 't, Tree<PLANES>, Record>) -> Action<Never> {
        let (base, uppers) = (run.span().first_page(), run.ancestors());
        self.tally.newly += mark_words(run.live_table(), base, run.part(), self.bits, uppers);
        Action::Continue
    }
}
