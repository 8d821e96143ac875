//! The tracker and its epochs against a model of pages (S16, S17, S18).

mod common;

use std::sync::Arc;
use std::thread;

use common::model::PageSet;
use common::{
    SPACE, any_page, any_range, config, gpa, pages, ragged_regions, ram, read, tracked,
    tracked_pages,
};
use ept::{
    Epoch, EpochError, Gpa, GpaRange, MAX_EPOCHS, Marker, Region, RegionKind, Source, Start,
    Tracker, TrackerError,
};
use proptest::prelude::*;

#[derive(Clone, Debug)]
enum Step {
    Mark {
        byte: u64,
        len: u64,
        marker: bool,
    },
    MarkWords {
        first: u64,
        words: Vec<u64>,
        marker: bool,
    },
    MarkEpoch {
        epoch: usize,
        range: GpaRange,
    },
    Harvest {
        epoch: usize,
        range: GpaRange,
        most: u64,
        commit: bool,
    },
    HarvestAll {
        epoch: usize,
        commit: bool,
    },
    Restart {
        epoch: usize,
        start: Start,
    },
}

fn any_step() -> impl Strategy<Value = Step> {
    let word = prop_oneof![
        Just(0),
        Just(u64::MAX),
        any::<u64>(),
        (0..64_u32).prop_map(|n| 1 << n)
    ];
    let epoch = 0..2_usize;
    prop_oneof![
        4 => (any_page(), 0..4096_u64, prop_oneof![0..9000_u64, 0..4_000_000_u64], any::<bool>())
            .prop_map(|(page, offset, len, marker)| Step::Mark { byte: gpa(page).0 + offset, len, marker }),
        3 => (any_page(), prop::collection::vec(word, 0..20), any::<bool>())
            .prop_map(|(first, words, marker)| Step::MarkWords { first, words, marker }),
        1 => (epoch.clone(), prop_oneof![any_range(1500), Just(GpaRange::ALL)])
            .prop_map(|(epoch, range)| Step::MarkEpoch { epoch, range }),
        4 => (epoch.clone(), any_range(1200), prop_oneof![Just(u64::MAX), 1..600_u64], any::<bool>())
            .prop_map(|(epoch, range, most, commit)| Step::Harvest { epoch, range, most, commit }),
        2 => (epoch.clone(), any::<bool>())
            .prop_map(|(epoch, commit)| Step::HarvestAll { epoch, commit }),
        1 => (epoch, prop_oneof![Just(Start::Clean), Just(Start::AllDirty)])
            .prop_map(|(epoch, start)| Step::Restart { epoch, start }),
    ]
}

/// A tracker with two epochs, and what each of them should find.
struct Checked {
    tracker: Arc<Tracker>,
    marker: Marker,
    regions: Vec<Region>,
    epochs: [Epoch; 2],
    dirty: [PageSet; 2],
    outside: u64,
}

impl Checked {
    fn new() -> Self {
        let regions = ragged_regions();
        let tracker = Arc::new(Tracker::new(&regions).unwrap());
        let begin = |name| Epoch::begin(&tracker, name, Start::Clean).unwrap();
        Self {
            epochs: [begin("one"), begin("two")],
            marker: tracker.marker(Source::Device).unwrap(),
            tracker,
            regions,
            dirty: Default::default(),
            outside: 0,
        }
    }

    fn note(&mut self, page: u64) {
        if tracked(&self.regions, page) {
            let page = pages(page, page + 1);
            self.dirty.iter_mut().for_each(|set| set.insert(page));
        } else {
            self.outside += 1;
        }
    }

    fn apply(&mut self, step: Step) {
        match step {
            Step::Mark { byte, len, marker } => {
                if marker {
                    self.marker.mark(Gpa(byte), len);
                } else {
                    self.tracker.mark(Gpa(byte), len, Source::Device);
                }
                if len > 0 {
                    let last = byte.saturating_add(len - 1) >> 12;
                    (byte >> 12..=last).for_each(|page| self.note(page));
                }
            }
            Step::MarkWords {
                first,
                words,
                marker,
            } => {
                if marker {
                    self.marker.mark_words(gpa(first), &words);
                } else {
                    self.tracker.mark_words(gpa(first), &words, Source::Vcpu);
                }
                for bit in 0..64 * words.len() as u64 {
                    let set = words[usize::try_from(bit / 64).unwrap()] >> (bit % 64) & 1 == 1;
                    if set && first + bit < SPACE {
                        self.note(first + bit);
                    }
                }
            }
            Step::MarkEpoch { epoch, range } => {
                self.epochs[epoch].mark(range);
                self.dirty[epoch].extend(&tracked_pages(&self.regions, range));
            }
            Step::Harvest {
                epoch,
                range,
                most,
                commit,
            } => self.harvest(epoch, range, most, commit),
            Step::HarvestAll { epoch, commit } => {
                self.harvest(epoch, GpaRange::ALL, u64::MAX, commit);
            }
            Step::Restart { epoch, start } => {
                let fresh = Epoch::begin(&self.tracker, "again", start).unwrap();
                self.epochs[epoch] = fresh;
                self.dirty[epoch] = match start {
                    Start::Clean => PageSet::new(),
                    Start::AllDirty => tracked_pages(&self.regions, GpaRange::ALL),
                };
            }
        }
    }

    fn harvest(&mut self, epoch: usize, range: GpaRange, most: u64, commit: bool) {
        let harvest = self.epochs[epoch].harvest_up_to(range, most).unwrap();
        let window = if range == GpaRange::ALL {
            pages(0, 2700)
        } else {
            range
        };
        let found = read(&harvest, window);
        let mut expected = self.dirty[epoch].within(range);
        if let Some(rest) = harvest.rest() {
            assert_eq!(rest.end_page(), range.end_page());
            assert!(
                harvest.pages() >= most,
                "stopped after {} of {most}",
                harvest.pages()
            );
            expected.clear(rest);
        }
        assert!(harvest.pages() < most.saturating_add(512));
        assert_eq!(found, expected);
        if commit {
            harvest.commit();
            self.dirty[epoch].remove_all(&found);
        } else {
            harvest.rollback();
        }
    }

    fn audit(&mut self) {
        for page in (0..2700).chain(SPACE - 1600..SPACE) {
            let [one, two] = [0, 1].map(|epoch| self.dirty[epoch].contains(page));
            assert_eq!(self.epochs[0].dirty_at(gpa(page)), one, "page {page:#x}");
            assert_eq!(self.epochs[1].dirty_at(gpa(page)), two, "page {page:#x}");
            assert_eq!(self.tracker.dirty_at(gpa(page)), one || two);
        }
        assert_eq!(self.tracker.counters().outside, self.outside);
        assert_eq!(self.tracker.counters().coarse, 0);
        self.harvest(0, GpaRange::ALL, u64::MAX, true);
        self.harvest(1, GpaRange::ALL, u64::MAX, true);
    }
}

proptest! {
    #![proptest_config(config(200))]

    /// S16, S17: whatever is marked, harvested, committed and rolled back, each epoch finds exactly
    /// the pages that a set of page numbers would hold.
    #[test]
    fn s17_epochs_find_what_a_set_of_pages_holds(steps in prop::collection::vec(any_step(), 1..25)) {
        let mut checked = Checked::new();
        for step in steps {
            checked.apply(step);
        }
        checked.audit();
    }
}

/// Mistake 9: a migration fails, is tried again, and must find the pages of the first try.
#[test]
fn s17_a_failed_try_loses_no_page() {
    let tracker = ram(4096);
    let epoch = Epoch::begin(&tracker, "migration", Start::Clean).unwrap();
    tracker.mark(gpa(10), 1, Source::Vcpu);
    tracker.mark(gpa(1000), 700 << 12, Source::Vcpu);
    let first = epoch.harvest(GpaRange::ALL).unwrap();
    assert_eq!(first.pages(), 701);
    tracker.mark(gpa(11), 1, Source::Vcpu);
    drop(first);
    let second = epoch.harvest(GpaRange::ALL).unwrap();
    assert_eq!(
        second.runs().collect::<Vec<_>>(),
        [pages(10, 12), pages(1000, 1700)]
    );
}

/// S17: a harvest that is dropped by a panic is rolled back.
#[test]
fn s17_a_panic_rolls_back() {
    let tracker = ram(4096);
    let epoch = Epoch::begin(&tracker, "migration", Start::AllDirty).unwrap();
    let unwound = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
        let _harvest = epoch.harvest(pages(100, 3000)).unwrap();
        panic!("the stream broke");
    }));
    assert!(unwound.is_err());
    assert_eq!(epoch.harvest(GpaRange::ALL).unwrap().pages(), 4096);
}

/// A harvest may outlive its epoch.
#[test]
fn s17_a_harvest_outlives_its_epoch() {
    let tracker = ram(600);
    let epoch = Epoch::begin(&tracker, "short", Start::AllDirty).unwrap();
    let harvest = epoch.harvest(GpaRange::ALL).unwrap();
    drop(epoch);
    assert_eq!(harvest.pages(), 600);
    drop(harvest);
}

/// Mistake 8: masks that straddle 2 MiB, at every alignment.
#[test]
fn s18_masks_straddle_huge_pages_at_every_alignment() {
    for first in 440..580 {
        let tracker = ram(2048);
        let epoch = Epoch::begin(&tracker, "log", Start::Clean).unwrap();
        tracker.mark_words(gpa(first), &[u64::MAX], Source::Vcpu);
        let harvest = epoch.harvest(pages(first, first + 64)).unwrap();
        assert_eq!(
            harvest.runs().collect::<Vec<_>>(),
            [pages(first, first + 64)]
        );
        assert_eq!(
            harvest
                .words_in(pages(first, first + 64))
                .collect::<Vec<_>>(),
            [u64::MAX]
        );
        assert_eq!(epoch.harvest(GpaRange::ALL).unwrap().pages(), 0);
    }
}

/// Mistake 7: a range that ends with the address space.
#[test]
fn s1_the_last_byte_of_the_space_is_tracked() {
    let range = pages(SPACE - 700, SPACE);
    let kind = RegionKind::Ram;
    let tracker = Arc::new(Tracker::new(&[Region { range, kind }]).unwrap());
    let epoch = Epoch::begin(&tracker, "last", Start::Clean).unwrap();
    tracker.mark(Gpa(u64::MAX), 1, Source::Vcpu);
    tracker.mark(Gpa(u64::MAX - 5000), u64::MAX, Source::Vcpu);
    let harvest = epoch.harvest(range).unwrap();
    assert_eq!(
        harvest.runs().collect::<Vec<_>>(),
        [pages(SPACE - 2, SPACE)]
    );
    assert_eq!(harvest.runs().next().unwrap().last(), Gpa(u64::MAX));
}

#[test]
fn s18_each_source_is_counted_once_a_page() {
    let tracker = ram(4096);
    tracker.mark(gpa(1), 2 << 12, Source::Vcpu);
    tracker.mark(gpa(2), 2 << 12, Source::Monitor);
    tracker.mark_words(gpa(0), &[0b1_1111], Source::VhostUser);
    tracker.mark(gpa(4090), 100 << 12, Source::Device);
    tracker.fault(gpa(3));
    tracker.fault(gpa(77));
    let counters = tracker.counters();
    assert_eq!(
        Source::ALL.map(|source| counters.dirtied_by(source)),
        [2, 1, 6, 2, 1]
    );
    assert_eq!(counters.dirtied(), 12);
    assert_eq!(counters.outside, 94);
}

/// Each marker counts for itself, and what it counted stays when it goes.
#[test]
fn s18_markers_count_every_page() {
    const PAGES: u64 = 2000;
    let tracker = Arc::new(ram(3 * PAGES));
    let sources = [Source::Device, Source::Device, Source::VhostUser];
    thread::scope(|scope| {
        for (source, first) in sources.into_iter().zip([0, PAGES, 2 * PAGES]) {
            let mut marker = tracker.marker(source).unwrap();
            scope.spawn(move || {
                for page in first..first + PAGES {
                    // Twice, and the second time it is dirty.
                    marker.mark(gpa(page), 1);
                    marker.mark(gpa(page), 4096);
                }
            });
        }
    });
    let mut later = tracker.marker(Source::VhostUser).unwrap();
    later.mark(gpa(3 * PAGES), 1);
    Epoch::begin(&tracker, "clean", Start::Clean).unwrap();
    later.mark(gpa(7), 1);
    let counters = tracker.counters();
    assert_eq!(counters.dirtied_by(Source::Device), 2 * PAGES);
    assert_eq!(counters.dirtied_by(Source::VhostUser), PAGES + 1);
    assert_eq!(counters.outside, 1);
}

/// A tree is as high as its regions need: marks of single pages and of runs, where there is no leaf table yet and
/// where there is one, in trees of every height.
#[test]
fn s18_trees_of_every_height_are_marked() {
    for pages in [1 << 18, 1 << 27, 1 << 36, 1 << 45, SPACE] {
        let range = GpaRange::from_pages(pages - 2048, 2048).unwrap();
        let kind = RegionKind::Ram;
        let tracker = Arc::new(Tracker::new(&[Region { range, kind }]).unwrap());
        let epoch = Epoch::begin(&tracker, "all", Start::Clean).unwrap();
        let edge = pages - 512;
        for marked in [1, 2, 3] {
            tracker.mark(gpa(edge - 3), 1, Source::Device);
            tracker.mark(gpa(edge - 2), 5 << 12, Source::Device);
            tracker.mark(gpa(pages - 1), 4096, Source::Device);
            let harvest = epoch.harvest(GpaRange::ALL).unwrap();
            let runs: Vec<_> = harvest.runs().collect();
            let expected = [
                GpaRange::from_pages(edge - 3, 6).unwrap(),
                GpaRange::from_pages(pages - 1, 1).unwrap(),
            ];
            assert_eq!(runs, expected, "of {pages:#x} pages");
            harvest.commit();
            assert_eq!(tracker.counters().dirtied_by(Source::Device), 7 * marked);
        }
    }
}

#[test]
fn a_tracker_refuses_what_is_no_map() {
    let ram = |first, end| Region {
        range: pages(first, end),
        kind: RegionKind::Ram,
    };
    assert_eq!(Tracker::new(&[]).unwrap_err(), TrackerError::NoRegions);
    assert_eq!(
        Tracker::new(&[ram(5, 9), ram(0, 6)]).unwrap_err(),
        TrackerError::Overlap(pages(0, 6), pages(5, 9))
    );
}

#[test]
fn s17_epochs_are_bounded_and_come_free() {
    let tracker = ram(16);
    let begin = || Epoch::begin(&tracker, "one", Start::Clean);
    let mut epochs: Vec<Epoch> = (0..MAX_EPOCHS).map(|_| begin().unwrap()).collect();
    assert_eq!(begin().unwrap_err(), EpochError::TooMany("one".into()));
    epochs.pop();
    assert_eq!(begin().unwrap().name(), "one");
}

/// P9: nothing is split until detail is needed, and whole huge leaves never are.
#[test]
fn p9_whole_spans_cost_no_detail() {
    let tracker = ram(1 << 28);
    let empty = tracker.memory_bytes();
    tracker.mark(gpa(0), 1 << 40, Source::Vcpu);
    assert_eq!(tracker.memory_bytes(), empty);
    let epoch = Epoch::begin(&tracker, "all", Start::AllDirty).unwrap();
    let harvest = epoch.harvest(GpaRange::ALL).unwrap();
    assert_eq!(harvest.runs().collect::<Vec<_>>(), [pages(0, 1 << 28)]);
    harvest.commit();
    assert!(epoch.harvest(GpaRange::ALL).unwrap().is_empty());
}

/// S21: what came since a snapshot, and for how long a harvest held its lock, by a clock that is the caller's.
#[test]
fn s21_rates_and_the_longest_harvest() {
    use std::sync::atomic::{AtomicU64, Ordering};
    static TICKS: AtomicU64 = AtomicU64::new(0);
    let region = Region {
        range: pages(0, 1000),
        kind: RegionKind::Ram,
    };
    let tracker = Tracker::new(&[region]).unwrap();
    // Each look at the clock is 50 ns after the last one.
    let tracker = Arc::new(tracker.with_clock(|| TICKS.fetch_add(50, Ordering::Relaxed)));
    let epoch = Epoch::begin(&tracker, "one", Start::Clean).unwrap();
    tracker.mark(gpa(5), 1, Source::Vcpu);
    let before = tracker.counters();
    assert_eq!((before.dirtied(), before.longest_harvest_ns), (1, 0));
    tracker.mark(gpa(5), 1, Source::Vcpu);
    assert_eq!(
        tracker.counters().since(&before).dirtied(),
        0,
        "it was dirty"
    );
    epoch.harvest(region.range).unwrap().commit();
    tracker.mark(gpa(5), 1, Source::Vcpu);
    tracker.mark(gpa(6), 1, Source::Device);
    let since = tracker.counters().since(&before);
    assert_eq!((since.dirtied(), since.dirtied_by(Source::Vcpu)), (2, 1));
    assert_eq!(since.longest_harvest_ns, 50);
}
