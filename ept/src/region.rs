//! Regions of guest-physical memory that a tracker knows.

use alloc::vec::Vec;
use core::fmt;

use crate::addr::GpaRange;
use crate::sync::atomic::{AtomicBool, AtomicU64, Ordering};

/// Kind of memory behind a region. It decides how the region may be write-protected.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum RegionKind {
    /// Ordinary memory.
    Ram,
    /// Memory that the guest only reads.
    Rom,
    /// A device's memory that the guest maps, coherent: writes are tracked.
    DeviceRam,
    /// Memory whose writes exit to a callback. Reads do not exit.
    Trapped,
    /// Private copy-on-write memory. Its pages can be marked but not write-protected: the first write replaces the
    /// page, so the protection would hold for a page that is about to be dropped.
    CopyOnWrite,
}

impl fmt::Display for RegionKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Ram => "RAM",
            Self::Rom => "ROM",
            Self::DeviceRam => "device RAM",
            Self::Trapped => "trapped memory",
            Self::CopyOnWrite => "private copy-on-write memory",
        })
    }
}

/// A range of guest-physical memory and the kind of memory behind it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Region {
    /// Guest-physical pages of the region.
    pub range: GpaRange,
    /// Kind of memory behind the pages.
    pub kind: RegionKind,
}

/// What a region holds when [`Tracker::add_region`](crate::Tracker::add_region) adds it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Contents {
    /// Every byte is zero, as in a mapping that was just created. The region starts clean for every open epoch. The
    /// consumer of each epoch must know by other means that the region exists and reads as zeros.
    Zero,
    /// The bytes may be anything. The whole region starts dirty for every open epoch, because no consumer has seen it.
    Unknown,
}

/// Regions in order of address, without overlap.
///
/// A region can be removed while other threads look regions up, but none can be added: a tracker replaces the whole list
/// instead, or keeps a second one.
#[derive(Debug)]
pub(crate) struct Regions {
    sorted: Vec<Entry>,
    /// The region with the most pages. Most marks hit it, so lookups compare with it first.
    largest_first: u64,
    /// Pages of that region; 0 after it was removed.
    largest_pages: AtomicU64,
    /// Whether any region was removed: tables may then hold flags of pages that lie in no region.
    shrunk: AtomicBool,
}

#[derive(Debug)]
struct Entry {
    region: Region,
    removed: AtomicBool,
}

impl Entry {
    fn is_present(&self) -> bool {
        !self.removed.load(Ordering::Acquire)
    }
}

/// Reason why a list of regions is refused.
#[derive(Debug)]
pub(crate) enum Unfit {
    /// The list is empty.
    Empty,
    /// These two regions overlap.
    Overlap(GpaRange, GpaRange),
    /// There is no memory for the list.
    OutOfMemory,
}

impl Regions {
    /// Creates a list of `regions`, which may be in any order.
    pub(crate) fn new(regions: &[Region]) -> Result<Self, Unfit> {
        let mut sorted = Vec::new();
        let reserved = sorted.try_reserve_exact(regions.len());
        reserved.map_err(|_| Unfit::OutOfMemory)?;
        sorted.extend(regions.iter().map(|region| Entry {
            region: *region,
            removed: AtomicBool::new(false),
        }));
        sorted.sort_unstable_by_key(|entry| entry.region.range);
        for pair in sorted.windows(2) {
            let (one, other) = (pair[0].region.range, pair[1].region.range);
            if one.overlaps(&other) {
                return Err(Unfit::Overlap(one, other));
            }
        }
        let ranges = sorted.iter().map(|entry| entry.region.range);
        let largest = ranges.max_by_key(GpaRange::pages).ok_or(Unfit::Empty)?;
        Ok(Self {
            largest_first: largest.first_page(),
            largest_pages: AtomicU64::new(largest.pages()),
            shrunk: AtomicBool::new(false),
            sorted,
        })
    }

    /// Creates a list of the regions that are still present, and `region`.
    pub(crate) fn with(&self, region: Region) -> Result<Self, Unfit> {
        let mut all = Vec::new();
        let reserved = all.try_reserve_exact(self.sorted.len() + 1);
        reserved.map_err(|_| Unfit::OutOfMemory)?;
        all.extend(self.iter());
        all.push(region);
        Self::new(&all)
    }

    /// Removes the region with exactly these pages, if it is present.
    pub(crate) fn remove(&self, range: GpaRange) {
        let Some(entry) = self.entry_of(range) else {
            return;
        };
        // Before the region goes: whoever no longer finds it must know that tables may have flags of its pages.
        self.shrunk.store(true, Ordering::Release);
        entry.removed.store(true, Ordering::Release);
        if range.first_page() == self.largest_first {
            self.largest_pages.store(0, Ordering::Release);
        }
    }

    /// Returns the region with exactly these pages.
    pub(crate) fn exact(&self, range: GpaRange) -> Option<Region> {
        self.entry_of(range).map(|entry| entry.region)
    }

    fn entry_of(&self, range: GpaRange) -> Option<&Entry> {
        let entry = self.from(range.first_page()).first()?;
        (entry.region.range == range && entry.is_present()).then_some(entry)
    }

    /// Returns whether a region was removed from this list.
    #[inline]
    pub(crate) fn shrunk(&self) -> bool {
        self.shrunk.load(Ordering::Acquire)
    }

    /// Iterates over the regions that are present, in order of address.
    pub(crate) fn iter(&self) -> impl Iterator<Item = Region> {
        let present = self.sorted.iter().filter(|entry| entry.is_present());
        present.map(|entry| entry.region)
    }

    /// Returns the number of the page after the last region.
    pub(crate) fn end_page(&self) -> u64 {
        let last = self.sorted.last();
        last.map_or(0, |last| last.region.range.end_page())
    }

    /// Returns whether page `page` lies in a region.
    #[inline]
    pub(crate) fn have_page(&self, page: u64) -> bool {
        let in_largest = page.wrapping_sub(self.largest_first);
        in_largest < self.largest_pages.load(Ordering::Relaxed) || self.at(page).is_some()
    }

    /// Returns the region that contains page `page`.
    #[inline]
    pub(crate) fn at(&self, page: u64) -> Option<&Region> {
        let entry = self.from(page).first()?;
        (entry.region.range.first_page() <= page && entry.is_present()).then_some(&entry.region)
    }

    /// Returns whether one region contains all of `range`.
    #[inline]
    pub(crate) fn have(&self, range: GpaRange) -> bool {
        let entry = self.from(range.first_page()).first();
        entry.is_some_and(|entry| entry.region.range.covers(&range) && entry.is_present())
    }

    /// Iterates over the parts of `range` that lie in regions, in order of address.
    #[inline]
    pub(crate) fn parts(&self, range: GpaRange) -> impl Iterator<Item = (GpaRange, &Region)> {
        self.from(range.first_page())
            .iter()
            .map_while(move |entry| Some((entry.region.range.intersection(&range)?, entry)))
            .filter(|(_, entry)| entry.is_present())
            .map(|(part, entry)| (part, &entry.region))
    }

    /// Counts the pages of `range` that lie in regions.
    pub(crate) fn pages_in(&self, range: GpaRange) -> u64 {
        self.parts(range).map(|(part, _)| part.pages()).sum()
    }

    /// Returns whether `range` contains every page of `span` that lies in a region.
    #[inline]
    pub(crate) fn covered(&self, span: GpaRange, range: GpaRange) -> bool {
        range.covers(&span) || self.parts(span).all(|(part, _)| range.covers(&part))
    }

    /// Returns the entries that end after page `page`, removed ones included.
    #[inline]
    fn from(&self, page: u64) -> &[Entry] {
        let skipped = self
            .sorted
            .partition_point(|entry| entry.region.range.end_page() <= page);
        &self.sorted[skipped..]
    }
}
