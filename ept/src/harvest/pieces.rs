//! Compact storage of the pages of a harvest: ranges, and bitmaps of leaf tables that would need too many ranges.

use alloc::vec::Vec;

use crate::addr::GpaRange;
use crate::harvest::iter::Spans;
use crate::tracking::{PLANE_WORDS, Sink, count};

/// Maximum number of runs of a leaf table that is stored as ranges. Four ranges are smaller than its bitmap.
const MAX_RUNS: usize = 4;

/// Bitmap of the dirty pages of one leaf table.
#[derive(Clone, Copy, Debug)]
pub(crate) struct LeafWords {
    /// First page of the table.
    pub(crate) base: u64,
    pub(crate) words: [u64; PLANE_WORDS],
}

impl LeafWords {
    pub(crate) fn span(&self) -> GpaRange {
        GpaRange::of(self.base, self.base + 64 * PLANE_WORDS as u64)
    }

    fn pages(&self) -> u64 {
        self.words.iter().map(|word| count(*word)).sum()
    }

    /// Returns the number of the page after the last dirty one.
    fn end_page(&self) -> Option<u64> {
        let word = self.words.iter().rposition(|word| *word != 0)?;
        let after = 64 * (word as u64 + 1) - u64::from(self.words[word].leading_zeros());
        Some(self.base + after)
    }
}

/// The pages of a harvest, in two lists. Each list is in order of address, and no page is in both.
#[derive(Debug, Default)]
pub(crate) struct Pieces {
    ranges: Vec<GpaRange>,
    leaves: Vec<LeafWords>,
    pages: u64,
}

impl Pieces {
    pub(crate) fn pages(&self) -> u64 {
        self.pages
    }

    /// Passes every page to `sink`: first the ranges, then the leaf tables.
    pub(crate) fn send_to(&self, sink: &mut impl Sink) {
        for range in &self.ranges {
            sink.range(*range);
        }
        for leaf in &self.leaves {
            sink.words(leaf.base, &leaf.words, leaf.pages());
        }
    }

    /// Iterates over the pages that lie in `range`, as ranges that need not be maximal.
    pub(crate) fn spans_in(&self, range: GpaRange) -> Spans<'_> {
        let first = range.first_page();
        let ranges = self.ranges.partition_point(|one| one.end_page() <= first);
        let leaves = self
            .leaves
            .partition_point(|one| one.span().end_page() <= first);
        Spans::new(&self.ranges[ranges..], &self.leaves[leaves..], range)
    }

    /// Returns the smallest range that contains every page.
    pub(crate) fn hull(&self) -> Option<GpaRange> {
        let first = self.spans_in(GpaRange::ALL).next()?.first_page();
        let ranges = self.ranges.last().map(GpaRange::end_page);
        let leaves = self.leaves.last().and_then(LeafWords::end_page);
        Some(GpaRange::of(first, ranges.max(leaves)?))
    }

    /// Adds a range, and joins it to the last one if they touch. `make_room` has reserved the space.
    fn push_range(&mut self, range: GpaRange) {
        self.pages += range.pages();
        match self.ranges.last_mut() {
            Some(last) if last.end_page() == range.first_page() => *last = last.hull(&range),
            _ => self.ranges.push(range),
        }
    }
}

impl Sink for Pieces {
    fn make_room(&mut self, parts: usize) -> bool {
        self.ranges.try_reserve(parts.max(MAX_RUNS)).is_ok() && self.leaves.try_reserve(1).is_ok()
    }

    fn range(&mut self, part: GpaRange) {
        self.push_range(part);
    }

    fn words(&mut self, base: u64, words: &[u64; PLANE_WORDS], pages: u64) {
        if is_ragged(words) {
            self.pages += pages;
            self.leaves.push(LeafWords {
                base,
                words: *words,
            });
            return;
        }
        let mut from = 0;
        while let Some((first, end)) = next_run(words, from) {
            self.push_range(GpaRange::of(base + first as u64, base + end as u64));
            from = end;
        }
    }
}

/// Returns whether `words` have more than [`MAX_RUNS`] maximal runs of ones. A run starts at a one that follows a zero.
fn is_ragged(words: &[u64; PLANE_WORDS]) -> bool {
    let mut before = 0;
    let mut runs = 0;
    for word in words {
        let mut starts = word & !(word << 1 | before);
        before = word >> 63;
        while starts != 0 {
            runs += 1;
            if runs > MAX_RUNS {
                return true;
            }
            starts &= starts - 1;
        }
    }
    false
}

/// Returns the first run of ones from bit `from` on, as its first bit and the bit after its last one.
#[inline]
fn next_run(words: &[u64; PLANE_WORDS], from: usize) -> Option<(usize, usize)> {
    let first = next_bit(words, from, 0)?;
    let end = next_bit(words, first, u64::MAX).unwrap_or(64 * PLANE_WORDS);
    Some((first, end))
}

/// Returns the first bit from `from` on that differs from the bits of `flip`.
#[inline]
fn next_bit(words: &[u64; PLANE_WORDS], from: usize, flip: u64) -> Option<usize> {
    let mut word = from / 64;
    let mut bits = (words.get(word)? ^ flip) & u64::MAX << (from % 64);
    while bits == 0 {
        word += 1;
        bits = words.get(word)? ^ flip;
    }
    Some(64 * word + bits.trailing_zeros() as usize)
}
