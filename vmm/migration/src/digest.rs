//! The digest of all guest memory, by which source and destination know that they hold the same.
//!
//! It is the sum, modulo 2^128, over all pages that are not zero, of XXH3-128 of the page with the
//! page's address as seed. So it does not depend on which zero pages are populated. It guards against
//! defects, not against an adversary.

use std::fmt;
use std::time::{Duration, Instant};

use ept::{GpaRange, PAGE_SIZE};
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend};
use xxhash_rust::xxh3::xxh3_128_with_seed;

use super::page_buffer::PageBuffer;
use super::pages::{MemoryAccess, is_zero};

/// The digest of all of a guest's memory.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Digest(pub u128);

impl fmt::Display for Digest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:032x}", self.0)
    }
}

/// How much memory is read between two calls of `alive`.
const STEP_PAGES: u64 = (64 << 20) / PAGE_SIZE;

/// The digest of stopped memory, of which only `populated` holds anything. `alive` is called now and then,
/// so that the other side can be told that this takes its time.
///
/// # Errors
/// Memory that is not there, and what `alive` returns.
pub fn of_memory<M, E>(
    memory: &M,
    populated: &[GpaRange],
    mut alive: impl FnMut() -> Result<(), E>,
) -> Result<Digest, E>
where
    M: GuestMemoryBackend,
    E: From<MemoryAccess>,
{
    let mut sum = 0_u128;
    let mut buffer = PageBuffer::new(1);
    for (number, address) in (1_u64..).zip(page_addresses(populated)) {
        memory
            .read_slice(&mut buffer, GuestAddress(address))
            .map_err(|source| MemoryAccess { address, source })?;
        if !buffer.first_chunk().is_some_and(is_zero) {
            sum = sum.wrapping_add(xxh3_128_with_seed(&buffer, address));
        }
        if number.is_multiple_of(STEP_PAGES) {
            alive()?;
        }
    }
    Ok(Digest(sum))
}

/// How long the digest of `populated` will take, by that of a sample of it.
///
/// # Errors
/// Memory that is not there.
pub fn estimate<M: GuestMemoryBackend>(
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
