//! The *tracking format*: a radix tree in which a leaf table is a handful of bit planes.
//!
//! An entry above level 0 is absent (no page below it is dirty or protected), or a leaf whose flags hold for its whole
//! span, or a table. A leaf table covers 2 MiB. It has one plane of 512 bits, which is one cache line, for each property.
//! The tables above have a summary bit for each entry: if it is clear, no page below is dirty.
//!
//! # Order
//! A marker works upwards: it sets the page's bit, then every summary bit on the way to the root. A harvester works
//! downwards: it clears summary bits, then takes the words below them. All of these accesses are `SeqCst`. So if a marker
//! finds a summary bit set and leaves it, the harvester that clears this bit reads the marker's bit below it. If the
//! harvester has cleared the summary bit already, the marker sets it again. A marker checks every level, also above a bit
//! that was set already, because the marker that set that bit may not have reached the next level yet.

mod bits;
mod look;
mod mark;
mod protect;
mod reserve;
mod table;
mod take;
#[cfg(test)]
mod tests;
mod way;

use core::fmt;

use alloc::collections::TryReserveError;
use alloc::sync::Arc;

use crate::addr::{GpaRange, Level};
use crate::arena::Arena;
use crate::format::{Allocate, Entry, Format, OutOfTables, TableId, Tables};
use crate::geometry::Geometry;
use crate::region::Regions;

pub(crate) use bits::{Bitmap, Bits, Every, Shifted, Tracked, count};
pub(crate) use mark::MarkTally;
pub use protect::Changed;
pub(crate) use protect::Toggle;
pub(crate) use take::{Discard, Sink, Taken};

pub(crate) use table::word_mask;

use table::{LEAF_CHUNK, LeafChunk, LeafTable, UpperTable, WORDS};

/// Words in one plane of a leaf table.
pub(crate) const PLANE_WORDS: usize = WORDS;

/// A property of pages, with a plane of its own.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Plane {
    /// The page was written since it was last harvested.
    Dirty = 0,
    /// A write to the page faults.
    Protected = 1,
}

/// The properties that all pages of an entry's span have.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Flags(u64);

impl Flags {
    /// Returns whether every page is dirty.
    pub(crate) fn dirty(self) -> bool {
        self.has(Plane::Dirty)
    }

    /// Returns whether every page is write-protected.
    pub(crate) fn protected(self) -> bool {
        self.has(Plane::Protected)
    }

    pub(crate) fn has(self, plane: Plane) -> bool {
        self.0 & plane.flag() != 0
    }
}

impl Plane {
    pub(crate) const fn flag(self) -> u64 {
        1 << self as u64
    }
}

/// Encoding of entries: bits 0 and 1 are flags, bit 2 is set for a table, and the index of the table starts at bit 8.
///
/// The flag bits of a table are always 0, so clearing a flag with `fetch_and` does no harm if the entry has become a table
/// meanwhile. Bits 3 to 7 are unused.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Tracking;

const FLAGS: u64 = 0b11;
const TABLE: u64 = 0b100;
const TABLE_SHIFT: u32 = 8;

impl Format for Tracking {
    type Leaf = Flags;

    #[inline]
    fn decode(&self, raw: u64, _: Level) -> Entry<Flags> {
        if raw & TABLE != 0 {
            Entry::Table(TableId(raw >> TABLE_SHIFT))
        } else if raw & FLAGS != 0 {
            Entry::Leaf(Flags(raw & FLAGS))
        } else {
            Entry::Absent
        }
    }

    fn encode(&self, entry: Entry<Flags>, _: Level) -> u64 {
        match entry {
            Entry::Absent => 0,
            Entry::Table(table) => table.0 << TABLE_SHIFT | TABLE,
            Entry::Leaf(flags) => flags.0,
        }
    }
}

/// Stop value of a walk that never stops.
pub(crate) enum Never {}

/// Number of tables, beyond those that can be linked, for threads that lose a race to link one.
const IN_FLIGHT: usize = 64;

/// A tree of the tracking format. With one plane it records which pages are dirty; with two, also which are protected.
pub(crate) struct Tree<const PLANES: usize> {
    geometry: Geometry,
    regions: Arc<Regions>,
    root: UpperTable,
    uppers: Arena<UpperTable, 1>,
    leaves: Arena<LeafChunk<PLANES>, LEAF_CHUNK>,
}

impl<const PLANES: usize> Tree<PLANES> {
    /// Creates a clean tree over `regions` with at most `max_leaf_tables` leaf tables.
    pub(crate) fn try_new(
        regions: Arc<Regions>,
        max_leaf_tables: usize,
    ) -> Result<Self, TryReserveError> {
        let geometry = Geometry::reaching(regions.end_page());
        let leaves = tables_at(&regions, Level::PAGE) + IN_FLIGHT;
        Ok(Self {
            geometry,
            root: UpperTable::default(),
            uppers: Arena::try_new(upper_tables(&regions, geometry) + IN_FLIGHT)?,
            leaves: Arena::try_new(leaves.min(max_leaf_tables))?,
            regions,
        })
    }

    pub(crate) fn regions(&self) -> &Regions {
        &self.regions
    }

    /// Returns the bytes of memory that the tree holds.
    pub(crate) fn bytes(&self) -> usize {
        size_of::<Self>() + self.uppers.bytes() + self.leaves.bytes()
    }
}

impl<const PLANES: usize> Tables for Tree<PLANES> {
    type Format = Tracking;
    type Upper = UpperTable;
    type Leaf<'t> = LeafTable<'t, PLANES>;
    /// Nothing: a table that was linked is not freed before the tree.
    type Reading<'t> = ();

    #[inline]
    fn reading(&self) {}

    fn format(&self) -> &Tracking {
        &Tracking
    }

    fn geometry(&self) -> Geometry {
        self.geometry
    }

    fn root(&self) -> &UpperTable {
        &self.root
    }

    #[inline]
    fn upper(&self, table: TableId) -> &UpperTable {
        self.uppers.get(table).0
    }

    #[inline]
    fn leaf(&self, table: TableId) -> LeafTable<'_, PLANES> {
        let (chunk, place) = self.leaves.get(table);
        LeafTable::new(chunk, place)
    }

    fn peek(leaf: LeafTable<'_, PLANES>, index: usize) -> u64 {
        leaf.flags(index)
    }
}

impl<const PLANES: usize> Allocate for Tree<PLANES> {
    fn grow(
        &self,
        level: Level,
        first_page: u64,
        entry: Entry<Flags>,
    ) -> Result<TableId, OutOfTables> {
        let flags = match entry {
            Entry::Leaf(flags) => flags.0,
            Entry::Absent | Entry::Table(_) => 0,
        };
        if level == Level::PAGE {
            let table = self.leaves.allocate()?;
            let span = level.up().span_at(first_page);
            self.leaf(table).fill(flags, span, &self.regions);
            return Ok(table);
        }
        let table = self.uppers.allocate()?;
        self.upper(table).fill(flags);
        Ok(table)
    }

    fn give_back(&self, level: Level, table: TableId) {
        if level == Level::PAGE {
            self.leaves.give_back(table);
        } else {
            self.uppers.give_back(table);
        }
    }
}

impl<const PLANES: usize> fmt::Debug for Tree<PLANES> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Tree")
            .field("geometry", &self.geometry)
            .field("bytes", &self.bytes())
            .finish_non_exhaustive()
    }
}

/// Iterates over the levels of the tables between the root and the leaf tables.
fn levels_between(geometry: Geometry) -> impl Iterator<Item = Level> {
    (1..geometry.root_level().number()).filter_map(Level::new)
}

fn upper_tables(regions: &Regions, geometry: Geometry) -> usize {
    levels_between(geometry)
        .map(|level| tables_at(regions, level))
        .sum()
}

/// Returns the maximum number of tables of `level` that `regions` can need.
fn tables_at(regions: &Regions, level: Level) -> usize {
    let regions = regions.iter();
    regions.map(|region| tables_over(region.range, level)).sum()
}

/// Returns the number of tables of `level` whose span meets `range`.
fn tables_over(range: GpaRange, level: Level) -> usize {
    let shift = level.up().shift();
    let count = ((range.end_page() - 1) >> shift) - (range.first_page() >> shift) + 1;
    usize::try_from(count).unwrap_or(usize::MAX)
}
