//! Memory shortage: more may be reported dirty than was written, never less (S2, S5, S16).

mod common;

use std::sync::Arc;

use common::model::PageSet;
use common::{
    SPACE, any_page, any_range, config, gpa, pages, ragged_regions, ram, read, tracked_pages,
};
use ept::{
    Epoch, Fault, GpaRange, Notifier, ProtectError, Region, RegionKind, Source, Start, Tracker,
};
use proptest::prelude::*;

#[derive(Clone, Debug)]
enum Step {
    Mark {
        page: u64,
        count: u64,
    },
    Harvest {
        epoch: usize,
        range: GpaRange,
        most: u64,
        commit: bool,
    },
}

fn any_step() -> impl Strategy<Value = Step> {
    prop_oneof![
        (any_page(), 1..700_u64).prop_map(|(page, count)| Step::Mark { page, count }),
        (
            0..2_usize,
            any_range(1500),
            prop_oneof![Just(u64::MAX), 1..600_u64],
            any::<bool>()
        )
            .prop_map(|(epoch, range, most, commit)| Step::Harvest {
                epoch,
                range,
                most,
                commit
            }),
    ]
}

proptest! {
    #![proptest_config(config(200))]

    /// S5, S16: with 0 to 3 leaf tables, what was marked and not committed is found by every epoch,
    /// nothing outside the regions is ever reported, and harvests end clean.
    #[test]
    fn s5_shortage_only_ever_adds(
        tables in 0..4_usize,
        steps in prop::collection::vec(any_step(), 1..25),
    ) {
        let regions = ragged_regions();
        let tracker = Arc::new(Tracker::with_table_limit(&regions, tables).unwrap());
        let epochs = ["one", "two"].map(|name| Epoch::begin(&tracker, name, Start::Clean).unwrap());
        let mut least = [PageSet::new(), PageSet::new()];
        for step in steps {
            match step {
                Step::Mark { page, count } => {
                    tracker.mark(gpa(page), count << 12, Source::Device);
                    let marked = tracked_pages(&regions, pages(page, (page + count).min(SPACE)));
                    least.iter_mut().for_each(|set| set.extend(&marked));
                }
                Step::Harvest { epoch, range, most, commit } => {
                    let harvest = epochs[epoch].harvest_up_to(range, most).unwrap();
                    let found = read(&harvest, range);
                    let end = harvest.rest().map_or(range.end_page(), |rest| rest.first_page());
                    prop_assert!(tracked_pages(&regions, range).covers(&found));
                    let owed = least[epoch].within(range.first_page()..end.max(range.first_page()));
                    prop_assert!(found.covers(&owed));
                    if commit {
                        harvest.commit();
                        least[epoch].remove_all(&found);
                    }
                }
            }
        }
        for (epoch, least) in epochs.iter().zip(&least) {
            let all = epoch.harvest(GpaRange::ALL).unwrap();
            let found = read(&all, pages(0, 100));
            prop_assert!(found.covers(least));
            prop_assert!(tracked_pages(&regions, GpaRange::ALL).covers(&found));
            all.commit();
            prop_assert!(epoch.harvest(GpaRange::ALL).unwrap().is_empty());
        }
    }
}

/// S5: the coarse entry is told, and one reserved beforehand is not needed.
#[test]
fn s5_a_coarse_entry_is_counted() {
    let range = pages(0, 2048);
    let kind = RegionKind::Ram;
    let tracker = Arc::new(Tracker::with_table_limit(&[Region { range, kind }], 1).unwrap());
    tracker.mark(gpa(5), 1, Source::Device);
    assert_eq!(tracker.counters().coarse, 0);
    tracker.mark(gpa(600), 1, Source::Device);
    assert_eq!(tracker.counters().coarse, 1);
    assert_eq!(tracker.counters().dirtied_by(Source::Device), 513);
    assert!(tracker.dirty_at(gpa(1023)) && !tracker.dirty_at(gpa(1024)));
    assert!(tracker.reserve(range).is_err());
}

/// S2: the worst case can be reserved.
#[test]
fn s2_reserved_detail_needs_no_memory() {
    let tracker = ram(1 << 20);
    tracker.reserve(pages(0, 1 << 20)).unwrap();
    let held = tracker.memory_bytes();
    for page in (0..1 << 20).step_by(512) {
        tracker.mark(gpa(page), 1, Source::Device);
    }
    assert_eq!(tracker.memory_bytes(), held);
}

/// S2: reservations add up, and asking again for what is there is free.
#[test]
fn s2_reservations_add_up() {
    let range = pages(0, 4096);
    let kind = RegionKind::Ram;
    let tracker = Tracker::with_table_limit(&[Region { range, kind }], 8).unwrap();
    tracker.reserve(pages(0, 2048)).unwrap();
    tracker.reserve(pages(2048, 4096)).unwrap();
    tracker.reserve(range).unwrap();
    let held = tracker.memory_bytes();
    for page in (0..4096).step_by(512) {
        tracker.mark(gpa(page), 1, Source::Device);
    }
    tracker.reserve(range).unwrap();
    assert_eq!(tracker.memory_bytes(), held);
    assert_eq!(tracker.counters().coarse, 0);
}

/// S2: the same where memory comes in more than one piece.
#[test]
fn s2_reserved_parts_need_no_memory() {
    let tracker = ram(1 << 20);
    for gib in 0..4 {
        tracker.reserve(pages(gib << 18, (gib + 1) << 18)).unwrap();
    }
    let held = tracker.memory_bytes();
    for page in (0..1 << 20).step_by(512) {
        tracker.mark(gpa(page), 1, Source::Device);
    }
    assert_eq!(tracker.memory_bytes(), held);
}

/// S2: a protection that runs out of tables says how far it got.
#[test]
fn s2_protect_says_how_far_it_got() {
    let range = pages(0, 2048);
    let kind = RegionKind::Ram;
    let tracker = Tracker::with_table_limit(&[Region { range, kind }], 1).unwrap();
    let notifier = Notifier::new();
    let open = notifier.open(range).unwrap();
    let Err(ProtectError::OutOfTables { reached, changed }) =
        tracker.protect(pages(500, 1030), &open)
    else {
        panic!("one table cannot be enough");
    };
    assert_eq!(reached, gpa(1024));
    assert_eq!((changed.entries, changed.pages), (13, 524));
    assert_eq!(changed.interval, Some(pages(500, 1024)));
}

/// A fault always lets the vCPU go on: without memory it releases, and marks dirty, the whole entry.
#[test]
fn s15_a_fault_without_memory_releases_the_whole_entry() {
    let range = pages(0, 2048);
    let kind = RegionKind::Ram;
    let tracker = Arc::new(Tracker::with_table_limit(&[Region { range, kind }], 0).unwrap());
    let epoch = Epoch::begin(&tracker, "one", Start::Clean).unwrap();
    let notifier = Notifier::new();
    let changed = tracker.protect(range, &notifier.open(range).unwrap());
    assert_eq!(changed.unwrap().pages, 2048);
    assert_eq!(tracker.fault(gpa(700)), Fault::Released(pages(512, 1024)));
    assert_eq!(tracker.fault(gpa(701)), Fault::Open);
    assert!(!tracker.is_protected(gpa(512)) && tracker.is_protected(gpa(1024)));
    let harvest = epoch.harvest(GpaRange::ALL).unwrap();
    assert_eq!(harvest.runs().collect::<Vec<_>>(), [pages(512, 1024)]);
}
