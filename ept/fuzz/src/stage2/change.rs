//! Changes that owe a flush.

use ept::format::{Entry, HardwareFormat};
use ept::stage2::{ChangeError, Flush};
use ept::{GpaRange, Notifier, OpenRange};

use crate::model::Pages;
use crate::pages::pages;
use crate::stage2::guest::{Guest, Page};
use crate::stage2::script::{Change, Fate, Open};

type Changed<'t, 'm, F> = (Flush<'t, 'm, F>, Result<(), ChangeError>);

/// The notifier range that is open while `range` is changed.
pub(super) fn open(range: GpaRange, how: Open) -> OpenRange {
    Notifier::new()
        .open(how.range(range))
        .expect("nobody objects")
}

impl<'t, 'm, F: HardwareFormat> Guest<'t, 'm, F> {
    pub(super) fn unmapped(&self, range: GpaRange) -> Changed<'t, 'm, F> {
        self.stage2.unmap(range, &open(range, Open::ALL))
    }

    pub(super) fn change(&mut self, change: Change, range: GpaRange, how: Open, fate: Fate) {
        let before = self.model.clone();
        let open = open(range, how);
        let enough = self.stage2.worst_case(range) <= self.stage2.available();
        let mut recorded = Vec::new();
        let (flush, result) = self.do_it(change, range, &open, |run| recorded.push(run));
        if let Some(done) = self.reached(change, range, &open, result, enough) {
            self.follow(change, done, &recorded);
        }
        self.check_flush(&flush, range, &before, result);
        self.owe(flush, fate);
        self.compare(range);
    }

    fn do_it(
        &self,
        change: Change,
        range: GpaRange,
        open: &OpenRange,
        record: impl FnMut(GpaRange),
    ) -> Changed<'t, 'm, F> {
        let stage2 = self.stage2;
        match change {
            Change::Unmap => stage2.unmap(range, open),
            Change::Protect(bits) => stage2.protect(range, crate::decode::permissions(bits), open),
            Change::Split(height) => stage2.split(range, height.level(), open),
            Change::Collapse(height) => stage2.collapse(range, height.level(), open),
            Change::Clean => stage2.clean(range, open, record),
            Change::Age => stage2.age(range, open, record),
        }
    }

    /// The part of `range` that was changed; the result is what it must be.
    fn reached(
        &self,
        change: Change,
        range: GpaRange,
        open: &OpenRange,
        result: Result<(), ChangeError>,
        enough: bool,
    ) -> Option<GpaRange> {
        let beyond = !self.window.span.covers(&range);
        let refused = match change {
            Change::Protect(bits) => !self.format.admits(crate::decode::permissions(bits)),
            _ => false,
        };
        let closed = !open.range().covers(&range);
        match result {
            Err(ChangeError::Beyond { .. }) => assert!(beyond),
            Err(ChangeError::Unsupported(_)) => assert!(refused && !beyond),
            Err(ChangeError::NotOpen(_)) => assert!(closed && !refused && !beyond),
            Ok(()) => {
                assert!(!beyond && !refused && !closed);
                return Some(range);
            }
            Err(ChangeError::Exhausted { reached }) => {
                assert!(!beyond && !refused && !closed && range.contains(reached));
                assert_eq!(self.stage2.available(), 0);
                self.may_exhaust(change, reached.page(), enough);
                return (range.first_page() < reached.page())
                    .then(|| pages(range.first_page(), reached.page()));
            }
            Err(error @ (ChangeError::Contended { .. } | ChangeError::Unflushed)) => {
                panic!("{error}")
            }
        }
        None
    }

    /// Only a split needs a table, and only of a huge leaf, which is named.
    fn may_exhaust(&self, change: Change, reached: u64, enough: bool) {
        let leaf = self.leaf(reached);
        assert!(leaf.pages() > 1, "page {reached:#x} needed no table");
        match change {
            Change::Unmap | Change::Protect(_) => assert!(!enough, "the worst case was there"),
            Change::Split(height) => assert!(leaf.pages() > height.level().pages()),
            Change::Collapse(_) | Change::Clean | Change::Age => {
                panic!("{change:?} needs no tables")
            }
        }
    }

    /// Does to the list of pages what was done to `done`.
    fn follow(&mut self, change: Change, done: GpaRange, recorded: &[GpaRange]) {
        match change {
            Change::Unmap => self.model.clear(done),
            Change::Protect(bits) => {
                let permissions = crate::decode::permissions(bits);
                self.changed(done, |guest, page| guest.permitted(page, permissions));
            }
            Change::Split(height) => {
                let largest = height.level().pages();
                let leaves = self.leaves(done);
                assert!(leaves.iter().all(|leaf| leaf.pages() <= largest));
            }
            Change::Collapse(height) => self.collapsed(done, height.level().pages()),
            Change::Clean => {
                let wide = self.widened(done);
                assert_eq!(recorded, self.model.ranges(wide, |page| page.dirty));
                self.changed(wide, Self::cleaned);
            }
            Change::Age => {
                let wide = self.widened(done);
                assert_eq!(recorded, self.model.ranges(wide, Self::is_accessed));
                self.changed(wide, Self::aged);
            }
        }
    }

    pub(super) fn changed(&mut self, range: GpaRange, change: impl Fn(&Self, Page) -> Page) {
        let mut model = std::mem::take(&mut self.model);
        model.update(range, |page| page.map(|page| change(self, page)));
        self.model = model;
    }

    /// Leaves have the flags of all their parts, and what can be one leaf is one.
    fn collapsed(&mut self, done: GpaRange, largest: u64) {
        for leaf in self.leaves(done) {
            let parts = self.model.runs(leaf);
            let all = parts.iter().map(|(_, page)| *page);
            let flags = all.reduce(Page::with_flags_of).expect("a leaf is mapped");
            self.changed(leaf, |_, page| page.with_flags_of(flags));
        }
        let largest = largest.min(self.format.largest_leaf().pages());
        if largest < 512 {
            return;
        }
        let mut first = done.first_page().next_multiple_of(512);
        while first + 512 <= done.end_page().min(done.first_page() + 16 * 512) {
            let parts = self.model.runs(pages(first, first + 512));
            if let [(run, page), ..] = parts.as_slice()
                && parts.iter().all(|(_, other)| page.like(*other))
                && parts.iter().map(|(run, _)| run.pages()).sum::<u64>() == 512
                && page.leads_to(run.first_page()).is_multiple_of(512 << 12)
            {
                assert!(self.leaf(first).pages() >= 512, "{run} could be one leaf");
            }
            first += 512;
        }
    }

    /// The interval has everything that is not as before, and nothing where all is; it says where huge leaves
    /// went, too.
    /// Whether a huge leaf lies across an edge of `range`.
    fn crosses_a_leaf(&self, range: GpaRange) -> bool {
        [range.first_page(), range.end_page() - 1]
            .iter()
            .any(|page| {
                let (level, entry) = self.stage2.lookup(*page);
                let first = page & !(level.pages() - 1);
                matches!(entry, Entry::Leaf(_))
                    && !range.covers(&pages(first, first + level.pages()))
            })
    }

    fn check_flush(
        &self,
        flush: &Flush<'t, 'm, F>,
        range: GpaRange,
        before: &Pages<Page>,
        result: Result<(), ChangeError>,
    ) {
        let interval = flush.interval();
        let counted = flush.tally().entries + flush.tally().splits;
        if counted == 0 && result.is_ok() {
            assert_eq!(flush.tables(), 0);
            // What another has changed and not flushed may overlap, or be another part of a huge leaf.
            let expected = self.owed() > 0 && interval == Some(range) || self.crosses_a_leaf(range);
            assert!(interval.is_none() || expected, "{interval:?}");
        }
        let span = interval.unwrap_or(pages(0, 1)).hull(&range);
        for part in not_the_same(before, &self.model, span) {
            let covered = interval.is_some_and(|interval| interval.covers(&part));
            assert!(covered, "{part} is not in {interval:?}");
        }
    }
}

/// Runs of which one list says this and the other that.
fn not_the_same(one: &Pages<Page>, other: &Pages<Page>, span: GpaRange) -> Vec<GpaRange> {
    let mut differing = Vec::new();
    for (a, b) in [(one, other), (other, one)] {
        for (run, page) in a.runs(span) {
            let mut rest = Pages::default();
            rest.set(run, ());
            for (part, found) in b.runs(run) {
                if found == page {
                    rest.clear(part);
                }
            }
            differing.extend(rest.ranges(run, |()| true));
        }
    }
    differing
}
