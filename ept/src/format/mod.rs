//! What a raw 64-bit entry means, which depends on its level.
//!
//! [`Format`] is all that the walker knows. The formats that hardware walks, one file each, are
//! [`HardwareFormat`]s: their leaves are [`Leaf`] values. The tracker's own format is private to it.

mod amd;
mod arm;
mod hardware;
mod intel;
mod leaf;
mod riscv;

use crate::sync::atomic::AtomicU64;

use crate::addr::Level;
use crate::geometry::Geometry;

pub use amd::Npt;
pub use arm::{ArmFlags, ArmStage2};
pub use hardware::HardwareFormat;
pub use intel::{Ept, EptFeatures, EptLevels};
pub use leaf::{Leaf, MemoryType, Permissions, Unsupported};
pub use riscv::{GStage, GStageMemory, GStageMode};

/// Names a table inside its store: an index, or a table's physical address.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct TableId(pub u64);

/// A decoded entry.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Entry<L> {
    /// Nothing is recorded here.
    Absent,
    /// The next lower table.
    Table(TableId),
    /// The whole span is described here.
    Leaf(L),
}

/// Decodes and encodes entries, always with their level: bit 7 of an EPT entry says "leaf" at
/// level 1 and 2 and nothing at all at level 0.
pub trait Format {
    /// What a leaf says.
    type Leaf: Copy;

    /// What `raw` means at `level`.
    fn decode(&self, raw: u64, level: Level) -> Entry<Self::Leaf>;

    /// The raw value of `entry` at `level`.
    fn encode(&self, entry: Entry<Self::Leaf>, level: Level) -> u64;
}

/// Lends the tables of one tree to a walk.
pub trait Tables {
    /// How this tree's entries are read.
    type Format: Format;
    /// A table above level 0: its entries as a slice, and whatever the format keeps beside them.
    type Upper: AsRef<[AtomicU64]> + ?Sized;
    /// A table of level 0 on loan, in any shape: a slice of 512 entries, or planes of bits.
    type Leaf<'t>: Copy
    where
        Self: 't;
    /// Held by a walk while it is going on: no table that it can reach is used for anything else meanwhile. `()`
    /// where tables never go out of use.
    type Reading<'t>
    where
        Self: 't;

    /// A walk begins.
    fn reading(&self) -> Self::Reading<'_>;

    /// How this tree's entries are read.
    fn format(&self) -> &Self::Format;

    /// The tree's shape.
    fn geometry(&self) -> Geometry;

    /// The root table, with [`Geometry::root_entries`] entries or more.
    fn root(&self) -> &Self::Upper;

    /// A table above level 0.
    ///
    /// # Panics
    /// May panic on an id that this store did not give out.
    fn upper(&self, table: TableId) -> &Self::Upper;

    /// A table of level 0.
    ///
    /// # Panics
    /// May panic on an id that this store did not give out.
    fn leaf(&self, table: TableId) -> Self::Leaf<'_>;

    /// The raw value of entry `index` (below 512) of a level-0 table.
    fn peek(leaf: Self::Leaf<'_>, index: usize) -> u64;
}

/// Makes new tables, for walks: nobody else calls this.
pub trait Allocate: Tables {
    /// A table of `level`, complete before it is linked, that says over the span starting at page
    /// `first_page` exactly what `entry` (absent or a leaf, one level up) said.
    ///
    /// # Errors
    /// No table is left.
    fn grow(
        &self,
        level: Level,
        first_page: u64,
        entry: Entry<<Self::Format as Format>::Leaf>,
    ) -> Result<TableId, OutOfTables>;

    /// Takes back a table of `level` that was never linked.
    fn give_back(&self, level: Level, table: TableId);
}

/// No table, or no memory for one, is left.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct OutOfTables;

impl core::fmt::Display for OutOfTables {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        f.write_str("no table is left")
    }
}

impl core::error::Error for OutOfTables {}
