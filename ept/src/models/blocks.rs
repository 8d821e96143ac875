//! What everything else stands on: the lock, the array that is filled once, the arena of tables.

use alloc::boxed::Box;
use alloc::sync::Arc;

use super::{explore, spawn};
use crate::arena::Arena;
use crate::sync::atomic::{AtomicU64, Ordering};
use crate::sync::{OnceArray, SpinLock};
use loom::cell::UnsafeCell;

/// One at a time, and each sees what the one before it did: loom's cell notices every access that is not ordered.
#[test]
#[allow(unsafe_code, reason = "it is what the lock is for")]
fn the_lock_excludes() {
    explore("lock", 5, || {
        let lock = Arc::new(SpinLock::new(UnsafeCell::new(0)));
        let add = |lock: &SpinLock<UnsafeCell<u64>>| {
            let guard = lock.lock();
            // SAFETY: the lock is held; loom fails the model if another access is not ordered with it.
            guard.with_mut(|value| unsafe { *value += 1 });
        };
        let other = {
            let lock = lock.clone();
            spawn(move || add(&lock))
        };
        add(&lock);
        other.join().unwrap();
        let guard = lock.lock();
        // SAFETY: as above.
        assert_eq!(guard.with(|value| unsafe { *value }), 2);
    });
}

/// What is found in a place is complete, and stays.
#[test]
fn a_place_is_filled_once() {
    explore("array filled once", 5, || {
        let array = Arc::new(OnceArray::try_new(1).unwrap());
        let fill = |array: &OnceArray<AtomicU64>, value: u64| {
            let made = Box::new(AtomicU64::new(0));
            made.store(value, Ordering::Relaxed);
            array.fill(0, made);
            array.get(0).unwrap().load(Ordering::Relaxed)
        };
        let other = {
            let array = array.clone();
            spawn(move || fill(&array, 1))
        };
        let seen = array.get(0).map(|value| value.load(Ordering::Relaxed));
        let mine = fill(&array, 2);
        assert_eq!(mine, other.join().unwrap());
        assert!(seen.is_none_or(|seen| seen == mine));
    });
}

/// Two that ask at once get two tables, though there is memory for neither at first.
#[test]
fn tables_are_given_out_once() {
    explore("arena", 10, || {
        let arena = Arc::new(Arena::<AtomicU64, 1>::try_new(2).unwrap());
        let other = {
            let arena = arena.clone();
            spawn(move || arena.allocate().unwrap())
        };
        let mine = arena.allocate().unwrap();
        let theirs = other.join().unwrap();
        assert_ne!(mine, theirs);
        assert!(arena.allocate().is_err());
        arena.give_back(theirs);
        assert_eq!(arena.allocate(), Ok(theirs));
        arena.get(mine).0.store(1, Ordering::Relaxed);
    });
}
