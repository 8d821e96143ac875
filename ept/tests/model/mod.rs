//! The model of pages that all suites compare ept with: a map from page numbers to values, kept as runs because a
//! guest has millions of pages.
//!
//! It uses nothing of ept but the type for its ranges, so that no error of ept can hide in it. The integration tests
//! of ept, its fuzz targets (`ept/fuzz`) and the model behind the emulated MMUs (`tests/src/oracle`) include this
//! file; `ept/tests/pages.rs` compares it with a plain map.

#![allow(dead_code, reason = "each test program uses a part of it")]

use std::collections::BTreeMap;
use std::ops::Range;

use ept::GpaRange;

/// A half-open range of pages, by their numbers.
pub(crate) trait Span: Sized {
    /// The pages from `first` to before `end`.
    fn new(first: u64, end: u64) -> Self;

    /// Number of the first page.
    fn first(&self) -> u64;

    /// Number of the page after the last.
    fn end(&self) -> u64;
}

impl Span for Range<u64> {
    fn new(first: u64, end: u64) -> Self {
        first..end
    }

    fn first(&self) -> u64 {
        self.start
    }

    fn end(&self) -> u64 {
        self.end
    }
}

impl Span for GpaRange {
    fn new(first: u64, end: u64) -> Self {
        Self::from_pages(first, end - first).expect("a range within the address space")
    }

    fn first(&self) -> u64 {
        self.first_page()
    }

    fn end(&self) -> u64 {
        self.end_page()
    }
}

/// Values by page number. Two maps are equal if every page has the same value in both.
#[derive(Clone, Debug)]
pub(crate) struct Pages<V> {
    /// By first page of a run: the page after the run, and the value of all its pages. Runs do not overlap; neighbours
    /// can have equal values.
    runs: BTreeMap<u64, (u64, V)>,
}

/// A set of pages.
pub(crate) type PageSet = Pages<()>;

impl<V> Default for Pages<V> {
    fn default() -> Self {
        Self::new()
    }
}

impl<V> Pages<V> {
    /// A map without pages.
    pub(crate) const fn new() -> Self {
        let runs = BTreeMap::new();
        Self { runs }
    }
}

impl<V: Copy + PartialEq> Pages<V> {
    /// Returns the value of a page.
    pub(crate) fn get(&self, page: u64) -> Option<V> {
        self.run_at(page).map(|(_, value)| value)
    }

    /// Returns the run that a page lies in, as it was set.
    pub(crate) fn run_at(&self, page: u64) -> Option<(Range<u64>, V)> {
        let (first, (end, value)) = self.runs.range(..=page).next_back()?;
        (page < *end).then_some((*first..*end, *value))
    }

    /// Replaces the value of every page of `range` by what `change` returns for it.
    pub(crate) fn update(&mut self, range: impl Span, change: impl Fn(Option<V>) -> Option<V>) {
        self.cut(range.first());
        self.cut(range.end());
        let inside = self.runs.range(range.first()..range.end());
        let inside: Vec<_> = inside.map(|(first, (end, v))| (*first, *end, *v)).collect();
        let mut next = range.first();
        for (first, end, value) in inside {
            self.put(next, first, change(None));
            self.put(first, end, change(Some(value)));
            next = end;
        }
        self.put(next, range.end(), change(None));
    }

    /// Gives every page of `range` the same value, as one run.
    pub(crate) fn set(&mut self, range: impl Span, value: V) {
        let (first, end) = (range.first(), range.end());
        self.clear(range);
        self.put(first, end, Some(value));
    }

    /// Removes every page of `range`.
    pub(crate) fn clear(&mut self, range: impl Span) {
        self.update(range, |_| None);
    }

    /// Returns the runs that overlap `range`, whole and as they were set.
    pub(crate) fn runs_as_set(&self, range: impl Span) -> impl Iterator<Item = (Range<u64>, V)> {
        let (first, end) = (range.first(), range.end());
        let across = self.run_at(first).filter(|_| first < end);
        let first = across.map_or(first, |(run, _)| run.start);
        let runs = self.runs.range(first..end.max(first));
        runs.map(|(first, (end, value))| (*first..*end, *value))
    }

    /// Returns the pages of `range` that have a value, as maximal runs of equal values.
    pub(crate) fn runs<R: Span>(&self, range: R) -> Vec<(R, V)> {
        let mut joined: Vec<(R, V)> = Vec::new();
        let (start, stop) = (range.first(), range.end());
        for (run, value) in self.runs_as_set(range) {
            let (first, end) = (run.start.max(start), run.end.min(stop));
            match joined.last_mut() {
                Some((last, same)) if last.end() == first && *same == value => {
                    *last = R::new(last.first(), end);
                }
                _ => joined.push((R::new(first, end), value)),
            }
        }
        joined
    }

    /// Returns the pages of `range` whose value satisfies `has`, as maximal runs.
    pub(crate) fn ranges<R: Span>(&self, range: R, has: impl Fn(V) -> bool) -> Vec<R> {
        let mut joined: Vec<R> = Vec::new();
        for (run, _) in self
            .runs(range)
            .into_iter()
            .filter(|(_, value)| has(*value))
        {
            match joined.last_mut() {
                Some(last) if last.end() == run.first() => *last = R::new(last.first(), run.end()),
                _ => joined.push(run),
            }
        }
        joined
    }

    /// Returns the first page of `range` that has a value.
    pub(crate) fn first(&self, range: impl Span) -> Option<u64> {
        let start = range.first();
        let first = self.runs_as_set(range).next();
        first.map(|(run, _)| run.start.max(start))
    }

    /// Returns a map of the pages of `range` alone.
    pub(crate) fn within(&self, range: impl Span) -> Self {
        let mut part = Self::new();
        for (run, value) in self.runs(range.first()..range.end()) {
            part.put(run.start, run.end, Some(value));
        }
        part
    }

    /// Returns the number of pages that have a value.
    pub(crate) fn count(&self) -> u64 {
        self.runs.iter().map(|(first, (end, _))| end - first).sum()
    }

    /// Makes `page` the start of a run if it lies inside of one.
    fn cut(&mut self, page: u64) {
        if let Some((_, (end, value))) = self.runs.range_mut(..page).next_back()
            && page < *end
        {
            let rest = (*end, *value);
            *end = page;
            self.runs.insert(page, rest);
        }
    }

    fn put(&mut self, first: u64, end: u64, value: Option<V>) {
        if first == end {
            return;
        }
        match value {
            Some(value) => self.runs.insert(first, (end, value)),
            None => self.runs.remove(&first),
        };
    }
}

impl PageSet {
    pub(crate) fn contains(&self, page: u64) -> bool {
        self.get(page).is_some()
    }

    pub(crate) fn insert(&mut self, range: impl Span) {
        self.set(range, ());
    }

    pub(crate) fn extend(&mut self, other: &Self) {
        for (run, ()) in other.runs(0..u64::MAX) {
            self.insert(run);
        }
    }

    pub(crate) fn remove_all(&mut self, other: &Self) {
        for (run, ()) in other.runs(0..u64::MAX) {
            self.clear(run);
        }
    }

    /// Whether every page of `other` is in this set.
    pub(crate) fn covers(&self, other: &Self) -> bool {
        let mut rest = other.clone();
        rest.remove_all(self);
        rest.count() == 0
    }

    /// Returns the smallest range that holds all pages of this set.
    pub(crate) fn hull<R: Span>(&self) -> Option<R> {
        let (first, _) = self.runs.first_key_value()?;
        let (_, (end, ())) = self.runs.last_key_value()?;
        Some(R::new(*first, *end))
    }
}

impl<V: Copy + PartialEq> PartialEq for Pages<V> {
    fn eq(&self, other: &Self) -> bool {
        self.runs(0..u64::MAX) == other.runs(0..u64::MAX)
    }
}

impl<R: Span> FromIterator<R> for PageSet {
    fn from_iter<I: IntoIterator<Item = R>>(ranges: I) -> Self {
        let mut set = Self::new();
        ranges.into_iter().for_each(|range| set.insert(range));
        set
    }
}
