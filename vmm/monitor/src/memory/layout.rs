//! Guest-physical layout of RAM.

use ept::{Gpa, GpaRange, PAGE_SIZE};

use super::{Backing, MemoryError};

/// End of the RAM below 4 GiB. The hole from here to 4 GiB holds interrupt controllers, firmware and device registers,
/// as on a PC.
pub const LOW_RAM_END: u64 = 3 << 30;
/// Start of the RAM that does not fit below [`LOW_RAM_END`].
pub const HIGH_RAM_START: u64 = 4 << 30;
/// Minimum RAM of a guest in bytes. The first MiB holds the structures of the boot protocols.
pub const MEMORY_MIN: u64 = 2 << 20;
/// Maximum RAM of a guest in bytes. One KVM memory slot must be smaller than 8 TiB (KVM_MEM_MAX_NR_PAGES in
/// include/linux/kvm_host.h).
pub const MEMORY_MAX: u64 = 4 << 40;

/// Returns the guest-physical ranges of `bytes` of RAM: one below the hole and, if necessary, one above 4 GiB.
///
/// # Errors
/// Returns [`MemoryError::Size`] if the size is out of range or not a multiple of the page size of the backing.
pub fn layout(bytes: u64, backing: Backing) -> Result<Vec<GpaRange>, MemoryError> {
    let step = backing.page_size();
    let size_error = || MemoryError::Size { bytes, step };
    if !(MEMORY_MIN..=MEMORY_MAX).contains(&bytes) || !bytes.is_multiple_of(step) {
        return Err(size_error());
    }
    let low = bytes.min(LOW_RAM_END);
    let mut ranges = vec![range(0, low).ok_or_else(size_error)?];
    if bytes > low {
        ranges.push(range(HIGH_RAM_START, bytes - low).ok_or_else(size_error)?);
    }
    Ok(ranges)
}

/// Returns a range of `bytes` at `start`.
fn range(start: u64, bytes: u64) -> Option<GpaRange> {
    GpaRange::with_len(Gpa(start), bytes).ok()
}

/// Returns the length of a range of guest memory in bytes. The range must not be the whole 64-bit space.
#[must_use]
pub fn byte_len(range: &GpaRange) -> u64 {
    range.pages().saturating_mul(PAGE_SIZE)
}
