//! Marking pages dirty. It never fails: where memory for detail is short, the whole entry is marked.

use crate::sync::atomic::{AtomicU64, Ordering, fence};

use crate::addr::{GpaRange, Level};
use crate::format::{Entry, Tables};
use crate::tracking::table::{LeafTable, UpperTable, masks};
use crate::tracking::way::Way;
use crate::tracking::{Bits, Never, PLANE_WORDS, Plane, Tree, count};
use crate::walk::{Action, Exhausted, Outcome, Place, Record, Run, Visitor, Walk};

/// What a marking did.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct MarkTally {
    /// Pages that were clean.
    pub(crate) newly: u64,
    /// Entries marked whole because memory for detail was short.
    pub(crate) coarse: u64,
}

impl MarkTally {
    /// The figures of both.
    pub(crate) fn and(self, other: Self) -> Self {
        Self {
            newly: self.newly + other.newly,
            coarse: self.coarse + other.coarse,
        }
    }
}

impl<const PLANES: usize> Tree<PLANES> {
    /// Marks one page, which lies in a region: whether it was clean; `None`, with nothing done, where there is no leaf
    /// table for it. Inlined where the root holds entries of 1 GiB, as it does for guests of 1 to 512 GiB.
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

    /// Marks the pages of `bits` that lie in `range`, all of which lies in regions.
    #[inline]
    pub(crate) fn mark<B: Bits>(&self, range: GpaRange, bits: &B) -> MarkTally {
        if range.pages() > Level::PAGE.up().pages() {
            return self.mark_walking(range, bits);
        }
        // At most two leaf tables: the way down to each is shorter than a walk.
        let edge = Level::PAGE.up().span_at(range.first_page()).end_page();
        if range.end_page() <= edge {
            return self.mark_in_table(range, bits);
        }
        let first = self.mark_in_table(GpaRange::of(range.first_page(), edge), bits);
        first.and(self.mark_in_table(GpaRange::of(edge, range.end_page()), bits))
    }

    /// As [`Tree::mark`], for a range that lies in the span of one leaf table.
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

    /// The short way; `None` where there is no leaf table.
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

    /// Levels of tables above the leaf tables: 1 to 5.
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

/// Marks the pages of `part` in `leaf`, the leaf table at page `base` below `uppers`; the result is how many were clean.
///
/// A bit is always written with a locked operation, also where it is set already: that is what
/// orders the caller's data before it (see [`confirm`] for the alternative, which costs as much).
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
    /// The next entry without detail is marked whole: there was no memory to split it.
    whole: bool,
}

impl<'t, B: Bits, const PLANES: usize> Marking<'_, 't, B, PLANES> {
    /// An entry without detail below it.
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

/// The entry read as dirty already. Nothing needs to be written if that is still so after a full
/// fence: the caller's data is then visible before the flag is cleared, and a harvester that
/// clears it passes a full fence before it reads data. Without the fence the processor could
/// read the flag before the data has left its store buffer.
fn confirm<const PLANES: usize>(place: &Place<'_, '_, Tree<PLANES>, Record>) -> Action<Never> {
    fence(Ordering::SeqCst);
    if place.slot().load(Ordering::SeqCst) != place.raw() {
        return Action::Again;
    }
    // Whoever set the flag may not have reached the root yet.
    summarise(place.ancestors());
    Action::Skip
}

/// Sets bits; the result is the old word. A full word is one exchange, where an or that returns the
/// old value is a loop of them on x86.
#[inline]
fn set_bits(word: &AtomicU64, bits: u64) -> u64 {
    if bits == u64::MAX {
        word.swap(u64::MAX, Ordering::SeqCst)
    } else {
        word.fetch_or(bits, Ordering::SeqCst)
    }
}

/// The index of a page's word in its leaf table's planes.
#[inline]
fn word_of(page: u64) -> usize {
    usize::try_from(page / 64 % PLANE_WORDS as u64).unwrap_or(0)
}

/// Tells every level up to the root, lowest first.
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
