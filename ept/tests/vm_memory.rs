//! The tracker as vm-memory's bitmap (S18), also in a monitor that hot-plugs memory (S24).
#![cfg(feature = "vm-memory")]

mod common;

use std::collections::BTreeSet;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;

use common::{gpa, pages};
use ept::{
    AttachError, Contents, Epoch, Gpa, GpaRange, Region, RegionKind, RemoveError, Source, Start,
    Tracker, TrackerBitmap,
};
use vm_memory::bitmap::{Bitmap, NewBitmap};
use vm_memory::mmap::{MmapRegion, MmapRegionBuilder};
use vm_memory::{
    Address, Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion,
    GuestRegionMmap,
};

#[test]
fn s18_writes_through_vm_memory_are_marked() {
    let ranges = [pages(0, 16), pages(64, 80)];
    let kind = RegionKind::Ram;
    let tracker = Arc::new(Tracker::new(&ranges.map(|range| Region { range, kind })).unwrap());
    let epoch = Epoch::begin(&tracker, "migration", Start::Clean).unwrap();
    let regions = ranges.map(|range| {
        let bitmap = TrackerBitmap::new(tracker.clone(), range.start(), Source::Device);
        let size = usize::try_from(range.bytes()).unwrap();
        let mapping = MmapRegionBuilder::new_with_bitmap(size, bitmap)
            .with_mmap_prot(libc_prot())
            .build()
            .unwrap();
        GuestRegionMmap::new(mapping, GuestAddress(range.start().0)).unwrap()
    });
    let memory = GuestMemoryMmap::from_regions(Vec::from(regions)).unwrap();

    memory
        .write_slice(&[7; 5000], GuestAddress(gpa(66).0 + 100))
        .unwrap();
    memory.write_obj(1_u64, GuestAddress(gpa(3).0)).unwrap();
    memory.read_obj::<u64>(GuestAddress(gpa(9).0)).unwrap();

    let harvest = epoch.harvest(GpaRange::ALL).unwrap();
    assert_eq!(
        harvest.runs().collect::<Vec<_>>(),
        [pages(3, 4), pages(66, 68)]
    );
    assert_eq!(tracker.counters().dirtied_by(Source::Device), 3);
}

/// PROT_READ | PROT_WRITE.
fn libc_prot() -> i32 {
    3
}

#[test]
fn slices_count_from_their_offset() {
    let tracker = common::ram(64);
    let bitmap = TrackerBitmap::new(tracker.clone(), gpa(10), Source::Monitor);
    let slice = bitmap.slice_at(5 << 12).slice_at(100);
    slice.mark_dirty(0, 4096);
    assert!(tracker.dirty_at(gpa(15)) && tracker.dirty_at(gpa(16)));
    assert!(bitmap.dirty_at(6 << 12) && !bitmap.dirty_at(7 << 12));
    assert!(!bitmap.dirty_at(usize::MAX));
}

fn ram_at(range: GpaRange) -> Region {
    let kind = RegionKind::Ram;
    Region { range, kind }
}

fn range_of(region: &GuestRegionMmap<TrackerBitmap>) -> GpaRange {
    GpaRange::with_len(Gpa(region.start_addr().0), region.len()).unwrap()
}

/// A mapping as Cloud Hypervisor's `create_ram_region` makes it: vm-memory makes the bitmap, and knows no address.
fn hot_plugged(range: GpaRange) -> Arc<GuestRegionMmap<TrackerBitmap>> {
    let size = usize::try_from(range.bytes()).unwrap();
    let flags = libc::MAP_NORESERVE | libc::MAP_PRIVATE | libc::MAP_ANONYMOUS;
    let prot = libc::PROT_READ | libc::PROT_WRITE;
    let mapping = MmapRegion::build(None, size, prot, flags).unwrap();
    Arc::new(GuestRegionMmap::new(mapping, GuestAddress(range.start().0)).unwrap())
}

/// S18, S24: a monitor that lets vm-memory make its bitmaps, hot-plugs a region with `insert_region` and unplugs it with
/// `remove_region`. What an epoch harvests is compared with a set of page numbers.
#[test]
fn s24_a_monitor_hot_plugs_memory() {
    let boot = [
        (GuestAddress(0), 64 << 12, None),
        (GuestAddress(1 << 20), 300 << 12, None),
    ];
    let memory = GuestMemoryMmap::<TrackerBitmap>::from_ranges_with_files(boot).unwrap();
    let mut dirty = BTreeSet::new();
    // Before there is a tracker: the kernel is loaded.
    let write = |memory: &GuestMemoryMmap<TrackerBitmap>, dirty: &mut BTreeSet<u64>, page: u64| {
        let bytes = [7; 5000];
        memory
            .write_slice(&bytes, GuestAddress(page << 12))
            .unwrap();
        dirty.extend([page, page + 1]);
    };
    write(&memory, &mut dirty, 3);
    write(&memory, &mut dirty, 300);

    let regions: Vec<Region> = memory
        .iter()
        .map(|region| ram_at(range_of(region)))
        .collect();
    let tracker = Arc::new(Tracker::new(&regions).unwrap());
    let migration = Epoch::begin(&tracker, "migration", Start::Clean).unwrap();
    for region in memory.iter() {
        let base = Gpa(region.start_addr().raw_value());
        let bitmap = (**region).bitmap();
        bitmap.attach(&tracker, base, Source::Device).unwrap();
    }
    write(&memory, &mut dirty, 310);

    // As `hotplug_ram_region`: map, add, insert.
    let dimm = hot_plugged(pages(1 << 20, (1 << 20) + 1000));
    (**dimm).bitmap().mark_dirty(7 << 12, 1);
    dirty.insert((1 << 20) + 7);
    let base = Gpa(dimm.start_addr().raw_value());
    let early = (**dimm).bitmap().attach(&tracker, base, Source::Device);
    assert_eq!(early, Err(AttachError::NoRegion(range_of(&dimm))));
    tracker
        .add_region(ram_at(range_of(&dimm)), Contents::Zero)
        .unwrap();
    let bitmap = (**dimm).bitmap();
    bitmap.attach(&tracker, base, Source::Device).unwrap();
    let again = bitmap.attach(&tracker, base, Source::Device);
    assert_eq!(again, Err(AttachError::Attached));
    let memory = memory.insert_region(dimm.clone()).unwrap();
    write(&memory, &mut dirty, (1 << 20) + 500);
    write(&memory, &mut dirty, 320);

    let harvest = migration.harvest(GpaRange::ALL).unwrap();
    let found: BTreeSet<u64> = harvest
        .runs()
        .flat_map(|run| run.first_page()..run.end_page())
        .collect();
    assert_eq!(found, dirty);
    harvest.commit();

    // As for `remove_region`: one more write, which the tracker does not let go of.
    write(&memory, &mut dirty, (1 << 20) + 900);
    let (memory, removed) = memory.remove_region(dimm.start_addr(), dimm.len()).unwrap();
    let epoch = "migration".to_owned();
    let at = gpa((1 << 20) + 900);
    assert_eq!(
        tracker.remove_region(range_of(&removed)),
        Err(RemoveError::Dirty { epoch, at })
    );
    let last = migration.harvest(range_of(&removed)).unwrap();
    assert_eq!(last.pages(), 2);
    last.commit();
    tracker.remove_region(range_of(&removed)).unwrap();

    write(&memory, &mut dirty, 330);
    let harvest = migration.harvest(GpaRange::ALL).unwrap();
    assert_eq!(harvest.runs().collect::<Vec<_>>(), [pages(330, 332)]);
    assert_eq!(tracker.counters().outside, 0);
}

/// `reset` and `get_and_reset` do what vm-memory's `AtomicBitmap` does, before and after the bitmap is attached.
#[test]
fn s18_bitmaps_are_read_and_reset_as_vm_memorys() {
    let regions = [pages(0, 100), pages(200, 330)];
    let tracker = Arc::new(Tracker::new(&regions.map(ram_at)).unwrap());
    let bitmaps = regions.map(|range| TrackerBitmap::with_len(range.bytes() as usize));
    let [low, high] = &bitmaps;
    high.mark_dirty(65 << 12, 8192);
    assert!(high.dirty_at(66 << 12) && !high.dirty_at(67 << 12));
    assert_eq!(high.get_and_reset(), [0, 0b110, 0]);
    assert_eq!(high.get_and_reset(), [0, 0, 0]);
    high.mark_dirty(129 << 12, 1);
    for (bitmap, range) in bitmaps.iter().zip(regions) {
        bitmap
            .attach(&tracker, range.start(), Source::Device)
            .unwrap();
    }
    let epoch = Epoch::begin(&tracker, "other", Start::Clean).unwrap();
    // The first time, nothing is known to be clean.
    assert_eq!(low.get_and_reset(), [u64::MAX, (1 << 36) - 1]);
    assert_eq!(high.get_and_reset(), [u64::MAX, u64::MAX, 0b11]);
    low.mark_dirty(99 << 12, 4096);
    tracker.mark(gpa(201), 4096, Source::Vcpu);
    assert_eq!(high.get_and_reset(), [0b10, 0, 0]);
    low.reset();
    assert_eq!(low.get_and_reset(), [0, 0]);
    assert_eq!(epoch.harvest(GpaRange::ALL).unwrap().pages(), 2);

    // A view of a tracker goes to the end of its region.
    let view = TrackerBitmap::new(tracker.clone(), gpa(300), Source::Device);
    view.mark_dirty(29 << 12, 1);
    assert_eq!(view.get_and_reset(), [1 << 29]);
    tracker.discard_region(regions[1]).unwrap();
    assert!(view.get_and_reset().is_empty());
}

#[test]
fn attaching_says_what_does_not_fit() {
    let tracker = common::ram(100);
    let attach = |bitmap: &TrackerBitmap, base| bitmap.attach(&tracker, base, Source::Device);
    assert_eq!(
        attach(&TrackerBitmap::default(), gpa(0)),
        Err(AttachError::Empty)
    );
    let view = TrackerBitmap::new(tracker.clone(), gpa(0), Source::Device);
    assert_eq!(attach(&view, gpa(0)), Err(AttachError::Attached));
    let bitmap = TrackerBitmap::with_len(10 << 12);
    for base in [Gpa(5), Gpa(u64::MAX - 4095)] {
        assert_eq!(attach(&bitmap, base), Err(AttachError::Misplaced(base)));
    }
    let missing = AttachError::NoRegion(pages(91, 101));
    assert_eq!(attach(&bitmap, gpa(91)), Err(missing));
    bitmap.mark_dirty(0, 1);
    let clone = bitmap.clone();
    attach(&bitmap, gpa(90)).unwrap();
    clone.mark_dirty(9 << 12, 1);
    assert!(tracker.dirty_at(gpa(90)) && tracker.dirty_at(gpa(99)));
}

/// A mark that races with `attach` is in the tracker in the end.
#[test]
fn s16_no_mark_is_lost_while_a_bitmap_is_attached() {
    for _ in 0..300 {
        let tracker = common::ram(4096);
        let bitmap = TrackerBitmap::with_len(4096 << 12);
        let begun = AtomicBool::new(false);
        thread::scope(|scope| {
            scope.spawn(|| {
                for page in 0..4096 {
                    bitmap.mark_dirty(page << 12, 1);
                    begun.store(page > 100, Ordering::Relaxed);
                }
            });
            while !begun.load(Ordering::Relaxed) {
                thread::yield_now();
            }
            bitmap.attach(&tracker, gpa(0), Source::Device).unwrap();
        });
        let lost = (0..4096).find(|page| !tracker.dirty_at(gpa(*page)));
        assert_eq!(lost, None);
    }
}
