//! The identity map above 4 GiB, added from ring 3, where it costs nothing.
//!
//! Unsafe: writes page tables, in pages that nothing else uses.

use core::ptr::with_exposed_provenance_mut;

use crate::interface::PAGE_SIZE;
use crate::memory::Runs;

/// What the image's own tables map.
const MAPPED: u64 = 4 << 30;
const GIB: u64 = 1 << 30;
const LEAF_SIZE: u64 = 2 << 20;
/// Entries' bits as in `boot.s`.
const TABLE_ENTRY: u64 = 0x27;
const LEAF_ENTRY: u64 = 0xe7;

unsafe extern "C" {
    static mut page_directory_pointers: [u64; 512];
}

/// Maps all of `memory`, taking the pages for the tables from its start; returns what is left.
/// If there is no room for tables, the memory above 4 GiB is given up.
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

fn add_table(table: u64, gib: u64) {
    let entries = with_exposed_provenance_mut::<u64>(table as usize);
    for index in 0..GIB / LEAF_SIZE {
        let leaf = gib * GIB + index * LEAF_SIZE;
        // SAFETY: a page of RAM below 4 GiB that is taken out of use by the caller.
        unsafe {
            entries
                .add(index as usize)
                .write_volatile(leaf | LEAF_ENTRY)
        };
    }
    // SAFETY: `gib` is below 512, since addresses end at 512 GiB. The entry was not present, so
    // there is nothing to flush; no other vCPU uses memory before this one says so.
    unsafe {
        (&raw mut page_directory_pointers)
            .cast::<u64>()
            .add(gib as usize)
            .write_volatile(table | TABLE_ENTRY);
    }
}

fn below(memory: &Runs, end: u64) -> Runs {
    let mut rest = Runs::new();
    for run in memory.as_slice() {
        let first = run.first * PAGE_SIZE;
        let bytes = (run.pages * PAGE_SIZE).min(end.saturating_sub(first));
        rest.add(first, bytes, 0);
    }
    rest
}
