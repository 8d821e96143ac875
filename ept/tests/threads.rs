//! Markers against harvesters: nothing is lost (S16, S17).

mod common;

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread;

use common::{gpa, pages, ram};
use ept::{
    Epoch, GpaRange, Harvest, Notifier, Region, RegionKind, Source, Start, Subscriber, Tracker,
    Unresponsive,
};

/// Stands for guest memory: one word a page, whose value is the newest version written.
struct Memory(Vec<AtomicU64>);

/// One consumer's copy of it.
struct Copy(Vec<u64>);

const PAGES: u64 = 3 * 512 + 100;
/// Writes of one marker in one bout: so few that hardly a page is written twice, because a second
/// mark would hide that the first was lost.
const WRITES: u64 = 500;
const BOUTS: u64 = 400;
/// Writes after a fault, each with harvests going on.
const FAULTS: u64 = 10_000;

impl Memory {
    fn new() -> Self {
        Self((0..PAGES).map(|_| AtomicU64::new(0)).collect())
    }

    fn page(&self, page: u64) -> &AtomicU64 {
        &self.0[usize::try_from(page).unwrap()]
    }
}

impl Copy {
    fn new() -> Self {
        Self(vec![0; usize::try_from(PAGES).unwrap()])
    }

    /// Takes over the pages of one harvest. Relaxed on purpose: the tracker must give the order.
    fn send(&mut self, memory: &Memory, epoch: &Epoch, round: u64) {
        let most = if round.is_multiple_of(3) {
            100
        } else {
            u64::MAX
        };
        let harvest = epoch.harvest_up_to(pages(0, PAGES), most).unwrap();
        if round % 4 == 1 {
            return harvest.rollback();
        }
        self.read(memory, &harvest);
        harvest.commit();
    }

    fn read(&mut self, memory: &Memory, harvest: &Harvest) {
        for run in harvest.runs() {
            for page in run.first_page()..run.end_page() {
                let copy = &mut self.0[usize::try_from(page).unwrap()];
                *copy = memory.page(page).load(Ordering::Relaxed);
            }
        }
    }
}

/// A marker writes pages all over, data first and mark after.
fn write(tracker: &Tracker, memory: &Memory, bout: u64, source: Source) {
    let mut random = (bout + 1) << 8 | source as u64;
    for version in bout * WRITES + 1..=(bout + 1) * WRITES {
        random ^= random << 13;
        random ^= random >> 7;
        random ^= random << 17;
        let page = random % PAGES;
        memory.page(page).fetch_max(version, Ordering::Relaxed);
        match random >> 60 {
            0 => tracker.mark_words(gpa(page), &[1], source),
            1 if page > 0 => tracker.mark(gpa(page - 1), 2 << 12, source),
            2 => {
                tracker.fault(gpa(page));
            }
            _ => tracker.mark(gpa(page), 1, source),
        }
    }
}

fn consume(copy: &mut Copy, epoch: &Epoch, memory: &Memory, writing: &AtomicBool) {
    let mut round = 0;
    while writing.load(Ordering::SeqCst) {
        round += 1;
        copy.send(memory, epoch, round);
    }
    // The final pass, with the writers stopped.
    copy.send(memory, epoch, 2);
    assert!(epoch.harvest(GpaRange::ALL).unwrap().is_empty());
}

fn nothing_is_lost(tracker: &Arc<Tracker>) {
    let memory = Memory::new();
    let epochs = ["one", "two"].map(|name| Epoch::begin(tracker, name, Start::Clean).unwrap());
    let mut copies = [Copy::new(), Copy::new()];
    for bout in 0..BOUTS {
        let writing = AtomicBool::new(true);
        thread::scope(|scope| {
            let (memory, writing) = (&memory, &writing);
            for (copy, epoch) in copies.iter_mut().zip(&epochs) {
                scope.spawn(move || consume(copy, epoch, memory, writing));
            }
            let writers = [Source::Vcpu, Source::Device]
                .map(|source| scope.spawn(move || write(tracker, memory, bout, source)));
            for writer in writers {
                writer.join().unwrap();
            }
            writing.store(false, Ordering::SeqCst);
        });
        copies.iter().for_each(|copy| audit(copy, &memory));
    }
}

fn audit(copy: &Copy, memory: &Memory) {
    for page in 0..PAGES {
        let newest = memory.page(page).load(Ordering::Relaxed);
        let copied = copy.0[usize::try_from(page).unwrap()];
        assert_eq!(copied, newest, "page {page} lost a write");
    }
}

/// S16, S17: two epochs that harvest, roll back and stop early all the time each end with a true copy.
#[test]
fn s16_two_epochs_and_two_markers_lose_nothing() {
    nothing_is_lost(&ram(PAGES));
}

/// S5, S16: the same when only one 2 MiB part can be had in detail.
#[test]
fn s16_nothing_is_lost_when_memory_is_short() {
    let range = pages(0, PAGES);
    let kind = RegionKind::Ram;
    let regions = [Region { range, kind }];
    nothing_is_lost(&Arc::new(Tracker::with_table_limit(&regions, 1).unwrap()));
}

/// S17: epochs that come and go do not disturb one that stays.
#[test]
fn s17_epochs_come_and_go() {
    let tracker = ram(1 << 16);
    let stays = Epoch::begin(&tracker, "stays", Start::Clean).unwrap();
    thread::scope(|scope| {
        scope.spawn(|| {
            for _ in 0..300 {
                let epoch = Epoch::begin(&tracker, "passes", Start::Clean).unwrap();
                epoch.harvest(GpaRange::ALL).unwrap().commit();
            }
        });
        for page in (0..1 << 16).step_by(7) {
            tracker.mark(gpa(page), 1, Source::Vcpu);
        }
    });
    let harvest = stays.harvest(GpaRange::ALL).unwrap();
    assert_eq!(harvest.pages(), (1_u64 << 16).div_ceil(7));
}

/// Racing markers split a huge leaf once, and count each page once.
#[test]
fn s7_racing_markers_count_each_page_once() {
    let tracker = ram(1 << 18);
    thread::scope(|scope| {
        for source in [Source::Vcpu, Source::Device] {
            let tracker = &tracker;
            scope.spawn(move || {
                for page in 0..1 << 15 {
                    tracker.mark(gpa(page * 8), 1, source);
                }
            });
        }
    });
    let epoch = Epoch::begin(&tracker, "late", Start::Clean).unwrap();
    assert_eq!(tracker.counters().dirtied(), 1 << 15);
    assert!(epoch.harvest(GpaRange::ALL).unwrap().is_empty());
}

/// S16: what was marked before a harvest began is in it, whoever else marks and harvests, in a tree of
/// many levels: a marker that finds a summary bit set may not rely on whoever set it.
#[test]
fn s16_what_was_marked_before_is_found() {
    const GIB: u64 = 1 << 18;
    let tracker = ram(1 << 28);
    thread::scope(|scope| {
        for number in 0..2_u64 {
            let tracker = &tracker;
            scope.spawn(move || {
                let epoch = Epoch::begin(tracker, "own", Start::Clean).unwrap();
                for turn in 0..40_000 {
                    // The same leaf table, the same 1 GiB, and the same 512 GiB, in turns.
                    let apart = [1, 512, GIB][usize::try_from(turn % 3).unwrap()];
                    let page = turn % 7 * GIB + number * apart;
                    tracker.mark(gpa(page), 1, Source::Vcpu);
                    let harvest = epoch.harvest(GpaRange::ALL).unwrap();
                    assert!(harvest.contains(gpa(page)), "page {page:#x} in turn {turn}");
                    harvest.commit();
                }
            });
        }
    });
}

/// A vCPU inside the guest: it checks the protection and writes as one step.
#[derive(Default)]
struct Vcpu {
    stops: AtomicU64,
    inside: AtomicBool,
}

impl Subscriber for Vcpu {
    fn start(&self, _: GpaRange) {
        self.stops.fetch_add(1, Ordering::SeqCst);
    }

    fn wait(&self, _: GpaRange) -> Result<(), Unresponsive> {
        while !self.stopped(GpaRange::ALL) {
            thread::yield_now();
        }
        Ok(())
    }

    fn stopped(&self, _: GpaRange) -> bool {
        !self.inside.load(Ordering::SeqCst)
    }

    fn end(&self, _: GpaRange) {
        self.stops.fetch_sub(1, Ordering::SeqCst);
    }
}

impl Vcpu {
    /// Writes `version` to page 0, with as many faults as that takes. Nothing but faults marks it.
    fn write(&self, tracker: &Tracker, memory: &Memory, version: u64) {
        loop {
            self.inside.store(true, Ordering::SeqCst);
            let stopping = self.stops.load(Ordering::SeqCst) != 0;
            let faults = stopping || tracker.is_protected(gpa(0));
            if !faults {
                memory.page(0).fetch_max(version, Ordering::Relaxed);
            }
            self.inside.store(false, Ordering::SeqCst);
            match (stopping, faults) {
                (true, _) => thread::yield_now(),
                (false, true) => {
                    tracker.fault(gpa(0));
                }
                (false, false) => return,
            }
        }
    }
}

/// S15, S16: faults alone are enough to see every write, also where a harvest comes between a fault
/// and the write that is tried again after it.
#[test]
fn s15_a_fault_in_progress_loses_no_write() {
    let tracker = ram(PAGES);
    let epoch = Epoch::begin(&tracker, "migration", Start::Clean).unwrap();
    let (memory, notifier) = (Memory::new(), Notifier::new());
    let (mut copy, mut copies) = (Copy::new(), Vec::new());
    let take = |copy: &mut Copy| {
        let open = notifier.open(pages(0, 1)).unwrap();
        let harvest = epoch.harvest(pages(0, 1)).unwrap();
        let _touched = tracker.protect(pages(0, 1), &open).unwrap();
        drop(open);
        copy.read(&memory, &harvest);
        harvest.commit();
    };
    let vcpu = Arc::new(Vcpu::default());
    let _subscription = notifier.subscribe(vcpu.clone()).unwrap();
    let (turn, written) = (AtomicU64::new(0), AtomicU64::new(0));
    thread::scope(|scope| {
        scope.spawn(|| {
            for version in 1..=FAULTS {
                while turn.load(Ordering::SeqCst) < version {
                    thread::yield_now();
                }
                vcpu.write(&tracker, &memory, version);
                written.store(version, Ordering::SeqCst);
            }
        });
        for version in 1..=FAULTS {
            take(&mut copy);
            turn.store(version, Ordering::SeqCst);
            let mut takes = 0;
            while written.load(Ordering::SeqCst) < version {
                take(&mut copy);
                takes += 1;
                if takes % 256 == 0 {
                    thread::yield_now();
                }
            }
            take(&mut copy);
            copies.push((copy.0[0], version));
        }
    });
    let lost = copies.iter().filter(|(copied, written)| copied != written);
    assert_eq!(lost.count(), 0, "of {FAULTS} writes");
}
