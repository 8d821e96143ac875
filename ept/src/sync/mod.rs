//! Atomics, a spin lock and a write-once array: what `core` lacks without a standard library. All `unsafe` code of this
//! crate is in this folder, except for that of the models.

pub(crate) mod atomic;
mod lock;
mod once;

pub(crate) use lock::{SpinGuard, SpinLock, relax};
pub(crate) use once::OnceArray;

use alloc::boxed::Box;
use alloc::vec::Vec;

/// Moves `value` into a new box. Returns `None` if there is no memory, where `Box::new` would abort.
///
/// The box holds an array of one, because `Vec` is the only way for safe code to allocate with an error.
pub(crate) fn try_box<T>(value: T) -> Option<Box<[T; 1]>> {
    let mut one = Vec::new();
    one.try_reserve_exact(1).ok()?;
    one.push(value);
    one.into_boxed_slice().try_into().ok()
}
