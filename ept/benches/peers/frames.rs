//! Page frames for the peers' tables: all take them from the same stack, so that no allocator is compared.
//!
//! A frame's "physical address" is its address in this process.

use std::ptr;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{LazyLock, Mutex, PoisonError};

const WORDS: usize = 512;
const COUNT: usize = 16384;

static FREE: LazyLock<Mutex<Vec<usize>>> = LazyLock::new(|| {
    // The program's for ever: tables are never dropped by all of those who have them.
    let words = aligned(COUNT * WORDS);
    let base = words.as_ptr().expose_provenance();
    let frames = (0..COUNT).rev().map(|frame| base + frame * 4096);
    Mutex::new(frames.collect())
});

/// Words of zero that lie at a multiple of 4096, for ever.
pub(crate) fn aligned(words: usize) -> &'static [AtomicU64] {
    let memory: Vec<AtomicU64> = (0..words + WORDS).map(|_| AtomicU64::new(0)).collect();
    let memory: &'static [AtomicU64] = memory.leak();
    let skipped = memory.as_ptr().align_offset(4096);
    let words = &memory[skipped..][..words];
    for word in words {
        // Touched once, so that no page fault is measured.
        word.store(0, Ordering::Relaxed);
    }
    words
}

/// A frame with whatever its last owner left in it.
pub(crate) fn take() -> Option<usize> {
    FREE.lock().unwrap_or_else(PoisonError::into_inner).pop()
}

pub(crate) fn give_back(frame: usize) {
    FREE.lock()
        .unwrap_or_else(PoisonError::into_inner)
        .push(frame);
}

pub(crate) fn pointer<T>(frame: usize) -> *mut T {
    ptr::with_exposed_provenance_mut(frame)
}
