//! Taking dirty pages: every bit that is cleared is handed to a sink.

use crate::sync::atomic::{AtomicU64, Ordering, fence};

use crate::addr::{Gpa, GpaRange, Level, MAX_LEVELS};
use crate::format::Entry;
use crate::tracking::table::{UpperTable, masks};
use crate::tracking::{Flags, PLANE_WORDS, Plane, Tree, count};
use crate::walk::{Action, Exhausted, Outcome, Place, Record, Run, Visitor, Walk, Window};

/// Receives what is taken, in order of address.
pub(crate) trait Sink {
    /// Makes room for `parts` more pieces. Nothing is taken before this said yes, so that nothing
    /// is cleaned unrecorded.
    fn make_room(&mut self, parts: usize) -> bool;

    /// Pages that are all dirty.
    fn range(&mut self, part: GpaRange);

    /// The dirty bits of the leaf table at page `base`, `pages` of them.
    fn words(&mut self, base: u64, words: &[u64; PLANE_WORDS], pages: u64);
}

/// How far a taking got.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Taken {
    /// Everything in the range was taken.
    All,
    /// The limit was reached; nothing from here on was taken.
    Limit(Gpa),
    /// The sink has no room; nothing from here on was taken.
    NoRoom(Gpa),
}

impl<const PLANES: usize> Tree<PLANES> {
    /// Takes the dirty pages of `range` into `sink` until there are `limit` of them; may exceed that
    /// by one leaf table's.
    ///
    /// One taking at a time: callers hold the drain lock. Marks go on meanwhile.
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
                // An entry that lies partly before `rest` straddles from now on: what is marked there
                // meanwhile would be hidden if its summary bit were cleared by a look at the rest.
                Some(rest) => (left, taking.range) = (rest, rest),
                None => break Taken::All,
            }
        };
        if taken != Taken::All {
            taking.restore();
        }
        // Pairs with the fence of a marker that found its page's entry dirty already and wrote
        // nothing: what it wrote to the page is visible after this.
        fence(Ordering::SeqCst);
        taken
    }
}

/// Why a taking stops.
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

/// Whether the next coarse entry may be split.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Splits {
    Possible,
    /// There was no memory for it.
    Impossible,
}

struct Taking<'s, 't, S, const PLANES: usize> {
    tree: &'t Tree<PLANES>,
    range: GpaRange,
    /// Pages that may still be taken.
    left: u64,
    splits: Splits,
    /// By level: summary bits that were taken and not all looked under yet.
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

    /// Sets the taken summary bits again that were not or not wholly looked under.
    fn restore(&mut self) {
        for summary in &mut self.summaries {
            if let Some(Summary { table, word, bits }) = summary.take() {
                table.restore_summary(word, bits);
            }
        }
    }

    /// The summary bits of `word` from index `from` on, taken if this is the first look at them.
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

    /// A dirty entry that has no detail: taken whole, or split first if only a part is wanted.
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
        // The other part of a straddling entry must stay dirty, so all of it does.
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

/// Clears the dirty flag; an action if the entry turned out to be something else.
fn clear_whole<const PLANES: usize>(
    place: &Place<'_, '_, Tree<PLANES>, Record>,
) -> Option<Action<Stop>> {
    let old = place
        .slot()
        .fetch_and(!Plane::Dirty.flag(), Ordering::SeqCst);
    // A table has no flags, so one that has appeared meanwhile was not changed.
    (old & Plane::Dirty.flag() == 0).then_some(Action::Again)
}

/// Clears the bits of `mask`; the result is which of them were set. A full word is one exchange,
/// where an and that returns the old value is a loop of them on x86.
#[inline]
fn clear_bits(word: &AtomicU64, mask: u64) -> u64 {
    if mask == u64::MAX {
        word.swap(0, Ordering::SeqCst)
    } else {
        word.fetch_and(!mask, Ordering::SeqCst) & mask
    }
}

/// The bits of summary word `word` that lie in the window.
fn wanted_bits(word: usize, window: &Window) -> u64 {
    let from = window.from.saturating_sub(64 * word);
    let to = (window.to - 64 * word).min(64);
    u64::MAX << from & u64::MAX >> (64 - to)
}

/// The bits of summary word `word` whose entries have tracked pages outside of `range`: they are
/// looked under and stay set. Only the window's first and last entry can be such.
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

    /// Jumps to the next entry that has its summary bit set, taking 64 of them at once.
    fn seek(&mut self, level: Level, table: &'t UpperTable, window: Window) -> usize {
        let mut from = window.from;
        while from < window.to {
            let word = from / 64;
            let bits = self.summary(level, table, word, &window) & u64::MAX << (from % 64);
            // The bit of the entry that is looked under next stays noted until the walk is past it.
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
        // All are read before any is written: what follows an exchange waits for it.
        let seen: [u64; PLANE_WORDS] =
            core::array::from_fn(|word| plane[word].load(Ordering::SeqCst));
        let mut taken = [0; PLANE_WORDS];
        for (word, mask) in masks(base, part) {
            // A word is only written where there is something to take.
            if seen[word] & mask != 0 {
                taken[word] = clear_bits(&plane[word], mask);
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
