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
//! Sources: RISC-V privileged specification, "Hypervisor extension", "Two-stage address translation" (U must be
//! set: G-stage accesses are a user's), and "Sv39", "Svpbmt". N (Svnapot) is not used.

use super::hardware::bits;
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
const MEMORY_SHIFT: u32 = 61;
const MEMORY: u64 = bits(61, 63);
const HPA_BITS: u32 = 56;

/// PBMT: as the platform says, non-cacheable, I/O.
const WRITE_BACK: u8 = 0;
const WRITE_COMBINING: u8 = 1;
const UNCACHED: u8 = 2;

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
    fn decode(&self, raw: u64, _: Level) -> Entry<Leaf> {
        if raw & VALID == 0 {
            return Entry::Absent;
        }
        let address = (raw & PAGE_NUMBER) << PAGE_NUMBER_SHIFT;
        if raw & ANY == 0 {
            return Entry::Table(TableId(address));
        }
        let granted = if raw & USER != 0 {
            Permissions::if_set(raw, READ, Permissions::READ)
                .union(Permissions::if_set(raw, WRITE, Permissions::WRITE))
                .union(Permissions::if_set(raw, EXECUTE, Permissions::EXECUTE))
        } else {
            Permissions::NONE
        };
        Entry::Leaf(Leaf {
            hpa: Hpa(address),
            permissions: granted,
            memory: memory_type(raw),
            accessed: raw & ACCESSED != 0,
            dirty: raw & DIRTY != 0,
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
                    | permission_bits(leaf.permissions)
                    | memory_bits(leaf.memory)
                    | if leaf.accessed { ACCESSED } else { 0 }
                    | if leaf.dirty { DIRTY } else { 0 }
            }
        }
    }
}

const fn permission_bits(permissions: Permissions) -> u64 {
    permissions.bits(Permissions::READ, READ)
        | permissions.bits(Permissions::WRITE, WRITE)
        | permissions.bits(Permissions::EXECUTE, EXECUTE)
}

fn memory_type(raw: u64) -> MemoryType {
    // Two bits.
    match u8::try_from((raw & MEMORY) >> MEMORY_SHIFT).unwrap_or_default() {
        WRITE_BACK => MemoryType::WriteBack,
        WRITE_COMBINING => MemoryType::WriteCombining,
        UNCACHED => MemoryType::Uncached,
        other => MemoryType::Other(other),
    }
}

fn memory_bits(memory: MemoryType) -> u64 {
    let kind = match memory {
        MemoryType::WriteBack => WRITE_BACK,
        MemoryType::WriteCombining => WRITE_COMBINING,
        MemoryType::Uncached => UNCACHED,
        MemoryType::Other(other) => other,
    };
    u64::from(kind) << MEMORY_SHIFT & MEMORY
}

impl HardwareFormat for GStage {
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
        raw & !ANY | USER | permission_bits(permissions)
    }

    fn dirty_bits(&self, _: u64) -> u64 {
        DIRTY
    }

    fn accessed_bits(&self, _: u64) -> u64 {
        ACCESSED
    }
}
