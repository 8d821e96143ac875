//! `selftest=`: corrupts memory to prove that the checks detect it.
//!
//! Unsafe: copies and overwrites a page of the area, as a faulty monitor would.

use core::cell::UnsafeCell;
use core::ptr::{with_exposed_provenance, with_exposed_provenance_mut};

use crate::cpu;
use crate::dirtier::{PLACES, Position, Selftest};
use crate::interface::PAGE_SIZE;
use crate::state::Progress;

/// The page is copied before this pass and corrupted after it.
const PASS: u64 = 3;

/// Copy of a page.
struct Copy(UnsafeCell<[u8; PAGE_SIZE as usize]>);

// SAFETY: only vCPU 0 uses it.
unsafe impl Sync for Copy {}

static COPY: Copy = Copy(UnsafeCell::new([0; PAGE_SIZE as usize]));

/// Addresses of the pages that may be corrupted.
#[derive(Clone, Copy)]
pub(crate) struct Victims {
    /// A page that is written in every pass.
    pub(crate) hot: u64,
    /// A page that is written once.
    pub(crate) cold: u64,
}

/// Copies or corrupts memory if `pass`, which has just ended, requires it. vCPU 0 calls it after each pass.
pub(crate) fn end_of_pass(kind: Selftest, pass: u64, victims: Victims, progress: &Progress) {
    if pass + 1 == PASS {
        copy(victims.hot);
    } else if pass == PASS {
        spoil(kind, victims, progress);
    }
}

/// Corrupts memory in the way that `kind` describes.
fn spoil(kind: Selftest, victims: Victims, progress: &Progress) {
    match kind {
        Selftest::Lost => restore(victims.hot, 0),
        Selftest::Torn => restore(victims.hot, PLACES[PLACES.len() - 1]),
        Selftest::Cold => zero(victims.cold),
        Selftest::State => progress.record(
            Position {
                pass: PASS,
                leg: 0,
                position: 0,
            },
            0,
        ),
        Selftest::Crash => cpu::crash(),
    }
}

fn copy(gpa: u64) {
    let page = with_exposed_provenance::<u8>(gpa as usize);
    for index in 0..PAGE_SIZE as usize {
        // SAFETY: the page is in the area, which is identity mapped. Only vCPU 0 uses the copy.
        unsafe { (*COPY.0.get())[index] = page.add(index).read_volatile() };
    }
}

/// Writes the copy back, from `offset` to the end of the page.
fn restore(gpa: u64, offset: u64) {
    for index in offset as usize..PAGE_SIZE as usize {
        // SAFETY: as in `copy`.
        overwrite(gpa, index, unsafe { (*COPY.0.get())[index] });
    }
}

fn zero(gpa: u64) {
    (0..PAGE_SIZE as usize).for_each(|index| overwrite(gpa, index, 0));
}

fn overwrite(gpa: u64, index: usize, byte: u8) {
    let page = with_exposed_provenance_mut::<u8>(gpa as usize);
    // SAFETY: as in `copy`.
    unsafe { page.add(index).write_volatile(byte) };
}
