//! The dirty set of a guest: every writer marks it and every consumer harvests it.
//!
//! A writer writes its data first and marks the pages after. A harvester clears the marks first and reads the data after.
//! Marks go to shared trees only: one locked operation for up to 64 pages, however many consumers there are. A harvest
//! moves them from the shared trees to the *pending* tree of each consumer.
//!
//! One shared tree holds the regions that the tracker was made with. Each region that is added later has its own.

mod added;
mod hotplug;
mod protect;
mod registry;

use alloc::sync::Arc;
use alloc::vec::Vec;
use core::fmt;

use crate::addr::{Gpa, GpaRange, PAGE_SHIFT, PAGE_SIZE, SPACE_PAGES};
use crate::clock::Clock;
use crate::counters::{Counters, CountersSnapshot, Source};
use crate::format::OutOfTables;
use crate::marker::Marker;
use crate::region::{Region, Regions, Unfit};
use crate::sync::{SpinGuard, SpinLock};
use crate::tracking::{Bitmap, Bits, Every, MarkTally, Plane, Tree};

pub use added::MAX_ADDED_REGIONS;
pub use hotplug::RemoveError;
pub use protect::{Fault, ProtectError};
pub(crate) use registry::{Pending, Registry, up_to};

use added::AddedRegions;

/// Reason why a tracker could not be created, or why a region could not be added to one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum TrackerError {
    /// These two regions overlap.
    Overlap(GpaRange, GpaRange),
    /// No region was given.
    NoRegions,
    /// [`MAX_ADDED_REGIONS`] regions were added and not removed.
    TooManyRegions,
    /// There is no memory for the tracker's tables.
    OutOfMemory,
}

impl fmt::Display for TrackerError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Overlap(one, other) => write!(f, "regions {one} and {other} overlap"),
            Self::NoRegions => f.write_str("a tracker needs at least one region"),
            Self::TooManyRegions => write!(
                f,
                "{MAX_ADDED_REGIONS} regions were added already (remove one first)"
            ),
            Self::OutOfMemory => f.write_str("no memory for the tracker's tables"),
        }
    }
}

impl core::error::Error for TrackerError {}

impl From<Unfit> for TrackerError {
    fn from(unfit: Unfit) -> Self {
        match unfit {
            Unfit::Empty => Self::NoRegions,
            Unfit::Overlap(one, other) => Self::Overlap(one, other),
            Unfit::OutOfMemory => Self::OutOfMemory,
        }
    }
}

/// Records which pages of a guest's memory were written, and which pages fault at the next write.
///
/// Regions can be added and removed while writers mark and epochs harvest: see [`Tracker::add_region`] and
/// [`Tracker::remove_region`].
pub struct Tracker {
    /// The regions that the tracker was made with, as far as they were not removed.
    regions: Arc<Regions>,
    /// The shared tree of these regions.
    tree: Tree<2>,
    added: AddedRegions,
    max_leaf_tables: usize,
    /// All regions, and the consumers. Locked while shared trees are drained, so that one drain runs at a time.
    registry: SpinLock<Registry>,
    counters: Counters,
    clock: Option<Clock>,
}

impl Tracker {
    /// Creates a tracker for `regions`, which may be in any order. Every page is clean.
    ///
    /// # Errors
    /// Returns [`TrackerError::Overlap`] if two regions overlap, [`TrackerError::NoRegions`] if `regions` is empty, and
    /// [`TrackerError::OutOfMemory`] if there is no memory.
    pub fn new(regions: &[Region]) -> Result<Self, TrackerError> {
        Self::with_table_limit(regions, usize::MAX)
    }

    /// Creates a tracker that keeps 4 KiB detail for at most `max_leaf_tables` parts of 2 MiB each. The limit holds for
    /// the regions given here together, for each region that is added later, and for the pending pages of each epoch.
    /// Beyond the limit, a mark makes a larger part dirty: a harvest may then report pages that were not written, but
    /// never misses one that was.
    ///
    /// # Errors
    /// As [`Tracker::new`].
    pub fn with_table_limit(
        regions: &[Region],
        max_leaf_tables: usize,
    ) -> Result<Self, TrackerError> {
        let regions = Arc::new(Regions::new(regions)?);
        let tree = Tree::try_new(regions.clone(), max_leaf_tables)
            .map_err(|_| TrackerError::OutOfMemory)?;
        Ok(Self {
            tree,
            added: AddedRegions::try_new().ok_or(TrackerError::OutOfMemory)?,
            max_leaf_tables,
            registry: SpinLock::new(Registry::new(regions.clone())),
            regions,
            counters: Counters::new(),
            clock: None,
        })
    }

    /// Returns the same tracker with a clock, so that it can measure how long harvests hold its lock.
    #[must_use]
    pub fn with_clock(mut self, clock: Clock) -> Self {
        self.clock = Some(clock);
        self
    }

    /// Returns the regions as they are now, in order of address.
    pub fn regions(&self) -> Vec<Region> {
        self.registry.lock().regions().iter().collect()
    }

    /// Returns the region that contains `gpa`.
    pub fn region_at(&self, gpa: Gpa) -> Option<Region> {
        self.registry.lock().regions().at(gpa.page()).copied()
    }

    /// Returns whether every page of `range` lies in a region.
    #[cfg(feature = "vm-memory")]
    pub(crate) fn tracks(&self, range: GpaRange) -> bool {
        self.registry.lock().regions().pages_in(range) == range.pages()
    }

    /// Allocates 4 KiB detail for all of `range`, so that marking and protecting there need no more memory. The pending
    /// pages of an epoch may still need some.
    ///
    /// # Errors
    /// Returns [`OutOfTables`] if the table limit is reached or there is no memory. Detail that was allocated before
    /// stays.
    pub fn reserve(&self, range: GpaRange) -> Result<(), OutOfTables> {
        self.tree.reserve(range)?;
        let mut added = self.added.iter();
        added.try_for_each(|one| one.reserve(range))
    }

    /// Returns a handle for one writer that marks often. It has a counter of its own.
    ///
    /// # Errors
    /// Returns [`TrackerError::OutOfMemory`] if there is no memory.
    pub fn marker(self: &Arc<Self>, source: Source) -> Result<Marker, TrackerError> {
        Marker::new(self, source)
    }

    /// Marks the pages of `len_bytes` bytes from `gpa` as written by `source`. The caller must have written the bytes
    /// before. Pages outside the regions are counted in [`CountersSnapshot::outside`] and otherwise ignored.
    #[inline]
    pub fn mark(&self, gpa: Gpa, len_bytes: u64, source: Source) {
        let marked = self.mark_bytes(gpa, len_bytes);
        self.count(marked, source);
    }

    /// Marks page `first_page + i` for each bit `i` of `words` (bit `i % 64` of word `i / 64`), the form of KVM's dirty
    /// log. `first_page` may be any page.
    pub fn mark_words(&self, first_page: Gpa, words: &[u64], source: Source) {
        let marked = self.mark_bits_of(first_page, words);
        self.count(marked, source);
    }

    /// As [`Tracker::mark`], but the caller counts the result. The path for one page that has a leaf table is inlined,
    /// because a call would take longer than the mark itself.
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

    /// As [`Tracker::mark_words`], but the caller counts the result.
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

    /// Marks the pages of `bits` in `range` that lie in regions, and counts those that do not.
    #[inline(never)]
    fn mark_parts<B: Bits>(&self, range: GpaRange, bits: &B) -> MarkTally {
        let mut tally = MarkTally::default();
        let mut next = range.first_page();
        for (part, _) in self.regions.parts(range) {
            tally = tally.and(self.mark_gap(next, part.first_page(), bits));
            tally = tally.and(self.tree.mark(part, bits));
            next = part.end_page();
        }
        tally.and(self.mark_gap(next, range.end_page(), bits))
    }

    /// Marks the pages of `bits` from page `first` to `end`, none of which lies in the regions that the tracker was made
    /// with: those in added regions are marked, the others are counted.
    fn mark_gap<B: Bits>(&self, first: u64, end: u64, bits: &B) -> MarkTally {
        if first >= end {
            return MarkTally::default();
        }
        let gap = GpaRange::of(first, end);
        if self.added.is_unused() {
            self.counters.outside(bits.count(gap));
            return MarkTally::default();
        }
        let (tally, inside) = self.added.mark(gap, bits);
        self.counters
            .outside(bits.count(gap).saturating_sub(inside));
        tally
    }

    #[inline]
    fn count(&self, tally: MarkTally, source: Source) {
        self.counters.dirtied(source, tally.newly);
        self.counters.coarse(tally.coarse);
    }

    /// Returns whether the page at `gpa` is dirty for any epoch; without epochs, whether it was marked since the last
    /// one ended. For tests and diagnosis: it waits for a harvest in progress.
    pub fn dirty_at(&self, gpa: Gpa) -> bool {
        let registry = self.registry.lock();
        self.is_marked(gpa.page()) || registry.is_pending(gpa.page())
    }

    /// Returns whether page `page` is dirty in its shared tree.
    pub(crate) fn is_marked(&self, page: u64) -> bool {
        self.has(page, Plane::Dirty)
    }

    /// Returns whether page `page` has the property `plane` in its shared tree. No page outside the regions has any.
    fn has(&self, page: u64, plane: Plane) -> bool {
        if self.regions.at(page).is_some() {
            return self.tree.has(page, plane);
        }
        let added = self.added.at(page);
        added.is_some_and(|one| one.has(page, plane))
    }

    /// Returns the counters since the tracker was created.
    pub fn counters(&self) -> CountersSnapshot {
        self.counters.snapshot()
    }

    /// Returns the bytes of memory that the shared trees and the pending trees of all epochs hold.
    pub fn memory_bytes(&self) -> usize {
        let registry = self.registry.lock();
        self.tree.bytes() + self.added.bytes() + registry.pending_bytes()
    }

    pub(crate) fn tree(&self) -> &Tree<2> {
        &self.tree
    }

    /// Locks the regions and the consumers.
    pub(crate) fn registry(&self) -> SpinGuard<'_, Registry> {
        self.registry.lock()
    }

    pub(crate) fn clock(&self) -> Option<Clock> {
        self.clock
    }

    pub(crate) fn all_counters(&self) -> &Counters {
        &self.counters
    }

    /// Creates an empty tree for the pending pages of one consumer.
    pub(crate) fn pending_tree(&self, regions: Arc<Regions>) -> Option<Tree<1>> {
        Tree::try_new(regions, self.max_leaf_tables).ok()
    }
}

impl fmt::Debug for Tracker {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Tracker")
            .field("regions", &self.regions())
            .field("counters", &self.counters.snapshot())
            .finish_non_exhaustive()
    }
}
