//! AMD's nested page tables (NPT): the long-mode format of the host.
//!
//! ```text
//!  63  62     52 51              12 11  9  8  7   6  5   4    3   2   1  0
//! │NX │ ignored │     address      │ ign. │G│PAT│D  A │PCD│PWT│U/S│R/W│P│   leaf of level 0
//! │NX │ ignored │  address   │PAT│ ign. │G│ 1 │D  A │PCD│PWT│U/S│R/W│P│   leaf of level 1 or 2
//! │NX │ ignored │     address      │ ign. │0│ 0 │i  A │PCD│PWT│U/S│R/W│P│   table
//! ```
//!
//! Sources: AMD APM volume 2, 15.25 "Nested paging" and 5.3 "Long-mode page translation". A nested walk is a
//! user's: without U/S in every entry nothing is allowed (15.25.5). NX counts while the host's EFER.NXE is
//! set, which this format takes for granted.

use super::hardware::{LARGE, MemoryCodes, address, bits, is_leaf};
use super::{Entry, Format, HardwareFormat, Leaf, MemoryType, Permissions, TableId};
use crate::addr::{Level, TABLE_ENTRIES};
use crate::geometry::Geometry;

const PRESENT: u64 = 1 << 0;
const WRITE: u64 = 1 << 1;
const USER: u64 = 1 << 2;
const PWT: u64 = 1 << 3;
const PCD: u64 = 1 << 4;
const ACCESSED: u64 = 1 << 5;
const DIRTY: u64 = 1 << 6;
/// What [`LARGE`] is above level 0.
const PAT_PAGE: u64 = 1 << 7;
const PAT_LARGE: u64 = 1 << 12;
/// Left to software in every entry.
const WRITE_TRACKED: u64 = 1 << 9;
const NO_EXECUTE: u64 = 1 << 63;
const ADDRESS_END: u32 = 52;

/// Indexes into the host's PAT as it is at reset (APM 7.8.2): write-back, UC-, uncached. Index 2 is made
/// write-combining by hosts that want it.
const CODES: MemoryCodes = MemoryCodes {
    write_back: 0,
    write_combining: 2,
    uncached: 3,
};

/// AMD's nested page tables: how many levels the host's own paging has.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Npt {
    /// Four: 48 bits of guest-physical address.
    FourLevels,
    /// Five: 57 bits, with CR4.LA57 set in the host.
    FiveLevels,
}

impl Format for Npt {
    type Leaf = Leaf;

    #[inline]
    fn decode(&self, raw: u64, level: Level) -> Entry<Leaf> {
        if raw & PRESENT == 0 {
            return Entry::Absent;
        }
        if !is_leaf(raw, level) {
            return Entry::Table(TableId(raw & bits(12, ADDRESS_END)));
        }
        let granted = if raw & USER != 0 {
            Permissions::from_bits(raw ^ NO_EXECUTE, USER, WRITE, NO_EXECUTE)
        } else {
            Permissions::NONE
        };
        Entry::Leaf(Leaf {
            hpa: address(raw, level, ADDRESS_END),
            permissions: granted,
            memory: memory_type(raw, level),
            accessed: raw & ACCESSED != 0,
            dirty: raw & DIRTY != 0,
            write_tracked: raw & WRITE_TRACKED != 0,
        })
    }

    #[inline]
    fn encode(&self, entry: Entry<Leaf>, level: Level) -> u64 {
        match entry {
            Entry::Absent => 0,
            Entry::Table(TableId(table)) => table | PRESENT | WRITE | USER,
            Entry::Leaf(leaf) => {
                let large = if level == Level::PAGE { 0 } else { LARGE };
                leaf.hpa.0
                    | PRESENT
                    | large
                    | permission_bits(leaf.permissions)
                    | memory_bits(leaf.memory, level)
                    | if leaf.accessed { ACCESSED } else { 0 }
                    | if leaf.dirty { DIRTY } else { 0 }
                    | if leaf.write_tracked { WRITE_TRACKED } else { 0 }
            }
        }
    }
}

const fn permission_bits(permissions: Permissions) -> u64 {
    NO_EXECUTE ^ permissions.to_bits(USER, WRITE, NO_EXECUTE)
}

const fn pat(level: Level) -> u64 {
    if level.number() == 0 {
        PAT_PAGE
    } else {
        PAT_LARGE
    }
}

fn memory_type(raw: u64, level: Level) -> MemoryType {
    let index = [(PWT, 1), (PCD, 2), (pat(level), 4)]
        .iter()
        .filter(|(bit, _)| raw & bit != 0)
        .map(|(_, value)| value)
        .sum();
    CODES.decode(index)
}

fn memory_bits(memory: MemoryType, level: Level) -> u64 {
    let index = CODES.encode(memory);
    [(PWT, 1), (PCD, 2), (pat(level), 4)]
        .iter()
        .filter(|(_, value)| index & value != 0)
        .map(|(bit, _)| bit)
        .sum()
}

impl HardwareFormat for Npt {
    const WRITE_TRACKED: u64 = WRITE_TRACKED;

    fn geometry(&self) -> Geometry {
        let root = match self {
            Self::FourLevels => 3,
            Self::FiveLevels => 4,
        };
        Geometry::with_root(root, TABLE_ENTRIES)
    }

    fn largest_leaf(&self) -> Level {
        Level::GIB
    }

    fn hpa_bits(&self) -> u32 {
        ADDRESS_END
    }

    /// What is present can be read; U/S apart, which takes everything.
    fn admits(&self, permissions: Permissions) -> bool {
        permissions.allows(Permissions::READ) || permissions == Permissions::NONE
    }

    fn caches(&self, memory: MemoryType) -> bool {
        match memory {
            MemoryType::Other(index) => index < 8,
            _ => true,
        }
    }

    #[inline]
    fn with_permissions(&self, raw: u64, _: Level, permissions: Permissions) -> u64 {
        raw & !(USER | WRITE | NO_EXECUTE) | permission_bits(permissions)
    }

    fn dirty_bits(&self, _: u64) -> u64 {
        DIRTY
    }

    fn accessed_bits(&self, _: u64) -> u64 {
        ACCESSED
    }
}
