//! Harvests: dirty pages that one consumer took and commits or rolls back.

mod iter;
mod pieces;

use alloc::sync::Arc;

use crate::addr::{Gpa, GpaRange};
use crate::epoch::Consumer;
use crate::tracker::Tracker;

pub use iter::{Runs, Words};
pub(crate) use pieces::Pieces;

/// Dirty pages that one consumer took.
///
/// The pages are clean for this consumer, unless the harvest is rolled back. Dropping a harvest rolls it back; only
/// [`Harvest::commit`] makes the pages clean for good.
#[derive(Debug)]
#[must_use = "a harvest that is dropped is rolled back"]
pub struct Harvest {
    tracker: Arc<Tracker>,
    consumer: Arc<Consumer>,
    pieces: Pieces,
    rest: Option<GpaRange>,
    /// Version of the tracker's registry when the pages were taken.
    version: u64,
}

impl Harvest {
    pub(crate) fn new(tracker: Arc<Tracker>, consumer: Arc<Consumer>) -> Self {
        Self {
            tracker,
            consumer,
            pieces: Pieces::default(),
            rest: None,
            version: 0,
        }
    }

    pub(crate) fn pieces_mut(&mut self) -> &mut Pieces {
        &mut self.pieces
    }

    pub(crate) fn set_version(&mut self, version: u64) {
        self.version = version;
    }

    pub(crate) fn set_rest(&mut self, rest: Option<GpaRange>) {
        self.rest = rest;
    }

    /// Returns the part of the range that [`Epoch::harvest_up_to`](crate::Epoch::harvest_up_to) did not look at.
    pub fn rest(&self) -> Option<GpaRange> {
        self.rest
    }

    /// Returns the number of pages.
    pub fn pages(&self) -> u64 {
        self.pieces.pages()
    }

    /// Returns whether the harvest has no page.
    pub fn is_empty(&self) -> bool {
        self.pages() == 0
    }

    /// Returns the smallest range that contains all pages; `None` if there is no page.
    pub fn interval(&self) -> Option<GpaRange> {
        self.pieces.hull()
    }

    /// Iterates over the pages as maximal ranges, in order of address.
    pub fn runs(&self) -> Runs<'_> {
        self.runs_in(GpaRange::ALL)
    }

    /// Iterates over the pages that lie in `range` as maximal ranges, in order of address.
    pub fn runs_in(&self, range: GpaRange) -> Runs<'_> {
        Runs::new(self.pieces.spans_in(range))
    }

    /// Iterates over the words of a bitmap of `range`: bit `i % 64` of word `i / 64` is page `range.first_page() + i`, and
    /// bits beyond the range are 0. `KVM_CLEAR_DIRTY_LOG` takes this form.
    pub fn words_in(&self, range: GpaRange) -> Words<'_> {
        Words::new(self.pieces.spans_in(range), range)
    }

    /// Returns whether the harvest contains the page at `gpa`.
    pub fn contains(&self, gpa: Gpa) -> bool {
        let page = GpaRange::of(gpa.page(), gpa.page() + 1);
        self.pieces.spans_in(page).next().is_some()
    }

    /// Makes the pages clean for this consumer for good, because it has dealt with them.
    pub fn commit(mut self) {
        self.pieces = Pieces::default();
    }

    /// Makes every page dirty again for this consumer, except pages of regions that were removed meanwhile. Has no effect
    /// if the [`Epoch`](crate::Epoch) has ended.
    pub fn rollback(self) {
        drop(self);
    }
}

impl Drop for Harvest {
    fn drop(&mut self) {
        if !self.is_empty() {
            let (consumer, pieces) = (&self.consumer, &self.pieces);
            self.tracker.give_back(consumer, pieces, self.version);
        }
    }
}
