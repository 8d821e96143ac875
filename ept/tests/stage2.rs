//! One suite over all hardware formats: random operations on a [`Stage2`] and on a model of pages, read back
//! by a walker of the raw words that knows the manuals and nothing of the crate.

mod mmu;
mod model;
mod tables;

use ept::format::{Entry, EptLevels, GStageMode, HardwareFormat, Npt, Permissions, Unsupported};
use ept::stage2::{ChangeError, MapError, PoolError, Stage2};
use ept::walk::{Action, Look, Outcome, Place, Run, Visitor, Walk};
use ept::{Gpa, GpaRange, Hpa, Level, Notifier};
use mmu::{Kind, Mmu, Touch};
use model::Pages;
use proptest::prelude::*;
use tables::{
    BASE, TABLES, WINDOW, attributes, done, for_all_formats, g_stage, intel, open, pages,
    some_huge_leaves, span, words,
};

/// How one page is mapped.
#[derive(Clone, Copy, Debug, PartialEq)]
struct Mapped {
    /// Its host-physical less its guest-physical address, modulo 2⁶⁴: the same for all pages of a leaf.
    distance: u64,
    permissions: Permissions,
}

impl Mapped {
    fn new(page: u64, hpa: u64, permissions: Permissions) -> Self {
        let distance = hpa.wrapping_sub(page << 12);
        Self {
            distance,
            permissions,
        }
    }
}

type Model = Pages<Mapped>;

#[derive(Clone, Debug)]
enum Op {
    Map(GpaRange, u64, Permissions, Level),
    Unmap(GpaRange),
    Protect(GpaRange, Permissions),
    Split(GpaRange, Level),
    Collapse(GpaRange, Level),
}

/// Ranges near `base`, many of them whole spans of 2 MiB.
fn range(base: u64) -> impl Strategy<Value = GpaRange> {
    prop_oneof![
        (0..WINDOW, 1..700_u64)
            .prop_map(move |(at, count)| pages(base + at, count.min(WINDOW - at))),
        (0..8_u64, 1..4_u64).prop_map(move |(at, count)| {
            pages(base + at * 512, (count * 512).min(WINDOW - at * 512))
        }),
    ]
}

fn permissions() -> impl Strategy<Value = Permissions> {
    prop_oneof![
        Just(Permissions::READ),
        Just(Permissions::READ.union(Permissions::WRITE)),
        Just(Permissions::READ.union(Permissions::EXECUTE)),
        Just(Permissions::ALL),
    ]
}

fn level() -> impl Strategy<Value = Level> {
    prop_oneof![Just(Level::PAGE), Just(Level::MIB2), Just(Level::GIB)]
}

fn op(base: u64) -> impl Strategy<Value = Op> {
    prop_oneof![
        3 => (range(base), 0..4_u64, permissions(), level())
            .prop_map(|(range, shift, permissions, level)| Op::Map(range, shift, permissions, level)),
        2 => range(base).prop_map(Op::Unmap),
        2 => (range(base), permissions()).prop_map(|(range, permissions)| Op::Protect(range, permissions)),
        1 => (range(base), level()).prop_map(|(range, level)| Op::Split(range, level)),
        1 => (range(base), level()).prop_map(|(range, level)| Op::Collapse(range, level)),
    ]
}

/// Where a map leads to: at times the same distance for all, so that huge leaves fit and collapse.
fn hpa_of(range: GpaRange, shift: u64) -> Hpa {
    Hpa((range.first_page() << 12) % (1 << 40) + (shift / 2) * 0x1000)
}

/// Does `op` to both; they agree on how it ends.
fn apply<F: HardwareFormat>(stage2: &Stage2<'_, F>, model: &mut Model, op: &Op) {
    let open = open();
    match *op {
        Op::Map(range, shift, permissions, level) => {
            let hpa = hpa_of(range, shift);
            let taken = model.first(range);
            let expected = match taken {
                None => Ok(()),
                Some(page) => Err(MapError::Occupied {
                    at: Gpa(page << 12),
                }),
            };
            assert_eq!(
                stage2.map(range, hpa, attributes(permissions, level)),
                expected
            );
            let mapped = range.first_page()..taken.unwrap_or(range.end_page());
            let value = Mapped::new(range.first_page(), hpa.0, permissions);
            model.set(mapped, value);
        }
        Op::Unmap(range) => {
            done(stage2.unmap(range, &open));
            model.clear(range);
        }
        Op::Protect(range, permissions) => {
            done(stage2.protect(range, permissions, &open));
            model.update(range, |page| {
                page.map(|page| Mapped {
                    permissions,
                    ..page
                })
            });
        }
        Op::Split(range, level) => done(stage2.split(range, level, &open)),
        Op::Collapse(range, level) => done(stage2.collapse(range, level, &open)),
    }
}

/// Every page of the window is what the model says, for the crate and for the raw words' own reader.
fn assert_same<F: HardwareFormat>(stage2: &Stage2<'_, F>, mmu: &Mmu<'_>, model: &Model, base: u64) {
    for page in base..base + WINDOW {
        let expected = model.get(page);
        let (level, entry) = stage2.lookup(page);
        let inside = (page % level.pages()) << 12;
        let found = match entry {
            Entry::Leaf(leaf) => Some(Mapped::new(page, leaf.hpa.0 + inside, leaf.permissions)),
            _ => None,
        };
        assert_eq!(found, expected, "page {page:#x} as the crate reads it");
        let found = mmu
            .translate(page << 12)
            .map(|(hpa, permissions)| Mapped::new(page, hpa, permissions));
        assert_eq!(found, expected, "page {page:#x} as hardware reads it");
    }
}

fn agrees<F: HardwareFormat>(format: F, kind: mmu::Kind, base: u64, ops: &[Op]) {
    let words = words(TABLES);
    let stage2 = Stage2::new(format, &words, BASE).unwrap();
    let mmu = Mmu::new(kind, &words, BASE.0);
    let all = stage2.available();
    let mut model = Model::new();
    for op in ops {
        apply(&stage2, &mut model, op);
    }
    assert_same(&stage2, &mmu, &model, base);
    let open = open();
    done(stage2.unmap(span(&stage2), &open));
    assert_eq!(stage2.available(), all, "every table has come back");
}

/// Operations are drawn for base 0 and moved to each format's window.
fn moved(op: &Op, by: u64) -> Op {
    let moved = |range: GpaRange| pages(range.first_page() + by, range.pages());
    match *op {
        Op::Map(range, shift, permissions, level) => {
            Op::Map(moved(range), shift, permissions, level)
        }
        Op::Unmap(range) => Op::Unmap(moved(range)),
        Op::Protect(range, permissions) => Op::Protect(moved(range), permissions),
        Op::Split(range, level) => Op::Split(moved(range), level),
        Op::Collapse(range, level) => Op::Collapse(moved(range), level),
    }
}

fn agrees_moved<F: HardwareFormat>(format: F, kind: mmu::Kind, base: u64, ops: &[Op]) {
    let ops: Vec<Op> = ops.iter().map(|op| moved(op, base)).collect();
    agrees(format, kind, base, &ops);
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 40, ..ProptestConfig::default() })]

    /// S1 to S7: whatever is done, every page is what a list of pages says, and no table is lost.
    #[test]
    fn every_format_agrees_with_a_list_of_pages(
        ops in proptest::collection::vec(op(0), 1..40)
    ) {
        for_all_formats!(agrees_moved, &ops);
    }
}

fn dirty_flags_are_harvested_once<F: HardwareFormat>(format: F, kind: mmu::Kind, base: u64) {
    let words = words(TABLES);
    let stage2 = Stage2::new(format, &words, BASE).unwrap();
    let mmu = Mmu::new(kind, &words, BASE.0);
    some_huge_leaves(&stage2, base);
    let all = pages(base, WINDOW);
    for page in [base + 3, base + 512, base + 513, base + 1023, base + 2049] {
        mmu.touch(page << 12, Touch::Write);
    }
    mmu.touch((base + 700) << 12, Touch::Read);

    let mut recorded = Vec::new();
    let (flush, result) = stage2.clean(all, &open(), |run| recorded.push(run));
    result.unwrap();
    // Two huge leaves, and three pages.
    assert_eq!(flush.tally().entries, 5);
    let first = pages(base, 514);
    assert_eq!(
        recorded,
        [first, pages(base + 1023, 1), pages(base + 2048, 512)]
    );
    assert_eq!(flush.interval(), Some(pages(base, 2560)));
    flush.done();

    let mut again = 0;
    done(stage2.clean(all, &open(), |_| again += 1));
    assert_eq!(again, 0, "what is clean is not recorded again");
    let mut used = Vec::new();
    done(stage2.age(all, &open(), |run| used.push(run)));
    assert_eq!(
        used,
        [
            first,
            pages(base + 700, 1),
            pages(base + 1023, 1),
            pages(base + 2048, 512)
        ]
    );
}

/// S15, S16, S19: clean-and-record and ageing, by leaves, on every format.
#[test]
fn flags_that_hardware_sets_are_harvested_once() {
    for_all_formats!(dirty_flags_are_harvested_once);
}

fn a_split_keeps_flags<F: HardwareFormat>(format: F, kind: mmu::Kind, base: u64) {
    let words = words(TABLES);
    let stage2 = Stage2::new(format, &words, BASE).unwrap();
    let mmu = Mmu::new(kind, &words, BASE.0);
    some_huge_leaves(&stage2, base);
    mmu.touch(base << 12, Touch::Write);
    done(stage2.split(pages(base, 1), Level::PAGE, &open()));
    let mut recorded = Vec::new();
    done(stage2.clean(pages(base, WINDOW), &open(), |run| recorded.push(run)));
    assert_eq!(recorded, [pages(base, 512)], "every part is dirty");

    mmu.touch((base + 77) << 12, Touch::Write);
    done(stage2.collapse(pages(base, WINDOW), Level::MIB2, &open()));
    let (level, _) = stage2.lookup(base + 77);
    assert_eq!(level, Level::MIB2);
    recorded.clear();
    done(stage2.clean(pages(base, WINDOW), &open(), |run| recorded.push(run)));
    assert_eq!(recorded, [pages(base, 512)], "the whole leaf is dirty");
}

/// S5, S6: a dirty leaf makes all its parts dirty, and a dirty part its whole.
#[test]
fn splits_and_collapses_lose_no_dirty_flag() {
    for_all_formats!(a_split_keeps_flags);
}

fn a_protected_page_stays_dirty<F: HardwareFormat>(format: F, kind: mmu::Kind, base: u64) {
    let words = words(TABLES);
    let stage2 = Stage2::new(format, &words, BASE).unwrap();
    let mmu = Mmu::new(kind, &words, BASE.0);
    some_huge_leaves(&stage2, base);
    mmu.touch((base + 600) << 12, Touch::Write);
    let read_only = Permissions::READ.union(Permissions::EXECUTE);
    let (flush, result) = stage2.protect(pages(base + 512, 512), read_only, &open());
    result.unwrap();
    assert_eq!(flush.tally().entries, 512);
    flush.done();
    let mut recorded = Vec::new();
    done(stage2.clean(pages(base, WINDOW), &open(), |run| recorded.push(run)));
    assert_eq!(recorded, [pages(base + 600, 1)]);
    let again = stage2.protect(pages(base + 512, 512), read_only, &open());
    assert_eq!(
        again.0.tally().entries,
        0,
        "only what really changes counts"
    );
    done(again);
}

/// S15: write-protecting keeps what was dirty, also where hardware has no bit for it.
#[test]
fn write_protection_loses_no_dirty_flag() {
    for_all_formats!(a_protected_page_stays_dirty);
}

/// S2: on exhaustion it is said how far it got, and the table is whole.
#[test]
fn a_map_without_tables_says_how_far_it_got() {
    // The root and three tables: room for the first 2 MiB in pages, and no more.
    let words = words(4);
    let stage2 = Stage2::new(intel(EptLevels::Four), &words, BASE).unwrap();
    let small = attributes(Permissions::ALL, Level::PAGE);
    let error = stage2.map(pages(0, 1024), Hpa(0), small).unwrap_err();
    let MapError::Exhausted(exhausted) = error else {
        panic!("{error:?}")
    };
    assert_eq!(exhausted.reached, Gpa(512 << 12));
    assert!(matches!(stage2.lookup(511).1, Entry::Leaf(_)));
    assert_eq!(stage2.lookup(512).1, Entry::Absent);
    // A huge leaf needs none.
    let large = attributes(Permissions::ALL, Level::MIB2);
    stage2.map(pages(512, 512), Hpa(0x20_0000), large).unwrap();
}

/// S5: where there is no table to split with, the coarse entry stays, and the caller is told.
#[test]
fn a_split_without_tables_leaves_the_huge_leaf() {
    // The root and two more: none is left when 2 MiB are mapped.
    let words = words(3);
    let stage2 = Stage2::new(Npt::FourLevels, &words, BASE).unwrap();
    let large = attributes(Permissions::ALL, Level::MIB2);
    stage2.map(pages(0, 512), Hpa(0), large).unwrap();
    assert_eq!(stage2.available(), 0);
    for (flush, result) in [
        stage2.unmap(pages(5, 1), &open()),
        stage2.protect(pages(5, 1), Permissions::READ, &open()),
        stage2.split(pages(5, 1), Level::PAGE, &open()),
    ] {
        assert_eq!(
            result,
            Err(ChangeError::Exhausted {
                reached: Gpa(5 << 12)
            })
        );
        assert_eq!((flush.tally().entries, flush.tally().splits), (0, 0));
        flush.done();
    }
    assert_eq!(stage2.lookup(5).0, Level::MIB2);
}

/// S2: what `worst_case` says is enough.
#[test]
fn the_worst_case_is_enough() {
    for (first, count) in [(0, 1), (511, 2), ((1 << 18) - 1, 2), (7, 5000)] {
        let range = pages(first, count);
        let probe = words(1);
        let needed = Stage2::new(intel(EptLevels::Four), &probe, BASE)
            .unwrap()
            .worst_case(range);
        let words = words(1 + needed);
        let stage2 = Stage2::new(intel(EptLevels::Four), &words, BASE).unwrap();
        let small = attributes(Permissions::ALL, Level::PAGE);
        stage2.map(range, Hpa(0), small).unwrap();
        assert_eq!(stage2.available(), 0, "and not too much");
    }
}

/// S2: what was reserved is there, however many tables others take meanwhile.
#[test]
fn a_reservation_is_kept() {
    let memory = words(32);
    let stage2 = Stage2::new(Npt::FourLevels, &memory, BASE).unwrap();
    let small = attributes(Permissions::ALL, Level::PAGE);
    let range = pages(700, 2000);
    stage2
        .map(
            pages(1536, 512),
            Hpa(0x4000_0000),
            attributes(Permissions::READ, Level::MIB2),
        )
        .unwrap();
    stage2.reserve(range).unwrap();
    assert_eq!(
        stage2.lookup(700).1,
        Entry::Absent,
        "nothing is mapped by it"
    );
    assert_eq!(stage2.lookup(1536).0, Level::MIB2, "what is mapped stays");
    // Others take all that is left.
    let rest = pages(1 << 20, 1 << 18);
    let error = stage2.reserve(rest).unwrap_err();
    let MapError::Exhausted(exhausted) = error else {
        panic!("{error}")
    };
    assert_eq!(stage2.available(), 0);
    assert_eq!(exhausted.reached.page() % 512, 0);
    stage2.map(pages(700, 836), Hpa(0), small).unwrap();
    stage2.map(pages(2048, 652), Hpa(0), small).unwrap();
    done(stage2.unmap(span(&stage2), &open()));
    assert_eq!(stage2.available(), 31);
}

/// S14: detached tables come back only when the flush is done; forgotten ones never do.
#[test]
fn tables_wait_for_the_flush() {
    let words = words(16);
    let stage2 = Stage2::new(intel(EptLevels::Four), &words, BASE).unwrap();
    let small = attributes(Permissions::ALL, Level::PAGE);
    stage2.map(pages(0, 1024), Hpa(0), small).unwrap();
    let before = stage2.available();
    let (flush, result) = stage2.unmap(pages(0, 512), &open());
    result.unwrap();
    assert_eq!((flush.tables(), stage2.available()), (1, before));
    flush.done();
    assert_eq!(stage2.available(), before + 1);
    let (flush, result) = stage2.unmap(pages(512, 512), &open());
    result.unwrap();
    drop(flush);
    assert_eq!(
        stage2.available(),
        before + 1,
        "never flushed, never used again"
    );
}

#[test]
fn ranges_and_memory_that_cannot_be_are_refused() {
    let memory = words(8);
    let misaligned = Stage2::new(g_stage(GStageMode::Sv39x4), &memory, Hpa(0x1000));
    assert!(matches!(misaligned, Err(PoolError::Misaligned(0x4000))));
    let small = Stage2::new(g_stage(GStageMode::Sv39x4), &memory[..2047], BASE);
    assert!(matches!(small, Err(PoolError::TooSmall(2048))));

    let stage2 = Stage2::new(intel(EptLevels::Four), &memory, BASE).unwrap();
    let all = attributes(Permissions::ALL, Level::GIB);
    let beyond = pages((1 << 36) - 1, 2);
    let error = stage2.map(beyond, Hpa(0), all).unwrap_err();
    assert!(matches!(error, MapError::Beyond { .. }), "{error}");
    let (_, result) = stage2.unmap(beyond, &open());
    assert!(matches!(result, Err(ChangeError::Beyond { .. })));
    let last = Hpa((1 << 52) - 0x1000);
    let error = stage2.map(pages(0, 2), last, all).unwrap_err();
    let refused = MapError::Unsupported(Unsupported::Address(Hpa(1 << 52)));
    assert_eq!(error, refused);
    let narrow = Notifier::new().open(pages(0, 1)).unwrap();
    let (_, result) = stage2.unmap(pages(0, 2), &narrow);
    assert!(matches!(result, Err(ChangeError::NotOpen(_))));
}

#[test]
fn a_dump_folds_equal_neighbours() {
    let words = words(TABLES);
    let stage2 = Stage2::new(intel(EptLevels::Four), &words, BASE).unwrap();
    let large = attributes(Permissions::ALL, Level::MIB2);
    stage2.map(pages(0, 1536), Hpa(0x4000_0000), large).unwrap();
    done(stage2.protect(pages(514, 2), Permissions::READ, &open()));
    let dump = stage2.dump(GpaRange::ALL).to_string();
    let lines: Vec<&str> = dump.lines().collect();
    assert_eq!(lines.len(), 5, "{dump}");
    assert!(lines[0].contains("0x40000000 rwx -- WriteBack"), "{dump}");
    assert!(lines[2].contains("0x40202000 r-- -- WriteBack"), "{dump}");
}

/// Counts the leaf tables that it is shown, and stops at the first above its budget.
struct Budget {
    left: u32,
    tables: u64,
}

impl<'t, 'm> Visitor<'t, Stage2<'m, Npt>, Look> for Budget
where
    'm: 't,
{
    type Stop = ();

    fn entry(&mut self, _: &Place<'_, 't, Stage2<'m, Npt>, Look>) -> Action<()> {
        Action::Continue
    }

    fn run(&mut self, _: &Run<'_, 't, Stage2<'m, Npt>, Look>) -> Action<()> {
        if self.left == 0 {
            return Action::Stop(());
        }
        self.left -= 1;
        self.tables += 1;
        Action::Continue
    }
}

/// S8: a long walk stops where it likes and goes on from there, and each step gets further.
#[test]
fn a_long_walk_yields_and_goes_on() {
    let words = words(TABLES);
    let stage2 = Stage2::new(Npt::FourLevels, &words, BASE).unwrap();
    let small = attributes(Permissions::ALL, Level::PAGE);
    stage2.map(pages(100, 20 * 512), Hpa(0), small).unwrap();
    let mut budget = Budget { left: 0, tables: 0 };
    let (mut left, mut steps) = (Some(pages(0, 1 << 18)), 0);
    while let Some(range) = left {
        budget.left = 3;
        steps += 1;
        left = match Walk::look(&stage2, range).run(&mut budget) {
            Outcome::Completed => None,
            Outcome::Stopped { at, .. } | Outcome::Contended { at } => {
                assert!(at > range.start(), "it got further");
                range.from(at)
            }
        };
    }
    assert_eq!((budget.tables, steps), (21, 7), "each table once");
}

fn ages_without_cleaning<F: HardwareFormat>(format: F, kind: Kind, base: u64) {
    let memory = words(TABLES);
    let stage2 = Stage2::new(format, &memory, BASE).unwrap();
    let mmu = Mmu::new(kind, &memory, BASE.0);
    some_huge_leaves(&stage2, base);
    // In 4 KiB detail, and in a huge leaf.
    let written = [pages(base + 600, 1), pages(base + 1024, 512)];
    for range in written {
        mmu.touch(range.start().0, Touch::Write);
    }
    let mut used = Vec::new();
    done(stage2.age(pages(base, WINDOW), &open(), |range| used.push(range)));
    assert_eq!(used, written);
    done(stage2.age(pages(base, WINDOW), &open(), |range| {
        panic!("{range} is old")
    }));
    let mut dirty = Vec::new();
    done(stage2.clean(pages(base, WINDOW), &open(), |range| dirty.push(range)));
    assert_eq!(dirty, written);
}

/// S19: ageing first loses no dirty state.
#[test]
fn ageing_cleans_nothing() {
    for_all_formats!(ages_without_cleaning);
}

fn collapses_inside_its_range<F: HardwareFormat>(format: F, _: Kind, base: u64) {
    let memory = words(TABLES);
    let stage2 = Stage2::new(format, &memory, BASE).unwrap();
    some_huge_leaves(&stage2, base);
    done(stage2.split(pages(base, WINDOW), Level::PAGE, &open()));
    // One table lies across each edge.
    done(stage2.collapse(pages(base + 300, 1024), Level::MIB2, &open()));
    let levels = [base, base + 512, base + 1024].map(|page| stage2.lookup(page).0);
    assert_eq!(levels, [Level::PAGE, Level::MIB2, Level::PAGE]);
}

/// S6: what lies across an edge of the range stays as it is: the slot beside may be another.
#[test]
fn nothing_collapses_across_an_edge() {
    for_all_formats!(collapses_inside_its_range);
}

/// Tables are where entries can point to.
#[test]
fn tables_lie_where_entries_reach() {
    let memory = words(4);
    let end = 1 << 52;
    let refused = Stage2::new(Npt::FourLevels, &memory, Hpa(end - 3 * 4096)).unwrap_err();
    assert!(matches!(refused, PoolError::Unreachable(52)), "{refused}");
    let stage2 = Stage2::new(Npt::FourLevels, &memory, Hpa(end - 4 * 4096)).unwrap();
    let all = attributes(Permissions::ALL, Level::PAGE);
    stage2.map(pages(7, 1), Hpa(0), all).unwrap();
    assert_eq!(stage2.lookup(7).0, Level::PAGE);
    let refused = Stage2::new(Npt::FourLevels, &memory, Hpa(u64::MAX - 4095)).unwrap_err();
    assert!(matches!(refused, PoolError::Unreachable(52)), "{refused}");
}
