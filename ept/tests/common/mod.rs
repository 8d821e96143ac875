//! Regions, ranges and checks that the suites of the tracker share. They compare it with [`model`].

#![allow(dead_code, reason = "each test program uses a part of it")]

#[path = "../model/mod.rs"]
pub(crate) mod model;

use std::sync::Arc;

use ept::{Gpa, GpaRange, Harvest, Region, RegionKind, Tracker};
use model::PageSet;
use proptest::prelude::*;

/// Pages in the 64-bit space.
pub(crate) const SPACE: u64 = 1 << 52;

/// Page `page`'s first byte.
pub(crate) fn gpa(page: u64) -> Gpa {
    Gpa(page << 12)
}

/// Pages `first` to `end`, half-open.
pub(crate) fn pages(first: u64, end: u64) -> GpaRange {
    GpaRange::from_pages(first, end - first).expect("a range in the space")
}

/// Regions that touch, that leave gaps inside 2 MiB, that are no multiple of anything, and one
/// that ends at the last byte of the space.
pub(crate) fn ragged_regions() -> Vec<Region> {
    [
        (3, 700, RegionKind::Ram),
        (700, 705, RegionKind::Rom),
        (1000, 2600, RegionKind::DeviceRam),
        (2610, 2615, RegionKind::Trapped),
        (2620, 2625, RegionKind::CopyOnWrite),
        (SPACE - 1500, SPACE, RegionKind::Ram),
    ]
    .map(|(first, end, kind)| Region {
        range: pages(first, end),
        kind,
    })
    .to_vec()
}

/// One RAM region of `count` pages from 0.
pub(crate) fn ram(count: u64) -> Arc<Tracker> {
    let range = pages(0, count);
    let kind = RegionKind::Ram;
    Arc::new(Tracker::new(&[Region { range, kind }]).expect("a tracker"))
}

/// Whether a page lies in one of `regions`.
pub(crate) fn tracked(regions: &[Region], page: u64) -> bool {
    let mut ranges = regions.iter().map(|region| region.range);
    ranges.any(|range| range.contains(gpa(page)))
}

/// The pages of `range` that lie in `regions`.
pub(crate) fn tracked_pages(regions: &[Region], range: GpaRange) -> PageSet {
    let parts = regions
        .iter()
        .filter_map(|region| region.range.intersection(&range));
    parts.collect()
}

/// A page in or near one of the ragged regions.
pub(crate) fn any_page() -> impl Strategy<Value = u64> {
    prop_oneof![0..2700_u64, 480..560_u64, SPACE - 1600..SPACE]
}

/// A range of up to `most` pages in or near the ragged regions.
pub(crate) fn any_range(most: u64) -> impl Strategy<Value = GpaRange> {
    (any_page(), 1..=most).prop_map(|(first, count)| pages(first, (first + count).min(SPACE)))
}

/// Returns the pages of a harvest, after checking that all methods of the harvest agree about them.
pub(crate) fn read(harvest: &Harvest, window: GpaRange) -> PageSet {
    let runs: Vec<GpaRange> = harvest.runs().collect();
    for pair in runs.windows(2) {
        assert!(
            pair[0].end_page() < pair[1].first_page(),
            "{pair:?} are not maximal and in order"
        );
    }
    let set: PageSet = runs.iter().copied().collect();
    assert_eq!(set.count(), harvest.pages());
    assert_eq!(harvest.is_empty(), set.count() == 0);
    assert_eq!(harvest.interval(), set.hull());

    let words: Vec<u64> = harvest.words_in(window).collect();
    assert_eq!(words.len() as u64, window.pages().div_ceil(64));
    for offset in 0..words.len() as u64 * 64 {
        let bit = words[usize::try_from(offset / 64).unwrap()] >> (offset % 64) & 1 == 1;
        let page = window.first_page() + offset;
        let inside = page < window.end_page() && set.contains(page);
        assert_eq!(bit, inside, "bit of page {page:#x}");
    }
    for page in window.first_page()..window.end_page() {
        assert_eq!(harvest.contains(gpa(page)), set.contains(page));
    }
    let cut: PageSet = harvest.runs_in(window).collect();
    assert_eq!(cut, set.within(window));
    set
}

/// `cases` cases, without a file of past failures.
pub(crate) fn config(cases: u32) -> ProptestConfig {
    ProptestConfig {
        cases,
        failure_persistence: None,
        ..ProptestConfig::default()
    }
}
