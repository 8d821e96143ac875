//! The two building blocks that `core` lacks without a standard library, and the atomics that they and all else
//! stand on. All `unsafe` of this crate is in this folder, but for that of the models.

pub(crate) mod atomic;
mod lock;
mod once;

pub(crate) use lock::{SpinLock, relax};
pub(crate) use once::OnceArray;
