//! A lock for data that is touched rarely and briefly: lists of consumers, subscribers, free tables.
//!
//! `unsafe` because `core` has no mutex; the alternative, fixed arrays of atomics, would bound how
//! many subscribers there may be and make every list operation a protocol of its own.
#![allow(unsafe_code)]

use crate::sync::atomic::{AtomicBool, Ordering};
use core::cell::UnsafeCell;
use core::marker::PhantomData;
use core::ops::{Deref, DerefMut};

#[cfg(not(loom))]
/// Spins before a waiting thread gives its processor away (with the feature `std`).
const SPINS: u32 = 64;

/// A mutual-exclusion lock without a queue.
pub(crate) struct SpinLock<T> {
    held: AtomicBool,
    value: UnsafeCell<T>,
}

// SAFETY: the value is reached only through a guard, and only one guard exists at a time, so a
// shared lock hands the value from thread to thread as moving it would: `T: Send` is enough.
unsafe impl<T: Send> Sync for SpinLock<T> {}

/// Access to a locked value; unlocks when dropped.
pub(crate) struct SpinGuard<'a, T> {
    lock: &'a SpinLock<T>,
    /// It lends the value, so it may be shared between threads only where the value may.
    lends: PhantomData<&'a mut T>,
}

impl<T> SpinLock<T> {
    pub(crate) fn new(value: T) -> Self {
        Self {
            held: AtomicBool::new(false),
            value: UnsafeCell::new(value),
        }
    }

    /// Waits for the lock. Not re-entrant.
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

/// One turn of waiting for another thread.
#[cfg(loom)]
pub(crate) fn relax(_: &mut u32) {
    loom::thread::yield_now();
}

/// One turn of waiting for another thread.
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
        // SAFETY: this guard exists, so no other does, and it lends the value no longer than itself.
        unsafe { &*self.lock.value.get() }
    }
}

impl<T> DerefMut for SpinGuard<'_, T> {
    fn deref_mut(&mut self) -> &mut T {
        // SAFETY: as in `deref`, and `&mut self` rules out a second borrow through this guard.
        unsafe { &mut *self.lock.value.get() }
    }
}

impl<T> Drop for SpinGuard<'_, T> {
    fn drop(&mut self) {
        self.lock.held.store(false, Ordering::Release);
    }
}
