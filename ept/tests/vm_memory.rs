//! The tracker as vm-memory's bitmap (S18).
#![cfg(feature = "vm-memory")]

mod common;

use common::{gpa, pages};
use ept::{Epoch, GpaRange, Region, RegionKind, Source, Start, Tracker, TrackerBitmap};
use std::sync::Arc;
use vm_memory::bitmap::Bitmap;
use vm_memory::mmap::MmapRegionBuilder;
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap, GuestRegionMmap};

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
