//! Intel's extended page tables (EPT).
//!
//! ```text
//! 63      52 51              12 11 10  9  8  7   6    5 3  2 1 0
//! │ ignored │     address      │ ign. │ D  A  L  IPAT │ MT │X W R│   leaf; L at levels 1 and 2
//! │ ignored │     address      │ ign. │ i  A  0 │  0  0    │X W R│   table
//! ```
//!
//! Source: Intel SDM volume 3C, chapter "VMX support for address translation", section "The extended page
//! table mechanism (EPT)", tables of the formats of EPT entries. There is no present bit: an entry is absent
//! when it allows nothing. Bit 7 means nothing in an entry of level 0.

use super::hardware::{LARGE, MemoryCodes, address, bits, is_leaf};
use super::{Entry, Format, HardwareFormat, Leaf, MemoryType, Permissions, TableId};
use crate::addr::{Level, TABLE_ENTRIES};
use crate::geometry::Geometry;

const READ: u64 = 1 << 0;
const WRITE: u64 = 1 << 1;
const EXECUTE: u64 = 1 << 2;
const ANY: u64 = READ | WRITE | EXECUTE;
const MEMORY: u64 = bits(3, 6);
const ACCESSED: u64 = 1 << 8;
const DIRTY: u64 = 1 << 9;
/// Address fields end here, whatever MAXPHYADDR is: bits between must be zero.
const ADDRESS_END: u32 = 52;

/// Ignored in leaves.
const WRITE_TRACKED: u64 = 1 << 52;

/// Memory types, as in the MTRRs: SDM volume 3A, "Memory types and methods of caching".
const CODES: MemoryCodes = MemoryCodes {
    write_back: 6,
    write_combining: 1,
    uncached: 0,
};
/// 2, 3 and 7 are misconfigurations.
const MEMORY_TYPES: [u8; 5] = [0, 1, 4, 5, 6];

/// How many levels of tables there are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum EptLevels {
    /// Four: 48 bits of guest-physical address.
    Four,
    /// Five: 57 bits.
    Five,
}

/// Intel's extended page tables, as one processor has them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Ept {
    /// EPTP bits 5:3.
    pub levels: EptLevels,
    /// What IA32_VMX_EPT_VPID_CAP offers, and the EPTP switches on.
    pub features: EptFeatures,
}

/// What not every processor has.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct EptFeatures(u8);

impl EptFeatures {
    /// Neither.
    pub const NONE: Self = Self(0);
    /// Pages that can be run and not be read: IA32_VMX_EPT_VPID_CAP bit 0.
    pub const EXECUTE_ONLY: Self = Self(1);
    /// The processor sets accessed and dirty flags: IA32_VMX_EPT_VPID_CAP bit 21, EPTP bit 6.
    pub const ACCESSED_DIRTY: Self = Self(2);

    /// Both of these.
    #[must_use]
    pub const fn with(self, other: Self) -> Self {
        Self(self.0 | other.0)
    }

    const fn has(self, other: Self) -> bool {
        self.0 & other.0 != 0
    }
}

impl Ept {
    /// The EPT pointer for a root table at `root`, with write-back table walks.
    pub fn pointer(&self, root: TableId) -> u64 {
        let walk_length: u64 = match self.levels {
            EptLevels::Four => 4,
            EptLevels::Five => 5,
        };
        let flags = u64::from(self.features.has(EptFeatures::ACCESSED_DIRTY)) << 6;
        root.0 | flags | (walk_length - 1) << 3 | u64::from(CODES.write_back)
    }

    /// Where the processor sets no dirty flags, what may be written is dirty.
    const fn is_dirty(&self, raw: u64) -> bool {
        raw & DIRTY != 0 || raw & WRITE != 0 && !self.features.has(EptFeatures::ACCESSED_DIRTY)
    }
}

impl Format for Ept {
    type Leaf = Leaf;

    #[inline]
    fn decode(&self, raw: u64, level: Level) -> Entry<Leaf> {
        if raw & ANY == 0 {
            return Entry::Absent;
        }
        if !is_leaf(raw, level) {
            return Entry::Table(TableId(raw & bits(12, ADDRESS_END)));
        }
        Entry::Leaf(Leaf {
            hpa: address(raw, level, ADDRESS_END),
            permissions: Permissions::from_bits(raw, READ, WRITE, EXECUTE),
            memory: CODES.in_field(raw, MEMORY),
            accessed: raw & ACCESSED != 0,
            dirty: self.is_dirty(raw),
            write_tracked: raw & WRITE_TRACKED != 0,
        })
    }

    #[inline]
    fn encode(&self, entry: Entry<Leaf>, level: Level) -> u64 {
        match entry {
            Entry::Absent => 0,
            Entry::Table(TableId(table)) => table | ANY,
            Entry::Leaf(leaf) => {
                let large = if level == Level::PAGE { 0 } else { LARGE };
                leaf.hpa.0
                    | large
                    | leaf.permissions.to_bits(READ, WRITE, EXECUTE)
                    | CODES.to_field(leaf.memory, MEMORY)
                    | if leaf.accessed { ACCESSED } else { 0 }
                    | if leaf.dirty { DIRTY } else { 0 }
                    | if leaf.write_tracked { WRITE_TRACKED } else { 0 }
            }
        }
    }
}

impl HardwareFormat for Ept {
    const WRITE_TRACKED: u64 = WRITE_TRACKED;

    fn geometry(&self) -> Geometry {
        let root = match self.levels {
            EptLevels::Four => 3,
            EptLevels::Five => 4,
        };
        Geometry::with_root(root, TABLE_ENTRIES)
    }

    fn largest_leaf(&self) -> Level {
        Level::GIB
    }

    fn hpa_bits(&self) -> u32 {
        ADDRESS_END
    }

    /// Write without read is a misconfiguration; execute alone is, where the processor lacks it.
    fn admits(&self, permissions: Permissions) -> bool {
        permissions.allows(Permissions::READ)
            || permissions == Permissions::EXECUTE && self.features.has(EptFeatures::EXECUTE_ONLY)
    }

    fn caches(&self, memory: MemoryType) -> bool {
        match memory {
            MemoryType::Other(kind) => MEMORY_TYPES.contains(&kind),
            _ => true,
        }
    }

    #[inline]
    fn with_permissions(&self, raw: u64, _: Level, permissions: Permissions) -> u64 {
        let dirty = if self.is_dirty(raw) { DIRTY } else { 0 };
        raw & !ANY | permissions.to_bits(READ, WRITE, EXECUTE) | dirty
    }

    fn dirty_bits(&self, _: u64) -> u64 {
        DIRTY
    }

    fn accessed_bits(&self, _: u64) -> u64 {
        ACCESSED
    }
}
