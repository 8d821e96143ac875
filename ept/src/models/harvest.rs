//! Hardware sets flags while they are taken, and while a leaf is split.

use alloc::sync::Arc;
use alloc::vec::Vec;

use loom::thread;

use super::small::{World, all, npt, open, pages};
use super::{explore, spawn};
use crate::addr::{Gpa, Hpa, Level};
use crate::format::{Entry, Format, HardwareFormat, Npt, Permissions, Tables};
use crate::sync::atomic::{AtomicU64, Ordering};

/// APM volume 2, 5.4.2: the processor sets A and D with a locked read-modify-write of the entry that it translates by.
const ACCESSED_DIRTY: u64 = 0x60;

/// What a guest's store to page 3 does to the entry that maps it. As hardware does, it starts again if that is another
/// one by then.
fn store(world: &World<Npt>) {
    loop {
        let root = world.root_entry(3);
        let raw = root.load(Ordering::SeqCst);
        let (slot, raw) = match world.format().decode(raw, Level::MIB2) {
            Entry::Table(_) => {
                let slot = world.table_entry(3);
                (slot, slot.load(Ordering::SeqCst))
            }
            Entry::Leaf(_) | Entry::Absent => (root, raw),
        };
        let new = raw | ACCESSED_DIRTY;
        let set = slot.compare_exchange(raw, new, Ordering::SeqCst, Ordering::SeqCst);
        if set.is_ok() {
            return;
        }
        thread::yield_now();
    }
}

/// The pages that are dirty, which they are no more.
fn clean(world: &World<Npt>) -> Vec<u64> {
    let mut dirty = Vec::new();
    let (flush, result) = world.clean(pages(0, 512), &open(), |run| {
        dirty.extend(run.first_page()..run.end_page());
    });
    result.unwrap();
    flush.done();
    dirty
}

/// S7, S16: a flag that hardware sets while it is taken is recorded, or still there.
#[test]
fn nothing_is_cleaned_unrecorded() {
    explore("harvest against hardware", 10, || {
        let world = Arc::new(World::new(npt(), 1));
        world.map(pages(0, 8), Hpa(0), all(Level::PAGE)).unwrap();
        let guest = {
            let world = Arc::clone(&world);
            spawn(move || store(&world))
        };
        let first = clean(&world);
        guest.join().unwrap();
        let second = clean(&world);
        let found = [first.as_slice(), second.as_slice()].concat();
        assert_eq!(found, [3], "once");
        assert_eq!(clean(&world), [], "and then it is clean");
    });
}

/// S7, S19: neither ageing nor protecting loses a dirty flag that is set meanwhile.
#[test]
fn another_change_loses_no_dirty_flag() {
    explore("ageing and protection against hardware", 10, || {
        let world = Arc::new(World::new(npt(), 1));
        world.map(pages(0, 8), Hpa(0), all(Level::PAGE)).unwrap();
        world.table_entry(3).fetch_or(0x20, Ordering::SeqCst);
        let guest = {
            let world = Arc::clone(&world);
            spawn(move || store(&world))
        };
        let (flush, result) = world.age(pages(0, 8), &open(), |_| ());
        result.unwrap();
        flush.done();
        let (flush, result) = world.protect(pages(0, 8), Permissions::READ, &open());
        result.unwrap();
        flush.done();
        guest.join().unwrap();
        assert_eq!(clean(&world), [3]);
    });
}

/// S5, S7: a leaf that hardware makes dirty while it is split: that is refused and tried again, or every part is dirty.
#[test]
fn a_split_loses_no_flag() {
    explore("split against hardware", 10, || {
        let world = Arc::new(World::new(npt(), 1));
        world.map(pages(0, 512), Hpa(0), all(Level::MIB2)).unwrap();
        let guest = {
            let world = Arc::clone(&world);
            spawn(move || store(&world))
        };
        let (flush, result) = world.split(pages(0, 512), Level::PAGE, &open());
        result.unwrap();
        flush.done();
        guest.join().unwrap();
        assert!(clean(&world).contains(&3));
    });
}

/// S5: of two that split one leaf, while hardware makes it dirty, one table is linked and the other comes back.
#[test]
fn a_split_against_a_split_loses_no_flag_and_no_table() {
    explore("split against split and hardware", 50, || {
        let world = Arc::new(World::new(npt(), 2));
        world.map(pages(0, 512), Hpa(0), all(Level::MIB2)).unwrap();
        let guest = {
            let world = Arc::clone(&world);
            spawn(move || store(&world))
        };
        let other = {
            let world = Arc::clone(&world);
            spawn(move || {
                let (flush, result) = world.protect(pages(500, 1), Permissions::READ, &open());
                result.unwrap();
                flush.done();
            })
        };
        let (flush, result) = world.split(pages(0, 1), Level::PAGE, &open());
        result.unwrap();
        flush.done();
        other.join().unwrap();
        guest.join().unwrap();
        assert!(clean(&world).contains(&3));
        assert_eq!(world.lookup(0).0, Level::PAGE);
        assert_eq!(world.available(), 1);
    });
}

/// S15, S16: two vCPUs fault on one page whose writes are tracked; what either writes is recorded after it may.
#[test]
fn a_write_fault_is_recorded() {
    explore("write fault against write fault and harvest", 20, || {
        let world = Arc::new(World::new(npt(), 1));
        world.map(pages(0, 8), Hpa(0), all(Level::PAGE)).unwrap();
        let (flush, result) = world.track_writes(pages(0, 8), &open());
        result.unwrap();
        flush.done();
        let recorded = Arc::new(AtomicU64::new(0));
        let data = Arc::new(AtomicU64::new(0));
        let vcpu = {
            let (world, recorded, data) = (world.clone(), recorded.clone(), data.clone());
            move || {
                let may_write = || {
                    let table = match world.lookup(3).1 {
                        Entry::Leaf(leaf) => leaf,
                        entry => panic!("{entry:?}"),
                    };
                    table.permissions.allows(Permissions::WRITE)
                };
                if !may_write() {
                    let (flush, result) = world.write_fault(Gpa(3 << 12), |_| {
                        recorded.store(1, Ordering::SeqCst);
                    });
                    result.unwrap();
                    flush.done();
                }
                // In the guest again; the harvest stops it before or after this.
                if may_write() {
                    data.fetch_add(1, Ordering::SeqCst);
                }
            }
        };
        let other = spawn(vcpu.clone());
        vcpu();
        other.join().unwrap();
        // Both are out of the guest: a harvest.
        let (flush, result) = world.track_writes(pages(0, 8), &open());
        result.unwrap();
        flush.done();
        assert_eq!(data.load(Ordering::SeqCst), 2);
        assert_eq!(recorded.swap(0, Ordering::SeqCst), 1);
    });
}

/// The model's processor knows the format's flags.
#[test]
fn the_flags_are_the_formats() {
    let format = Npt::FourLevels;
    assert_eq!(
        format.dirty_bits(0) | format.accessed_bits(0),
        ACCESSED_DIRTY
    );
}
