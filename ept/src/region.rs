//! The regions of guest-physical memory that a tracker knows, and what may be done to each.

use alloc::vec::Vec;
use core::fmt;

use crate::addr::GpaRange;

/// What lies behind a region.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum RegionKind {
    /// Ordinary memory.
    Ram,
    /// Memory that the guest only reads.
    Rom,
    /// A device's memory, coherent and mapped: writes are tracked.
    DeviceRam,
    /// Writes go to a callback, reads stay native.
    Trapped,
    /// Private copy-on-write memory: the first write to a page puts another page in its place. Marks are fine; it
    /// cannot be write-protected by page, because the protection would be of the page that is about to go.
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

/// One region.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Region {
    /// Its pages.
    pub range: GpaRange,
    /// What lies behind them.
    pub kind: RegionKind,
}

/// Regions in order, without overlap.
#[derive(Debug)]
pub(crate) struct Regions {
    sorted: Vec<Region>,
    /// The one with the most pages, which is asked first: most pages lie there.
    largest: GpaRange,
}

/// Why regions cannot be tracked.
#[derive(Debug)]
pub(crate) enum Unfit {
    /// There is none.
    Empty,
    /// The first two that overlap.
    Overlap(GpaRange, GpaRange),
}

impl Regions {
    pub(crate) fn new(mut regions: Vec<Region>) -> Result<Self, Unfit> {
        regions.sort_unstable_by_key(|region| region.range);
        for pair in regions.windows(2) {
            if pair[0].range.overlaps(&pair[1].range) {
                return Err(Unfit::Overlap(pair[0].range, pair[1].range));
            }
        }
        let ranges = regions.iter().map(|region| region.range);
        Ok(Self {
            largest: ranges.max_by_key(GpaRange::pages).ok_or(Unfit::Empty)?,
            sorted: regions,
        })
    }

    pub(crate) fn as_slice(&self) -> &[Region] {
        &self.sorted
    }

    /// The page after the last region.
    pub(crate) fn end_page(&self) -> u64 {
        self.sorted.last().map_or(0, |last| last.range.end_page())
    }

    /// Whether a region has page `page`.
    #[inline]
    pub(crate) fn have_page(&self, page: u64) -> bool {
        self.largest.contains_page(page) || self.at(page).is_some()
    }

    /// The region that has page `page`.
    #[inline]
    pub(crate) fn at(&self, page: u64) -> Option<&Region> {
        let region = self.from(page).first()?;
        (region.range.first_page() <= page).then_some(region)
    }

    /// Whether one region has all of `range`.
    #[inline]
    pub(crate) fn have(&self, range: GpaRange) -> bool {
        let region = self.from(range.first_page()).first();
        region.is_some_and(|region| region.range.covers(&range))
    }

    /// The parts of `range` that lie in regions, in order.
    #[inline]
    pub(crate) fn parts(&self, range: GpaRange) -> impl Iterator<Item = (GpaRange, &Region)> {
        self.from(range.first_page())
            .iter()
            .map_while(move |region| Some((region.range.intersection(&range)?, region)))
    }

    /// Pages of `range` that lie in regions.
    pub(crate) fn pages_in(&self, range: GpaRange) -> u64 {
        self.parts(range).map(|(part, _)| part.pages()).sum()
    }

    /// Whether `range` has every page of `span` that lies in a region.
    #[inline]
    pub(crate) fn covered(&self, span: GpaRange, range: GpaRange) -> bool {
        range.covers(&span) || self.parts(span).all(|(part, _)| range.covers(&part))
    }

    /// The regions that end after page `page`.
    #[inline]
    fn from(&self, page: u64) -> &[Region] {
        let skipped = self
            .sorted
            .partition_point(|region| region.range.end_page() <= page);
        &self.sorted[skipped..]
    }
}
