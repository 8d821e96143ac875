//! Handle for one writer, with a counter of its own.

use alloc::sync::Arc;

use crate::addr::Gpa;
use crate::counters::{Source, Tally};
use crate::tracker::{Tracker, TrackerError};
use crate::tracking::MarkTally;

/// Marks pages dirty for one source, and counts them in a counter of its own.
///
/// It marks the same pages as [`Tracker::mark`]. But `Tracker::mark` adds to a counter that all writers of the source
/// share. This takes a second locked operation beside the one for the page, and the cache line of the counter travels
/// between processors. The counter of a marker is only written by this marker. Use one for each thread that writes often,
/// such as the worker of a device. [`Tracker::counters`] includes the counts at once, and keeps them when the marker is
/// dropped.
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

    /// Returns the tracker in which it marks.
    pub fn tracker(&self) -> &Arc<Tracker> {
        &self.tracker
    }

    /// Returns the source for which it marks.
    pub fn source(&self) -> Source {
        self.tally.source()
    }

    /// Marks the pages of `len_bytes` bytes from `gpa` as written, as [`Tracker::mark`] does. The caller must have written
    /// the bytes before.
    #[inline]
    pub fn mark(&mut self, gpa: Gpa, len_bytes: u64) {
        let marked = self.tracker.mark_bytes(gpa, len_bytes);
        self.count(marked);
    }

    /// Marks page `first_page + i` for each bit `i` of `words`, as [`Tracker::mark_words`] does.
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
