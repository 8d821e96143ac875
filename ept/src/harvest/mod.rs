//! What a harvest took: a transaction that is committed, or rolled back.

mod iter;
mod pieces;

use alloc::sync::Arc;

use crate::addr::{Gpa, GpaRange};
use crate::epoch::Consumer;
use crate::tracker::Tracker;
use crate::tracking::{Bitmap, Every};

pub use iter::{Runs, Words};
pub(crate) use pieces::Pieces;

/// Dirty pages taken by one consumer.
///
/// They are clean for that consumer until the harvest is rolled back, which is also what dropping
/// it does: only [`Harvest::commit`] lets go of them.
#[derive(Debug)]
#[must_use = "a harvest that is dropped is rolled back"]
pub struct Harvest {
    tracker: Arc<Tracker>,
    consumer: Arc<Consumer>,
    pieces: Pieces,
    rest: Option<GpaRange>,
}

impl Harvest {
    pub(crate) fn new(tracker: Arc<Tracker>, consumer: Arc<Consumer>) -> Self {
        Self {
            tracker,
            consumer,
            pieces: Pieces::default(),
            rest: None,
        }
    }

    pub(crate) fn pieces_mut(&mut self) -> &mut Pieces {
        &mut self.pieces
    }

    pub(crate) fn set_rest(&mut self, rest: Option<GpaRange>) {
        self.rest = rest;
    }

    /// The part of the range that a bounded harvest did not look at.
    pub fn rest(&self) -> Option<GpaRange> {
        self.rest
    }

    /// How many pages there are.
    pub fn pages(&self) -> u64 {
        self.pieces.pages()
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.pages() == 0
    }

    /// The smallest range that has all of them.
    pub fn interval(&self) -> Option<GpaRange> {
        self.pieces.hull()
    }

    /// The pages as maximal ranges, in order.
    pub fn runs(&self) -> Runs<'_> {
        self.runs_in(GpaRange::ALL)
    }

    /// The pages that lie in `range`, as maximal ranges, in order.
    pub fn runs_in(&self, range: GpaRange) -> Runs<'_> {
        Runs::new(self.pieces.spans_in(range))
    }

    /// A bitmap of `range`: bit `i % 64` of word `i / 64` is page `range.first_page() + i`, and bits
    /// beyond the range are 0. The form that `KVM_CLEAR_DIRTY_LOG` takes.
    pub fn words_in(&self, range: GpaRange) -> Words<'_> {
        Words::new(self.pieces.spans_in(range), range)
    }

    /// Whether the page at `gpa` is among them.
    pub fn contains(&self, gpa: Gpa) -> bool {
        let page = GpaRange::of(gpa.page(), gpa.page() + 1);
        self.pieces.spans_in(page).next().is_some()
    }

    /// Lets go of the pages: they were dealt with.
    pub fn commit(mut self) {
        self.pieces = Pieces::default();
    }

    /// Makes every page dirty again for this consumer. Where its [`Epoch`](crate::Epoch) is gone, for nobody.
    pub fn rollback(self) {
        drop(self);
    }
}

impl Drop for Harvest {
    fn drop(&mut self) {
        let mut coarse = 0;
        for range in self.pieces.ranges() {
            coarse += self.consumer.pending.mark(*range, &Every).coarse;
        }
        for leaf in self.pieces.leaves() {
            let bits = Bitmap {
                first_page: leaf.base,
                words: &leaf.words,
            };
            coarse += self.consumer.pending.mark(leaf.span(), &bits).coarse;
        }
        self.tracker.all_counters().coarse(coarse);
    }
}
