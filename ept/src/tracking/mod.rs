//! The *tracking format*: a radix tree in which a leaf table is a handful of bit planes.
//!
//! An entry above level 0 is absent (nothing below it is dirty or protected), a leaf with flags that
//! hold for its whole span, or a table. A leaf table covers 2 MiB: one plane of 512 bits, one
//! cache line, for each property. Tables above have a summary bit for each entry: something
//! below is, or is just becoming, dirty.
//!
//! # Order
//! A marker works upwards: the page's bit, then every summary bit on the way to the root. A
//! harvester works downwards: it clears summary bits, then takes the words below. All of these are
//! `SeqCst`, so of a marker's step at one level and a harvester's at the next, one sees the other:
//! if the marker found a summary bit still set and left it, then its bit below was there before
//! the harvester came to look; if not, it set the summary bit again. A marker checks every level,
//! also above a bit that was set already, because whoever set that one may not have got further.

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

pub(crate) use bits::{Bitmap, Bits, Every, Tracked, count};
pub(crate) use mark::MarkTally;
pub use protect::Changed;
pub(crate) use protect::Toggle;
pub(crate) use take::{Sink, Taken};

use table::{LEAF_CHUNK, LeafChunk, LeafTable, UpperTable, WORDS};

/// Words in one plane of a leaf table.
pub(crate) const PLANE_WORDS: usize = WORDS;

/// A property of pages, with a plane of its own.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Plane {
    /// Written since the page was last taken.
    Dirty = 0,
    /// A write faults.
    Protected = 1,
}

/// The properties that hold for an entry's whole span.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Flags(u64);

impl Flags {
    /// Whether every page is dirty.
    pub(crate) fn dirty(self) -> bool {
        self.has(Plane::Dirty)
    }

    /// Whether every page is protected.
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

/// Raw entries: bits 0 and 1 are flags, bit 2 says table, the table's index starts at bit 8.
///
/// A table's flag bits are always 0: clearing a flag with `fetch_and` is harmless to an entry that
/// has become a table meanwhile. Bits 3 to 7 are left for a collapse in progress.
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

/// The stop of a walk that never stops.
pub(crate) enum Never {}

/// Tables that threads losing a race may hold for a moment, beyond those that can be linked.
const IN_FLIGHT: usize = 64;

/// One tree of the tracking format, with `PLANES` planes (dirty; dirty and protected).
pub(crate) struct Tree<const PLANES: usize> {
    geometry: Geometry,
    regions: Arc<Regions>,
    root: UpperTable,
    uppers: Arena<UpperTable, 1>,
    leaves: Arena<LeafChunk<PLANES>, LEAF_CHUNK>,
}

impl<const PLANES: usize> Tree<PLANES> {
    /// A clean tree over `regions`, with at most `max_leaf_tables` leaf tables.
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

    /// Bytes held.
    pub(crate) fn bytes(&self) -> usize {
        size_of::<Self>() + self.uppers.bytes() + self.leaves.bytes()
    }
}

impl<const PLANES: usize> Tables for Tree<PLANES> {
    type Format = Tracking;
    type Upper = UpperTable;
    type Leaf<'t> = LeafTable<'t, PLANES>;
    /// A table that was linked stays where it is.
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

/// The levels of the tables between the root and the leaf tables.
fn levels_between(geometry: Geometry) -> impl Iterator<Item = Level> {
    (1..geometry.root_level().number()).filter_map(Level::new)
}

fn upper_tables(regions: &Regions, geometry: Geometry) -> usize {
    levels_between(geometry)
        .map(|level| tables_at(regions, level))
        .sum()
}

/// Tables of `level` that `regions` can need.
fn tables_at(regions: &Regions, level: Level) -> usize {
    let parts = regions.as_slice().iter();
    parts.map(|region| tables_over(region.range, level)).sum()
}

/// Tables of `level` that meet `range`.
fn tables_over(range: GpaRange, level: Level) -> usize {
    let shift = level.up().shift();
    let count = ((range.end_page() - 1) >> shift) - (range.first_page() >> shift) + 1;
    usize::try_from(count).unwrap_or(usize::MAX)
}
