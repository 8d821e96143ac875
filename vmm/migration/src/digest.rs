//! Digest of all guest memory, by which source and destination find out whether they hold the same.
//!
//! The digest is the sum, modulo 2^128, of XXH3-128 over all pages that are not zero, with the page's address as
//! seed. It does not depend on which zero pages are populated. It finds defects; an adversary can forge it.

use std::fmt;
use std::time::{Duration, Instant};

use ept::{GpaRange, PAGE_SIZE};
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend};
use xxhash_rust::xxh3::xxh3_128_with_seed;

use crate::page_buffer::PageBuffer;
use crate::pages::{MemoryAccess, is_zero};

/// Digest of all memory of a guest.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Digest(pub u128);

impl fmt::Display for Digest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:032x}", self.0)
    }
}

/// Computes the digest of `memory`, which must not change meanwhile and of which only `populated` may hold anything but
/// zeros.
///
/// # Errors
/// Returns [`MemoryAccess`] if memory cannot be read.
pub(crate) fn of_memory<M: GuestMemoryBackend>(
    memory: &M,
    populated: &[GpaRange],
) -> Result<Digest, MemoryAccess> {
    let mut sum = 0_u128;
    let mut buffer = PageBuffer::new(1);
    for address in page_addresses(populated) {
        memory
            .read_slice(&mut buffer, GuestAddress(address))
            .map_err(|source| MemoryAccess { address, source })?;
        if !buffer.first_chunk().is_some_and(is_zero) {
            sum = sum.wrapping_add(xxh3_128_with_seed(&buffer, address));
        }
    }
    Ok(Digest(sum))
}

/// Estimates how long the digest of `populated` will take, by that of a sample.
///
/// # Errors
/// Returns [`MemoryAccess`] if memory cannot be read.
pub(crate) fn estimate<M: GuestMemoryBackend>(
    memory: &M,
    populated: &[GpaRange],
) -> Result<Duration, MemoryAccess> {
    const SAMPLE_PAGES: usize = 2048;
    let total: u64 = populated.iter().map(GpaRange::pages).sum();
    let mut buffer = PageBuffer::new(1);
    let mut sampled = 0_u32;
    let began = Instant::now();
    for address in page_addresses(populated).take(SAMPLE_PAGES) {
        memory
            .read_slice(&mut buffer, GuestAddress(address))
            .map_err(|source| MemoryAccess { address, source })?;
        std::hint::black_box(xxh3_128_with_seed(&buffer, address));
        sampled += 1;
    }
    let each = began.elapsed() / sampled.max(1);
    Ok(each.saturating_mul(u32::try_from(total).unwrap_or(u32::MAX)))
}

fn page_addresses(ranges: &[GpaRange]) -> impl Iterator<Item = u64> {
    ranges
        .iter()
        .flat_map(|range| (0..range.pages()).map(|page| range.start().0 + page * PAGE_SIZE))
}
