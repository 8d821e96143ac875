//! Iterators over the pages of a harvest.

use crate::addr::GpaRange;
use crate::harvest::pieces::LeafWords;

/// Iterator over the pages of both lists of a harvest, in order of address and cut to a range. Neighbouring ranges are not
/// joined.
#[derive(Clone, Debug)]
pub(crate) struct Spans<'a> {
    ranges: &'a [GpaRange],
    leaves: &'a [LeafWords],
    /// Index of the current word of the first leaf table.
    word: usize,
    /// Bits of this word that were not returned yet.
    bits: u64,
    range: GpaRange,
}

impl<'a> Spans<'a> {
    pub(crate) fn new(ranges: &'a [GpaRange], leaves: &'a [LeafWords], range: GpaRange) -> Self {
        Self {
            ranges,
            leaves,
            word: 0,
            bits: leaves.first().map_or(0, |leaf| leaf.words[0]),
            range,
        }
    }

    fn next_range(&mut self) -> Option<GpaRange> {
        let (first, rest) = self.ranges.split_first()?;
        self.ranges = rest;
        Some(*first)
    }

    /// Returns the next run of the first leaf table. At its end, returns `None` and moves on to the next leaf table.
    #[inline]
    fn next_in_leaf(&mut self) -> Option<GpaRange> {
        let (leaf, rest) = self.leaves.split_first()?;
        while self.bits == 0 {
            self.word += 1;
            let Some(word) = leaf.words.get(self.word) else {
                self.leaves = rest;
                self.word = 0;
                self.bits = rest.first().map_or(0, |leaf| leaf.words[0]);
                return None;
            };
            self.bits = *word;
        }
        let from = self.bits.trailing_zeros();
        let first = leaf.base + 64 * self.word as u64 + u64::from(from);
        // Adding the lowest one bit carries through the lowest run of ones; the bits that remain are above it.
        let (above, beyond) = self.bits.overflowing_add(1 << from);
        self.bits &= above;
        if !beyond {
            let end = leaf.base + 64 * self.word as u64 + u64::from(above.trailing_zeros());
            return Some(GpaRange::of(first, end));
        }
        Some(GpaRange::of(first, self.end_in_next_words(leaf)))
    }

    /// Returns the end of a run that continues in the next word of the first leaf table.
    fn end_in_next_words(&mut self, leaf: &LeafWords) -> u64 {
        self.bits = 0;
        for word in &leaf.words[self.word + 1..] {
            self.word += 1;
            if *word != u64::MAX {
                let ones = word.trailing_ones();
                self.bits = word & u64::MAX << ones;
                return leaf.base + 64 * self.word as u64 + u64::from(ones);
            }
        }
        leaf.span().end_page()
    }
}

impl Iterator for Spans<'_> {
    type Item = GpaRange;

    #[inline]
    fn next(&mut self) -> Option<GpaRange> {
        loop {
            let next = match (self.ranges.first(), self.leaves.first()) {
                (None, None) => return None,
                (Some(range), Some(leaf)) if range.first_page() < leaf.base => self.next_range(),
                (_, Some(_)) => self.next_in_leaf(),
                (Some(_), None) => self.next_range(),
            };
            let Some(span) = next else { continue };
            if span.first_page() >= self.range.end_page() {
                return None;
            }
            if let Some(part) = span.intersection(&self.range) {
                return Some(part);
            }
        }
    }
}

/// Iterator over the pages of a harvest, as maximal ranges in order of address.
#[derive(Clone, Debug)]
pub struct Runs<'a> {
    spans: Spans<'a>,
    ahead: Option<GpaRange>,
}

impl<'a> Runs<'a> {
    pub(crate) fn new(mut spans: Spans<'a>) -> Self {
        let ahead = spans.next();
        Self { spans, ahead }
    }
}

impl Iterator for Runs<'_> {
    type Item = GpaRange;

    #[inline]
    fn next(&mut self) -> Option<GpaRange> {
        let mut run = self.ahead?;
        loop {
            self.ahead = self.spans.next();
            match self.ahead {
                Some(next) if next.first_page() == run.end_page() => run = run.hull(&next),
                _ => return Some(run),
            }
        }
    }
}

/// Iterator over a bitmap of a harvest: 64 pages a word, from the first page of a range.
#[derive(Clone, Debug)]
pub struct Words<'a> {
    spans: Spans<'a>,
    ahead: Option<GpaRange>,
    page: u64,
    end: u64,
}

impl<'a> Words<'a> {
    pub(crate) fn new(mut spans: Spans<'a>, range: GpaRange) -> Self {
        let ahead = spans.next();
        Self {
            spans,
            ahead,
            page: range.first_page(),
            end: range.end_page(),
        }
    }
}

impl Iterator for Words<'_> {
    type Item = u64;

    fn next(&mut self) -> Option<u64> {
        if self.page >= self.end {
            return None;
        }
        let end = self.page + 64;
        let mut bits = 0;
        while let Some(span) = self.ahead
            && span.first_page() < end
        {
            let from = span.first_page().saturating_sub(self.page);
            let to = span.end_page().min(end) - self.page;
            bits |= u64::MAX << from & u64::MAX >> (64 - to);
            if span.end_page() > end {
                break;
            }
            self.ahead = self.spans.next();
        }
        self.page = end;
        Some(bits)
    }
}
