//! A spin lock for data that is used rarely and briefly: regions and consumers, subscribers, lists of free tables.
//!
//! It needs `unsafe` because `core` has no mutex. The alternative, fixed arrays of atomics, would limit the number of
//! subscribers, and each operation on a list would need its own lock-free protocol.
#![allow(unsafe_code)]

use crate::sync::atomic::{AtomicBool, Ordering};
use core::cell::UnsafeCell;
use core::marker::PhantomData;
use core::ops::{Deref, DerefMut};

#[cfg(not(loom))]
/// Number of spins before a waiting thread yields its processor (with the feature `std`).
const SPINS: u32 = 64;

/// Mutual-exclusion lock without a queue.
pub(crate) struct SpinLock<T> {
    held: AtomicBool,
    value: UnsafeCell<T>,
}

// SAFETY: the value is only reached through a guard, and only one guard exists at a time. So a shared lock passes the value
// from thread to thread as a move would, for which `T: Send` is enough.
unsafe impl<T: Send> Sync for SpinLock<T> {}

/// Access to the value of a lock. Dropping it unlocks.
pub(crate) struct SpinGuard<'a, T> {
    lock: &'a SpinLock<T>,
    /// The guard lends the value, so it may only be shared between threads if the value may.
    lends: PhantomData<&'a mut T>,
}

impl<T> SpinLock<T> {
    pub(crate) fn new(value: T) -> Self {
        Self {
            held: AtomicBool::new(false),
            value: UnsafeCell::new(value),
        }
    }

    /// Waits for the lock and takes it. A thread that holds it already waits for ever.
    pub(crate) fn lock(&self) -> SpinGuard<'_, T> {
        let mut spins = 0;
        while self
            .held
            .compare_exchange_weak(false, true, Ordering::Acquire, Ordering::Relaxed)
            .is_err()
        {
            relax(&mut spins);
        }
        SpinGuard {
            lock: self,
            lends: PhantomData,
        }
    }
}

/// Waits a moment for another thread. `spins` counts the calls in a row.
#[cfg(loom)]
pub(crate) fn relax(_: &mut u32) {
    loom::thread::yield_now();
}

/// Waits a moment for another thread. `spins` counts the calls in a row.
#[cfg(not(loom))]
pub(crate) fn relax(spins: &mut u32) {
    *spins += 1;
    if *spins < SPINS {
        core::hint::spin_loop();
        return;
    }
    *spins = 0;
    #[cfg(feature = "std")]
    std::thread::yield_now();
}

impl<T> Deref for SpinGuard<'_, T> {
    type Target = T;

    fn deref(&self) -> &T {
        // SAFETY: this guard exists, so there is no other, and it lends the value no longer than it lives.
        unsafe { &*self.lock.value.get() }
    }
}

impl<T> DerefMut for SpinGuard<'_, T> {
    fn deref_mut(&mut self) -> &mut T {
        // SAFETY: as in `deref`; `&mut self` rules out a second borrow through this guard.
        unsafe { &mut *self.lock.value.get() }
    }
}

impl<T> Drop for SpinGuard<'_, T> {
    fn drop(&mut self) {
        self.lock.held.store(false, Ordering::Release);
    }
}
