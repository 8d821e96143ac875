//! What all formats that hardware walks have in common.

use crate::addr::{Hpa, Level, PAGE_SIZE};
use crate::format::{Entry, Format, Leaf, MemoryType, Permissions, Unsupported};
use crate::geometry::Geometry;

/// A format that hardware walks. Its tables, the root apart, are of 512 entries of 64 bits.
pub trait HardwareFormat: Format<Leaf = Leaf> + Copy {
    /// Whether a live leaf may become a table, or a table a leaf, only by way of an entry that hardware does not use
    /// (Arm's break-before-make). Then [`HardwareFormat::broken`] and the two below it are its own.
    const BREAKS: bool = false;

    /// Whether hardware may go on faulting by an entry that it has cached, after the entry allows more: Arm ("Always
    /// invalidate TLB for stage-2 permission faults", Linux's `arch/arm64/kvm/hyp/pgtable.c`) and RISC-V (privileged
    /// specification, 12.2.1, on SFENCE.VMA). On x86 the fault itself removes what was cached (Intel SDM 30.4.3.1).
    const CACHES_FAULTS: bool = false;

    /// A bit of leaves that hardware ignores: [`Leaf::write_tracked`].
    const WRITE_TRACKED: u64;

    /// How much more the raw leaf of a page is than that of the page before, where they map alike to neighbours: one
    /// in the number of the page, whose bits are together in all these formats. At higher levels, as many times that
    /// as a leaf has pages.
    const PAGE_STEP: u64 = PAGE_SIZE;

    /// The tree's shape.
    fn geometry(&self) -> Geometry;

    /// The highest level at which a leaf can stand.
    fn largest_leaf(&self) -> Level;

    /// Bits of a host-physical address that an entry holds.
    fn hpa_bits(&self) -> u32;

    /// Whether there is an entry that allows just `permissions`.
    fn admits(&self, permissions: Permissions) -> bool;

    /// Whether there is an entry with this memory type.
    fn caches(&self, memory: MemoryType) -> bool;

    /// The leaf `raw` of `level` with just `permissions`, which the format admits; all else that it says stays,
    /// what was dirty stays dirty, and bits that the format does not know stay as they are.
    fn with_permissions(&self, raw: u64, level: Level, permissions: Permissions) -> u64;

    /// The leaf `raw` of `level` as it is when its first write is to fault: without the right to write, which it
    /// is noted to have. A leaf without that right stays as it is.
    fn with_write_tracked(&self, raw: u64, level: Level) -> u64 {
        match self.decode(raw, level) {
            Entry::Leaf(leaf) if leaf.permissions.allows(Permissions::WRITE) => {
                let withheld = leaf.permissions.without(Permissions::WRITE);
                self.with_permissions(raw, level, withheld) | Self::WRITE_TRACKED
            }
            Entry::Leaf(_) | Entry::Absent | Entry::Table(_) => raw,
        }
    }

    /// The leaf `raw` of `level` with the right to write that was withheld, if it was.
    fn with_write_released(&self, raw: u64, level: Level) -> u64 {
        match self.decode(raw, level) {
            Entry::Leaf(leaf) if leaf.write_tracked => {
                let granted = leaf.permissions.union(Permissions::WRITE);
                self.with_permissions(raw & !Self::WRITE_TRACKED, level, granted)
            }
            Entry::Leaf(_) | Entry::Absent | Entry::Table(_) => raw,
        }
    }

    /// The entry `raw`, which says the same to this crate and is not used by hardware until it is made. `by` is a
    /// number below 64 that says who makes it.
    fn broken(&self, raw: u64, by: u8) -> u64 {
        let _ = by;
        raw
    }

    /// Who is to make `raw`, if it is broken.
    fn broken_by(&self, raw: u64) -> Option<u8> {
        let _ = raw;
        None
    }

    /// The entry `raw` as hardware is to use it.
    fn made(&self, raw: u64) -> u64 {
        raw
    }

    /// The bit that hardware sets when the guest writes through a leaf; cleared with one atomic and, the
    /// leaf is clean and its translation as before.
    ///
    /// Where hardware does not keep it for a leaf like `raw`, the bit in which software does, or zero: such a leaf
    /// counts as dirty while it is writable.
    fn dirty_bits(&self, raw: u64) -> u64;

    /// The bit that hardware sets when the guest uses a leaf; as above. Zero where clearing it would make the
    /// hardware fault instead.
    fn accessed_bits(&self, raw: u64) -> u64;

    /// Refuses what this format cannot say.
    ///
    /// # Errors
    /// The first part of `leaf` that no entry at `level` has.
    fn check(&self, leaf: &Leaf, level: Level) -> Result<(), Unsupported> {
        if level > self.largest_leaf() {
            return Err(Unsupported::Level(level));
        }
        let Hpa(hpa) = leaf.hpa;
        if !hpa.is_multiple_of(level.span()) || hpa >> self.hpa_bits() != 0 {
            return Err(Unsupported::Address(leaf.hpa));
        }
        if !self.admits(leaf.permissions) {
            return Err(Unsupported::Permissions(leaf.permissions));
        }
        if !self.caches(leaf.memory) {
            return Err(Unsupported::Memory(leaf.memory));
        }
        Ok(())
    }
}

/// The codes that a format has for the memory types that all formats share.
#[derive(Clone, Copy)]
pub(crate) struct MemoryCodes {
    pub(crate) write_back: u8,
    pub(crate) write_combining: u8,
    pub(crate) uncached: u8,
}

impl MemoryCodes {
    #[inline]
    pub(crate) fn decode(self, code: u8) -> MemoryType {
        if code == self.write_back {
            MemoryType::WriteBack
        } else if code == self.write_combining {
            MemoryType::WriteCombining
        } else if code == self.uncached {
            MemoryType::Uncached
        } else {
            MemoryType::Other(code)
        }
    }

    #[inline]
    pub(crate) fn encode(self, memory: MemoryType) -> u8 {
        match memory {
            MemoryType::WriteBack => self.write_back,
            MemoryType::WriteCombining => self.write_combining,
            MemoryType::Uncached => self.uncached,
            MemoryType::Other(code) => code,
        }
    }

    /// The type that is held in the field `mask` of `raw`, of at most eight bits.
    #[inline]
    pub(crate) fn in_field(self, raw: u64, mask: u64) -> MemoryType {
        let code = (raw & mask) >> mask.trailing_zeros();
        self.decode(u8::try_from(code).unwrap_or_default())
    }

    /// The field `mask` for `memory`.
    #[inline]
    pub(crate) fn to_field(self, memory: MemoryType, mask: u64) -> u64 {
        u64::from(self.encode(memory)) << mask.trailing_zeros() & mask
    }
}

/// x86's mark of a leaf above level 0; an entry of level 0 is one, and a bit of something else stands there.
pub(crate) const LARGE: u64 = 1 << 7;

/// Whether an entry of x86's is a leaf if it is present: above level 0 it says so itself, and level 3 has none.
pub(crate) const fn is_leaf(raw: u64, level: Level) -> bool {
    match level.number() {
        0 => true,
        1 | 2 => raw & LARGE != 0,
        _ => false,
    }
}

/// Bits `from` up to and without `to`.
pub(crate) const fn bits(from: u32, to: u32) -> u64 {
    (u64::MAX >> (64 - (to - from))) << from
}

/// The address field of a leaf at `level`, for fields that hold an address in place, up to bit `to`.
pub(crate) const fn address(raw: u64, level: Level, to: u32) -> Hpa {
    Hpa(raw & bits(level.span().trailing_zeros(), to))
}
