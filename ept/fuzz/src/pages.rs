//! What should hold for each page: a map from pages to values, kept as runs of equal values because pages are many.

use std::collections::BTreeMap;

use ept::{Gpa, GpaRange};

/// Page `page`'s first byte.
pub(crate) fn gpa(page: u64) -> Gpa {
    Gpa(page << 12)
}

/// Pages `first` to `end`, half-open.
pub(crate) fn pages(first: u64, end: u64) -> GpaRange {
    GpaRange::from_pages(first, end - first).expect("a range in the space")
}

/// Values by page; a set of pages where the value says nothing.
#[derive(Clone, Debug)]
pub(crate) struct Pages<V> {
    /// By first page: the page after the run, and the value of all its pages.
    runs: BTreeMap<u64, (u64, V)>,
}

impl<V> Default for Pages<V> {
    fn default() -> Self {
        let runs = BTreeMap::new();
        Self { runs }
    }
}

impl<V: Copy + PartialEq> Pages<V> {
    pub(crate) fn get(&self, page: u64) -> Option<V> {
        let (_, (end, value)) = self.runs.range(..=page).next_back()?;
        (page < *end).then_some(*value)
    }

    /// Gives every page of `range` what `change` makes of its value.
    pub(crate) fn update(&mut self, range: GpaRange, change: impl Fn(Option<V>) -> Option<V>) {
        self.cut(range.first_page());
        self.cut(range.end_page());
        let inside: Vec<_> = self.inside(range).collect();
        let mut next = range.first_page();
        for (first, end, value) in inside {
            self.put(next, first, change(None));
            self.put(first, end, change(Some(value)));
            next = end;
        }
        self.put(next, range.end_page(), change(None));
    }

    pub(crate) fn set(&mut self, range: GpaRange, value: V) {
        self.update(range, |_| Some(value));
    }

    pub(crate) fn clear(&mut self, range: GpaRange) {
        self.update(range, |_| None);
    }

    /// The pages of `range` that have a value, as maximal runs of equal values.
    pub(crate) fn runs(&self, range: GpaRange) -> Vec<(GpaRange, V)> {
        let mut joined: Vec<(GpaRange, V)> = Vec::new();
        let before = self.runs.range(..range.first_page()).next_back();
        let before = before.map(|(first, (end, value))| (*first, *end, *value));
        for (first, end, value) in before.into_iter().chain(self.inside(range)) {
            let (first, end) = (first.max(range.first_page()), end.min(range.end_page()));
            match joined.last_mut() {
                Some((last, same)) if last.end_page() == first && *same == value => {
                    *last = pages(last.first_page(), end);
                }
                _ if first < end => joined.push((pages(first, end), value)),
                _ => {}
            }
        }
        joined
    }

    /// As [`Self::runs`], of the pages whose value `has` it.
    pub(crate) fn ranges(&self, range: GpaRange, has: impl Fn(V) -> bool) -> Vec<GpaRange> {
        let mut joined: Vec<GpaRange> = Vec::new();
        for (run, value) in self.runs(range) {
            match joined.last_mut() {
                _ if !has(value) => {}
                Some(last) if last.end_page() == run.first_page() => *last = last.hull(&run),
                _ => joined.push(run),
            }
        }
        joined
    }

    /// The first page of `range` that has a value.
    pub(crate) fn first(&self, range: GpaRange) -> Option<u64> {
        self.runs(range).first().map(|(run, _)| run.first_page())
    }

    /// Runs that start in `range`.
    fn inside(&self, range: GpaRange) -> impl Iterator<Item = (u64, u64, V)> {
        self.runs
            .range(range.first_page()..range.end_page())
            .map(|(first, (end, value))| (*first, *end, *value))
    }

    /// Makes `page` the start of a run if it is inside of one.
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

/// Pages of `ranges` together.
pub(crate) fn count(ranges: &[GpaRange]) -> u64 {
    ranges.iter().map(GpaRange::pages).sum()
}
