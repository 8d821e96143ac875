//! Changes of overlapping ranges, and of disjoint ones.

use alloc::sync::Arc;

use super::small::{World, all, arm, leaf_at, npt, open, pages};
use super::{explore, spawn};
use crate::addr::{Hpa, Level};
use crate::format::Permissions;

const READ_EXECUTE: Permissions = Permissions::READ.union(Permissions::EXECUTE);

/// S9: two changes of the same pages are one after the other: never the first page by one and the second by the other.
#[test]
fn overlapping_changes_are_ordered() {
    explore("two changes of two pages", 20, || {
        let world = Arc::new(World::new(npt(), 1));
        world.map(pages(0, 2), Hpa(0), all(Level::PAGE)).unwrap();
        let other = {
            let world = Arc::clone(&world);
            spawn(move || {
                let (flush, result) = world.protect(pages(0, 2), Permissions::READ, &open());
                result.unwrap();
                flush.done();
            })
        };
        let (flush, result) = world.protect(pages(0, 2), READ_EXECUTE, &open());
        result.unwrap();
        flush.done();
        other.join().unwrap();
        let found = [0, 1].map(|page| leaf_at(&world, page).unwrap().permissions);
        assert_eq!(found[0], found[1]);
    });
}

/// S14: whoever finds nothing left to change, because another has changed it already and not flushed, flushes all the
/// same.
#[test]
fn nobody_relies_on_anothers_flush() {
    explore("one change, two flushes", 20, || {
        let world = Arc::new(World::new(npt(), 1));
        world.map(pages(0, 1), Hpa(0), all(Level::PAGE)).unwrap();
        // The translation that hardware has cached, until it is flushed.
        let cached = Arc::new(loom::sync::atomic::AtomicBool::new(true));
        let change = |world: &World<_>, cached: &loom::sync::atomic::AtomicBool| {
            let (flush, result) = world.protect(pages(0, 1), Permissions::READ, &open());
            result.unwrap();
            if flush.interval().is_some() {
                cached.store(false, loom::sync::atomic::Ordering::SeqCst);
            }
            flush.done();
            let stale = cached.load(loom::sync::atomic::Ordering::SeqCst);
            assert!(!stale, "a write may still go through");
        };
        let other = {
            let (world, cached) = (Arc::clone(&world), Arc::clone(&cached));
            spawn(move || change(&world, &cached))
        };
        change(&world, &cached);
        other.join().unwrap();
    });
}

/// Two threads split one leaf, on Arm: each flushes, and when both are done hardware finds every page.
#[test]
fn a_split_by_two_is_made() {
    explore("two splits with break-before-make", 20, || {
        let world = Arc::new(World::new(arm(), 2));
        world.map(pages(0, 512), Hpa(0), all(Level::MIB2)).unwrap();
        let other = {
            let world = Arc::clone(&world);
            spawn(move || {
                let (flush, result) = world.write_fault(crate::Gpa(0), |_| ());
                result.unwrap();
                flush.done();
                let (flush, result) = world.split(pages(0, 1), Level::PAGE, &open());
                result.unwrap();
                flush.done();
            })
        };
        let (flush, result) = world.split(pages(100, 1), Level::PAGE, &open());
        result.unwrap();
        flush.done();
        other.join().unwrap();
        assert_eq!(world.lookup(0).0, Level::PAGE);
        assert!(world.is_made(0), "hardware finds it");
        assert_eq!(world.available(), 1, "the loser's table has come back");
    });
}

/// Break-before-make: whoever makes its entries makes no others, also where its place in the list is another's at once;
/// and a collapse is not given up because the entry was made meanwhile.
#[test]
fn done_makes_its_own_only() {
    explore("done against a collapse", 10, || {
        let world = Arc::new(World::new(arm(), 2));
        world.map(pages(0, 1024), Hpa(0), all(Level::MIB2)).unwrap();
        let (flush, result) = world.split(pages(0, 1024), Level::PAGE, &open());
        result.unwrap();
        let (beside, result) = world.collapse(pages(512, 512), Level::MIB2, &open());
        result.unwrap();
        beside.done();
        let other = {
            let world = Arc::clone(&world);
            spawn(move || {
                let (flush, result) = world.collapse(pages(0, 512), Level::MIB2, &open());
                result.unwrap();
                assert_eq!(flush.tally().collapses, 1);
                assert!(!world.is_made(0), "not flushed yet");
                flush.done();
                assert!(world.is_made(0));
            })
        };
        flush.done();
        other.join().unwrap();
    });
}
