//! Epochs: what one consumer is told, and what memory that costs (S5, S15, S17, P9).

mod common;

use std::sync::Arc;

use common::{gpa, pages, ram};
use ept::{Epoch, GpaRange, Region, RegionKind, Source, Start, Tracker};

const GIB: u64 = 1 << 18;

fn two_epochs(tracker: &Arc<Tracker>) -> [Epoch; 2] {
    ["one", "two"].map(|name| Epoch::begin(tracker, name, Start::Clean).unwrap())
}

/// S17: pages marked for one epoch are dirty for it alone, joined to what everybody marked, clean
/// once committed and dirty again once rolled back.
#[test]
fn s17_an_epoch_is_marked_for_itself_alone() {
    let tracker = ram(4096);
    let [one, two] = two_epochs(&tracker);
    tracker.mark(gpa(100), 1, Source::Vcpu);
    one.mark(pages(101, 1600));
    assert!(one.dirty_at(gpa(101)) && !two.dirty_at(gpa(101)));
    assert_eq!(tracker.counters().dirtied(), 1);
    let taken = one.harvest(GpaRange::ALL).unwrap();
    assert_eq!(taken.runs().collect::<Vec<_>>(), [pages(100, 1600)]);
    taken.rollback();
    one.harvest(pages(0, 700)).unwrap().commit();
    let rest = one.harvest(GpaRange::ALL).unwrap();
    assert_eq!(rest.runs().collect::<Vec<_>>(), [pages(700, 1600)]);
    let other = two.harvest(GpaRange::ALL).unwrap();
    assert_eq!(other.runs().collect::<Vec<_>>(), [pages(100, 101)]);
}

/// S5: where an epoch has no memory for detail it is marked coarsely, and that is counted.
#[test]
fn s5_an_epoch_marked_coarsely_is_counted() {
    let region = Region {
        range: pages(0, 2048),
        kind: RegionKind::Ram,
    };
    let tracker = Arc::new(Tracker::with_table_limit(&[region], 0).unwrap());
    let epoch = Epoch::begin(&tracker, "one", Start::Clean).unwrap();
    epoch.mark(pages(5, 6));
    assert_eq!(tracker.counters().coarse, 1);
    assert_eq!(epoch.harvest(GpaRange::ALL).unwrap().pages(), 512);
}

/// P9: what lies between the regions is neither reported nor kept in detail, however the pages are
/// marked and in whatever steps they are taken.
#[test]
fn p9_gaps_between_regions_cost_nothing() {
    let ranges = [pages(0, GIB), pages(100 * GIB, 101 * GIB)];
    let kind = RegionKind::Ram;
    let tracker = Arc::new(Tracker::new(&ranges.map(|range| Region { range, kind })).unwrap());
    let epoch = Epoch::begin(&tracker, "all", Start::AllDirty).unwrap();
    let before = tracker.memory_bytes();
    for _ in 0..2 {
        let (mut left, mut pages) = (Some(GpaRange::ALL), 0);
        while let Some(range) = left {
            let harvest = epoch.harvest_up_to(range, GIB / 4).unwrap();
            assert!(harvest.pages() < GIB / 4 + 512);
            pages += harvest.pages();
            left = harvest.rest();
            harvest.commit();
        }
        assert_eq!(pages, 2 * GIB);
        epoch.mark(GpaRange::ALL);
    }
    // One table of 512 entries and their summary for each GiB that was taken in parts.
    assert!(tracker.memory_bytes() - before <= 2 * (4096 + 64));
}

/// S5: what a rollback marks coarsely is counted, too.
#[test]
fn s5_a_coarse_rollback_is_counted() {
    let region = Region {
        range: pages(0, 2048),
        kind: RegionKind::Ram,
    };
    let tracker = Arc::new(Tracker::with_table_limit(&[region], 1).unwrap());
    let epoch = Epoch::begin(&tracker, "one", Start::Clean).unwrap();
    tracker.mark(gpa(5), 1, Source::Vcpu);
    let harvest = epoch.harvest(region.range).unwrap();
    epoch.mark(pages(600, 601));
    assert_eq!(tracker.counters().coarse, 0);
    harvest.rollback();
    assert_eq!(tracker.counters().coarse, 1);
}
