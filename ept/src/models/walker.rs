//! Somebody looks while somebody else maps, splits, collapses or unmaps.

use alloc::sync::Arc;

use loom::thread::JoinHandle;

use super::small::{World, all, leaf_at, npt, open, pages};
use super::{explore, spawn};
use crate::addr::{Hpa, Level};
use crate::format::{Leaf, Npt};
use crate::stage2::MapError;

const BASE: Hpa = Hpa(0x4000_0000);

/// Looks at `page` while `change` goes on; the result is what it saw.
fn look(world: &Arc<World<Npt>>, page: u64) -> JoinHandle<Option<Leaf>> {
    let world = Arc::clone(world);
    spawn(move || leaf_at(&world, page))
}

/// Nothing, or what is being mapped: never a table that is not filled yet.
#[test]
fn a_map_is_seen_whole_or_not_at_all() {
    explore("walker against mapper", 10, || {
        let world = Arc::new(World::new(npt(), 1));
        let seen = look(&world, 3);
        // Page by page, in a table that is linked first.
        world.map(pages(0, 4), BASE, all(Level::PAGE)).unwrap();
        let seen = seen.join().unwrap();
        assert!(seen.is_none_or(|leaf| leaf.hpa == Hpa(BASE.0 + 0x3000)));
    });
    explore("walker against mapper of a whole table", 5, || {
        let world = Arc::new(World::new(npt(), 1));
        let seen = look(&world, 3);
        let mapped = world.map(pages(0, 512), BASE, all(Level::PAGE));
        let seen = seen.join().unwrap();
        assert!(seen.is_none_or(|leaf| leaf.hpa == Hpa(BASE.0 + 0x3000)));
        // The table may have waited for the walker.
        assert!(matches!(mapped, Ok(()) | Err(MapError::Exhausted(_))));
    });
}

/// S5: a page is mapped to the same place at every moment of a split.
#[test]
fn a_split_changes_no_translation() {
    explore("walker against split", 5, || {
        let world = Arc::new(World::new(npt(), 1));
        world.map(pages(0, 512), BASE, all(Level::MIB2)).unwrap();
        let seen = look(&world, 3);
        let (flush, result) = world.split(pages(0, 512), Level::PAGE, &open());
        result.unwrap();
        flush.done();
        let seen = seen.join().unwrap().expect("it is mapped all the time");
        assert!([BASE, Hpa(BASE.0 + 0x3000)].contains(&seen.hpa));
    });
}

/// S6, S8: nor of a collapse, whose table is taken for something else at once if nobody reads it.
#[test]
fn a_collapse_changes_no_translation() {
    explore("walker against collapse", 5, || {
        let world = Arc::new(World::new(npt(), 1));
        world.map(pages(0, 512), BASE, all(Level::PAGE)).unwrap();
        let seen = look(&world, 3);
        let (flush, result) = world.collapse(pages(0, 512), Level::MIB2, &open());
        result.unwrap();
        flush.done();
        // Without a table for it, it is not mapped: then the reader has the table.
        let taken = world.map(pages(512, 512), Hpa(0x8000_0000), all(Level::PAGE));
        let seen = seen.join().unwrap().expect("it is mapped all the time");
        assert!(
            [BASE, Hpa(BASE.0 + 0x3000)].contains(&seen.hpa),
            "{taken:?}"
        );
    });
}

/// S8: a table that was in use before is linked when it says what it is to say, and nothing of what it said.
#[test]
fn a_recycled_table_is_seen_whole() {
    explore("walker against mapper of a recycled table", 10, || {
        let world = Arc::new(World::new(npt(), 1));
        let old = Hpa(0x8000_0000);
        world.map(pages(512, 512), old, all(Level::PAGE)).unwrap();
        let (flush, result) = world.unmap(pages(512, 512), &open());
        result.unwrap();
        flush.done();
        let seen = look(&world, 3);
        let mapped = world.map(pages(0, 512), BASE, all(Level::PAGE));
        let seen = seen.join().unwrap();
        assert!(seen.is_none_or(|leaf| leaf.hpa == Hpa(BASE.0 + 0x3000)));
        // The table may have waited for the walker.
        assert!(matches!(mapped, Ok(()) | Err(MapError::Exhausted(_))));
    });
}
