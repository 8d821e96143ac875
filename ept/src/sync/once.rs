//! An array whose places are filled once each, read without a lock, and freed together.
//!
//! `unsafe` because `core` has no shared once-cell; a lock in its place would cost a locked
//! operation at every level of every descent.
#![allow(unsafe_code)]

use crate::sync::atomic::{AtomicPtr, Ordering};
use alloc::boxed::Box;
use alloc::collections::TryReserveError;
use alloc::vec::Vec;
use core::marker::PhantomData;
use core::ptr;

/// A fixed number of places for `T`, empty at first.
pub(crate) struct OnceArray<T> {
    places: Box<[AtomicPtr<T>]>,
    /// The places own what they point to.
    owns: PhantomData<Box<T>>,
}

// SAFETY: a filled place only lends `&T` until the array is dropped, and `fill` moves a `T` in from
// any thread: `T: Send + Sync` covers both.
unsafe impl<T: Send + Sync> Sync for OnceArray<T> {}

impl<T> OnceArray<T> {
    /// `len` empty places.
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

    /// What place `index` holds; `None` while it is empty or where there is no such place.
    #[inline]
    pub(crate) fn get(&self, index: usize) -> Option<&T> {
        let place = self.places.get(index)?.load(Ordering::Acquire);
        // SAFETY: a place is null or came from `Box::into_raw` in `fill`; it is never changed again
        // and freed only by `drop`, which needs the array for itself. The acquire load pairs with
        // the release exchange there, so the value is seen complete.
        unsafe { place.as_ref() }
    }

    /// Fills place `index`. Where another thread was first, or there is no such place, `value` is
    /// dropped.
    pub(crate) fn fill(&self, index: usize, value: Box<T>) {
        let Some(place) = self.places.get(index) else {
            return;
        };
        let new = Box::into_raw(value);
        let won =
            place.compare_exchange(ptr::null_mut(), new, Ordering::Release, Ordering::Relaxed);
        if won.is_err() {
            // SAFETY: `new` came from `Box::into_raw` just above and was not published.
            drop(unsafe { Box::from_raw(new) });
        }
    }
}

impl<T> Drop for OnceArray<T> {
    fn drop(&mut self) {
        for place in &self.places {
            let held = place.load(Ordering::Relaxed);
            if !held.is_null() {
                // SAFETY: it came from `Box::into_raw` in `fill`, and `&mut self` means that nobody
                // borrows it any more.
                drop(unsafe { Box::from_raw(held) });
            }
        }
    }
}
