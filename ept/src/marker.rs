//! A writer's own handle: marking without a counter that others count on too.

use alloc::sync::Arc;

use crate::addr::Gpa;
use crate::counters::{Source, Tally};
use crate::tracker::{Tracker, TrackerError};
use crate::tracking::MarkTally;

/// Marks pages dirty for one source, and counts them by itself.
///
/// It marks what [`Tracker::mark`] marks. That adds to a figure that all writers of the source share, a second locked
/// operation beside the one for the page, whose cache line travels between their processors; a marker has a figure of
/// its own, which only it writes. One for each thread that writes much, such as a device's worker. The figures are in
/// [`Tracker::counters`] at once, and stay there when the marker goes.
///
/// ```
/// use std::sync::Arc;
/// use ept::{Gpa, GpaRange, Region, RegionKind, Source, Tracker};
///
/// let range = GpaRange::with_len(Gpa(0), 1 << 20).unwrap();
/// let tracker = Arc::new(Tracker::new(&[Region { range, kind: RegionKind::Ram }]).unwrap());
/// let mut marker = tracker.marker(Source::Device).unwrap();
/// marker.mark(Gpa(0x1234), 5000);
/// assert_eq!(tracker.counters().dirtied_by(Source::Device), 2);
/// ```
#[derive(Debug)]
pub struct Marker {
    tracker: Arc<Tracker>,
    tally: Arc<Tally>,
}

impl Marker {
    pub(crate) fn new(tracker: &Arc<Tracker>, source: Source) -> Result<Self, TrackerError> {
        let tally = tracker.all_counters().enter(source);
        Ok(Self {
            tracker: tracker.clone(),
            tally: tally.ok_or(TrackerError::OutOfMemory)?,
        })
    }

    /// The tracker that it marks in.
    pub fn tracker(&self) -> &Arc<Tracker> {
        &self.tracker
    }

    /// For whom it marks.
    pub fn source(&self) -> Source {
        self.tally.source()
    }

    /// As [`Tracker::mark`]: marks the pages of `len_bytes` bytes from `gpa` as written, after they were.
    #[inline]
    pub fn mark(&mut self, gpa: Gpa, len_bytes: u64) {
        let marked = self.tracker.mark_bytes(gpa, len_bytes);
        self.count(marked);
    }

    /// As [`Tracker::mark_words`]: marks page `first_page + i` for each bit `i` of `words`.
    pub fn mark_words(&mut self, first_page: Gpa, words: &[u64]) {
        let marked = self.tracker.mark_bits_of(first_page, words);
        self.count(marked);
    }

    #[inline]
    fn count(&mut self, marked: MarkTally) {
        self.tally.add(marked.newly);
        self.tracker.all_counters().coarse(marked.coarse);
    }
}

impl Drop for Marker {
    fn drop(&mut self) {
        self.tracker.all_counters().leave(&self.tally);
    }
}
