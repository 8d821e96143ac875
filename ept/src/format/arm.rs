//! Arm's stage 2 of VMSAv8-64, 4 KiB granule.
//!
//! ```text
//! 63   56 55 54 53 52  51  50 48 47            12 11  10 9  8 7    6 5     2  1 0
//! │ ignored │SD│XN   │ C │DBM│ 0 │    address     │ 0 │AF│ SH │ S2AP │MemAttr│ 0 1 │  block: levels 1 and 2 here
//! │                                                                            1 1 │  page: level 0 here
//! │ ignored                    │ 0 │    address     │ ignored                 │ 1 1 │  table
//! ```
//!
//! Arm counts its levels downwards: level 3 of the manual is this crate's level 0.
//!
//! Source: Arm Architecture Reference Manual (DDI 0487), chapter D8, "The AArch64 Virtual Memory System
//! Architecture": descriptor formats, "Stage 2 permissions", "Hardware management of the Access flag and dirty
//! state". An entry that is valid still faults while its access flag is clear and hardware does not set it.
//!
//! Where hardware manages the dirty state, a page that may be written has DBM set, and S2AP\[1\] is its dirty
//! bit. A page that may not be written has nowhere for the hardware to say so: bit 55 (SD), which is left to
//! software, keeps that it was dirty when the right was taken.
//!
//! Break-before-make: a leaf that becomes a table, or a table that becomes a leaf, is written first without its valid
//! bit. Hardware does not use such an entry, and what it cached of the old one is flushed; then it is made valid.

use super::hardware::{MemoryCodes, address, bits};
use super::{Entry, Format, HardwareFormat, Leaf, MemoryType, Permissions, TableId};
use crate::addr::{Level, TABLE_ENTRIES};
use crate::geometry::{Geometry, GeometryError};

const VALID: u64 = 1 << 0;
/// A table above level 0, a page at level 0.
const TABLE_OR_PAGE: u64 = 1 << 1;
const MEMORY: u64 = bits(2, 6);
const S2AP_READ: u64 = 1 << 6;
const S2AP_WRITE: u64 = 1 << 7;
const INNER_SHAREABLE: u64 = 0b11 << 8;
const ACCESS_FLAG: u64 = 1 << 10;
const DBM: u64 = 1 << 51;
/// XN\[1:0\] = 0b10: nobody executes.
const EXECUTE_NEVER: u64 = 1 << 54;
const SOFTWARE_DIRTY: u64 = 1 << 55;
/// Left to software in blocks and pages.
const WRITE_TRACKED: u64 = 1 << 56;
/// A broken entry: not valid, all of whose other bits are ignored by hardware and still say what they said.
const BROKEN: u64 = 1 << 57;
/// Who is to make a broken entry. These bits are 0 in the others: they are ignored, or belong to features that are
/// not used here.
const BROKEN_BY: u64 = bits(58, 64);
/// 48-bit addresses: FEAT_LPA2 is not used.
const ADDRESS_END: u32 = 48;

/// Stage 2 MemAttr\[3:0\], without FEAT_S2FWB: normal write-back, normal non-cacheable, Device-nGnRE.
const CODES: MemoryCodes = MemoryCodes {
    write_back: 0b1111,
    write_combining: 0b0101,
    uncached: 0b0001,
};

/// The most tables that are concatenated into one root, as index bits.
const CONCATENATED_BITS: u32 = 4;
/// Index bits of one table.
const INDEX_BITS: u32 = TABLE_ENTRIES.trailing_zeros();

/// Arm's stage 2, as one guest is given it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ArmStage2 {
    geometry: Geometry,
    ipa_bits: u32,
    flags: ArmFlags,
}

/// Who keeps the access flag and the dirty state: VTCR_EL2.HA and HD.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ArmFlags {
    /// Software. Every leaf is made with its access flag set; those that may be written count as dirty.
    Software,
    /// Hardware sets the access flag.
    Accessed,
    /// Hardware sets the access flag and the dirty state.
    AccessedDirty,
}

impl ArmStage2 {
    /// A stage 2 for guest-physical addresses (IPAs) of so many bits, 31 to 48; its root is as small as
    /// concatenation makes it. From 44 bits on it starts at Arm's level 0, which takes VTCR_EL2.PS of 44 bits or more.
    ///
    /// # Errors
    /// Fewer bits, or more.
    pub fn new(ipa_bits: u32, flags: ArmFlags) -> Result<Self, GeometryError> {
        if !(31..=ADDRESS_END).contains(&ipa_bits) {
            return Err(GeometryError::AddressBits(ipa_bits));
        }
        let mut root = Level::PAGE.up();
        while ipa_bits - root.span().trailing_zeros() > INDEX_BITS + CONCATENATED_BITS {
            root = root.up();
        }
        let entries = 1 << (ipa_bits - root.span().trailing_zeros());
        Ok(Self {
            geometry: Geometry::new(root, entries)?,
            ipa_bits,
            flags,
        })
    }

    /// The part of VTCR_EL2 that this format decides: T0SZ, SL0, TG0 (4 KiB), HA and HD.
    pub fn vtcr(&self) -> u64 {
        const HARDWARE_ACCESSED: u64 = 1 << 21;
        const HARDWARE_DIRTY: u64 = 1 << 22;
        let t0sz = u64::from(64 - self.ipa_bits);
        // SL0 counts upwards from Arm's level 2.
        let sl0 = u64::from(self.geometry.root_level().number() - 1);
        let flags = match self.flags {
            ArmFlags::Software => 0,
            ArmFlags::Accessed => HARDWARE_ACCESSED,
            ArmFlags::AccessedDirty => HARDWARE_ACCESSED | HARDWARE_DIRTY,
        };
        t0sz | sl0 << 6 | flags
    }

    fn is_leaf(raw: u64, level: Level) -> bool {
        match level.number() {
            0 => raw & TABLE_OR_PAGE != 0,
            1 | 2 => raw & TABLE_OR_PAGE == 0,
            _ => false,
        }
    }

    fn is_table(raw: u64, level: Level) -> bool {
        level > Level::PAGE && raw & TABLE_OR_PAGE != 0
    }

    /// S2AP, XN, DBM and the software's dirty bit of a leaf.
    fn permission_bits(&self, permissions: Permissions, dirty: bool) -> u64 {
        let write = match (self.flags, permissions.allows(Permissions::WRITE), dirty) {
            (ArmFlags::AccessedDirty, true, true) => DBM | S2AP_WRITE,
            (ArmFlags::AccessedDirty, true, false) => DBM,
            (_, true, _) => S2AP_WRITE,
            (_, false, true) => SOFTWARE_DIRTY,
            (_, false, false) => 0,
        };
        write | EXECUTE_NEVER ^ permissions.to_bits(S2AP_READ, 0, EXECUTE_NEVER)
    }
}

impl Format for ArmStage2 {
    type Leaf = Leaf;

    #[inline]
    fn decode(&self, raw: u64, level: Level) -> Entry<Leaf> {
        if raw & (VALID | BROKEN) == 0 {
            return Entry::Absent;
        }
        if Self::is_table(raw, level) {
            return Entry::Table(TableId(raw & bits(12, ADDRESS_END)));
        }
        if !Self::is_leaf(raw, level) {
            // A reserved descriptor: the hardware treats it as invalid.
            return Entry::Absent;
        }
        Entry::Leaf(Leaf {
            hpa: address(raw, level, ADDRESS_END),
            permissions: Permissions::from_bits(
                raw ^ EXECUTE_NEVER,
                S2AP_READ,
                S2AP_WRITE | DBM,
                EXECUTE_NEVER,
            ),
            memory: CODES.in_field(raw, MEMORY),
            accessed: raw & ACCESS_FLAG != 0,
            dirty: raw & (S2AP_WRITE | SOFTWARE_DIRTY) != 0,
            write_tracked: raw & WRITE_TRACKED != 0,
        })
    }

    #[inline]
    fn encode(&self, entry: Entry<Leaf>, level: Level) -> u64 {
        match entry {
            Entry::Absent => 0,
            Entry::Table(TableId(table)) => table | VALID | TABLE_OR_PAGE,
            Entry::Leaf(leaf) => {
                let page = if level == Level::PAGE {
                    TABLE_OR_PAGE
                } else {
                    0
                };
                let accessed = leaf.accessed || self.flags == ArmFlags::Software;
                leaf.hpa.0
                    | VALID
                    | page
                    | CODES.to_field(leaf.memory, MEMORY)
                    | INNER_SHAREABLE
                    | self.permission_bits(leaf.permissions, leaf.dirty)
                    | if accessed { ACCESS_FLAG } else { 0 }
                    | if leaf.write_tracked { WRITE_TRACKED } else { 0 }
            }
        }
    }
}

impl HardwareFormat for ArmStage2 {
    /// DDI 0487, D8.16.1 "Using break-before-make when updating translation table entries": a change of the size of
    /// a block is one that needs it.
    const BREAKS: bool = true;
    const CACHES_FAULTS: bool = true;
    const WRITE_TRACKED: u64 = WRITE_TRACKED;

    fn broken(&self, raw: u64, by: u8) -> u64 {
        raw & !(VALID | BROKEN_BY) | BROKEN | u64::from(by) << BROKEN_BY.trailing_zeros()
    }

    fn broken_by(&self, raw: u64) -> Option<u8> {
        let broken = raw & (VALID | BROKEN) == BROKEN;
        let by = (raw & BROKEN_BY) >> BROKEN_BY.trailing_zeros();
        u8::try_from(by).ok().filter(|_| broken)
    }

    fn made(&self, raw: u64) -> u64 {
        raw & !(BROKEN | BROKEN_BY) | VALID
    }

    fn geometry(&self) -> Geometry {
        self.geometry
    }

    /// Blocks of 512 GiB exist only with FEAT_LPA2.
    fn largest_leaf(&self) -> Level {
        Level::GIB.min(self.geometry.root_level())
    }

    fn hpa_bits(&self) -> u32 {
        ADDRESS_END
    }

    fn admits(&self, _: Permissions) -> bool {
        true
    }

    fn caches(&self, memory: MemoryType) -> bool {
        match memory {
            MemoryType::Other(attributes) => attributes < 16,
            _ => true,
        }
    }

    #[inline]
    fn with_permissions(&self, raw: u64, _: Level, permissions: Permissions) -> u64 {
        const CHANGED: u64 = S2AP_READ | S2AP_WRITE | DBM | EXECUTE_NEVER | SOFTWARE_DIRTY;
        let dirty = raw & (S2AP_WRITE | SOFTWARE_DIRTY) != 0;
        raw & !CHANGED | self.permission_bits(permissions, dirty)
    }

    /// S2AP\[1\] is the right itself where DBM is clear.
    fn dirty_bits(&self, raw: u64) -> u64 {
        if raw & DBM != 0 {
            S2AP_WRITE | SOFTWARE_DIRTY
        } else {
            SOFTWARE_DIRTY
        }
    }

    fn accessed_bits(&self, _: u64) -> u64 {
        match self.flags {
            ArmFlags::Software => 0,
            ArmFlags::Accessed | ArmFlags::AccessedDirty => ACCESS_FLAG,
        }
    }
}
