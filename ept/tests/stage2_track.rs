//! Tracking by write faults, on every format: what the guest writes is recorded, and nothing else changes for it.

mod mmu;
mod tables;

use std::collections::BTreeSet;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{RwLock, mpsc};
use std::thread;

use ept::format::{
    ArmStage2, Entry, EptFeatures, EptLevels, GStage, GStageMode, HardwareFormat, Npt, Permissions,
};
use ept::stage2::{ChangeError, Stage2, WriteFault};
use ept::walk::{Action, Change, Place, Run, Visitor, Walk};
use ept::{Gpa, GpaRange, Hpa, Level};
use mmu::{Kind, Mmu, Touch};
use proptest::prelude::*;
use tables::{
    BASE, TABLES, WINDOW, attributes, done, for_all_formats, g_stage, open, pages,
    some_huge_leaves, words,
};

const READ_ONLY: Permissions = Permissions::READ;

/// A guest that writes to a page, and whoever handles its faults; what was recorded.
fn write<F: HardwareFormat>(
    stage2: &Stage2<'_, F>,
    mmu: &Mmu<'_>,
    page: u64,
    recorded: &mut BTreeSet<u64>,
) -> WriteFault {
    let mut fault = WriteFault::Writable;
    for _ in 0..2 {
        let (_, permissions) = mmu.translate(page << 12).expect("it is mapped");
        if permissions.allows(Permissions::WRITE) {
            mmu.touch(page << 12, Touch::Write);
            return fault;
        }
        let (flush, result) = stage2.write_fault(Gpa(page << 12), |range| {
            recorded.extend(range.first_page()..range.end_page());
        });
        fault = result.unwrap();
        flush.done();
    }
    assert_eq!(fault, WriteFault::Denied, "page {page:#x} faults for ever");
    fault
}

/// Read-only from `RO` on, 64 pages.
const RO: u64 = 1024;

fn records_what_is_written<F: HardwareFormat>(format: F, kind: Kind, base: u64, writes: &[u64]) {
    let memory = words(TABLES);
    let stage2 = Stage2::new(format, &memory, BASE).unwrap();
    let mmu = Mmu::new(kind, &memory, BASE.0);
    some_huge_leaves(&stage2, base);
    done(stage2.protect(pages(base + RO, 64), READ_ONLY, &open()));
    let translations = |mmu: &Mmu<'_>| -> Vec<_> {
        let all = base..base + WINDOW;
        all.map(|page| mmu.translate(page << 12)).collect()
    };
    let before = translations(&mmu);
    for round in 0..2 {
        done(stage2.track_writes(pages(base, WINDOW), &open()));
        let may_write = |entry: &Option<(u64, Permissions)>| {
            entry.is_some_and(|(_, permissions)| permissions.allows(Permissions::WRITE))
        };
        assert!(
            !translations(&mmu).iter().any(may_write),
            "nothing may be written"
        );
        let mut recorded = BTreeSet::new();
        let mut written = BTreeSet::new();
        for page in writes {
            let read_only = (RO..RO + 64).contains(page);
            let fault = write(&stage2, &mmu, base + page, &mut recorded);
            match fault {
                WriteFault::Denied => assert!(read_only),
                WriteFault::Released(_) => assert!(written.insert(base + page)),
                WriteFault::Writable => assert!(written.contains(&(base + page))),
                WriteFault::Absent => panic!("page {page:#x} is mapped"),
            }
        }
        assert_eq!(recorded, written, "round {round}");
    }
    done(stage2.untrack_writes(pages(base, WINDOW)));
    assert_eq!(translations(&mmu), before, "all is as it was");
    done(stage2.protect(pages(base, WINDOW), READ_ONLY, &open()));
    done(stage2.protect(pages(base, WINDOW), Permissions::ALL, &open()));
    done(stage2.collapse(pages(base, WINDOW), Level::MIB2, &open()));
    assert_eq!(stage2.lookup(base).0, Level::MIB2, "nothing of it is left");
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 30, ..ProptestConfig::default() })]

    /// S15: by write faults, on every format, as exactly as pages are.
    #[test]
    fn every_format_records_what_is_written(
        writes in proptest::collection::vec(prop_oneof![0..WINDOW, RO - 4..RO + 68], 0..40)
    ) {
        for_all_formats!(records_what_is_written, &writes);
    }
}

fn keeps_what_was_dirty<F: HardwareFormat>(format: F, kind: Kind, base: u64) {
    let memory = words(TABLES);
    let stage2 = Stage2::new(format, &memory, BASE).unwrap();
    let mmu = Mmu::new(kind, &memory, BASE.0);
    some_huge_leaves(&stage2, base);
    mmu.touch((base + 600) << 12, Touch::Write);
    done(stage2.track_writes(pages(base, WINDOW), &open()));
    let mut recorded = BTreeSet::new();
    write(&stage2, &mmu, base + 700, &mut recorded);
    let mut dirty = Vec::new();
    done(stage2.clean(pages(base, WINDOW), &open(), |range| dirty.push(range)));
    assert_eq!(dirty, [pages(base + 600, 1), pages(base + 700, 1)]);
}

/// S15, S16: both ways at once: withholding the right to write loses no dirty flag.
#[test]
fn write_tracking_loses_no_dirty_flag() {
    for_all_formats!(keeps_what_was_dirty);
}

fn keeps_to_its_range<F: HardwareFormat>(format: F, kind: Kind, base: u64) {
    let memory = words(TABLES);
    let stage2 = Stage2::new(format, &memory, BASE).unwrap();
    let mmu = Mmu::new(kind, &memory, BASE.0);
    some_huge_leaves(&stage2, base);
    let part = pages(base + 2000, 1000);
    let (flush, result) = stage2.track_writes(part, &open());
    result.unwrap();
    // A huge leaf across each edge; between them 48 pages, one huge leaf and 440 pages.
    assert_eq!(
        (flush.tally().splits, flush.tally().entries),
        (2, 48 + 1 + 440)
    );
    flush.done();
    let writable = |page: u64| {
        let (_, permissions) = mmu.translate(page << 12).unwrap();
        permissions.allows(Permissions::WRITE)
    };
    for page in base..base + WINDOW {
        assert_eq!(writable(page), !part.contains(Gpa(page << 12)), "{page:#x}");
    }
    let (flush, result) = stage2.untrack_writes(pages(base + 2500, 100));
    result.unwrap();
    assert_eq!(flush.tally().entries, 100);
    flush.done();
    assert!(!writable(base + 2499) && writable(base + 2500) && !writable(base + 2600));
}

#[test]
fn write_tracking_keeps_to_its_range() {
    for_all_formats!(keeps_to_its_range);
}

/// A page that is protected for good while its writes are tracked is denied, and stays tracked when it is not.
#[test]
fn protection_and_tracking_are_two_things() {
    let memory = words(TABLES);
    let stage2 = Stage2::new(Npt::FourLevels, &memory, BASE).unwrap();
    some_huge_leaves(&stage2, 0);
    let one = pages(600, 1);
    let fault = || {
        let (flush, result) = stage2.write_fault(one.start(), drop);
        flush.done();
        result.unwrap()
    };
    done(stage2.track_writes(one, &open()));
    done(stage2.protect(one, Permissions::READ.union(Permissions::WRITE), &open()));
    assert_eq!(fault(), WriteFault::Released(one), "still tracked");
    assert_eq!(fault(), WriteFault::Writable);
    done(stage2.track_writes(one, &open()));
    done(stage2.protect(one, READ_ONLY, &open()));
    assert_eq!(fault(), WriteFault::Denied);
    done(stage2.unmap(one, &open()));
    assert_eq!(fault(), WriteFault::Absent);
    let (flush, result) = stage2.write_fault(Gpa(1 << 60), |_| panic!("nothing is there"));
    flush.done();
    assert!(matches!(result, Err(ChangeError::Beyond { .. })));
    assert_eq!(stage2.figures().faults, 1);
}

/// S5: where no table is left a huge leaf is released whole, and recorded whole.
#[test]
fn a_fault_without_tables_releases_the_huge_leaf() {
    let memory = words(3);
    let stage2 = Stage2::new(Npt::FourLevels, &memory, BASE).unwrap();
    let large = attributes(Permissions::ALL, Level::MIB2);
    stage2.map(pages(0, 1024), ept::Hpa(0), large).unwrap();
    assert_eq!(stage2.available(), 0);
    done(stage2.track_writes(pages(0, 1024), &open()));
    let mut recorded = None;
    let (flush, result) = stage2.write_fault(Gpa(5 << 12), |range| recorded = Some(range));
    assert_eq!(result, Ok(WriteFault::Released(pages(0, 512))));
    assert_eq!((flush.tally().splits, recorded), (0, Some(pages(0, 512))));
    flush.done();
    let Entry::Leaf(leaf) = stage2.lookup(512).1 else {
        panic!("it was mapped")
    };
    assert!(leaf.write_tracked, "the leaf beside it is not released");
}

/// An EPT without accessed and dirty flags: what may be written counts as dirty, and faults tell what was.
#[test]
fn an_ept_without_flags_is_tracked_by_faults() {
    let memory = words(TABLES);
    let format = ept::format::Ept {
        levels: EptLevels::Four,
        features: EptFeatures::NONE,
    };
    let stage2 = Stage2::new(format, &memory, BASE).unwrap();
    let all = attributes(Permissions::ALL, Level::PAGE);
    stage2.map(pages(0, 8), ept::Hpa(0), all).unwrap();
    let dirty = || {
        let mut dirty = Vec::new();
        done(stage2.clean(pages(0, 8), &open(), |range| dirty.push(range)));
        dirty
    };
    assert_eq!(dirty(), [pages(0, 8)], "writable, so nobody knows");
    done(stage2.track_writes(pages(0, 8), &open()));
    assert_eq!(
        dirty(),
        [pages(0, 8)],
        "written before the right was taken, perhaps"
    );
    assert_eq!(dirty(), [], "known now");
    let (flush, result) = stage2.write_fault(Gpa(3 << 12), drop);
    flush.done();
    assert_eq!(result, Ok(WriteFault::Released(pages(3, 1))));
    assert_eq!(dirty(), [pages(3, 1)]);
}

/// Memory of a guest, and which of its pages a harvest has yet to take.
struct Guest {
    memory: Vec<AtomicU64>,
    recorded: Vec<AtomicBool>,
    /// What the embedder's notifier does: no vCPU runs while a range is open.
    gate: RwLock<()>,
    /// The vCPUs' work is over.
    ended: AtomicBool,
}

const GUEST_PAGES: u64 = 2048;
const HARVESTS: u64 = 150;

fn index(page: u64) -> usize {
    usize::try_from(page).unwrap()
}

impl Guest {
    fn new() -> Self {
        Self {
            memory: (0..GUEST_PAGES).map(|_| AtomicU64::new(0)).collect(),
            recorded: (0..GUEST_PAGES).map(|_| AtomicBool::new(true)).collect(),
            gate: RwLock::new(()),
            ended: AtomicBool::new(false),
        }
    }

    fn record(&self, range: GpaRange) {
        for page in range.first_page()..range.end_page() {
            self.recorded[index(page)].store(true, Ordering::SeqCst);
        }
    }

    /// One vCPU of two: writes ever new stamps to pages of its own, and handles its faults.
    fn run<F: HardwareFormat>(&self, stage2: &Stage2<'_, F>, mmu: &Mmu<'_>, vcpu: u64) {
        let mut stamp = 0;
        while !self.ended.load(Ordering::SeqCst) {
            stamp += 1;
            let page = stamp * 613 % (GUEST_PAGES / 2) * 2 + vcpu;
            while !self.try_write(mmu, page, stamp) {
                let (flush, result) = stage2.write_fault(Gpa(page << 12), |it| self.record(it));
                result.unwrap();
                flush.done();
            }
        }
    }

    /// Writes if the hardware lets it. On Arm a split that is not flushed yet looks as if nothing were mapped.
    fn try_write(&self, mmu: &Mmu<'_>, page: u64, stamp: u64) -> bool {
        let _running = self.gate.read().unwrap();
        let found = mmu.translate(page << 12);
        let may = found.is_some_and(|(_, granted)| granted.allows(Permissions::WRITE));
        if may {
            self.memory[index(page)].store(stamp, Ordering::SeqCst);
        }
        may
    }

    /// Takes what was recorded, and copies it after the vCPUs run again.
    fn harvest<F: HardwareFormat>(&self, stage2: &Stage2<'_, F>, copy: &mut [u64]) {
        let stopped = self.gate.write().unwrap();
        done(stage2.track_writes(pages(0, GUEST_PAGES), &open()));
        let taken: Vec<usize> = (0..copy.len())
            .filter(|page| self.recorded[*page].swap(false, Ordering::SeqCst))
            .collect();
        drop(stopped);
        for page in taken {
            copy[page] = self.memory[page].load(Ordering::SeqCst);
        }
    }
}

/// What a migration that harvests by faults has at the end is what the guest wrote last.
fn no_write_is_lost<F: HardwareFormat + Sync>(format: F, kind: Kind) {
    let words = words(64);
    let stage2 = Stage2::new(format, &words, BASE).unwrap();
    let large = attributes(Permissions::ALL, Level::MIB2);
    stage2
        .map(pages(0, GUEST_PAGES), ept::Hpa(0), large)
        .unwrap();
    let guest = Guest::new();
    let mut copy = vec![0; guest.memory.len()];
    thread::scope(|scope| {
        for vcpu in 0..2 {
            let (stage2, guest, words) = (&stage2, &guest, &words);
            scope.spawn(move || guest.run(stage2, &Mmu::new(kind, words, BASE.0), vcpu));
        }
        for _ in 0..HARVESTS {
            let faults = stage2.figures().faults;
            guest.harvest(&stage2, &mut copy);
            while stage2.figures().faults < faults + 200 {
                thread::yield_now();
            }
        }
        guest.ended.store(true, Ordering::SeqCst);
    });
    guest.harvest(&stage2, &mut copy);
    let memory = guest.memory.iter();
    let written: Vec<u64> = memory.map(|page| page.load(Ordering::SeqCst)).collect();
    assert_eq!(copy, written);
}

/// S7, S16: two vCPUs that fault at once in one huge leaf, against a harvest by faults.
#[test]
fn no_write_is_lost_between_faults_and_a_harvest() {
    no_write_is_lost(Npt::FourLevels, mmu::NPT4);
    no_write_is_lost(tables::arm(40), mmu::ARM40);
}

fn says_where_faults_may_be_cached<F: HardwareFormat>(format: F, _: Kind, base: u64) {
    let memory = words(TABLES);
    let stage2 = Stage2::new(format, &memory, BASE).unwrap();
    let all = attributes(Permissions::ALL, Level::PAGE);
    stage2.map(pages(base, 4), Hpa(0), all).unwrap();
    done(stage2.track_writes(pages(base, 2), &open()));
    let page = pages(base, 1);
    let expected = F::CACHES_FAULTS.then_some(page);
    for found in [WriteFault::Released(page), WriteFault::Writable] {
        let (flush, result) = stage2.write_fault(page.start(), |_| {});
        assert_eq!((result, flush.interval()), (Ok(found), expected));
        flush.done();
    }
    done(stage2.protect(pages(base + 3, 1), Permissions::READ, &open()));
    let (flush, result) = stage2.write_fault(pages(base + 3, 1).start(), |_| {});
    assert_eq!((result, flush.interval()), (Ok(WriteFault::Denied), None));
    flush.done();
}

/// S14: on Arm and RISC-V a vCPU may go on faulting by what it has cached, whoever was first to release the page.
#[test]
fn a_cached_fault_is_to_be_flushed() {
    for_all_formats!(says_where_faults_may_be_cached);
    const { assert!(<ArmStage2 as HardwareFormat>::CACHES_FAULTS) };
    const { assert!(<GStage as HardwareFormat>::CACHES_FAULTS) };
}

/// S15, S16: whoever withholds the right to write again does it before the fault or after its record.
#[test]
fn a_fault_is_recorded_before_the_next_harvest() {
    let memory = words(TABLES);
    let stage2 = Stage2::new(Npt::FourLevels, &memory, BASE).unwrap();
    let all = attributes(Permissions::ALL, Level::PAGE);
    stage2.map(pages(0, 512), Hpa(0), all).unwrap();
    done(stage2.track_writes(pages(0, 512), &open()));
    let (tell, told) = mpsc::channel();
    let (go, gone) = mpsc::channel::<()>();
    let recorded = AtomicBool::new(false);
    thread::scope(|scope| {
        let (stage2, recorded) = (&stage2, &recorded);
        scope.spawn(move || {
            let (flush, result) = stage2.write_fault(Gpa(7 << 12), |_| {
                tell.send(()).unwrap();
                gone.recv().unwrap();
                recorded.store(true, Ordering::SeqCst);
            });
            result.unwrap();
            flush.done();
        });
        told.recv().unwrap();
        let harvest = scope.spawn(move || {
            done(stage2.track_writes(pages(0, 512), &open()));
            assert!(
                recorded.load(Ordering::SeqCst),
                "nobody would know of a write"
            );
        });
        // It waits; if it did not, it would be over before the record is made, now and then.
        thread::yield_now();
        go.send(()).unwrap();
        harvest.join().unwrap();
    });
}

/// A value that the format reserves is no leaf, and nothing makes a table of it.
#[test]
fn a_reserved_g_stage_leaf_becomes_no_table() {
    struct WriteOnly;
    impl<'t, 'm: 't, 'o> Visitor<'t, Stage2<'m, GStage>, Change<'o>> for WriteOnly {
        type Stop = ();
        fn entry(&mut self, place: &Place<'_, 't, Stage2<'m, GStage>, Change<'o>>) -> Action<()> {
            if let Entry::Leaf(_) = place.entry() {
                place.slot().fetch_and(!0b1010, Ordering::SeqCst);
            }
            Action::Continue
        }
        fn run(&mut self, _: &Run<'_, 't, Stage2<'m, GStage>, Change<'o>>) -> Action<()> {
            Action::Continue
        }
    }
    let memory = words(TABLES);
    let stage2 = Stage2::new(g_stage(GStageMode::Sv39x4), &memory, BASE).unwrap();
    let all = attributes(Permissions::ALL, Level::MIB2);
    stage2.map(pages(0, 512), Hpa(1 << 30), all).unwrap();
    let open = open();
    let walk = Walk::change(&stage2, pages(0, 512), &open).unwrap();
    walk.run(&mut WriteOnly);
    assert_eq!(stage2.lookup(3), (Level::MIB2, Entry::Absent));
    done(stage2.track_writes(pages(0, 512), &open));
    assert_eq!(stage2.lookup(3), (Level::MIB2, Entry::Absent));
}
