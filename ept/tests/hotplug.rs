//! Regions that come and go while writers mark and epochs harvest (S16, S17, S18, S24).

mod common;

use std::collections::BTreeSet;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread;

use common::model::PageSet;
use common::{SPACE, config, gpa, pages, ram, read};
use ept::{
    Contents, Epoch, Fault, Gpa, GpaRange, Harvest, MAX_ADDED_REGIONS, Notifier, ProtectError,
    Region, RegionKind, RemoveError, Source, Start, Tracker, TrackerError,
};
use proptest::prelude::*;

const GIB: u64 = 1 << 18;

fn ram_at(range: GpaRange) -> Region {
    Region {
        range,
        kind: RegionKind::Ram,
    }
}

fn begin(tracker: &Arc<Tracker>, name: &str) -> Epoch {
    Epoch::begin(tracker, name, Start::Clean).unwrap()
}

fn runs(harvest: Harvest) -> Vec<GpaRange> {
    let runs = harvest.runs().collect();
    harvest.commit();
    runs
}

/// Slots for regions: in the gaps of the first regions, beside them in the same 2 MiB, beyond the first tree, across a
/// 1 GiB boundary, and at the end of the space. Slots 0 to 2 are there from the beginning.
const SLOTS: [(u64, u64); 9] = [
    (3, 700),
    (1000, 1400),
    (2048, 2560),
    (700, 705),
    (900, 1000),
    (1400, 1500),
    (GIB - 300, GIB + 900),
    (1 << 30, (1 << 30) + 1024),
    (SPACE - 700, SPACE),
];

fn slot(number: usize) -> GpaRange {
    let (first, end) = SLOTS[number];
    pages(first, end)
}

/// A page in or near a slot.
fn any_page() -> impl Strategy<Value = u64> {
    prop_oneof![
        0..2600_u64,
        GIB - 400..GIB + 1000,
        (1 << 30) - 10..(1 << 30) + 1100_u64,
        SPACE - 800..SPACE
    ]
}

fn any_range(most: u64) -> impl Strategy<Value = GpaRange> {
    (any_page(), 1..=most).prop_map(|(first, count)| pages(first, (first + count).min(SPACE)))
}

#[derive(Clone, Debug)]
enum Step {
    Add {
        slot: usize,
        contents: Contents,
    },
    Remove {
        slot: usize,
    },
    Discard {
        slot: usize,
    },
    Mark {
        range: GpaRange,
    },
    MarkWords {
        first: u64,
        words: Vec<u64>,
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
    Restart {
        epoch: usize,
        start: Start,
    },
}

fn any_step() -> impl Strategy<Value = Step> {
    let slot = 0..SLOTS.len();
    let epoch = 0..2_usize;
    let contents = prop_oneof![Just(Contents::Zero), Just(Contents::Unknown)];
    let word = prop_oneof![Just(0), Just(u64::MAX), any::<u64>()];
    let most = prop_oneof![Just(u64::MAX), 1..600_u64];
    let start = prop_oneof![Just(Start::Clean), Just(Start::AllDirty)];
    prop_oneof![
        4 => (slot.clone(), contents).prop_map(|(slot, contents)| Step::Add { slot, contents }),
        2 => slot.clone().prop_map(|slot| Step::Remove { slot }),
        2 => slot.prop_map(|slot| Step::Discard { slot }),
        6 => prop_oneof![any_range(3), any_range(1500)].prop_map(|range| Step::Mark { range }),
        2 => (any_page(), prop::collection::vec(word, 0..20))
            .prop_map(|(first, words)| Step::MarkWords { first, words }),
        1 => (epoch.clone(), prop_oneof![any_range(1500), Just(GpaRange::ALL)])
            .prop_map(|(epoch, range)| Step::MarkEpoch { epoch, range }),
        5 => (epoch.clone(), prop_oneof![any_range(1500), Just(GpaRange::ALL)], most, any::<bool>())
            .prop_map(|(epoch, range, most, commit)| Step::Harvest { epoch, range, most, commit }),
        1 => (epoch, start).prop_map(|(epoch, start)| Step::Restart { epoch, start }),
    ]
}

/// A tracker, and a naive model of it: the slots with a region, and a set of dirty pages for each epoch.
struct Checked {
    tracker: Arc<Tracker>,
    present: BTreeSet<usize>,
    epochs: [Epoch; 2],
    dirty: [PageSet; 2],
    outside: u64,
}

impl Checked {
    fn new() -> Self {
        let present = BTreeSet::from([0, 1, 2]);
        let regions: Vec<Region> = present.iter().map(|number| ram_at(slot(*number))).collect();
        let tracker = Arc::new(Tracker::new(&regions).unwrap());
        Self {
            epochs: [begin(&tracker, "one"), begin(&tracker, "two")],
            tracker,
            present,
            dirty: Default::default(),
            outside: 0,
        }
    }

    fn is_tracked(&self, page: u64) -> bool {
        let mut present = self.present.iter();
        present.any(|number| slot(*number).contains(gpa(page)))
    }

    fn tracked(&self, range: GpaRange) -> PageSet {
        let parts = self.present.iter();
        let parts = parts.filter_map(|number| slot(*number).intersection(&range));
        parts.collect()
    }

    fn note(&mut self, page: u64) {
        if self.is_tracked(page) {
            for dirty in &mut self.dirty {
                dirty.insert(page..page + 1);
            }
        } else {
            self.outside += 1;
        }
    }

    fn apply(&mut self, step: Step) {
        match step {
            Step::Add { slot, contents } => self.add(slot, contents),
            Step::Remove { slot } => self.remove(slot),
            Step::Discard { slot } => self.discard(slot),
            Step::Mark { range } => {
                let bytes = u64::try_from(range.bytes()).unwrap();
                self.tracker.mark(range.start(), bytes, Source::Device);
                (range.first_page()..range.end_page()).for_each(|page| self.note(page));
            }
            Step::MarkWords { first, words } => {
                self.tracker.mark_words(gpa(first), &words, Source::Vcpu);
                for (number, word) in words.iter().enumerate() {
                    let start = first + 64 * number as u64;
                    let set = (0..64).filter(|bit| word >> bit & 1 == 1);
                    let set = set.map(|bit| start + bit).filter(|page| *page < SPACE);
                    set.for_each(|page| self.note(page));
                }
            }
            Step::MarkEpoch { epoch, range } => {
                self.epochs[epoch].mark(range);
                let marked = self.tracked(range);
                self.dirty[epoch].extend(&marked);
            }
            Step::Harvest {
                epoch,
                range,
                most,
                commit,
            } => self.harvest(epoch, range, most, commit),
            Step::Restart { epoch, start } => {
                self.epochs[epoch] = Epoch::begin(&self.tracker, "again", start).unwrap();
                self.dirty[epoch] = match start {
                    Start::Clean => PageSet::new(),
                    Start::AllDirty => self.tracked(GpaRange::ALL),
                };
            }
        }
    }

    fn add(&mut self, number: usize, contents: Contents) {
        let added = self.tracker.add_region(ram_at(slot(number)), contents);
        if self.present.contains(&number) {
            let overlap = TrackerError::Overlap(slot(number), slot(number));
            assert_eq!(added, Err(overlap));
            return;
        }
        added.unwrap();
        self.present.insert(number);
        if contents == Contents::Unknown {
            for dirty in &mut self.dirty {
                dirty.insert(slot(number));
            }
        }
    }

    fn remove(&mut self, number: usize) {
        let range = slot(number);
        let removed = self.tracker.remove_region(range);
        if !self.present.contains(&number) {
            assert_eq!(removed, Err(RemoveError::NoSuchRegion(range)));
            return;
        }
        let first = |dirty: &PageSet| dirty.first(range);
        let firsts: Vec<u64> = self.dirty.iter().filter_map(first).collect();
        if firsts.is_empty() {
            assert_eq!(removed, Ok(ram_at(range)));
            self.present.remove(&number);
            return;
        }
        let Err(RemoveError::Dirty { at, .. }) = removed else {
            panic!("pages {firsts:#x?} are dirty, but {removed:?}");
        };
        assert!(firsts.contains(&at.page()));
    }

    fn discard(&mut self, number: usize) {
        let range = slot(number);
        let discarded = self.tracker.discard_region(range);
        if !self.present.remove(&number) {
            assert_eq!(discarded, Err(RemoveError::NoSuchRegion(range)));
            return;
        }
        assert_eq!(discarded, Ok(ram_at(range)));
        for dirty in &mut self.dirty {
            dirty.clear(range);
        }
    }

    fn harvest(&mut self, epoch: usize, range: GpaRange, most: u64, commit: bool) {
        let harvest = self.epochs[epoch].harvest_up_to(range, most).unwrap();
        let window = if range == GpaRange::ALL {
            pages(0, 2600)
        } else {
            range
        };
        let found = read(&harvest, window);
        let mut expected = self.dirty[epoch].within(range);
        if let Some(rest) = harvest.rest() {
            assert_eq!(rest.end_page(), range.end_page());
            expected.clear(rest.first_page()..SPACE);
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
        let present = self.present.iter().map(|number| slot(*number));
        let mut ranges: Vec<GpaRange> = present.collect();
        ranges.sort_unstable();
        let regions = self.tracker.regions();
        let found: Vec<GpaRange> = regions.iter().map(|region| region.range).collect();
        assert_eq!(found, ranges);
        assert_eq!(self.tracker.counters().outside, self.outside);
        assert_eq!(self.tracker.counters().coarse, 0);
        for number in 0..SLOTS.len() {
            let range = slot(number);
            for page in [range.first_page(), range.end_page() - 1] {
                let dirty = [0, 1].map(|epoch| self.dirty[epoch].contains(page));
                let found = [0, 1].map(|epoch| self.epochs[epoch].dirty_at(gpa(page)));
                assert_eq!(found, dirty, "page {page:#x}");
                let any = dirty.contains(&true);
                assert_eq!(self.tracker.dirty_at(gpa(page)), any, "page {page:#x}");
            }
        }
        self.harvest(0, GpaRange::ALL, u64::MAX, true);
        self.harvest(1, GpaRange::ALL, u64::MAX, true);
    }
}

proptest! {
    #![proptest_config(config(200))]

    /// S16, S17, S24: whatever is added, removed, marked, harvested and rolled back, each epoch finds exactly the pages
    /// that a set of page numbers would hold.
    #[test]
    fn s24_regions_come_and_go_as_in_a_set_of_pages(steps in prop::collection::vec(any_step(), 1..40)) {
        let mut checked = Checked::new();
        for step in steps {
            checked.apply(step);
        }
        checked.audit();
    }

    /// S5, S16: the same with 0 to 3 leaf tables for each tree. More pages may be dirty, none is lost, and none lies
    /// outside the regions.
    #[test]
    fn s16_shortage_loses_no_page_of_an_added_region(
        tables in 0..4_usize,
        marks in prop::collection::vec((any_range(700), 0..SLOTS.len()), 1..20),
    ) {
        let first = ram_at(slot(0));
        let tracker = Arc::new(Tracker::with_table_limit(&[first], tables).unwrap());
        let epoch = begin(&tracker, "one");
        let mut present = BTreeSet::from([0]);
        let mut least = PageSet::new();
        for (range, number) in marks {
            let bytes = u64::try_from(range.bytes()).unwrap();
            tracker.mark(range.start(), bytes, Source::Device);
            for part in present.iter().filter_map(|number| slot(*number).intersection(&range)) {
                least.insert(part);
            }
            if present.insert(number) {
                tracker.add_region(ram_at(slot(number)), Contents::Zero).unwrap();
            } else if number % 2 == 1 {
                tracker.discard_region(slot(number)).unwrap();
                present.remove(&number);
                least.clear(slot(number));
            }
        }
        let harvest = epoch.harvest(GpaRange::ALL).unwrap();
        let found = read(&harvest, pages(0, 100));
        prop_assert!(found.covers(&least));
        let tracked: PageSet = present.iter().map(|number| slot(*number)).collect();
        prop_assert!(tracked.covers(&found));
        harvest.commit();
        prop_assert!(epoch.harvest(GpaRange::ALL).unwrap().is_empty());
    }
}

/// S24: open epochs are told of a region whose contents are unknown, and epochs that begin later are not.
#[test]
fn s24_contents_decide_what_open_epochs_are_told() {
    let tracker = ram(512);
    let open = begin(&tracker, "open");
    let (zero, unknown) = (pages(5 * GIB, 5 * GIB + 100), pages(700, 800));
    tracker.add_region(ram_at(zero), Contents::Zero).unwrap();
    tracker
        .add_region(ram_at(unknown), Contents::Unknown)
        .unwrap();
    let later = begin(&tracker, "later");
    let all = Epoch::begin(&tracker, "all", Start::AllDirty).unwrap();
    assert_eq!(runs(open.harvest(GpaRange::ALL).unwrap()), [unknown]);
    assert!(later.harvest(GpaRange::ALL).unwrap().is_empty());
    let everything = [pages(0, 512), unknown, zero];
    assert_eq!(runs(all.harvest(GpaRange::ALL).unwrap()), everything);
}

/// S24: a removal that would lose a dirty page is refused and says for whom; a discard is not.
#[test]
fn s24_a_removal_loses_no_page_by_accident() {
    let tracker = ram(512);
    let (one, two) = (begin(&tracker, "one"), begin(&tracker, "two"));
    let dimm = pages(GIB, 2 * GIB);
    tracker.add_region(ram_at(dimm), Contents::Zero).unwrap();
    tracker.mark(gpa(GIB + 77), 1, Source::Vcpu);
    one.harvest(dimm).unwrap().commit();
    let refused = tracker.remove_region(dimm).unwrap_err();
    let (epoch, at) = ("two".to_owned(), gpa(GIB + 77));
    assert_eq!(refused, RemoveError::Dirty { epoch, at });
    assert!(two.dirty_at(at) && !one.dirty_at(at));

    let last = two.harvest(dimm).unwrap();
    assert_eq!(tracker.remove_region(dimm), Ok(ram_at(dimm)));
    assert_eq!(last.pages(), 1);
    // Its pages are gone: nobody is told of them again.
    last.rollback();
    assert!(!two.dirty_at(at) && !tracker.dirty_at(at));
    tracker.mark(at, 1, Source::Vcpu);
    assert_eq!(tracker.counters().outside, 1);
    let gone = RemoveError::NoSuchRegion(dimm);
    assert_eq!(tracker.remove_region(dimm), Err(gone));

    tracker.add_region(ram_at(dimm), Contents::Unknown).unwrap();
    assert_eq!(tracker.discard_region(dimm), Ok(ram_at(dimm)));
    assert!(two.harvest(GpaRange::ALL).unwrap().is_empty());
}

/// S24: only whole regions are removed, also those that the tracker was made with, and all of them.
#[test]
fn s24_the_first_regions_can_be_removed_and_come_back() {
    let tracker = Arc::new(Tracker::new(&[pages(0, 100), pages(100, 300)].map(ram_at)).unwrap());
    let epoch = begin(&tracker, "one");
    tracker.mark(gpa(90), 20 << 12, Source::Vcpu);
    for part in [pages(0, 50), pages(100, 200), pages(0, 300)] {
        let refused = RemoveError::NoSuchRegion(part);
        assert_eq!(tracker.discard_region(part), Err(refused));
    }
    tracker.discard_region(pages(100, 300)).unwrap();
    assert_eq!(
        runs(epoch.harvest(GpaRange::ALL).unwrap()),
        [pages(90, 100)]
    );
    tracker.remove_region(pages(0, 100)).unwrap();
    assert!(tracker.regions().is_empty());
    tracker.mark(gpa(0), 300 << 12, Source::Vcpu);
    assert_eq!(tracker.counters().outside, 300);

    tracker
        .add_region(ram_at(pages(50, 150)), Contents::Zero)
        .unwrap();
    tracker.mark(gpa(0), 300 << 12, Source::Vcpu);
    assert_eq!(
        runs(epoch.harvest(GpaRange::ALL).unwrap()),
        [pages(50, 150)]
    );
    assert_eq!(tracker.counters().outside, 500);
}

/// S15, S20: an added region is protected as any other, and forgets its protection when it is removed.
#[test]
fn s15_added_regions_are_protected() {
    let tracker = ram(512);
    let notifier = Notifier::new();
    let open = notifier.open(GpaRange::ALL).unwrap();
    let dimm = pages(512, 1100);
    tracker.add_region(ram_at(dimm), Contents::Zero).unwrap();
    let epoch = begin(&tracker, "one");
    let changed = tracker.protect(pages(500, 1100), &open).unwrap();
    assert_eq!(changed.pages, 600);
    assert_eq!(changed.interval, Some(pages(500, 1100)));
    assert!(tracker.is_protected(gpa(511)) && tracker.is_protected(gpa(1099)));
    assert_eq!(tracker.fault(gpa(1000)), Fault::Released(pages(1000, 1001)));
    assert_eq!(tracker.fault(gpa(1000)), Fault::Open);
    assert_eq!(tracker.fault(gpa(1100)), Fault::Outside);
    let released = tracker.unprotect(pages(600, 700), &open).unwrap();
    assert_eq!(released.interval, Some(pages(600, 700)));
    assert_eq!(
        runs(epoch.harvest(GpaRange::ALL).unwrap()),
        [pages(1000, 1001)]
    );

    tracker.remove_region(dimm).unwrap();
    assert!(!tracker.is_protected(gpa(1099)));
    let outside = ProtectError::Outside(gpa(512));
    assert_eq!(tracker.protect(pages(500, 600), &open), Err(outside));
    let rom = Region {
        range: dimm,
        kind: RegionKind::Rom,
    };
    tracker.add_region(rom, Contents::Unknown).unwrap();
    assert!(!tracker.is_protected(gpa(1099)));
    let (gpa, kind) = (gpa(512), RegionKind::Rom);
    let refused = ProtectError::Kind { gpa, kind };
    assert_eq!(tracker.protect(pages(500, 600), &open), Err(refused));
    let narrow = notifier.open(pages(0, 10)).unwrap();
    assert!(matches!(
        tracker.protect(pages(0, 100), &narrow),
        Err(ProtectError::NotOpen(_))
    ));
}

/// S2: detail of added regions can be allocated beforehand.
#[test]
fn s2_added_regions_are_reserved() {
    let tracker = ram(512);
    let dimm = pages(GIB, 2 * GIB);
    tracker.add_region(ram_at(dimm), Contents::Zero).unwrap();
    tracker.reserve(GpaRange::ALL).unwrap();
    let held = tracker.memory_bytes();
    for page in (GIB..2 * GIB).step_by(512) {
        tracker.mark(gpa(page), 1, Source::Device);
    }
    assert_eq!(tracker.memory_bytes(), held);
}

/// A region that is plugged and unplugged for ever needs no more memory than the first time.
#[test]
fn hot_plugging_again_needs_no_more_memory() {
    let tracker = ram(512);
    let epoch = begin(&tracker, "one");
    let mut held = None;
    for turn in 0..2 * MAX_ADDED_REGIONS as u64 {
        let first = (turn + 1) * GIB - turn % 600;
        let dimm = pages(first, first + 4096 + turn % 3000);
        tracker.add_region(ram_at(dimm), Contents::Zero).unwrap();
        assert!(epoch.harvest(dimm).unwrap().is_empty());
        tracker.mark(gpa(first + 5), 4000 << 12, Source::Device);
        let marked = pages(first + 5, first + 4005);
        assert_eq!(runs(epoch.harvest(GpaRange::ALL).unwrap()), [marked]);
        tracker.mark(gpa(first), 1, Source::Device);
        tracker.discard_region(dimm).unwrap();
        if turn == 10 {
            held = Some(tracker.memory_bytes());
        }
    }
    let held = held.unwrap();
    assert!(
        tracker.memory_bytes() < 2 * held,
        "{} bytes",
        tracker.memory_bytes()
    );
}

/// The number of added regions is bounded, and a refused region changes nothing.
#[test]
fn too_many_regions_are_refused() {
    let tracker = ram(8);
    let dimm = |number: usize| {
        ram_at(pages(
            16 * (number as u64 + 1),
            16 * (number as u64 + 1) + 8,
        ))
    };
    for number in 0..MAX_ADDED_REGIONS {
        tracker.add_region(dimm(number), Contents::Zero).unwrap();
    }
    let one_more = dimm(MAX_ADDED_REGIONS);
    let refused = tracker.add_region(one_more, Contents::Unknown);
    assert_eq!(refused, Err(TrackerError::TooManyRegions));
    assert_eq!(tracker.regions().len(), MAX_ADDED_REGIONS + 1);
    tracker.remove_region(dimm(7).range).unwrap();
    tracker.add_region(one_more, Contents::Unknown).unwrap();
    let across = ram_at(pages(20, 40));
    let overlap = TrackerError::Overlap(pages(16, 24), pages(20, 40));
    assert_eq!(tracker.add_region(across, Contents::Unknown), Err(overlap));
    assert_eq!(tracker.region_at(gpa(20)), Some(dimm(0)));
    assert_eq!(tracker.region_at(gpa(25)), None);
}

/// The newest version of each page, and a copy of it.
struct Versions(Vec<AtomicU64>);

impl Versions {
    fn new(pages: u64) -> Self {
        Self((0..pages).map(|_| AtomicU64::new(0)).collect())
    }

    fn page(&self, page: u64) -> &AtomicU64 {
        &self.0[usize::try_from(page).unwrap()]
    }
}

/// Pages of the region that stays and of the added one that stays.
const STAYS: u64 = 1200;
const ADDED: u64 = GIB;
const ADDED_PAGES: u64 = 900;
const VERSIONS: u64 = 30_000;

/// S16, S24: two writers write to a first region and to an added one, two epochs harvest and roll back, and other regions
/// come and go beside them, in places before the added one. No write is lost.
#[test]
fn s24_other_regions_come_and_go_beside_writers() {
    let tracker = ram(STAYS);
    let passing = [pages(STAYS, STAYS + 300), pages(3 * GIB, 3 * GIB + 5000)];
    tracker
        .add_region(ram_at(passing[0]), Contents::Zero)
        .unwrap();
    let added = pages(ADDED, ADDED + ADDED_PAGES);
    tracker.add_region(ram_at(added), Contents::Zero).unwrap();
    tracker.discard_region(passing[0]).unwrap();

    let memory = Versions::new(STAYS + ADDED_PAGES);
    let copies = [(); 2].map(|()| Versions::new(STAYS + ADDED_PAGES));
    let epochs = ["one", "two"].map(|name| begin(&tracker, name));
    let writing = AtomicBool::new(true);
    thread::scope(|scope| {
        let (tracker, memory, writing) = (&tracker, &memory, &writing);
        for (epoch, copy) in epochs.iter().zip(&copies) {
            scope.spawn(move || {
                let mut round = 0;
                while writing.load(Ordering::SeqCst) {
                    round += 1;
                    copy_dirty(epoch, memory, copy, round);
                }
            });
        }
        scope.spawn(move || {
            let mut turn = 0;
            while writing.load(Ordering::SeqCst) {
                let range = passing[turn % 2];
                let contents = [Contents::Zero, Contents::Unknown][turn / 2 % 2];
                tracker.add_region(ram_at(range), contents).unwrap();
                tracker.mark(range.start(), 4096, Source::Monitor);
                tracker.discard_region(range).unwrap();
                turn += 1;
            }
        });
        let writers = [Source::Vcpu, Source::Device]
            .map(|source| scope.spawn(move || write_versions(tracker, memory, source)));
        for writer in writers {
            writer.join().unwrap();
        }
        writing.store(false, Ordering::SeqCst);
    });
    for (epoch, copy) in epochs.iter().zip(&copies) {
        copy_dirty(epoch, &memory, copy, 0);
        for page in 0..STAYS + ADDED_PAGES {
            let [newest, copied] = [&memory, copy].map(|one| one.page(page).load(Ordering::SeqCst));
            assert_eq!(copied, newest, "page {page} lost a write");
        }
    }
    assert_eq!(tracker.counters().outside, 0);
}

fn place_of(number: u64) -> Gpa {
    if number < STAYS {
        gpa(number)
    } else {
        gpa(ADDED + number - STAYS)
    }
}

fn write_versions(tracker: &Tracker, memory: &Versions, source: Source) {
    let mut random = 1 << 20 | source as u64;
    for version in 1..=VERSIONS {
        random ^= random << 13;
        random ^= random >> 7;
        random ^= random << 17;
        let number = random % (STAYS + ADDED_PAGES);
        memory.page(number).fetch_max(version, Ordering::Relaxed);
        tracker.mark(place_of(number), 1, source);
    }
}

fn copy_dirty(epoch: &Epoch, memory: &Versions, copy: &Versions, round: u64) {
    let harvest = epoch.harvest(GpaRange::ALL).unwrap();
    if round % 4 == 1 {
        return harvest.rollback();
    }
    for number in 0..STAYS + ADDED_PAGES {
        if harvest.contains(place_of(number)) {
            let version = memory.page(number).load(Ordering::Relaxed);
            copy.page(number).store(version, Ordering::Relaxed);
        }
    }
    harvest.commit();
}
