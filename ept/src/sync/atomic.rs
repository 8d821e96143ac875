//! The atomics of this crate: `core`'s, or those of the model checker `loom` (with `--cfg loom`).

#[cfg(not(loom))]
pub(crate) use core::sync::atomic::{
    AtomicBool, AtomicPtr, AtomicU32, AtomicU64, AtomicUsize, Ordering, fence,
};
#[cfg(loom)]
pub(crate) use modelled::*;

/// Loom has no total order of `SeqCst` accesses: it takes them for `AcqRel`, and lets a load return what was there
/// before another thread's store. Here a `SeqCst` load is a read-modify-write that changes nothing, which returns the
/// latest value: all `SeqCst` accesses are in the one order in which loom runs them, as the language says. It acquires
/// as a load does, and releases nothing. Loads of any other strength are loom's own.
///
/// So the models do not tell `SeqCst` from `AcqRel` on read-modify-writes: that marks, summaries and crowds need the
/// stronger one is argued where they are. And such a load is a write to loom: beside plain stores to the same atomic it
/// may return an old value that no machine would; the models write with read-modify-writes what is loaded so.
#[cfg(loom)]
mod modelled {
    #![allow(
        dead_code,
        missing_docs,
        unreachable_pub,
        reason = "as in `core`, whose every method is there whether it is used or not"
    )]

    pub use loom::sync::atomic::{AtomicPtr, Ordering, fence};

    macro_rules! modelled {
        ($name:ident, $value:ty, $load:ident, $nothing:expr) => {
            #[derive(Debug)]
            pub struct $name(loom::sync::atomic::$name);

            impl $name {
                pub fn new(value: $value) -> Self {
                    Self(loom::sync::atomic::$name::new(value))
                }

                pub fn load(&self, order: Ordering) -> $value {
                    match order {
                        Ordering::SeqCst => self.0.$load($nothing, Ordering::Acquire),
                        other => self.0.load(other),
                    }
                }

                pub fn store(&self, value: $value, order: Ordering) {
                    self.0.store(value, order);
                }

                pub fn compare_exchange(
                    &self,
                    old: $value,
                    new: $value,
                    success: Ordering,
                    failure: Ordering,
                ) -> Result<$value, $value> {
                    self.0.compare_exchange(old, new, success, failure)
                }

                pub fn compare_exchange_weak(
                    &self,
                    old: $value,
                    new: $value,
                    success: Ordering,
                    failure: Ordering,
                ) -> Result<$value, $value> {
                    self.0.compare_exchange_weak(old, new, success, failure)
                }
            }

            impl Default for $name {
                fn default() -> Self {
                    Self::new(<$value>::default())
                }
            }
        };
        ($name:ident, $value:ty, $load:ident, $nothing:expr, $($method:ident),*) => {
            modelled!($name, $value, $load, $nothing);

            impl $name {
                $(pub fn $method(&self, value: $value, order: Ordering) -> $value {
                    self.0.$method(value, order)
                })*
            }
        };
    }

    modelled!(AtomicBool, bool, fetch_or, false);
    modelled!(AtomicU32, u32, fetch_add, 0);
    modelled!(
        AtomicU64, u64, fetch_add, 0, swap, fetch_add, fetch_sub, fetch_and, fetch_max, fetch_or
    );
    modelled!(
        AtomicUsize,
        usize,
        fetch_add,
        0,
        fetch_add,
        fetch_sub,
        fetch_max
    );
}
