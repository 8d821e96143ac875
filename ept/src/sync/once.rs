//! An array whose elements are written once each, read without a lock, and freed together.
//!
//! It needs `unsafe` because `core` has no once-cell that threads can share. A lock in its place would cost a locked
//! operation at every level of every walk.
#![allow(unsafe_code)]

use crate::sync::atomic::{AtomicPtr, Ordering};
use alloc::boxed::Box;
use alloc::collections::TryReserveError;
use alloc::vec::Vec;
use core::marker::PhantomData;
use core::ptr;

/// A fixed number of places for a `T`, all empty at first.
pub(crate) struct OnceArray<T> {
    places: Box<[AtomicPtr<T>]>,
    /// Each place owns the `T` that it points to.
    owns: PhantomData<Box<T>>,
}

// SAFETY: a filled place only lends `&T` until the array is dropped, and `fill` moves a `T` in from any thread.
// `T: Send + Sync` allows both.
unsafe impl<T: Send + Sync> Sync for OnceArray<T> {}

impl<T> OnceArray<T> {
    /// Creates an array of `len` empty places.
    pub(crate) fn try_new(len: usize) -> Result<Self, TryReserveError> {
        let mut places = Vec::new();
        places.try_reserve_exact(len)?;
        places.resize_with(len, || AtomicPtr::new(ptr::null_mut()));
        Ok(Self {
            places: places.into_boxed_slice(),
            owns: PhantomData,
        })
    }

    pub(crate) fn len(&self) -> usize {
        self.places.len()
    }

    /// Returns the value in place `index`; `None` if the place is empty or does not exist.
    #[inline]
    pub(crate) fn get(&self, index: usize) -> Option<&T> {
        let place = self.places.get(index)?.load(Ordering::Acquire);
        // SAFETY: the pointer is null or came from `Box::into_raw` in `fill`. It never changes again, and only `drop`
        // frees it, which needs `&mut self`. The acquire load pairs with the release exchange in `fill`, so the value is
        // seen complete.
        unsafe { place.as_ref() }
    }

    /// Fills place `index`. Drops `value` if the place is filled already or does not exist.
    pub(crate) fn fill(&self, index: usize, value: Box<T>) {
        let Some(place) = self.places.get(index) else {
            return;
        };
        let new = Box::into_raw(value);
        let won =
            place.compare_exchange(ptr::null_mut(), new, Ordering::Release, Ordering::Relaxed);
        if won.is_err() {
            // SAFETY: `new` came from `Box::into_raw` above, and no other thread has seen it.
            drop(unsafe { Box::from_raw(new) });
        }
    }
}

impl<T> Drop for OnceArray<T> {
    fn drop(&mut self) {
        for place in &self.places {
            let held = place.load(Ordering::Relaxed);
            if !held.is_null() {
                // SAFETY: the pointer came from `Box::into_raw` in `fill`, and `&mut self` means that no borrow is left.
                drop(unsafe { Box::from_raw(held) });
            }
        }
    }
}
