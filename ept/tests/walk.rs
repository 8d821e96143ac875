//! The walker over a toy hardware format, against a model of pages (S1 to S4, S7).

mod common;

use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};

use common::model::Pages;
use common::{config, gpa, pages};
use ept::format::{Allocate, Entry, Format, OutOfTables, TableId, Tables};
use ept::walk::{
    AGAIN_LIMIT, Action, Change, EachEntry, Look, Outcome, Page, PageVisitor, Place, Run, Visitor,
    Walk,
};
use ept::{Geometry, Gpa, GpaRange, Level, Notifier, RangeError};
use proptest::prelude::*;

/// Entries with a permission byte: bit 7 says "leaf" above level 0 and nothing at level 0, where
/// every present entry is one (mistake 1).
struct Toy;

const PRESENT: u64 = 1;
const LEAF: u64 = 1 << 7;

impl Format for Toy {
    type Leaf = u64;

    fn decode(&self, raw: u64, level: Level) -> Entry<u64> {
        match raw {
            _ if raw & PRESENT == 0 => Entry::Absent,
            _ if level == Level::PAGE || raw & LEAF != 0 => Entry::Leaf(raw >> 8),
            _ => Entry::Table(TableId(raw >> 8)),
        }
    }

    fn encode(&self, entry: Entry<u64>, level: Level) -> u64 {
        match entry {
            Entry::Absent => 0,
            Entry::Table(TableId(table)) => table << 8 | PRESENT,
            Entry::Leaf(value) if level == Level::PAGE => value << 8 | PRESENT,
            Entry::Leaf(value) => value << 8 | LEAF | PRESENT,
        }
    }
}

/// Tables in a vector, the first of them the root; a root of 1024 entries (mistake 4).
struct Store {
    tables: Vec<Vec<AtomicU64>>,
    used: AtomicUsize,
    given_back: AtomicUsize,
}

const ROOT_ENTRIES: usize = 1024;

fn zeroed(entries: usize) -> Vec<AtomicU64> {
    (0..entries).map(|_| AtomicU64::new(0)).collect()
}

impl Store {
    fn new(spare: usize) -> Self {
        let mut tables = vec![zeroed(ROOT_ENTRIES)];
        tables.extend((0..spare).map(|_| zeroed(512)));
        Self {
            tables,
            used: AtomicUsize::new(1),
            given_back: AtomicUsize::new(0),
        }
    }

    fn table(&self, TableId(table): TableId) -> &[AtomicU64] {
        &self.tables[usize::try_from(table).unwrap()]
    }
}

impl Tables for Store {
    type Format = Toy;
    type Upper = [AtomicU64];
    type Leaf<'t> = &'t [AtomicU64];
    type Reading<'t> = ();

    fn reading(&self) {}

    fn format(&self) -> &Toy {
        &Toy
    }

    fn geometry(&self) -> Geometry {
        Geometry::new(Level::new(2).unwrap(), ROOT_ENTRIES).unwrap()
    }

    fn root(&self) -> &[AtomicU64] {
        &self.tables[0]
    }

    fn upper(&self, table: TableId) -> &[AtomicU64] {
        self.table(table)
    }

    fn leaf(&self, table: TableId) -> &[AtomicU64] {
        self.table(table)
    }

    fn peek(leaf: &[AtomicU64], index: usize) -> u64 {
        leaf[index].load(Ordering::Relaxed)
    }
}

impl Allocate for Store {
    fn grow(&self, level: Level, _: u64, entry: Entry<u64>) -> Result<TableId, OutOfTables> {
        let index = self.used.fetch_add(1, Ordering::Relaxed);
        let table = self.tables.get(index).ok_or(OutOfTables)?;
        for slot in table {
            slot.store(Toy.encode(entry, level), Ordering::Relaxed);
        }
        Ok(TableId(index as u64))
    }

    fn give_back(&self, _: Level, _: TableId) {
        self.given_back.fetch_add(1, Ordering::Relaxed);
    }
}

/// Writes a value to every page; a whole span where it can.
struct Write(u64);

impl<'t, 'o> Visitor<'t, Store, Change<'o>> for Write {
    type Stop = ();

    fn entry(&mut self, place: &Place<'_, 't, Store, Change<'o>>) -> Action<()> {
        if let Entry::Table(_) = place.entry() {
            return Action::Continue;
        }
        if place.part() == place.span() && place.level().number() == 1 {
            let new = Toy.encode(Entry::Leaf(self.0), place.level());
            let written = place.slot().compare_exchange(
                place.raw(),
                new,
                Ordering::SeqCst,
                Ordering::Relaxed,
            );
            return if written.is_ok() {
                Action::Skip
            } else {
                Action::Again
            };
        }
        match place.entry() {
            Entry::Leaf(_) => Action::Split,
            _ => Action::Descend,
        }
    }

    fn run(&mut self, run: &Run<'_, 't, Store, Change<'o>>) -> Action<()> {
        let base = run.span().first_page();
        for page in run.part().first_page()..run.part().end_page() {
            let index = usize::try_from(page - base).unwrap();
            run.table()[index].swap(
                Toy.encode(Entry::Leaf(self.0), Level::PAGE),
                Ordering::SeqCst,
            );
        }
        Action::Continue
    }
}

/// Reads every page; notes holes with their level.
#[derive(Default)]
struct Read {
    /// Values by page.
    found: Pages<u64>,
    holes: u64,
    wide: u64,
}

impl<'t> PageVisitor<'t, Store, Look> for Read {
    type Stop = ();

    fn entry(&mut self, place: &Place<'_, 't, Store, Look>) -> Action<()> {
        assert!(place.span().covers(&place.part()));
        assert_eq!(place.span().pages(), place.level().pages());
        match place.entry() {
            Entry::Absent => self.holes += place.part().pages(),
            Entry::Table(_) => {}
            Entry::Leaf(value) => {
                self.wide += 1;
                let part = place.part();
                assert_eq!(self.found.first(part), None, "found before");
                self.found.set(part, value);
            }
        }
        Action::Continue
    }

    fn page(&mut self, _: &Run<'_, 't, Store, Look>, page: Page<u64>) -> Action<()> {
        match page.entry {
            Entry::Leaf(value) => {
                assert_eq!(self.found.get(page.page), None, "found before");
                self.found.set(page.page..page.page + 1, value);
            }
            _ => self.holes += 1,
        }
        Action::Continue
    }
}

fn look(store: &Store, first: u64, end: u64) -> Read {
    let mut read = EachEntry(Read::default());
    let outcome = Walk::look(store, pages(first, end)).run(&mut read);
    assert_eq!(outcome, Outcome::Completed);
    read.0
}

/// Pages round the edges of 2 MiB, of 1 GiB, and of the 1 TiB that the store describes.
fn any_page() -> impl Strategy<Value = u64> {
    const GIB: u64 = 1 << 18;
    prop_oneof![
        0..2000_u64,
        GIB - 1100..GIB + 1100,
        1024 * GIB - 1600..1024 * GIB
    ]
}

proptest! {
    #![proptest_config(config(200))]

    /// S1, S2, S4: whatever is written with whole spans, splits and filled tables is read back page by
    /// page, holes are the rest, and exhaustion leaves exactly what was reached.
    #[test]
    fn s2_walks_write_and_read_like_a_map(
        spare in prop_oneof![Just(64_usize), 0..8_usize],
        writes in prop::collection::vec((any_page(), 1..1500_u64), 1..12),
    ) {
        let store = Store::new(spare);
        let notifier = Notifier::new();
        let open = notifier.open(store.geometry().span()).unwrap();
        let mut model = Pages::new();
        for (value, (first, count)) in (1..).zip(writes) {
            let range = pages(first, (first + count).min(1 << 28));
            let walk = Walk::change(&store, range, &open).unwrap();
            let end = match walk.run_allocating(&mut Write(value)) {
                Ok(outcome) => {
                    prop_assert_eq!(outcome, Outcome::Completed);
                    range.end_page()
                }
                Err(exhausted) => {
                    prop_assert!(range.contains(exhausted.reached));
                    exhausted.reached.page()
                }
            };
            model.set(range.first_page()..end, value);
        }
        for window in [(0, 4000), ((1 << 18) - 1200, (1 << 18) + 2000), ((1 << 28) - 1600, 1 << 28)] {
            let read = look(&store, window.0, window.1);
            let expected = model.within(window.0..window.1);
            prop_assert_eq!(read.holes, window.1 - window.0 - expected.count());
            prop_assert_eq!(read.found, expected);
        }
    }
}

/// S1: a huge leaf that crosses an edge is seen once, with its true span.
#[test]
fn s1_a_huge_leaf_is_seen_once_with_its_true_span() {
    let store = Store::new(4);
    let open = Notifier::new().open(pages(0, 4096)).unwrap();
    let walk = Walk::change(&store, pages(512, 1024), &open).unwrap();
    walk.run_allocating(&mut Write(7)).unwrap();
    let read = look(&store, 600, 700);
    assert_eq!((read.wide, read.found.count(), read.holes), (1, 100, 0));
}

/// Beyond what the tables can describe there is nothing to cover.
#[test]
fn s1_a_walk_ends_with_the_tables() {
    let store = Store::new(0);
    let read = look(&store, (1 << 28) - 5, (1 << 28) + 5);
    assert_eq!(read.holes, 5);
    assert_eq!(look(&store, 1 << 28, 1 << 29).holes, 0);
}

/// A changing walk needs an open range that covers it.
#[test]
fn s14_change_needs_the_open_range() {
    let store = Store::new(0);
    let open = Notifier::new().open(pages(10, 20)).unwrap();
    assert!(Walk::change(&store, pages(10, 20), &open).is_ok());
    let refused = Walk::change(&store, pages(9, 12), &open).err().unwrap();
    assert_eq!((refused.range, refused.open), (pages(9, 12), pages(10, 20)));
}

/// Counts what it is shown and gives one answer.
struct Answer {
    action: Action<&'static str>,
    shown: u32,
}

impl<'t> Visitor<'t, Store, Look> for Answer {
    type Stop = &'static str;

    fn entry(&mut self, _: &Place<'_, 't, Store, Look>) -> Action<&'static str> {
        self.shown += 1;
        self.action
    }

    fn run(&mut self, _: &Run<'_, 't, Store, Look>) -> Action<&'static str> {
        Action::Continue
    }
}

fn answer(action: Action<&'static str>) -> (Outcome<&'static str>, u32) {
    let store = Store::new(0);
    let mut visitor = Answer { action, shown: 0 };
    let range = pages(5, 3 << 18);
    (Walk::look(&store, range).run(&mut visitor), visitor.shown)
}

/// S3: every answer; `Again` cannot loop for ever, and `Skip` does not leak.
#[test]
fn s3_every_answer() {
    for action in [
        Action::Continue,
        Action::Descend,
        Action::Skip,
        Action::Split,
    ] {
        assert_eq!(answer(action), (Outcome::Completed, 3));
    }
    let at = gpa(5);
    assert_eq!(
        answer(Action::Again),
        (Outcome::Contended { at }, AGAIN_LIMIT + 1)
    );
    let value = "here";
    assert_eq!(
        answer(Action::Stop(value)),
        (Outcome::Stopped { value, at }, 1)
    );
}

/// S2, S7: the loser of a race for an entry gives its table back.
#[test]
fn s7_racing_walks_fill_one_table_each() {
    let store = Store::new(256);
    let notifier = Notifier::new();
    std::thread::scope(|scope| {
        for thread in 0..2 {
            let (store, notifier) = (&store, &notifier);
            scope.spawn(move || {
                for gib in 0..32 {
                    let first = (gib << 18) + 3 * thread;
                    let range = pages(first, first + 3);
                    let open = notifier.open(range).unwrap();
                    let walk = Walk::change(store, range, &open).unwrap();
                    walk.run_allocating(&mut Write(thread + 1)).unwrap();
                }
            });
        }
    });
    for gib in 0..32_u64 {
        let read = look(&store, gib << 18, (gib << 18) + 512);
        let pages = read.found.runs(0..u64::MAX).into_iter();
        let sum: u64 = pages
            .map(|(run, value)| (run.end - run.start) * value)
            .sum();
        assert_eq!(sum, 9);
        assert_eq!(read.holes, 506);
    }
    let linked = store.used.load(Ordering::Relaxed) - store.given_back.load(Ordering::Relaxed);
    assert_eq!(linked, 1 + 2 * 32);
}

/// Gives one answer where there is no table, and notes the runs that it is shown.
struct Goes {
    action: Action<()>,
    runs: Vec<GpaRange>,
}

impl<'t, 'o> Visitor<'t, Store, Change<'o>> for Goes {
    type Stop = ();

    fn entry(&mut self, place: &Place<'_, 't, Store, Change<'o>>) -> Action<()> {
        match place.entry() {
            Entry::Table(_) => Action::Continue,
            _ => self.action,
        }
    }

    fn run(&mut self, run: &Run<'_, 't, Store, Change<'o>>) -> Action<()> {
        self.runs.push(run.part());
        Action::Continue
    }
}

/// S3: what `Descend`, `Split` and `Skip` do to an absent entry and to a huge leaf, where tables may be made.
#[test]
fn s3_descend_makes_tables_and_split_divides() {
    let open = Notifier::new().open(GpaRange::ALL).unwrap();
    let run = |store: &Store, range, action| {
        let mut goes = Goes {
            action,
            runs: Vec::new(),
        };
        let walk = Walk::change(store, range, &open).unwrap();
        let outcome = walk.run_allocating(&mut goes).unwrap();
        assert!(matches!(outcome, Outcome::Completed));
        goes.runs
    };
    let store = Store::new(8);
    let walk = Walk::change(&store, pages(512, 1024), &open).unwrap();
    walk.run_allocating(&mut Write(7)).unwrap();
    let leaf = pages(512, 1024);
    for passed_over in [Action::Continue, Action::Descend, Action::Skip] {
        assert_eq!(
            run(&store, leaf, passed_over),
            [],
            "a leaf is not descended into"
        );
    }
    assert_eq!(
        run(&store, pages(520, 523), Action::Split),
        [pages(520, 523)]
    );
    let read = look(&store, 512, 1024);
    assert_eq!((read.found.count(), read.wide, read.holes), (512, 0, 0));
    for passed_over in [Action::Continue, Action::Split, Action::Skip] {
        assert_eq!(
            run(&store, pages(0, 512), passed_over),
            [],
            "a hole is not split"
        );
    }
    assert_eq!(run(&store, pages(3, 7), Action::Descend), [pages(3, 7)]);
    assert_eq!(look(&store, 0, 512).holes, 512);
}

/// S4: a leaf table is one run, whatever is in it; the holes between say their level by their span.
#[test]
fn s4_a_table_is_one_run() {
    let store = Store::new(16);
    let open = Notifier::new().open(GpaRange::ALL).unwrap();
    for page in [3, 5, 700, 2048] {
        let walk = Walk::change(&store, pages(page, page + 1), &open).unwrap();
        walk.run_allocating(&mut Write(page)).unwrap();
    }
    let mut goes = Goes {
        action: Action::Continue,
        runs: Vec::new(),
    };
    let walk = Walk::change(&store, pages(1, 2501), &open).unwrap();
    walk.run(&mut goes);
    assert_eq!(
        goes.runs,
        [pages(1, 512), pages(512, 1024), pages(2048, 2501)]
    );
}

/// Shows an entry that somebody else changes while it is looked at: `Again` shows what it is then.
struct Rival<'s> {
    store: &'s Store,
    seen: Vec<Entry<u64>>,
}

impl<'t> Visitor<'t, Store, Look> for Rival<'_> {
    type Stop = ();

    fn entry(&mut self, place: &Place<'_, 't, Store, Look>) -> Action<()> {
        self.seen.push(place.entry());
        if self.seen.len() > 1 {
            return Action::Skip;
        }
        let leaf = Toy.encode(Entry::Leaf(9), place.level());
        self.store.root()[0].store(leaf, Ordering::SeqCst);
        Action::Again
    }

    fn run(&mut self, _: &Run<'_, 't, Store, Look>) -> Action<()> {
        Action::Continue
    }
}

/// S3: `Again` reads the entry anew.
#[test]
fn s3_again_reads_anew() {
    let store = Store::new(0);
    let mut rival = Rival {
        store: &store,
        seen: Vec::new(),
    };
    Walk::look(&store, pages(0, 1)).run(&mut rival);
    assert_eq!(rival.seen, [Entry::Absent, Entry::Leaf(9)]);
}

/// S1: what is no range is told what it is instead.
#[test]
fn s1_what_is_no_range_is_refused_by_name() {
    let at = Gpa;
    assert_eq!(
        GpaRange::new(at(0x3000), at(0x3000)),
        Err(RangeError::Empty(at(0x3000)))
    );
    let inverted = RangeError::Inverted {
        start: at(0x3000),
        end: at(0x1000),
    };
    assert_eq!(GpaRange::new(at(0x3000), at(0x1000)), Err(inverted));
    for (start, end, odd) in [(0x3001, 0x5000, 0x3001), (0x3000, 0x4fff, 0x1fff)] {
        assert_eq!(
            GpaRange::new(at(start), at(end)),
            Err(RangeError::Misaligned(odd))
        );
    }
    assert_eq!(
        GpaRange::with_len(at(0x3000), 0x1800),
        Err(RangeError::Misaligned(0x1800))
    );
    let last = u64::MAX - 0xfff;
    assert!(GpaRange::with_len(at(last), 0x1000).is_ok());
    let first_page = last >> 12;
    let overflow = |pages| RangeError::Overflow { first_page, pages };
    assert_eq!(GpaRange::with_len(at(last), 0x2000), Err(overflow(2)));
    assert_eq!(GpaRange::from_pages(first_page, 2), Err(overflow(2)));
    assert_eq!(
        GpaRange::from_pages(first_page, u64::MAX),
        Err(overflow(u64::MAX))
    );
}
