//! RISC-V's G-stage: Sv39x4, Sv48x4 and Sv57x4.
//!
//! ```text
//!  63 62  61 60     54 53                   10 9 8  7 6 5 4 3 2 1 0
//! │N │ PBMT │ reserved │ page number (address >> 12)│RSW │D A G U X W R V│
//! ```
//!
//! An entry that allows something is a leaf, at every level; one that allows nothing is a table. The root is
//! four tables long: 2048 entries in 16 KiB.
//!
//! The hardware sets A and D itself (Svadu, or as implementations may): entries are made with both clear, and where
//! hardware faults instead, nothing here answers that.
//!
//! Sources: RISC-V privileged specification, "Hypervisor extension", "Two-stage address translation" (U must be
//! set: G-stage accesses are a user's), and "Sv39", "Svpbmt". N (Svnapot) is not used.

use super::hardware::{MemoryCodes, bits};
use super::{Entry, Format, HardwareFormat, Leaf, MemoryType, Permissions, TableId};
use crate::addr::{Hpa, Level, TABLE_ENTRIES};
use crate::geometry::Geometry;

const VALID: u64 = 1 << 0;
const READ: u64 = 1 << 1;
const WRITE: u64 = 1 << 2;
const EXECUTE: u64 = 1 << 3;
const ANY: u64 = READ | WRITE | EXECUTE;
const USER: u64 = 1 << 4;
const ACCESSED: u64 = 1 << 6;
const DIRTY: u64 = 1 << 7;
const PAGE_NUMBER: u64 = bits(10, 54);
/// A page number stands two bits lower than its address.
const PAGE_NUMBER_SHIFT: u32 = 2;
const MEMORY: u64 = bits(61, 63);
const HPA_BITS: u32 = 56;

/// The first bit of RSW, which is left to software.
const WRITE_TRACKED: u64 = 1 << 8;

/// PBMT: as the platform says, non-cacheable, I/O.
const CODES: MemoryCodes = MemoryCodes {
    write_back: 0,
    write_combining: 1,
    uncached: 2,
};

/// The root is so many tables long.
const ROOT_TABLES: usize = 4;

/// A mode of hgatp.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum GStageMode {
    /// Three levels: 41 bits of guest-physical address.
    Sv39x4,
    /// Four levels: 50 bits.
    Sv48x4,
    /// Five levels: 59 bits.
    Sv57x4,
}

/// Where a page's memory type comes from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum GStageMemory {
    /// The platform alone.
    Platform,
    /// Entries can override it: Svpbmt, switched on in menvcfg.PBMTE.
    Svpbmt,
}

/// RISC-V's G-stage, as one processor has it. It sets accessed and dirty flags where it has Svadu or does so
/// always; elsewhere a clear flag is a guest-page fault, and software sets it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct GStage {
    /// The mode.
    pub mode: GStageMode,
    /// Memory types.
    pub memory: GStageMemory,
}

impl GStage {
    /// hgatp for a root table at `root` and the guest `vmid`, of which the lowest 14 bits count.
    pub fn hgatp(&self, root: TableId, vmid: u64) -> u64 {
        let mode: u64 = match self.mode {
            GStageMode::Sv39x4 => 8,
            GStageMode::Sv48x4 => 9,
            GStageMode::Sv57x4 => 10,
        };
        mode << 60 | (vmid & bits(0, 14)) << 44 | root.0 >> 12
    }
}

impl Format for GStage {
    type Leaf = Leaf;

    #[inline]
    fn decode(&self, raw: u64, level: Level) -> Entry<Leaf> {
        // At level 0 there is no table to point to: the hardware faults.
        if raw & VALID == 0 || raw & ANY == 0 && level == Level::PAGE {
            return Entry::Absent;
        }
        let address = (raw & PAGE_NUMBER) << PAGE_NUMBER_SHIFT;
        if raw & ANY == 0 {
            return Entry::Table(TableId(address));
        }
        // Reserved: hardware faults there.
        if raw & (READ | WRITE) == WRITE {
            return Entry::Absent;
        }
        let granted = if raw & USER != 0 {
            Permissions::from_bits(raw, READ, WRITE, EXECUTE)
        } else {
            Permissions::NONE
        };
        Entry::Leaf(Leaf {
            hpa: Hpa(address),
            permissions: granted,
            memory: CODES.in_field(raw, MEMORY),
            accessed: raw & ACCESSED != 0,
            dirty: raw & DIRTY != 0,
            write_tracked: raw & WRITE_TRACKED != 0,
        })
    }

    #[inline]
    fn encode(&self, entry: Entry<Leaf>, _: Level) -> u64 {
        match entry {
            Entry::Absent => 0,
            Entry::Table(TableId(table)) => table >> PAGE_NUMBER_SHIFT | VALID,
            Entry::Leaf(leaf) => {
                leaf.hpa.0 >> PAGE_NUMBER_SHIFT
                    | VALID
                    | USER
                    | leaf.permissions.to_bits(READ, WRITE, EXECUTE)
                    | CODES.to_field(leaf.memory, MEMORY)
                    | if leaf.accessed { ACCESSED } else { 0 }
                    | if leaf.dirty { DIRTY } else { 0 }
                    | if leaf.write_tracked { WRITE_TRACKED } else { 0 }
            }
        }
    }
}

impl HardwareFormat for GStage {
    const CACHES_FAULTS: bool = true;
    const WRITE_TRACKED: u64 = WRITE_TRACKED;
    const PAGE_STEP: u64 = PAGE_NUMBER & PAGE_NUMBER.wrapping_neg();

    fn geometry(&self) -> Geometry {
        let root = match self.mode {
            GStageMode::Sv39x4 => 2,
            GStageMode::Sv48x4 => 3,
            GStageMode::Sv57x4 => 4,
        };
        Geometry::with_root(root, ROOT_TABLES * TABLE_ENTRIES)
    }

    fn largest_leaf(&self) -> Level {
        self.geometry().root_level()
    }

    fn hpa_bits(&self) -> u32 {
        HPA_BITS
    }

    /// Write without read is reserved, and what allows nothing is a table.
    fn admits(&self, permissions: Permissions) -> bool {
        permissions != Permissions::NONE
            && (permissions.allows(Permissions::READ) || !permissions.allows(Permissions::WRITE))
    }

    fn caches(&self, memory: MemoryType) -> bool {
        match memory {
            MemoryType::WriteBack => true,
            MemoryType::WriteCombining | MemoryType::Uncached => {
                self.memory == GStageMemory::Svpbmt
            }
            MemoryType::Other(_) => false,
        }
    }

    #[inline]
    fn with_permissions(&self, raw: u64, _: Level, permissions: Permissions) -> u64 {
        raw & !ANY | USER | permissions.to_bits(READ, WRITE, EXECUTE)
    }

    fn dirty_bits(&self, _: u64) -> u64 {
        DIRTY
    }

    fn accessed_bits(&self, _: u64) -> u64 {
        ACCESSED
    }
}
