//! The one dirty set that every writer marks and every consumer harvests.
//!
//! A marker writes its data first and marks after; a harvester clears first and reads data after.
//! Marks go to the shared tree only, one locked operation for 64 pages, however many consumers
//! there are. A harvest drains the shared tree into what is pending for the other consumers.

mod protect;

use alloc::sync::Arc;
use alloc::vec::Vec;
use core::fmt;

use crate::addr::{Gpa, GpaRange, PAGE_SHIFT, PAGE_SIZE, SPACE_PAGES};
use crate::clock::Clock;
use crate::counters::{Counters, CountersSnapshot, Source};
use crate::epoch::Consumer;
use crate::format::OutOfTables;
use crate::marker::Marker;
use crate::region::{Region, Regions, Unfit};
use crate::sync::SpinLock;
use crate::tracking::{Bitmap, Bits, Every, MarkTally, Plane, Tree};

pub use protect::{Fault, ProtectError};

/// Why a tracker could not be made.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum TrackerError {
    /// These two regions overlap.
    Overlap(GpaRange, GpaRange),
    /// No region was given.
    NoRegions,
    /// No memory for the tracker's directories.
    OutOfMemory,
}

impl fmt::Display for TrackerError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Overlap(one, other) => write!(f, "regions {one} and {other} overlap"),
            Self::NoRegions => f.write_str("a tracker needs at least one region"),
            Self::OutOfMemory => f.write_str("no memory for a tracker"),
        }
    }
}

impl core::error::Error for TrackerError {}

/// Which pages of a guest's memory were written, and which of them fault at the next write.
pub struct Tracker {
    regions: Arc<Regions>,
    tree: Tree<2>,
    max_leaf_tables: usize,
    /// The consumers. Held while the shared tree is drained, so that there is one drain at a time.
    consumers: SpinLock<Vec<Arc<Consumer>>>,
    counters: Counters,
    clock: Option<Clock>,
}

impl Tracker {
    /// A clean tracker for `regions`, in any order.
    ///
    /// # Errors
    /// Regions that overlap, none at all, or no memory.
    pub fn new(regions: &[Region]) -> Result<Self, TrackerError> {
        Self::with_table_limit(regions, usize::MAX)
    }

    /// A tracker that keeps at most `max_leaf_tables` 2 MiB parts in 4 KiB detail, and as many for
    /// each consumer. Beyond that it works in coarse entries: more is reported dirty than
    /// was written, never less.
    ///
    /// # Errors
    /// As [`Tracker::new`].
    pub fn with_table_limit(
        regions: &[Region],
        max_leaf_tables: usize,
    ) -> Result<Self, TrackerError> {
        let mut owned = Vec::new();
        owned
            .try_reserve_exact(regions.len())
            .map_err(|_| TrackerError::OutOfMemory)?;
        owned.extend_from_slice(regions);
        let regions = Arc::new(Regions::new(owned).map_err(|unfit| match unfit {
            Unfit::Empty => TrackerError::NoRegions,
            Unfit::Overlap(one, other) => TrackerError::Overlap(one, other),
        })?);
        let tree = Tree::try_new(regions.clone(), max_leaf_tables)
            .map_err(|_| TrackerError::OutOfMemory)?;
        Ok(Self {
            regions,
            tree,
            max_leaf_tables,
            consumers: SpinLock::new(Vec::new()),
            counters: Counters::new(),
            clock: None,
        })
    }

    /// The same tracker with a clock, so that it can say for how long harvests held its lock.
    #[must_use]
    pub fn with_clock(mut self, clock: Clock) -> Self {
        self.clock = Some(clock);
        self
    }

    /// The regions, in order of address.
    pub fn regions(&self) -> &[Region] {
        self.regions.as_slice()
    }

    /// Makes 4 KiB detail everywhere in `range`, so that marking and protecting there need no more
    /// memory. An epoch's own pending pages may.
    ///
    /// # Errors
    /// The table limit, or no memory; what was made stays.
    pub fn reserve(&self, range: GpaRange) -> Result<(), OutOfTables> {
        self.tree.reserve(range)
    }

    /// A handle for one writer that marks much, with a figure of its own.
    ///
    /// # Errors
    /// No memory.
    pub fn marker(self: &Arc<Self>, source: Source) -> Result<Marker, TrackerError> {
        Marker::new(self, source)
    }

    /// Marks the pages of `len_bytes` bytes from `gpa` as written by `source`: call it after the
    /// bytes were written. Pages outside the regions are ignored and counted.
    #[inline]
    pub fn mark(&self, gpa: Gpa, len_bytes: u64, source: Source) {
        let marked = self.mark_bytes(gpa, len_bytes);
        self.count(marked, source);
    }

    /// Marks page `first_page + i` for each bit `i` of `words` (bit `i % 64` of word `i / 64`), as
    /// KVM's dirty log gives them. `first_page` may be any page.
    pub fn mark_words(&self, first_page: Gpa, words: &[u64], source: Source) {
        let marked = self.mark_bits_of(first_page, words);
        self.count(marked, source);
    }

    /// [`Tracker::mark`], for the caller to count. A page that has its leaf table is the short way, all of it inlined:
    /// a call would be dearer than what is done.
    #[inline(always)]
    pub(crate) fn mark_bytes(&self, gpa: Gpa, len_bytes: u64) -> MarkTally {
        let in_page = len_bytes.wrapping_sub(1) < PAGE_SIZE - gpa.0 % PAGE_SIZE;
        if in_page
            && self.regions.have_page(gpa.page())
            && let Some(was_clean) = self.tree.mark_page(gpa.page())
        {
            return MarkTally {
                newly: u64::from(was_clean),
                coarse: 0,
            };
        }
        self.mark_range(gpa, len_bytes)
    }

    #[inline(never)]
    fn mark_range(&self, gpa: Gpa, len_bytes: u64) -> MarkTally {
        if len_bytes == 0 {
            return MarkTally::default();
        }
        let last = gpa.0.saturating_add(len_bytes - 1) >> PAGE_SHIFT;
        let range = GpaRange::of(gpa.page(), last + 1);
        if self.regions.have(range) {
            return self.tree.mark(range, &Every);
        }
        self.mark_parts(range, &Every)
    }

    /// [`Tracker::mark_words`], for the caller to count.
    pub(crate) fn mark_bits_of(&self, first_page: Gpa, words: &[u64]) -> MarkTally {
        let mut tally = MarkTally::default();
        let mut page = first_page.page();
        for stretch in words.split_inclusive(|word| *word == 0) {
            let set = match stretch {
                [set @ .., 0] => set,
                all => all,
            };
            let bits = Bitmap {
                first_page: page,
                words: set,
            };
            let end = page.saturating_add(64 * set.len() as u64).min(SPACE_PAGES);
            if page < end {
                tally = tally.and(self.mark_parts(GpaRange::of(page, end), &bits));
            }
            page = page.saturating_add(64 * stretch.len() as u64);
        }
        tally
    }

    /// Marks what of `bits` lies in regions, and counts what does not.
    #[inline(never)]
    fn mark_parts<B: Bits>(&self, range: GpaRange, bits: &B) -> MarkTally {
        let mut tally = MarkTally::default();
        let mut next = range.first_page();
        for (part, _) in self.regions.parts(range) {
            self.outside(next, part.first_page(), bits);
            tally = tally.and(self.tree.mark(part, bits));
            next = part.end_page();
        }
        self.outside(next, range.end_page(), bits);
        tally
    }

    #[inline]
    fn count(&self, tally: MarkTally, source: Source) {
        self.counters.dirtied(source, tally.newly);
        self.counters.coarse(tally.coarse);
    }

    fn outside<B: Bits>(&self, first: u64, end: u64, bits: &B) {
        if first < end {
            self.counters.outside(bits.count(GpaRange::of(first, end)));
        }
    }

    /// Whether the page at `gpa` is marked for some consumer that has not harvested it yet (or,
    /// without consumers, since the last one went). For tests and diagnosis: it may wait for a
    /// harvest in progress.
    pub fn dirty_at(&self, gpa: Gpa) -> bool {
        if self.regions.at(gpa.page()).is_none() {
            return false;
        }
        let consumers = self.consumers.lock();
        self.tree.has(gpa.page(), Plane::Dirty)
            || consumers
                .iter()
                .any(|consumer| consumer.pending.has(gpa.page(), Plane::Dirty))
    }

    /// The figures so far.
    pub fn counters(&self) -> CountersSnapshot {
        self.counters.snapshot()
    }

    /// Bytes of memory held for the shared map and for every consumer's pending pages.
    pub fn memory_bytes(&self) -> usize {
        let consumers = self.consumers.lock();
        let pending = consumers.iter().map(|consumer| consumer.pending.bytes());
        self.tree.bytes() + pending.sum::<usize>()
    }

    pub(crate) fn tree(&self) -> &Tree<2> {
        &self.tree
    }

    pub(crate) fn consumers(&self) -> &SpinLock<Vec<Arc<Consumer>>> {
        &self.consumers
    }

    pub(crate) fn clock(&self) -> Option<Clock> {
        self.clock
    }

    pub(crate) fn all_counters(&self) -> &Counters {
        &self.counters
    }

    /// An empty tree for what is pending for one consumer.
    pub(crate) fn pending_tree(&self) -> Result<Tree<1>, TrackerError> {
        Tree::try_new(self.regions.clone(), self.max_leaf_tables)
            .map_err(|_| TrackerError::OutOfMemory)
    }
}

impl fmt::Debug for Tracker {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Tracker")
            .field("regions", &self.regions.as_slice())
            .field("counters", &self.counters.snapshot())
            .finish_non_exhaustive()
    }
}
