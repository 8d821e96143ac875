//! Taking dirty pages: every bit that is cleared is passed to a sink.

use crate::sync::atomic::{AtomicU64, Ordering, fence};

use crate::addr::{Gpa, GpaRange, Level, MAX_LEVELS};
use crate::format::Entry;
use crate::tracking::table::{UpperTable, masks, tracked_words};
use crate::tracking::{Flags, PLANE_WORDS, Plane, Tree, count};
use crate::walk::{Action, Exhausted, Outcome, Place, Record, Run, Visitor, Walk, Window};

/// Receiver of dirty pages that are taken, in order of address.
pub(crate) trait Sink {
    /// Reserves space for `parts` more pieces, and returns whether there is memory. It must succeed before any dirty bit is
    /// cleared, so that a failed allocation cannot lose a page.
    fn make_room(&mut self, parts: usize) -> bool;

    /// Receives a range, all of which was dirty.
    fn range(&mut self, part: GpaRange);

    /// Receives the dirty bits of the leaf table of page `base`. `pages` of them are set.
    fn words(&mut self, base: u64, words: &[u64; PLANE_WORDS], pages: u64);
}

/// How far [`Tree::take`] got.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Taken {
    /// Every dirty page of the range was taken.
    All,
    /// The limit was reached. No page from here on was taken.
    Limit(Gpa),
    /// The sink has no memory. No page from here on was taken.
    NoRoom(Gpa),
}

/// A sink that drops all pages.
pub(crate) struct Discard;

impl Sink for Discard {
    fn make_room(&mut self, _: usize) -> bool {
        true
    }

    fn range(&mut self, _: GpaRange) {}

    fn words(&mut self, _: u64, _: &[u64; PLANE_WORDS], _: u64) {}
}

impl<const PLANES: usize> Tree<PLANES> {
    /// Clears the dirty bits of `range` and passes their pages to `sink`, up to `limit` pages. It may exceed the limit by the
    /// pages of one leaf table.
    ///
    /// The caller must hold the tracker's lock, so that only one thread takes pages. Other threads may mark meanwhile.
    pub(crate) fn take<S: Sink>(&self, range: GpaRange, limit: u64, sink: &mut S) -> Taken {
        let mut taking = Taking::new(self, range, limit, sink);
        let mut left = range;
        let taken = loop {
            let outcome = Walk::record(self, left).run_allocating(&mut taking);
            let at = match outcome {
                Ok(Outcome::Completed) => break Taken::All,
                Ok(Outcome::Stopped { value, at }) => break value.at(at),
                Ok(Outcome::Contended { at }) => at,
                Err(Exhausted { reached }) => {
                    taking.splits = Splits::Impossible;
                    reached
                }
            };
            taking.restore();
            match left.from(at) {
                // An entry that lies partly before `rest` straddles the start from now on. If a look at the rest
                // cleared its summary bit, marks in the part before would be hidden.
                Some(rest) => (left, taking.range) = (rest, rest),
                None => break Taken::All,
            }
        };
        if taken != Taken::All {
            taking.restore();
        }
        // Pairs with the fence of a marker that found its page's entry dirty and therefore wrote nothing to the tree: its
        // write to the page is visible after this.
        fence(Ordering::SeqCst);
        taken
    }
}

/// Reason why a walk that takes pages stops.
enum Stop {
    Limit,
    NoRoom,
}

impl Stop {
    fn at(self, at: Gpa) -> Taken {
        match self {
            Self::Limit => Taken::Limit(at),
            Self::NoRoom => Taken::NoRoom(at),
        }
    }
}

/// Whether the next coarse entry can be split.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Splits {
    Possible,
    /// There was no memory for a leaf table.
    Impossible,
}

struct Taking<'s, 't, S, const PLANES: usize> {
    tree: &'t Tree<PLANES>,
    range: GpaRange,
    /// Number of pages that may still be taken.
    left: u64,
    splits: Splits,
    /// Summary bits that were cleared and whose entries were not all visited yet, by level.
    summaries: [Option<Summary<'t>>; MAX_LEVELS],
    sink: &'s mut S,
}

#[derive(Clone, Copy)]
struct Summary<'t> {
    table: &'t UpperTable,
    word: usize,
    bits: u64,
}

impl<'s, 't, S: Sink, const PLANES: usize> Taking<'s, 't, S, PLANES> {
    fn new(tree: &'t Tree<PLANES>, range: GpaRange, limit: u64, sink: &'s mut S) -> Self {
        Self {
            tree,
            range,
            left: limit,
            splits: Splits::Possible,
            summaries: [None; MAX_LEVELS],
            sink,
        }
    }

    /// Sets those summary bits again whose entries were not completely visited.
    fn restore(&mut self) {
        for summary in &mut self.summaries {
            if let Some(Summary { table, word, bits }) = summary.take() {
                table.restore_summary(word, bits);
            }
        }
    }

    /// Returns the summary bits of `word` that lie in the window. The first call for a word clears them.
    fn summary(
        &mut self,
        level: Level,
        table: &'t UpperTable,
        word: usize,
        window: &Window,
    ) -> u64 {
        let held = &mut self.summaries[level.index()];
        if let Some(held) = held
            && core::ptr::eq(held.table, table)
            && held.word == word
        {
            return held.bits;
        }
        let wanted = wanted_bits(word, window);
        let clear = wanted & !straddling_bits(self.tree, self.range, level, word, window);
        let bits = table.take_summary(word, wanted, clear);
        *held = Some(Summary { table, word, bits });
        bits
    }

    /// Takes a dirty entry without 4 KiB detail. If only a part of it is wanted, it is split first.
    fn take_whole(&mut self, place: &Place<'_, 't, Tree<PLANES>, Record>) -> Action<Stop> {
        let span = place.span();
        let regions = self.tree.regions();
        let straddles = !regions.covered(span, self.range);
        let too_much =
            place.level() > Level::PAGE.up() && regions.pages_in(place.part()) > self.left;
        if (straddles || too_much) && self.splits == Splits::Possible {
            return Action::Split;
        }
        let parts = regions.parts(place.part()).count();
        if !self.sink.make_room(parts) {
            return Action::Stop(Stop::NoRoom);
        }
        self.splits = Splits::Possible;
        // If an entry that could not be split reaches beyond the range, that part must stay dirty, so all of it does.
        if !straddles && let Some(action) = clear_whole(place) {
            return action;
        }
        for (part, _) in regions.parts(place.part()) {
            self.sink.range(part);
            self.left = self.left.saturating_sub(part.pages());
        }
        Action::Skip
    }
}

/// Clears the dirty flag. Returns an action if the entry has changed meanwhile.
fn clear_whole<const PLANES: usize>(
    place: &Place<'_, '_, Tree<PLANES>, Record>,
) -> Option<Action<Stop>> {
    let old = place
        .slot()
        .fetch_and(!Plane::Dirty.flag(), Ordering::SeqCst);
    // A table has no flags: if the entry has become one, the operation above did not change it.
    (old & Plane::Dirty.flag() == 0).then_some(Action::Again)
}

/// Clears the bits of `mask` and returns those that were set. A full word is exchanged: on x86 that is one instruction,
/// while a `fetch_and` whose result is used is a loop.
#[inline]
fn clear_bits(word: &AtomicU64, mask: u64) -> u64 {
    if mask == u64::MAX {
        word.swap(0, Ordering::SeqCst)
    } else {
        word.fetch_and(!mask, Ordering::SeqCst) & mask
    }
}

/// Returns the bits of summary word `word` that lie in the window.
fn wanted_bits(word: usize, window: &Window) -> u64 {
    let from = window.from.saturating_sub(64 * word);
    let to = (window.to - 64 * word).min(64);
    u64::MAX << from & u64::MAX >> (64 - to)
}

/// Returns the bits of summary word `word` whose entries have pages of regions outside `range`. These entries are visited,
/// but their bits stay set. Only the first and the last entry of the window can be such.
fn straddling_bits<const PLANES: usize>(
    tree: &Tree<PLANES>,
    range: GpaRange,
    level: Level,
    word: usize,
    window: &Window,
) -> u64 {
    let mut bits = 0;
    for (index, page) in [
        (window.from, window.page),
        (window.to - 1, window.last_page(level)),
    ] {
        if index / 64 == word && !tree.regions().covered(level.span_at(page), range) {
            bits |= 1 << (index % 64);
        }
    }
    bits
}

impl<'t, S: Sink, const PLANES: usize> Visitor<'t, Tree<PLANES>, Record>
    for Taking<'_, 't, S, PLANES>
{
    type Stop = Stop;

    /// Jumps to the next entry whose summary bit is set. It reads and clears 64 summary bits at once.
    fn seek(&mut self, level: Level, table: &'t UpperTable, window: Window) -> usize {
        let mut from = window.from;
        while from < window.to {
            let word = from / 64;
            let bits = self.summary(level, table, word, &window) & u64::MAX << (from % 64);
            // The bit of the entry that is visited next is kept until the walk is past it, for `restore`.
            if let Some(held) = &mut self.summaries[level.index()] {
                held.bits = bits;
            }
            if bits != 0 {
                return 64 * word + bits.trailing_zeros() as usize;
            }
            from = 64 * (word + 1);
        }
        window.to
    }

    fn entry(&mut self, place: &Place<'_, 't, Tree<PLANES>, Record>) -> Action<Stop> {
        match place.entry() {
            Entry::Table(_) => Action::Continue,
            Entry::Absent => Action::Skip,
            Entry::Leaf(_) if self.left == 0 => Action::Stop(Stop::Limit),
            Entry::Leaf(flags) if Flags::dirty(flags) => self.take_whole(place),
            Entry::Leaf(_) => Action::Skip,
        }
    }

    fn run(&mut self, run: &Run<'_, 't, Tree<PLANES>, Record>) -> Action<Stop> {
        if self.left == 0 {
            return Action::Stop(Stop::Limit);
        }
        if !self.sink.make_room(1) {
            return Action::Stop(Stop::NoRoom);
        }
        let (base, part) = (run.span().first_page(), run.part());
        let plane = run.live_table().plane(Plane::Dirty);
        // All words are read before any is written, because loads wait for an exchange before them.
        let seen: [u64; PLANE_WORDS] =
            core::array::from_fn(|word| plane[word].load(Ordering::SeqCst));
        let mut taken = [0; PLANE_WORDS];
        for (word, mask) in masks(base, part) {
            // A word without dirty pages of the range is not written.
            if seen[word] & mask != 0 {
                taken[word] = clear_bits(&plane[word], mask);
            }
        }
        if self.tree.regions().shrunk() {
            // A mark that raced with the removal of its region may have set the bit of a page that lies in no region.
            let tracked = tracked_words(run.span(), self.tree.regions());
            for (word, tracked) in taken.iter_mut().zip(tracked) {
                *word &= tracked;
            }
        }
        let pages = taken.iter().map(|word| count(*word)).sum();
        if pages != 0 {
            self.sink.words(base, &taken, pages);
            self.left = self.left.saturating_sub(pages);
        }
        Action::Continue
    }
}
