//! Regions that were added after the tracker was created. Each has a tree of its own.
//!
//! The first tree of a tracker is as tall as its first regions need, and has room for their tables only. Neither can
//! change while other threads mark without a lock. Each region that is added later therefore gets its own tree. The tree
//! numbers its pages from the start of the region, rounded down to 2 MiB, so it too is only as tall as its region needs.
//!
//! A tree is never freed before its tracker, because a marker may still be writing to it. After its region was removed,
//! the tree is reused for the next region that fits. A marker that is late by then makes a page of the new region dirty,
//! which no consumer minds.
//!
//! # Order
//! Regions are added and removed under the tracker's lock, and markers look them up without it.
//! [`RegionTree::sequence`] is odd while the tree has no region. A marker reads the sequence, then the range, then the
//! sequence again. All these accesses are `SeqCst`: if both reads return the same even number, the range was not written
//! between them. If the sequence is odd, the region is still being added or was removed, so no mark is owed.

use alloc::sync::Arc;

use crate::addr::{Gpa, GpaRange, Level, PAGE_SHIFT, SPACE_PAGES};
use crate::format::OutOfTables;
use crate::region::{Region, RegionKind, Regions};
use crate::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use crate::sync::{OnceArray, try_box};
use crate::tracker::TrackerError;
use crate::tracking::{
    Bits, Changed, Discard, MarkTally, PLANE_WORDS, Plane, Shifted, Sink, Taken, Toggle, Tree,
    count, word_mask,
};
use crate::walk::Walk;

/// Maximum number of regions that can be added to one tracker at a time, besides those that it was made with.
pub const MAX_ADDED_REGIONS: usize = 256;

/// Minimum number of pages that the tree of an added region has room for: the reach of the lowest possible tree.
const LEAST_PAGES: u64 = Level::PAGE.up().pages() * 512;

/// The added regions of one tracker, and the trees that wait for a region.
pub(crate) struct AddedRegions {
    /// The trees, in one array that is allocated when the first region is added.
    trees: OnceArray<[OnceArray<[RegionTree; 1]>; 1]>,
    /// Number of trees.
    used: AtomicUsize,
}

/// A shared tree for one added region.
pub(crate) struct RegionTree {
    /// Odd while the tree has no region: see the module.
    sequence: AtomicU64,
    first_page: AtomicU64,
    pages: AtomicU64,
    tree: Tree<2>,
    /// Number of pages that the tree has room for.
    capacity: u64,
}

impl AddedRegions {
    pub(crate) fn try_new() -> Option<Self> {
        Some(Self {
            trees: OnceArray::try_new(1).ok()?,
            used: AtomicUsize::new(0),
        })
    }

    /// Returns whether no region was ever added. A fast check for the usual case.
    #[inline]
    pub(crate) fn is_unused(&self) -> bool {
        self.used.load(Ordering::Acquire) == 0
    }

    /// Iterates over the added regions, in no particular order.
    pub(crate) fn iter(&self) -> impl Iterator<Item = AddedRegion<'_>> {
        self.trees().filter_map(RegionTree::region)
    }

    /// Returns the added region that contains page `page`.
    pub(crate) fn at(&self, page: u64) -> Option<AddedRegion<'_>> {
        self.iter().find(|one| one.range.contains_page(page))
    }

    /// Returns the tree of the added region with exactly these pages.
    pub(crate) fn tree_of(&self, range: GpaRange) -> Option<&RegionTree> {
        self.trees().find(|tree| tree.range() == Some(range))
    }

    /// Marks the pages of `bits` in `range` that lie in added regions. Also returns the number of these pages.
    pub(crate) fn mark<B: Bits>(&self, range: GpaRange, bits: &B) -> (MarkTally, u64) {
        let (mut tally, mut inside) = (MarkTally::default(), 0);
        for one in self.iter() {
            if let Some(part) = one.range.intersection(&range) {
                tally = tally.and(one.mark(part, bits));
                inside += bits.count(part);
            }
        }
        (tally, inside)
    }

    /// Returns a clean tree without a region that has room for `range`. The caller holds the tracker's lock, and calls
    /// [`RegionTree::publish`].
    ///
    /// # Errors
    /// Returns [`TrackerError::OutOfMemory`] if there is no memory for a new tree, and
    /// [`TrackerError::TooManyRegions`] if there are [`MAX_ADDED_REGIONS`] trees and none without a region fits.
    pub(crate) fn vacant(
        &self,
        range: GpaRange,
        max_leaf_tables: usize,
    ) -> Result<&RegionTree, TrackerError> {
        let needed = range.end_page() - base_of(range);
        let vacant = self.trees().filter(|tree| tree.range().is_none());
        let fitting = vacant.filter(|tree| tree.capacity >= needed);
        if let Some(tree) = fitting.min_by_key(|tree| tree.capacity) {
            tree.clean();
            return Ok(tree);
        }
        self.new_tree(needed, max_leaf_tables)
    }

    fn new_tree(&self, needed: u64, max_leaf_tables: usize) -> Result<&RegionTree, TrackerError> {
        if self.trees.get(0).is_none() {
            let trees = OnceArray::try_new(MAX_ADDED_REGIONS).ok();
            let trees = trees.and_then(try_box).ok_or(TrackerError::OutOfMemory)?;
            self.trees.fill(0, trees);
        }
        let [trees] = self.trees.get(0).ok_or(TrackerError::OutOfMemory)?;
        let index = self.used.load(Ordering::Acquire);
        if index == trees.len() {
            return Err(TrackerError::TooManyRegions);
        }
        let tree = RegionTree::try_new(needed, max_leaf_tables).ok_or(TrackerError::OutOfMemory)?;
        trees.fill(index, try_box(tree).ok_or(TrackerError::OutOfMemory)?);
        self.used.store(index + 1, Ordering::Release);
        let [tree] = trees.get(index).ok_or(TrackerError::OutOfMemory)?;
        Ok(tree)
    }

    /// Returns the bytes of memory that all trees hold, also those without a region.
    pub(crate) fn bytes(&self) -> usize {
        self.trees().map(|tree| tree.tree.bytes()).sum()
    }

    fn trees(&self) -> impl Iterator<Item = &RegionTree> {
        let used = self.used.load(Ordering::Acquire);
        let trees = self.trees.get(0).into_iter().flatten();
        trees
            .flat_map(move |trees| (0..used).filter_map(|index| trees.get(index)))
            .flatten()
    }
}

impl RegionTree {
    /// Creates a tree without a region, with room for at least `needed` pages. The capacity is a power of two, so that the
    /// tree can be reused for other sizes. It costs little: tables are allocated when they are needed.
    fn try_new(needed: u64, max_leaf_tables: usize) -> Option<Self> {
        let capacity = needed.max(LEAST_PAGES).next_power_of_two();
        let whole = Region {
            range: GpaRange::of(0, capacity.min(SPACE_PAGES)),
            kind: RegionKind::Ram,
        };
        let regions = Regions::new(&[whole]).ok()?;
        Some(Self {
            sequence: AtomicU64::new(1),
            first_page: AtomicU64::new(0),
            pages: AtomicU64::new(0),
            tree: Tree::try_new(Arc::new(regions), max_leaf_tables).ok()?,
            capacity,
        })
    }

    /// Returns the pages of the tree's region; `None` if it has none.
    fn range(&self) -> Option<GpaRange> {
        loop {
            let before = self.sequence.load(Ordering::SeqCst);
            if before % 2 == 1 {
                return None;
            }
            let first_page = self.first_page.load(Ordering::SeqCst);
            let pages = self.pages.load(Ordering::SeqCst);
            if self.sequence.load(Ordering::SeqCst) == before {
                return Some(GpaRange::of(first_page, first_page + pages));
            }
        }
    }

    /// Gives the tree, which has no region, to the region `range`. From then on markers find it. The caller holds the
    /// tracker's lock.
    pub(crate) fn publish(&self, range: GpaRange) {
        self.first_page.swap(range.first_page(), Ordering::SeqCst);
        self.pages.swap(range.pages(), Ordering::SeqCst);
        self.sequence.fetch_add(1, Ordering::SeqCst);
    }

    /// Takes the tree from its region, so that markers no longer find it. The caller holds the tracker's lock.
    pub(crate) fn withdraw(&self) {
        self.sequence.fetch_add(1, Ordering::SeqCst);
    }

    /// Clears every dirty bit and every protection of a tree without a region. The caller holds the tracker's lock.
    fn clean(&self) {
        self.tree.take(GpaRange::ALL, u64::MAX, &mut Discard);
        // This needs no memory: no entry is split, because the walk covers all of the tree.
        let walk = Walk::record(&self.tree, GpaRange::of(0, self.capacity));
        let _released = self.tree.toggle(walk, Toggle::Off);
    }

    /// Returns the tree's region as it is now; `None` if it has none.
    fn region(&self) -> Option<AddedRegion<'_>> {
        let range = self.range()?;
        Some(AddedRegion {
            tree: &self.tree,
            capacity: self.capacity,
            base: base_of(range),
            range,
        })
    }
}

/// Returns the guest's page number of page 0 in the tree of region `range`. It is a multiple of 512, so that a leaf table
/// covers an aligned 2 MiB of guest memory.
fn base_of(range: GpaRange) -> u64 {
    range.first_page() / Level::PAGE.up().pages() * Level::PAGE.up().pages()
}

/// An added region, as a lookup found it.
pub(crate) struct AddedRegion<'t> {
    tree: &'t Tree<2>,
    capacity: u64,
    base: u64,
    range: GpaRange,
}

impl AddedRegion<'_> {
    /// Converts `part`, which lies in the region, to the tree's page numbers.
    fn inside(&self, part: GpaRange) -> GpaRange {
        GpaRange::of(part.first_page() - self.base, part.end_page() - self.base)
    }

    /// Converts `part` from the tree's page numbers to the guest's, and cuts it to the region.
    fn outside(&self, part: GpaRange) -> Option<GpaRange> {
        let first = part.first_page() + self.base;
        let end = (part.end_page() + self.base).min(SPACE_PAGES);
        let part = (first < end).then(|| GpaRange::of(first, end));
        part.and_then(|part| part.intersection(&self.range))
    }

    fn gpa(&self, inside: Gpa) -> Gpa {
        Gpa(inside.0.saturating_add(self.base << PAGE_SHIFT))
    }

    /// Marks the pages of `bits` in `part`, which lies in the region.
    pub(crate) fn mark<B: Bits>(&self, part: GpaRange, bits: &B) -> MarkTally {
        let base = self.base;
        self.tree.mark(self.inside(part), &Shifted { bits, base })
    }

    /// As [`Tree::take`], for the part of `range` that lies in the region.
    pub(crate) fn take<S: Sink>(&self, range: GpaRange, limit: u64, sink: &mut S) -> Taken {
        let Some(part) = self.range.intersection(&range) else {
            return Taken::All;
        };
        let part = self.inside(part);
        // Bits beyond the ends of the region belong to no page. An entry across an end is taken whole, not split.
        let first = if part.first_page() + self.base == self.range.first_page() {
            0
        } else {
            part.first_page()
        };
        let end = if part.end_page() + self.base == self.range.end_page() {
            self.capacity
        } else {
            part.end_page()
        };
        let mut relocated = Relocated { added: self, sink };
        let taken = self
            .tree
            .take(GpaRange::of(first, end), limit, &mut relocated);
        match taken {
            Taken::All => Taken::All,
            Taken::Limit(at) => Taken::Limit(self.gpa(at)),
            Taken::NoRoom(at) => Taken::NoRoom(self.gpa(at)),
        }
    }

    pub(crate) fn has(&self, page: u64, plane: Plane) -> bool {
        self.tree.has(page - self.base, plane)
    }

    /// Makes every leaf table that `range` can need.
    pub(crate) fn reserve(&self, range: GpaRange) -> Result<(), OutOfTables> {
        match self.range.intersection(&range) {
            Some(part) => self.tree.reserve(self.inside(part)),
            None => Ok(()),
        }
    }

    /// As [`Tree::toggle`], for `part`, which lies in the region.
    pub(crate) fn toggle(&self, part: GpaRange, toggle: Toggle) -> (Changed, Option<Gpa>) {
        let walk = Walk::record(self.tree, self.inside(part));
        let (mut changed, stuck) = self.tree.toggle(walk, toggle);
        changed.interval = changed.interval.and_then(|part| self.outside(part));
        (changed, stuck.map(|at| self.gpa(at)))
    }
}

/// A sink that converts the page numbers of an added region's tree to the guest's, and passes the pages on.
struct Relocated<'a, S> {
    added: &'a AddedRegion<'a>,
    sink: &'a mut S,
}

impl<S: Sink> Sink for Relocated<'_, S> {
    fn make_room(&mut self, parts: usize) -> bool {
        self.sink.make_room(parts)
    }

    fn range(&mut self, part: GpaRange) {
        if let Some(part) = self.added.outside(part) {
            self.sink.range(part);
        }
    }

    fn words(&mut self, base: u64, words: &[u64; PLANE_WORDS], _: u64) {
        let span = GpaRange::of(base, base + Level::PAGE.up().pages());
        let Some(part) = self.added.outside(span) else {
            return;
        };
        let mut words = *words;
        let base = base + self.added.base;
        for (number, word) in words.iter_mut().enumerate() {
            *word &= word_mask(base, number, part);
        }
        let pages = words.iter().map(|word| count(*word)).sum();
        self.sink.words(base, &words, pages);
    }
}
