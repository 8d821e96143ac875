//! What all formats that hardware walks have in common.

use crate::addr::{Hpa, Level};
use crate::format::{Format, Leaf, MemoryType, Permissions, Unsupported};
use crate::geometry::Geometry;

/// A format that hardware walks. Its tables, the root apart, are of 512 entries of 64 bits.
pub trait HardwareFormat: Format<Leaf = Leaf> + Copy {
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

    /// The bit that hardware sets when the guest writes through a leaf; cleared with one atomic and, the
    /// leaf is clean and its translation as before.
    ///
    /// Zero where a leaf like `raw` does not keep it: such a leaf counts as dirty while it is writable.
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

/// Bits `from` up to and without `to`.
pub(crate) const fn bits(from: u32, to: u32) -> u64 {
    (u64::MAX >> (64 - (to - from))) << from
}

/// The address field of a leaf at `level`, for fields that hold an address in place, up to bit `to`.
pub(crate) const fn address(raw: u64, level: Level, to: u32) -> Hpa {
    Hpa(raw & bits(level.span().trailing_zeros(), to))
}
