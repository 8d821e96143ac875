//! The two building blocks that `core` lacks without a standard library. All `unsafe` of this crate
//! is in this folder.

pub(crate) mod atomic;
mod lock;
mod once;

pub(crate) use lock::{SpinLock, relax};
pub(crate) use once::OnceArray;
