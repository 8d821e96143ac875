//! The tracker: regions come and go while pages are marked and harvested.

use alloc::sync::Arc;

use super::small::pages;
use super::{explore, spawn};
use crate::addr::Gpa;
use crate::epoch::{Epoch, Start};
use crate::region::{Contents, Region, RegionKind};
use crate::sync::atomic::{AtomicU64, Ordering};
use crate::tracker::Tracker;
use crate::{GpaRange, Source};

fn gpa(page: u64) -> Gpa {
    Gpa(page << 12)
}

fn ram(range: GpaRange) -> Region {
    Region {
        range,
        kind: RegionKind::Ram,
    }
}

fn tracker() -> (Arc<Tracker>, Epoch) {
    let tracker = Arc::new(Tracker::new(&[ram(pages(0, 8))]).unwrap());
    let epoch = Epoch::begin(&tracker, "migration", Start::Clean).unwrap();
    (tracker, epoch)
}

/// S16, S24: one thread adds a region and writes to it, data first and mark after, while another harvests. What was
/// copied last is what was written.
#[test]
fn a_mark_in_a_new_region_is_harvested() {
    explore("add and mark against harvest", 30, || {
        let (tracker, epoch) = tracker();
        let data = Arc::new(AtomicU64::new(0));
        let writer = {
            let (tracker, data) = (tracker.clone(), data.clone());
            spawn(move || {
                let region = ram(pages(512, 8));
                tracker.add_region(region, Contents::Zero).unwrap();
                data.store(1, Ordering::Relaxed);
                tracker.mark(gpa(515), 1, Source::Vcpu);
            })
        };
        let mut copy = 0;
        let mut harvest = || {
            let harvest = epoch.harvest(GpaRange::ALL).unwrap();
            if harvest.contains(gpa(515)) {
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

/// S16, S24: a page of an added region is marked while the place before it goes from one region to another one, which
/// is larger. The mark goes to neither of these.
#[test]
fn a_place_that_changes_takes_no_mark_of_another_region() {
    explore("mark against discard and add", 100, || {
        let (tracker, epoch) = tracker();
        let (old, stays, new) = (pages(8, 600), pages(1000, 8), pages(900, 50));
        for range in [old, stays] {
            tracker.add_region(ram(range), Contents::Zero).unwrap();
        }
        let other = {
            let tracker = tracker.clone();
            spawn(move || {
                tracker.discard_region(old).unwrap();
                tracker.add_region(ram(new), Contents::Zero).unwrap();
            })
        };
        tracker.mark(gpa(1003), 1, Source::Device);
        other.join().unwrap();
        let harvest = epoch.harvest(GpaRange::ALL).unwrap();
        assert!(harvest.contains(gpa(1003)));
        assert_eq!(harvest.pages(), 1);
        harvest.commit();
    });
}

/// S16, S24: a mark that races with the removal of its region loses nothing of another one, and is never reported.
#[test]
fn a_late_mark_stays_outside() {
    explore("mark against discard", 30, || {
        let (tracker, epoch) = tracker();
        let first = pages(0, 8);
        let other = {
            let tracker = tracker.clone();
            spawn(move || tracker.discard_region(first).unwrap())
        };
        tracker.mark(gpa(3), 1, Source::Device);
        other.join().unwrap();
        assert!(epoch.harvest(GpaRange::ALL).unwrap().is_empty());
        assert!(!epoch.dirty_at(gpa(3)));
    });
}
