//! Who may change what when, and what waits for whom: turns, flushes, walks that read, break-before-make.

mod mmu;
mod tables;

use std::collections::BTreeMap;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Barrier, mpsc};
use std::thread;

use ept::apply::{Existing, apply_to_pfn_range};
use ept::format::{Entry, EptLevels, HardwareFormat, Npt, Permissions};
use ept::stage2::{ChangeError, MapError, Stage2, WriteFault};
use ept::walk::{Action, Look, Place, Run, Visitor, Walk};
use ept::{Gpa, GpaRange, Hpa, Level};
use mmu::{ARM34, ARM40, ARM48, Kind, Mmu};
use proptest::prelude::*;
use tables::{
    BASE, TABLES, WINDOW, arm, attributes, done, intel, open, pages, some_huge_leaves, words,
};

const READ_ONLY: Permissions = Permissions::READ;
const SMALL: Level = Level::PAGE;

fn mapped<'m>(words: &'m [AtomicU64], range: GpaRange, largest: Level) -> Stage2<'m, Npt> {
    let stage2 = Stage2::new(Npt::FourLevels, words, BASE).unwrap();
    let hpa = Hpa(range.start().0);
    let all = attributes(Permissions::ALL, largest);
    stage2.map(range, hpa, all).unwrap();
    stage2
}

fn permissions_of<F: HardwareFormat>(stage2: &Stage2<'_, F>, page: u64) -> Permissions {
    match stage2.lookup(page).1 {
        Entry::Leaf(leaf) => leaf.permissions,
        entry => panic!("page {page:#x} is {entry:?}"),
    }
}

/// S9: changes of one range come one after the other: whatever the threads do, each change is whole.
#[test]
fn overlapping_changes_are_ordered() {
    let memory = words(TABLES);
    let range = pages(100, 3000);
    let stage2 = mapped(&memory, range, SMALL);
    let kinds = [
        READ_ONLY,
        Permissions::READ.union(Permissions::WRITE),
        Permissions::READ.union(Permissions::EXECUTE),
        Permissions::ALL,
    ];
    for round in 0..100 {
        thread::scope(|scope| {
            for (number, kind) in (0..).zip(kinds) {
                let stage2 = &stage2;
                // All but one overlap in part only.
                let part = pages(100 + 10 * number, 3000 - 20 * number);
                scope.spawn(move || done(stage2.protect(part, kind, &open())));
            }
        });
        let core: Vec<_> = (130..3070)
            .map(|page| permissions_of(&stage2, page))
            .collect();
        assert!(
            core.windows(2).all(|pair| pair[0] == pair[1]),
            "round {round}: two changes are mixed"
        );
    }
}

/// S9: a change that takes long holds up nobody beside it, in the same leaf table.
#[test]
fn disjoint_changes_do_not_wait() {
    let memory = words(TABLES);
    let stage2 = mapped(&memory, pages(0, 512), SMALL);
    let mmu = Mmu::new(mmu::NPT4, &memory, BASE.0);
    mmu.touch(3 << 12, mmu::Touch::Write);
    let (tell, told) = mpsc::channel();
    let (go, gone) = mpsc::channel::<()>();
    thread::scope(|scope| {
        let stage2 = &stage2;
        let slow = scope.spawn(move || {
            let (flush, result) = stage2.clean(pages(0, 256), &open(), |_| {
                tell.send(()).unwrap();
                gone.recv().unwrap();
            });
            result.unwrap();
            flush.done();
        });
        told.recv().unwrap();
        // In the middle of the other's turn.
        done(stage2.protect(pages(256, 256), READ_ONLY, &open()));
        done(stage2.unmap(pages(300, 1), &open()));
        assert!(!slow.is_finished());
        go.send(()).unwrap();
    });
}

/// S14: what somebody else changed and did not flush yet may look as if there were nothing to flush.
#[test]
fn a_pending_flush_makes_the_next_one_whole() {
    let memory = words(TABLES);
    let stage2 = mapped(&memory, pages(0, 2048), SMALL);
    let open = open();
    let (first, result) = stage2.protect(pages(10, 5), READ_ONLY, &open);
    result.unwrap();
    assert_eq!(first.interval(), Some(pages(10, 5)));
    let (second, result) = stage2.protect(pages(0, 100), READ_ONLY, &open);
    result.unwrap();
    assert_eq!(second.interval(), Some(pages(0, 100)), "all of its range");
    let (third, result) = stage2.protect(pages(10, 5), READ_ONLY, &open);
    result.unwrap();
    assert_eq!(third.tally().entries, 0);
    assert_eq!(
        third.interval(),
        Some(pages(10, 5)),
        "though nothing changed"
    );
    let (beside, result) = stage2.protect(pages(1000, 5), READ_ONLY, &open);
    result.unwrap();
    assert_eq!(beside.interval(), Some(pages(1000, 5)), "nobody overlaps");
    for flush in [second, first, third, beside] {
        flush.done();
    }
    let (last, result) = stage2.protect(pages(10, 5), READ_ONLY, &open);
    result.unwrap();
    assert_eq!(last.interval(), None, "all was flushed");
    last.done();
}

/// Break-before-make: what was unmapped is mapped again only after hardware has forgotten it, on a format that wants
/// that.
#[test]
fn arm_maps_nothing_that_is_not_forgotten() {
    let memory = words(TABLES);
    let stage2 = Stage2::new(arm(40), &memory, BASE).unwrap();
    let all = attributes(Permissions::ALL, SMALL);
    stage2.map(pages(0, 512), Hpa(0), all).unwrap();
    let (flush, result) = stage2.unmap(pages(100, 10), &open());
    result.unwrap();
    let moved = Hpa(1 << 30);
    assert_eq!(
        stage2.map(pages(105, 1), moved, all),
        Err(MapError::Unforgotten)
    );
    assert_eq!(stage2.lookup(105).1, Entry::Absent);
    stage2.map(pages(512, 8), moved, all).unwrap();
    flush.done();
    stage2.map(pages(105, 1), moved, all).unwrap();

    let memory = words(TABLES);
    let stage2 = mapped(&memory, pages(0, 512), SMALL);
    let (flush, result) = stage2.unmap(pages(100, 10), &open());
    result.unwrap();
    stage2.map(pages(105, 1), moved, all).unwrap();
    flush.done();
}

/// S14: a program that forgets its flushes is told so, and is never kept waiting for ever.
#[test]
fn forgotten_flushes_are_an_error() {
    let memory = words(TABLES);
    let stage2 = mapped(&memory, pages(0, 512), SMALL);
    for page in 0..64 {
        let (flush, result) = stage2.protect(pages(page, 1), READ_ONLY, &open());
        result.unwrap();
        drop(flush);
    }
    let (flush, result) = stage2.protect(pages(100, 1), READ_ONLY, &open());
    assert_eq!(result, Err(ChangeError::Unflushed));
    flush.done();
    let hpa = Hpa(0);
    let refused = stage2.map(pages(600, 1), hpa, attributes(READ_ONLY, SMALL));
    assert_eq!(refused, Err(MapError::Unflushed));
    assert_eq!(permissions_of(&stage2, 100), Permissions::ALL);
}

/// S10, S14: a callback that panics leaves the range free for others, and its flush owed.
#[test]
fn a_panic_in_a_turn_ends_it() {
    let memory = words(TABLES);
    let stage2 = mapped(&memory, pages(0, 512), SMALL);
    Mmu::new(mmu::NPT4, &memory, BASE.0).touch(3 << 12, mmu::Touch::Write);
    let panicked = thread::scope(|scope| {
        let one = scope.spawn(|| {
            stage2
                .clean(pages(0, 16), &open(), |_| panic!("on purpose"))
                .1
        });
        one.join().is_err()
    });
    assert!(panicked);
    let (flush, result) = stage2.protect(pages(8, 2), Permissions::ALL, &open());
    result.unwrap();
    assert_eq!(flush.interval(), Some(pages(8, 2)), "as a whole");
    flush.done();
}

/// Unmaps what it is being shown, and looks what has become of the table.
struct Pull<'t, 'm> {
    stage2: &'t Stage2<'m, Npt>,
    shown: u64,
}

impl<'t, 'm> Visitor<'t, Stage2<'m, Npt>, Look> for Pull<'t, 'm>
where
    'm: 't,
{
    type Stop = ();

    fn entry(&mut self, _: &Place<'_, 't, Stage2<'m, Npt>, Look>) -> Action<()> {
        Action::Continue
    }

    fn run(&mut self, run: &Run<'_, 't, Stage2<'m, Npt>, Look>) -> Action<()> {
        let before = self.stage2.available();
        done(self.stage2.unmap(run.span(), &open()));
        assert_eq!(self.stage2.available(), before, "it is being read");
        // Another map must take other tables.
        let all = attributes(Permissions::ALL, SMALL);
        let elsewhere = pages(run.span().first_page() + (1 << 20), 512);
        self.stage2.map(elsewhere, Hpa(0xdead_0000), all).unwrap();
        let (first, page) = (run.peek(0), run.span().first_page());
        assert_eq!(first & 0x000f_ffff_ffff_f000, page << 12, "as it was");
        self.shown += 1;
        Action::Continue
    }
}

/// S8: no table is used again while a walker may still read it; and it is, after that.
#[test]
fn no_table_is_reused_under_a_walk() {
    let memory = words(TABLES);
    let stage2 = mapped(&memory, pages(0, 2048), SMALL);
    let free = stage2.available();
    let mut pull = Pull {
        stage2: &stage2,
        shown: 0,
    };
    Walk::look(&stage2, pages(0, 2048)).run(&mut pull);
    assert_eq!(pull.shown, 4);
    // Four leaf tables and one above them are in use elsewhere now; those of the walk have come back.
    assert_eq!(stage2.available(), free + 4 - 5);
    done(stage2.unmap(pages(1 << 20, 2048), &open()));
    done(stage2.unmap(tables::span(&stage2), &open()));
    assert_eq!(stage2.available(), TABLES - 1);
}

/// S8: readers meet only what was mapped at their page, while tables go from one range to another all the time.
#[test]
fn readers_never_see_another_ranges_entries() {
    // So few tables that each is used again at once.
    let memory = words(8);
    let stage2 = Stage2::new(Npt::FourLevels, &memory, BASE).unwrap();
    let ended = AtomicBool::new(false);
    let hpa_of = |page: u64, turn: u64| Hpa((page << 12) + (turn % 2) * (1 << 40));
    thread::scope(|scope| {
        for number in 0..2 {
            let (stage2, ended) = (&stage2, &ended);
            scope.spawn(move || {
                let mut page = number;
                let mut seen = 0_u64;
                while !ended.load(Ordering::Relaxed) {
                    page = (page + 331) % 2048;
                    if let (SMALL, Entry::Leaf(leaf)) = stage2.lookup(page) {
                        let Hpa(hpa) = leaf.hpa;
                        assert_eq!(hpa & !(1 << 40), page << 12, "page {page:#x}");
                        seen += 1;
                    }
                }
                seen
            });
        }
        for turn in 0..6000 {
            let range = pages(turn * 512 % 2048, 512);
            let all = attributes(Permissions::ALL, SMALL);
            // Readers may still hold the tables: then it is tried again.
            loop {
                match stage2.map(range, hpa_of(range.first_page(), turn), all) {
                    Ok(()) => break,
                    Err(MapError::Exhausted(_)) => {
                        done(stage2.unmap(range, &open()));
                        thread::yield_now();
                    }
                    Err(error) => panic!("{error}"),
                }
            }
            done(stage2.unmap(range, &open()));
        }
        ended.store(true, Ordering::Relaxed);
    });
}

/// S21: splits, collapses, and for how long a range was held, by a clock that is the caller's.
#[test]
fn figures_are_kept() {
    static TICKS: AtomicU64 = AtomicU64::new(0);
    let memory = words(TABLES);
    let stage2 = Stage2::new(intel(EptLevels::Four), &memory, BASE).unwrap();
    let stage2 = stage2.with_clock(|| TICKS.load(Ordering::Relaxed));
    some_huge_leaves(&stage2, 0);
    assert_eq!(stage2.figures().splits, 1);
    assert_eq!(stage2.figures().longest_turn_ns, 0);
    mmu::Mmu::new(mmu::EPT4, &memory, BASE.0).touch(0, mmu::Touch::Write);
    let (flush, result) = stage2.clean(pages(0, 16), &open(), |_| {
        TICKS.fetch_add(700, Ordering::Relaxed);
    });
    result.unwrap();
    flush.done();
    assert_eq!(stage2.figures().longest_turn_ns, 700);
    done(stage2.collapse(pages(0, WINDOW), Level::MIB2, &open()));
    assert_eq!(stage2.figures().collapses, 1);
}

/// The entries that Arm's hardware can find, by the address of each: (level, raw value).
fn live(memory: &[AtomicU64], kind: Kind) -> BTreeMap<usize, (u32, u64)> {
    let mut found = BTreeMap::new();
    Mmu::new(kind, memory, BASE.0).for_each_entry(&mut |index, level, raw| {
        found.insert(index, (level, raw));
    });
    found
}

/// What a valid entry of Arm's is, for the rule: the kind, the output address, the memory attributes.
fn kind_of((level, raw): (u32, u64)) -> (bool, u64) {
    let table = level > 0 && raw & 2 != 0;
    let said = if table {
        0x0000_ffff_ffff_f000
    } else {
        0x0000_ffff_ffff_f03c
    };
    (table, raw & said)
}

/// No entry went from one valid state to another, but in its permissions and flags.
fn assert_broken_before_made(
    before: &BTreeMap<usize, (u32, u64)>,
    after: &BTreeMap<usize, (u32, u64)>,
) {
    for (index, old) in before {
        if let Some(new) = after.get(index)
            && old.1 & 1 != 0
            && new.1 & 1 != 0
        {
            assert_eq!(kind_of(*old), kind_of(*new), "{:#x} → {:#x}", old.1, new.1);
        }
    }
}

/// DDI 0487, D8.16.1: a block becomes a table, or a table a block, only by way of an entry that is not valid.
fn breaks_before_it_makes(bits: u32, kind: Kind, base: u64, choices: &[u8]) {
    let memory = words(TABLES);
    let stage2 = Stage2::new(arm(bits), &memory, BASE).unwrap();
    some_huge_leaves(&stage2, base);
    let mut before = live(&memory, kind);
    for choice in choices {
        let at = base + u64::from(choice >> 3) * 100;
        let range = pages(at, 700.min(base + WINDOW - at));
        let open = open();
        let (flush, result) = match choice % 6 {
            0 => stage2.split(range, SMALL, &open),
            1 => stage2.collapse(pages(base, WINDOW), Level::MIB2, &open),
            2 => stage2.protect(range, READ_ONLY, &open),
            3 => stage2.protect(range, Permissions::ALL, &open),
            4 => stage2.track_writes(range, &open),
            _ => stage2.untrack_writes(range),
        };
        result.unwrap();
        let broken = live(&memory, kind);
        assert_broken_before_made(&before, &broken);
        flush.done();
        let made = live(&memory, kind);
        assert_broken_before_made(&broken, &made);
        for page in (base..base + WINDOW).step_by(37) {
            let (level, entry) = stage2.lookup(page);
            let Entry::Leaf(leaf) = entry else {
                panic!("page {page:#x} is {entry:?}")
            };
            let found = Mmu::new(kind, &memory, BASE.0).translate(page << 12);
            let inside = (page % level.pages()) << 12;
            let expected = Some((leaf.hpa.0 + inside, leaf.permissions));
            assert_eq!(found, expected, "hardware finds page {page:#x} again");
        }
        before = made;
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 40, ..ProptestConfig::default() })]

    #[test]
    fn arm_breaks_before_it_makes(choices in proptest::collection::vec(any::<u8>(), 1..12)) {
        breaks_before_it_makes(34, ARM34, (1 << 18) - 2048, &choices);
        breaks_before_it_makes(40, ARM40, (1 << 28) - WINDOW, &choices);
        breaks_before_it_makes(48, ARM48, (1 << 27) - 2048, &choices);
    }
}

/// Between break and make hardware finds nothing, and the crate what it always found.
#[test]
fn a_broken_entry_is_whole_for_the_crate() {
    let memory = words(TABLES);
    let stage2 = Stage2::new(arm(40), &memory, BASE).unwrap();
    let mmu = Mmu::new(ARM40, &memory, BASE.0);
    let large = attributes(Permissions::ALL, Level::MIB2);
    stage2.map(pages(0, 1024), Hpa(0x4000_0000), large).unwrap();
    let open = open();
    let (flush, result) = stage2.protect(pages(3, 1), READ_ONLY, &open);
    result.unwrap();
    assert_eq!(mmu.translate(5 << 12), None, "broken");
    assert!(
        mmu.translate(512 << 12).is_some(),
        "the leaf beside it is not"
    );
    assert_eq!(permissions_of(&stage2, 3), READ_ONLY);
    assert_eq!(permissions_of(&stage2, 5), Permissions::ALL);
    // A second change below it, whose flush is done first, leaves it to the first to make it.
    let (second, result) = stage2.protect(pages(7, 1), READ_ONLY, &open);
    result.unwrap();
    second.done();
    assert_eq!(mmu.translate(5 << 12), None, "not flushed yet");
    flush.done();
    assert_eq!(
        mmu.translate(5 << 12),
        Some((0x4000_5000, Permissions::ALL))
    );
    assert_eq!(mmu.translate(7 << 12), Some((0x4000_7000, READ_ONLY)));
}

/// Each change makes what it broke itself: what lies between may wait for another flush.
#[test]
fn an_entry_is_made_by_who_broke_it() {
    let memory = words(TABLES);
    let stage2 = Stage2::new(arm(40), &memory, BASE).unwrap();
    let mmu = Mmu::new(ARM40, &memory, BASE.0);
    let large = attributes(Permissions::ALL, Level::MIB2);
    stage2.map(pages(0, 1536), Hpa(0), large).unwrap();
    let is_there = |page: u64| mmu.translate(page << 12).is_some();
    let open = open();
    let (first, result) = stage2.split(pages(512, 512), SMALL, &open);
    result.unwrap();
    let (second, result) = stage2.split(pages(0, 1536), SMALL, &open);
    result.unwrap();
    assert_eq!(second.tally().splits, 2);
    second.done();
    let made = [0, 512, 1024].map(is_there);
    assert_eq!(
        made,
        [true, false, true],
        "the one in the middle is the first's"
    );
    // Collapsed again before that is done: now it is the third's.
    let (third, result) = stage2.collapse(pages(512, 512), Level::MIB2, &open);
    result.unwrap();
    first.done();
    assert!(!is_there(512), "what replaced it is not flushed yet");
    third.done();
    assert!(is_there(512));
}

/// S9: a crowd that waits for one range is larger than the list of changes: nobody is refused, and who changes another
/// range is not held up.
#[test]
fn a_crowd_that_waits_holds_up_nobody_elsewhere() {
    const CROWD: u64 = 100;
    let memory = words(TABLES);
    let stage2 = mapped(&memory, pages(0, 512), SMALL);
    done(stage2.track_writes(pages(0, 512), &open()));
    let (tell, told) = mpsc::channel();
    let (go, gone) = mpsc::channel::<()>();
    let arrived = AtomicU64::new(0);
    thread::scope(|scope| {
        let (stage2, arrived) = (&stage2, &arrived);
        scope.spawn(move || {
            let mut met = false;
            let (flush, result) =
                apply_to_pfn_range(stage2, pages(0, 512), &open(), Existing::Refuse, |_, _| {
                    if !std::mem::replace(&mut met, true) {
                        tell.send(()).unwrap();
                        gone.recv().unwrap();
                    }
                    Ok::<(), ()>(())
                });
            result.unwrap();
            flush.done();
        });
        told.recv().unwrap();
        let crowd: Vec<_> = (0..CROWD)
            .map(|page| {
                scope.spawn(move || {
                    arrived.fetch_add(1, Ordering::SeqCst);
                    let (flush, result) = stage2.write_fault(Gpa(page << 12), |_| {});
                    flush.done();
                    result
                })
            })
            .collect();
        while arrived.load(Ordering::SeqCst) < CROWD {
            thread::yield_now();
        }
        for page in 1024..1124 {
            let all = attributes(Permissions::ALL, SMALL);
            stage2.map(pages(page, 1), Hpa(0), all).unwrap();
        }
        assert!(crowd.iter().all(|one| !one.is_finished()));
        go.send(()).unwrap();
        for (page, one) in (0..).zip(crowd) {
            let released = WriteFault::Released(pages(page, 1));
            assert_eq!(one.join().unwrap(), Ok(released));
        }
    });
}

/// S14, S16: who harvests one part of a huge leaf takes its flag for all of it; who harvests another part before that
/// is flushed has to flush as well.
#[test]
fn parts_of_one_huge_leaf_are_flushed_by_each() {
    let memory = words(TABLES);
    let stage2 = mapped(&memory, pages(0, 512), Level::MIB2);
    let mmu = Mmu::new(mmu::NPT4, &memory, BASE.0);
    mmu.touch(300 << 12, mmu::Touch::Write);
    let mut recorded = Vec::new();
    let (first, result) = stage2.clean(pages(0, 1), &open(), |range| recorded.push(range));
    result.unwrap();
    assert_eq!(recorded, [pages(0, 512)]);
    assert_eq!(first.interval(), Some(pages(0, 512)));
    let (second, result) = stage2.clean(pages(300, 1), &open(), |_| panic!("it is clean"));
    result.unwrap();
    assert_eq!(second.interval(), Some(pages(0, 512)));
    first.done();
    second.done();
}

/// S16: a closure that panics has everything that was cleaned.
#[test]
fn a_panic_leaves_nothing_cleaned_unrecorded() {
    let written = [3, 10, 11, 20, 30];
    for after in 1..=4 {
        let memory = words(TABLES);
        let stage2 = mapped(&memory, pages(0, 512), SMALL);
        let mmu = Mmu::new(mmu::NPT4, &memory, BASE.0);
        for page in written {
            mmu.touch(page << 12, mmu::Touch::Write);
        }
        let mut recorded = Vec::new();
        let panicked = catch_unwind(AssertUnwindSafe(|| {
            let (flush, _) = stage2.clean(pages(0, 512), &open(), |run: GpaRange| {
                recorded.extend(run.first_page()..run.end_page());
                assert!(recorded.len() < after, "no more");
            });
            flush.done();
        }));
        assert!(panicked.is_err());
        done(stage2.clean(pages(0, 512), &open(), |run| {
            recorded.extend(run.first_page()..run.end_page());
        }));
        assert_eq!(recorded, written);
    }
}

/// S21: whoever loses a race to split a leaf has split none.
#[test]
fn a_split_is_counted_once() {
    for _ in 0..500 {
        let memory = words(8);
        let stage2 = mapped(&memory, pages(0, 512), Level::MIB2);
        let barrier = Barrier::new(2);
        thread::scope(|scope| {
            for half in [0, 256] {
                let (stage2, barrier) = (&stage2, &barrier);
                scope.spawn(move || {
                    let open = open();
                    barrier.wait();
                    done(stage2.protect(pages(half, 3), READ_ONLY, &open));
                });
            }
        });
        assert_eq!(stage2.figures().splits, 1);
    }
}

/// A clock is the embedder's, and may panic: nobody waits for a change that never began.
#[test]
fn a_clock_that_panics_ends_its_change_alone() {
    static BROKEN: AtomicBool = AtomicBool::new(true);
    let memory = words(TABLES);
    let stage2 = mapped(&memory, pages(0, 512), SMALL);
    let (flush, result) = stage2.protect(pages(0, 1), READ_ONLY, &open());
    result.unwrap();
    let splits = stage2.figures().splits;
    drop(flush);
    let stage2 = stage2.with_clock(|| {
        assert!(!BROKEN.load(Ordering::SeqCst), "no time");
        0
    });
    assert_eq!(stage2.figures().splits, splits);
    let panicked = catch_unwind(AssertUnwindSafe(|| {
        let (flush, _) = stage2.protect(pages(10, 1), READ_ONLY, &open());
        flush.done();
    }));
    assert!(panicked.is_err());
    BROKEN.store(false, Ordering::SeqCst);
    let (flush, result) = stage2.protect(pages(0, 20), READ_ONLY, &open());
    result.unwrap();
    // Nor does a table forget, with a clock, what was not flushed before it had one.
    assert_eq!(flush.interval(), Some(pages(0, 20)));
    flush.done();
    let (flush, result) = stage2.protect(pages(0, 1), READ_ONLY, &open());
    result.unwrap();
    assert_eq!(flush.interval(), Some(pages(0, 1)), "as before it had one");
    flush.done();
}
