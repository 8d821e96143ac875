//! `selftest=`: memory spoilt on purpose, to prove that the checks can fail.
//!
//! Unsafe: copies and overwrites a page of the area, as a monitor at fault would.

use core::cell::UnsafeCell;
use core::ptr::{with_exposed_provenance, with_exposed_provenance_mut};

use crate::cpu;
use crate::dirtier::{PLACES, Position, Selftest};
use crate::interface::PAGE_SIZE;
use crate::state::Progress;

/// The page is copied before this pass and spoilt after it.
const PASS: u64 = 3;

struct Copy(UnsafeCell<[u8; PAGE_SIZE as usize]>);

// SAFETY: used by vCPU 0 only.
unsafe impl Sync for Copy {}

static COPY: Copy = Copy(UnsafeCell::new([0; PAGE_SIZE as usize]));

/// The pages that may be spoilt.
#[derive(Clone, Copy)]
pub(crate) struct Victims {
    /// A page that is written in every pass.
    pub(crate) hot: u64,
    /// A page that is written once.
    pub(crate) cold: u64,
}

/// Called on vCPU 0 at the end of each pass, with the pass that has ended.
pub(crate) fn end_of_pass(kind: Selftest, pass: u64, victims: Victims, progress: &Progress) {
    if pass + 1 == PASS {
        copy(victims.hot);
    } else if pass == PASS {
        spoil(kind, victims, progress);
    }
}

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
        // SAFETY: a page of the area, identity mapped; the copy is this vCPU's own.
        unsafe { (*COPY.0.get())[index] = page.add(index).read_volatile() };
    }
}

/// Puts the copy back, from `offset` to the end of the page.
fn restore(gpa: u64, offset: u64) {
    for index in offset as usize..PAGE_SIZE as usize {
        // SAFETY: as for copying.
        overwrite(gpa, index, unsafe { (*COPY.0.get())[index] });
    }
}

fn zero(gpa: u64) {
    (0..PAGE_SIZE as usize).for_each(|index| overwrite(gpa, index, 0));
}

fn overwrite(gpa: u64, index: usize, byte: u8) {
    let page = with_exposed_provenance_mut::<u8>(gpa as usize);
    // SAFETY: as for copying.
    unsafe { page.add(index).write_volatile(byte) };
}
