//! The tracker: marks go up while a harvest comes down.

use alloc::sync::Arc;

use super::small::pages;
use super::{explore, spawn};
use crate::addr::Gpa;
use crate::epoch::{Epoch, Start};
use crate::region::{Region, RegionKind};
use crate::sync::atomic::{AtomicU64, Ordering};
use crate::tracker::Tracker;
use crate::{GpaRange, Source};

const ALL: GpaRange = GpaRange::ALL;

fn gpa(page: u64) -> Gpa {
    Gpa(page << 12)
}

/// A tracker of `region`, one leaf table of it made.
fn tracker(region: GpaRange) -> (Arc<Tracker>, Epoch) {
    let region = Region {
        range: region,
        kind: RegionKind::Ram,
    };
    let tracker = Arc::new(Tracker::new(&[region]).unwrap());
    let epoch = Epoch::begin(&tracker, "migration", Start::Clean).unwrap();
    (tracker, epoch)
}

/// A writer that stores data and then marks its page, for one page after the other, against a harvest that clears and
/// then reads the data; a harvest after both finds what is left. What was read last must be what was written last.
fn nothing_is_lost(region: GpaRange, written: [u64; 2], reserve: GpaRange) {
    let (tracker, epoch) = tracker(region);
    tracker.reserve(reserve).unwrap();
    marks_and_harvests(&tracker, &epoch, written);
}

fn marks_and_harvests(tracker: &Arc<Tracker>, epoch: &Epoch, written: [u64; 2]) {
    let data = Arc::new([0, 1].map(|_| AtomicU64::new(0)));
    let writer = {
        let (tracker, data) = (tracker.clone(), data.clone());
        spawn(move || {
            for (page, data) in written.into_iter().zip(data.iter()) {
                // A plain store: it is the mark that orders it.
                data.store(data.load(Ordering::Relaxed) + 1, Ordering::Relaxed);
                tracker.mark(gpa(page), 1, Source::Vcpu);
            }
        })
    };
    let mut copies = [0, 0];
    let harvest = |copies: &mut [u64; 2]| {
        let harvest = epoch.harvest(ALL).unwrap();
        for ((page, data), copy) in written.into_iter().zip(data.iter()).zip(copies) {
            if harvest.contains(gpa(page)) {
                *copy = data.load(Ordering::Relaxed);
            }
        }
        harvest.commit();
    };
    harvest(&mut copies);
    writer.join().unwrap();
    harvest(&mut copies);
    assert_eq!(copies, [1, 1]);
}

/// Pages of one leaf table, in two words of its plane.
const NEIGHBOURS: [u64; 2] = [3, 100];

/// S16: with one level of summary bits above the leaf table.
#[test]
fn a_mark_is_harvested() {
    explore("mark against harvest", 10, || {
        nothing_is_lost(pages(0, 1024), NEIGHBOURS, pages(0, 512));
    });
}

/// S16: with two levels: a mark that finds the lower summary bit set goes on to the upper one.
#[test]
fn a_mark_is_harvested_through_two_levels() {
    explore("mark against harvest, two levels", 30, || {
        nothing_is_lost(pages(0, 1 << 19), NEIGHBOURS, pages(0, 512));
    });
}

/// S16: the same page twice, which is taken while it is marked again.
#[test]
fn a_second_mark_is_harvested() {
    explore("mark against harvest, twice", 10, || {
        let (tracker, epoch) = tracker(pages(0, 1024));
        tracker.reserve(pages(0, 512)).unwrap();
        let data = Arc::new(AtomicU64::new(0));
        let writer = {
            let (tracker, data) = (tracker.clone(), data.clone());
            spawn(move || {
                for value in 1..=2 {
                    data.store(value, Ordering::Relaxed);
                    tracker.mark(gpa(3), 1, Source::Vcpu);
                }
            })
        };
        let mut copy = 0;
        let mut harvest = || {
            let harvest = epoch.harvest(ALL).unwrap();
            if harvest.contains(gpa(3)) {
                copy = data.load(Ordering::Relaxed);
            }
            harvest.commit();
        };
        harvest();
        writer.join().unwrap();
        harvest();
        assert_eq!(copy, 2);
    });
}

/// S16: where detail has to be made first.
#[test]
fn a_mark_that_makes_detail_is_harvested() {
    explore("first mark against harvest", 10, || {
        nothing_is_lost(pages(0, 1024), NEIGHBOURS, pages(512, 512));
    });
}

/// S5, S16: two writers that make the detail of one entry at once.
#[test]
fn two_first_marks_are_harvested() {
    explore("first mark against first mark", 20, || {
        let (tracker, epoch) = tracker(pages(0, 1024));
        let other = {
            let tracker = tracker.clone();
            spawn(move || tracker.mark(gpa(5), 1, Source::Device))
        };
        tracker.mark(gpa(9), 1, Source::Vcpu);
        other.join().unwrap();
        let harvest = epoch.harvest(ALL).unwrap();
        assert_eq!(harvest.pages(), 2);
        harvest.commit();
        assert_eq!(tracker.counters().dirtied(), 2);
    });
}

/// S17: two consumers that harvest at once: each sees the page.
#[test]
fn one_harvest_hides_nothing_from_another() {
    explore("harvest against harvest", 10, || {
        let (tracker, epoch) = tracker(pages(0, 1024));
        let second = Epoch::begin(&tracker, "dirty-rate", Start::Clean).unwrap();
        tracker.mark(gpa(3), 1, Source::Vcpu);
        let other = spawn(move || {
            let harvest = second.harvest(ALL).unwrap();
            assert!(harvest.contains(gpa(3)));
            harvest.commit();
        });
        let harvest = epoch.harvest(ALL).unwrap();
        assert!(harvest.contains(gpa(3)));
        harvest.commit();
        other.join().unwrap();
    });
}

/// S16: as above for marks of several pages at once, which go another way: the bits of a word together.
#[test]
fn a_run_of_marks_is_harvested() {
    explore("marks of two pages against harvest", 10, || {
        let (tracker, epoch) = tracker(pages(0, 1024));
        tracker.reserve(pages(0, 512)).unwrap();
        let data = Arc::new(AtomicU64::new(0));
        let writer = {
            let (tracker, data) = (tracker.clone(), data.clone());
            spawn(move || {
                tracker.mark(gpa(100), 2 << 12, Source::Vcpu);
                data.store(1, Ordering::Relaxed);
                tracker.mark(gpa(3), 2 << 12, Source::Vcpu);
            })
        };
        let mut copy = 0;
        let mut harvest = || {
            let harvest = epoch.harvest(ALL).unwrap();
            if harvest.contains(gpa(3)) {
                copy = data.load(Ordering::Relaxed);
            }
            harvest.commit();
        };
        harvest();
        writer.join().unwrap();
        harvest();
        assert_eq!(copy, 1);
    });
}

/// S16: whoever has marked finds its page in its own harvest, also where somebody else has set the bit, or a summary
/// bit, and stands still on the way to the root.
#[test]
fn a_marker_relies_on_nobody() {
    for second in NEIGHBOURS {
        explore("mark against mark and harvest", 10, move || {
            let (tracker, epoch) = tracker(pages(0, 1 << 19));
            tracker.reserve(pages(0, 512)).unwrap();
            finds_its_own(&tracker, &epoch, second);
        });
    }
}

fn finds_its_own(tracker: &Arc<Tracker>, epoch: &Epoch, page: u64) {
    let other = {
        let tracker = tracker.clone();
        spawn(move || tracker.mark(gpa(NEIGHBOURS[0]), 1, Source::Device))
    };
    tracker.mark(gpa(page), 1, Source::Vcpu);
    let harvest = epoch.harvest(ALL).unwrap();
    let found = harvest.contains(gpa(page));
    harvest.commit();
    assert!(found);
    other.join().unwrap();
}

/// S16: both of the above where there is no detail: the whole entry is marked.
#[test]
fn a_coarse_mark_is_harvested() {
    let coarse = || {
        let region = Region {
            range: pages(0, 1024),
            kind: RegionKind::Ram,
        };
        let tracker = Arc::new(Tracker::with_table_limit(&[region], 0).unwrap());
        let epoch = Epoch::begin(&tracker, "migration", Start::Clean).unwrap();
        (tracker, epoch)
    };
    explore("coarse marks against harvest", 10, move || {
        let (tracker, epoch) = coarse();
        marks_and_harvests(&tracker, &epoch, NEIGHBOURS);
    });
    explore("coarse mark against mark and harvest", 10, move || {
        let (tracker, epoch) = coarse();
        finds_its_own(&tracker, &epoch, NEIGHBOURS[1]);
    });
}
