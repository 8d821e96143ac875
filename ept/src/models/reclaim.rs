//! A table goes from one range to another while somebody reads.

use alloc::sync::Arc;

use super::small::{World, all, leaf_at, npt, open, pages};
use super::{explore, spawn};
use crate::addr::{Hpa, Level};
use crate::stage2::MapError;

/// Where the pages below 2 MiB lead, and those above.
const LOW: Hpa = Hpa(0x4000_0000);
const HIGH: Hpa = Hpa(0x8000_0000);

/// S8: with a single table to be had, a reader of one range never meets the entries of the other; and the table is
/// there for the other at the latest when the reader is gone.
#[test]
fn no_table_is_reused_under_a_reader() {
    explore("reader against reuse", 20, || {
        let world = Arc::new(World::new(npt(), 1));
        world.map(pages(3, 1), LOW, all(Level::PAGE)).unwrap();
        let reader = {
            let world = Arc::clone(&world);
            spawn(move || {
                if let Some(leaf) = leaf_at(&world, 3) {
                    assert_eq!(leaf.hpa, LOW);
                }
            })
        };
        let (flush, result) = world.unmap(pages(0, 512), &open());
        result.unwrap();
        flush.done();
        // The same entry of the same table, if it may be used already.
        let high = pages(512 + 3, 1);
        let mapped = world.map(high, HIGH, all(Level::PAGE));
        let waits = matches!(mapped, Err(MapError::Exhausted(_)));
        assert!(waits || mapped.is_ok());
        reader.join().unwrap();
        if waits {
            world.map(high, HIGH, all(Level::PAGE)).unwrap();
        }
        assert_eq!(leaf_at(&world, 515).unwrap().hpa, HIGH);
        assert_eq!(leaf_at(&world, 3), None);
    });
}
