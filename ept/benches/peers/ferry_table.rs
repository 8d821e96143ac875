//! Ferry: Intel's EPT, four levels, with accessed and dirty flags.

use std::sync::atomic::Ordering;

use ept::format::{Entry, Ept, EptFeatures, EptLevels, HardwareFormat, Leaf, MemoryType};
use ept::format::{Format, Permissions};
use ept::stage2::{Attributes, Stage2};
use ept::walk::{
    Action, Change, EachEntry, Look, Outcome, Page, PageVisitor, Place, Run, Visitor, Walk,
};
use ept::{Gpa, GpaRange, Hpa, Level, Notifier, OpenRange};

use super::plain_table::ADDRESS;
use super::{
    BLOCK, BLOCKS, FIRST, Halves, LEN, PAGES, PageTable, Protects, Splits, Unmaps, frames,
};

/// The root, a table each of the two levels below, and 512 leaf tables.
const TABLES: usize = 515;
const BASE: Hpa = Hpa(0x10_0000_0000);
const PRESENT: u64 = 7;
const READ_ONLY: Permissions = Permissions::ALL.without(Permissions::WRITE);
const FORMAT: Ept = Ept {
    levels: EptLevels::Four,
    features: EptFeatures::ACCESSED_DIRTY,
};
const PAGE_BY_PAGE: Attributes = Attributes {
    permissions: Permissions::ALL,
    memory: MemoryType::WriteBack,
    largest: Level::PAGE,
};

type Table = Stage2<'static, Ept>;

pub(crate) struct Ferry {
    stage2: Table,
    open: OpenRange,
}

fn bytes(from: u64, len: u64) -> GpaRange {
    GpaRange::with_len(Gpa(from), len).expect("a range")
}

fn all() -> GpaRange {
    bytes(FIRST, LEN)
}

impl Ferry {
    fn allow(&self, range: GpaRange, permissions: Permissions) {
        let (flush, result) = self.stage2.protect(range, permissions, &self.open);
        result.expect("all of it is there");
        flush.done();
    }
}

impl PageTable for Ferry {
    const NAME: &'static str = "ferry";

    fn new() -> Self {
        let words = frames::aligned(TABLES * 512);
        Self {
            stage2: Stage2::new(FORMAT, words, BASE).expect("room for the root"),
            open: Notifier::new().open(GpaRange::ALL).expect("nobody objects"),
        }
    }

    fn map(&mut self) {
        let mapped = self.stage2.map(all(), Hpa(FIRST), PAGE_BY_PAGE);
        mapped.expect("nothing is mapped");
    }

    fn sum(&self) -> u64 {
        let mut sum = Sum(0);
        let outcome = Walk::look(&self.stage2, all()).run(&mut sum);
        assert!(matches!(outcome, Outcome::Completed));
        sum.0
    }
}

impl Unmaps for Ferry {
    fn unmap(&mut self) {
        let (flush, result) = self.stage2.unmap(all(), &self.open);
        result.expect("no table is needed");
        flush.done();
    }
}

impl Protects for Ferry {
    fn protect(&mut self) {
        self.allow(all(), READ_ONLY);
    }

    fn release(&mut self) {
        self.allow(all(), Permissions::ALL);
    }

    fn writable(&self) -> u64 {
        let mut writable = EachEntry(Writable(0));
        let outcome = Walk::look(&self.stage2, all()).run(&mut writable);
        assert!(matches!(outcome, Outcome::Completed));
        writable.0.0
    }
}

impl Halves for Ferry {
    fn toggle(&self, half: usize) {
        let half = bytes(FIRST + half as u64 * LEN / 2, LEN / 2);
        self.allow(half, READ_ONLY);
        self.allow(half, Permissions::ALL);
    }
}

impl Splits for Ferry {
    fn fill(&mut self) {
        self.unmap();
        let large = Attributes {
            largest: Level::MIB2,
            ..PAGE_BY_PAGE
        };
        let blocks = bytes(FIRST, BLOCKS * BLOCK);
        let mapped = self.stage2.map(blocks, Hpa(FIRST), large);
        mapped.expect("nothing is mapped");
    }

    fn split(&mut self, block: u64) {
        let block = bytes(FIRST + block * BLOCK, BLOCK);
        let (flush, result) = self.stage2.split(block, Level::PAGE, &self.open);
        result.expect("there are tables");
        flush.done();
    }
}

/// Reads whole leaf tables.
struct Sum(u64);

impl<'t> Visitor<'t, Table, Look> for Sum {
    type Stop = ();

    fn entry(&mut self, _: &Place<'_, 't, Table, Look>) -> Action<()> {
        Action::Continue
    }

    fn run(&mut self, run: &Run<'_, 't, Table, Look>) -> Action<()> {
        for index in 0..512 {
            let raw = run.peek(index);
            if raw & PRESENT != 0 {
                self.0 = self.0.wrapping_add(raw & ADDRESS);
            }
        }
        Action::Continue
    }
}

/// The same walk by decoded entries.
pub(crate) struct FerryEntries(Ferry);

impl PageTable for FerryEntries {
    const NAME: &'static str = "ferry, decoded";

    fn new() -> Self {
        Self(Ferry::new())
    }

    fn map(&mut self) {
        self.0.map();
    }

    fn sum(&self) -> u64 {
        let mut sum = EachEntry(SumOfLeaves(0));
        let outcome = Walk::look(&self.0.stage2, all()).run(&mut sum);
        assert!(matches!(outcome, Outcome::Completed));
        sum.0.0
    }
}

struct SumOfLeaves(u64);

impl<'t> PageVisitor<'t, Table, Look> for SumOfLeaves {
    type Stop = ();

    fn entry(&mut self, _: &Place<'_, 't, Table, Look>) -> Action<()> {
        Action::Continue
    }

    fn page(&mut self, _: &Run<'_, 't, Table, Look>, page: Page<Leaf>) -> Action<()> {
        if let Entry::Leaf(leaf) = page.entry {
            self.0 = self.0.wrapping_add(leaf.hpa.0);
        }
        Action::Continue
    }
}

struct Writable(u64);

impl<'t> PageVisitor<'t, Table, Look> for Writable {
    type Stop = ();

    fn entry(&mut self, _: &Place<'_, 't, Table, Look>) -> Action<()> {
        Action::Continue
    }

    fn page(&mut self, _: &Run<'_, 't, Table, Look>, page: Page<Leaf>) -> Action<()> {
        if let Entry::Leaf(leaf) = page.entry
            && leaf.permissions.allows(Permissions::WRITE)
        {
            self.0 += 1;
        }
        Action::Continue
    }
}

/// Tables that nobody else sees. Ferry has no operation of its own for them: this is what its embedder can do, a
/// walk with plain stores.
pub(crate) struct FerryDetached(Ferry);

impl FerryDetached {
    fn allow(&self, permissions: Permissions) {
        let Ferry { stage2, open } = &self.0;
        let walk = Walk::change(stage2, all(), open).expect("it is open");
        let outcome = walk.run(&mut Store { permissions });
        assert!(matches!(outcome, Outcome::Completed));
    }
}

impl PageTable for FerryDetached {
    const NAME: &'static str = "ferry, a visitor";

    fn new() -> Self {
        Self(Ferry::new())
    }

    fn map(&mut self) {
        self.0.map();
    }

    fn sum(&self) -> u64 {
        self.0.sum()
    }
}

impl Protects for FerryDetached {
    fn protect(&mut self) {
        self.allow(READ_ONLY);
    }

    fn release(&mut self) {
        self.allow(Permissions::ALL);
    }

    fn writable(&self) -> u64 {
        self.0.writable()
    }
}

struct Store {
    permissions: Permissions,
}

impl<'t, 'o> Visitor<'t, Table, Change<'o>> for Store {
    type Stop = ();

    fn entry(&mut self, _: &Place<'_, 't, Table, Change<'o>>) -> Action<()> {
        Action::Continue
    }

    fn run(&mut self, run: &Run<'_, 't, Table, Change<'o>>) -> Action<()> {
        // The range is whole tables.
        for slot in run.table() {
            let raw = slot.load(Ordering::Relaxed);
            if let Entry::Leaf(_) = FORMAT.decode(raw, Level::PAGE) {
                let new = FORMAT.with_permissions(raw, Level::PAGE, self.permissions);
                slot.store(new, Ordering::Relaxed);
            }
        }
        Action::Continue
    }
}

const _: () = assert!(PAGES == 512 * 512);
