//! Extension of the identity map above 4 GiB, made in ring 3, because instructions in ring 0 are slow
//! on some hosts.
//!
//! Unsafe: writes page tables in pages that nothing else uses.

use core::ptr::with_exposed_provenance_mut;

use crate::interface::PAGE_SIZE;
use crate::memory::Runs;

/// End of the memory that the page tables of the image map.
const MAPPED: u64 = 4 << 30;
const GIB: u64 = 1 << 30;
const LEAF_SIZE: u64 = 2 << 20;
/// Bits of page-table entries, as in `boot.s`.
const TABLE_ENTRY: u64 = 0x27;
const LEAF_ENTRY: u64 = 0xe7;

unsafe extern "C" {
    static mut page_directory_pointers: [u64; 512];
}

/// Maps all of `memory`. Takes the pages for the page tables from its start and returns the rest. If
/// there is no room for page tables, returns only the memory below 4 GiB.
pub(crate) fn map(memory: &Runs) -> Runs {
    let top = memory
        .as_slice()
        .last()
        .map_or(0, |run| (run.first + run.pages) * PAGE_SIZE);
    let tables = top.saturating_sub(MAPPED).div_ceil(GIB);
    if tables == 0 {
        return *memory;
    }
    let low = memory.as_slice()[0];
    if low.pages <= tables || (low.first + tables) * PAGE_SIZE > MAPPED {
        return below(memory, MAPPED);
    }
    for number in 0..tables {
        add_table(memory.gpa(number), MAPPED / GIB + number);
    }
    memory.window(tables, u64::MAX)
}

/// Fills a page directory that maps one GiB, and links it.
fn add_table(table: u64, gib: u64) {
    let entries = with_exposed_provenance_mut::<u64>(table as usize);
    for index in 0..GIB / LEAF_SIZE {
        let leaf = gib * GIB + index * LEAF_SIZE;
        // SAFETY: the caller reserves this page of RAM below 4 GiB for the table.
        unsafe {
            entries
                .add(index as usize)
                .write_volatile(leaf | LEAF_ENTRY)
        };
    }
    // SAFETY: `gib` is below 512, because addresses end at 512 GiB. The entry was not present, so that
    // no TLB flush is needed. No other vCPU uses this memory before the setup is published.
    unsafe {
        (&raw mut page_directory_pointers)
            .cast::<u64>()
            .add(gib as usize)
            .write_volatile(table | TABLE_ENTRY);
    }
}

/// Returns the part of `memory` below `end`.
fn below(memory: &Runs, end: u64) -> Runs {
    let mut rest = Runs::new();
    for run in memory.as_slice() {
        let first = run.first * PAGE_SIZE;
        let bytes = (run.pages * PAGE_SIZE).min(end.saturating_sub(first));
        rest.add(first, bytes, 0);
    }
    rest
}
