//! Table of the crate under test, in memory that the machine walks, with an interface in the types of the model.

use std::convert::Infallible;
use std::sync::atomic::{AtomicU64, Ordering};

use ept::format::{self, Entry, HardwareFormat, Permissions, TableId, Unsupported};
use ept::stage2::{self, ChangeError, Flush, MapError, Stage2, WriteFault};
use ept::walk::{Action, EachEntry, Look, Page, PageVisitor, Place, Run, Walk};
use ept::{GpaRange, Hpa, Level, Notifier};

use crate::oracle::emulator::{bytes, words};
use crate::oracle::model::{Attributes, Failure, Fault, Leaf, Operation, Pages, Report};

/// Table of the crate under test.
pub(super) struct Table<'m, F> {
    words: &'m [AtomicU64],
    stage2: Stage2<'m, F>,
    notifier: Notifier,
}

impl<'m, F: HardwareFormat> Table<'m, F> {
    /// Returns an empty table. Its memory is at host-physical address `base` of the machine.
    ///
    /// # Panics
    /// Panics if the crate refuses the memory.
    pub(super) fn new(format: F, words: &'m [AtomicU64], base: u64) -> Self {
        let stage2 = Stage2::new(format, words, Hpa(base));
        Self {
            words,
            stage2: stage2.unwrap_or_else(|error| panic!("{error}")),
            notifier: Notifier::new(),
        }
    }

    pub(super) fn root(&self) -> TableId {
        self.stage2.root_id()
    }

    /// Returns the number of free tables.
    pub(super) fn free(&self) -> u64 {
        self.stage2.available() as u64
    }

    /// Performs an operation while the notifier range `open` is open.
    ///
    /// # Panics
    /// Panics on errors that only concurrent operations can cause.
    pub(super) fn perform(&self, operation: &Operation, open: &Pages) -> Report {
        let stage2 = &self.stage2;
        let open = self.notifier.open(range_of(open));
        let open = &open.unwrap_or_else(|error| panic!("{error}"));
        let range = range_of(operation.range());
        let mut recorded = Vec::new();
        let record = |span: GpaRange| recorded.push(span);
        let done = match operation {
            Operation::Map {
                hpa, attributes, ..
            } => {
                let result = stage2.map(range, Hpa(*hpa), attributes_of(*attributes));
                return Report::new(result.map_err(map_failure));
            }
            Operation::Unmap { .. } => stage2.unmap(range, open),
            Operation::Protect { permissions, .. } => stage2.protect(range, *permissions, open),
            Operation::Split { largest, .. } => stage2.split(range, level_of(*largest), open),
            Operation::Collapse { to, .. } => stage2.collapse(range, level_of(*to), open),
            Operation::Clean { .. } => stage2.clean(range, open, record),
            Operation::Age { .. } => stage2.age(range, open, record),
            Operation::TrackWrites { .. } => stage2.track_writes(range, open),
            Operation::UntrackWrites { .. } => stage2.untrack_writes(range),
            Operation::WriteFault { .. } => {
                let (flush, result) = stage2.write_fault(range.start(), record);
                let fault = result.ok().map(fault_of);
                let report = report((flush, result.map(|_| ())), &recorded);
                return Report { fault, ..report };
            }
        };
        report(done, &recorded)
    }

    /// Returns the leaves that map any of these pages, each with its first page.
    pub(super) fn leaves(&self, range: &Pages) -> Vec<(u64, Leaf)> {
        let mut leaves = EachEntry(Leaves(Vec::new()));
        // The visitor never stops the walk.
        let _ = Walk::look(&self.stage2, range_of(range)).run(&mut leaves);
        leaves.0.0
    }

    /// Returns the leaf that maps a page, or the level of the absent entry.
    pub(super) fn lookup(&self, page: u64) -> Result<Leaf, u32> {
        match self.stage2.lookup(page) {
            (level, Entry::Leaf(leaf)) => Ok(leaf_of(leaf, level)),
            (level, _) => Err(level.number().into()),
        }
    }

    /// Returns the contents of the memory, to load into the machine.
    pub(super) fn bytes(&self) -> Vec<u8> {
        bytes(self.words.iter().map(|word| word.load(Ordering::SeqCst)))
    }

    /// Replaces the contents of the memory by those that the machine left.
    pub(super) fn load(&self, bytes: &[u8]) {
        for (word, value) in self.words.iter().zip(words(bytes)) {
            word.store(value, Ordering::SeqCst);
        }
    }
}

/// Converts the result of a change into a report, and does its flush. The machine starts without cached translations.
fn report<F: HardwareFormat>(
    (flush, result): (Flush<'_, '_, F>, Result<(), ChangeError>),
    recorded: &[GpaRange],
) -> Report {
    let tally = flush.tally();
    let mut report = Report {
        interval: flush.interval().map(pages_of),
        entries: tally.entries,
        splits: tally.splits,
        tables: flush.tables() as u64,
        ..Report::new(result.map_err(change_failure))
    };
    for span in recorded {
        report.record(&pages_of(*span));
    }
    flush.done();
    report
}

/// Visitor that collects leaves.
struct Leaves(Vec<(u64, Leaf)>);

impl<'t, 'm, F: HardwareFormat> PageVisitor<'t, Stage2<'m, F>, Look> for Leaves
where
    'm: 't,
{
    type Stop = Infallible;

    fn entry(&mut self, place: &Place<'_, 't, Stage2<'m, F>, Look>) -> Action<Infallible> {
        if let Entry::Leaf(leaf) = place.entry() {
            let leaf = leaf_of(leaf, place.level());
            self.0.push((place.span().first_page(), leaf));
        }
        Action::Continue
    }

    fn page(
        &mut self,
        _: &Run<'_, 't, Stage2<'m, F>, Look>,
        page: Page<format::Leaf>,
    ) -> Action<Infallible> {
        if let Entry::Leaf(leaf) = page.entry {
            self.0.push((page.page, leaf_of(leaf, Level::PAGE)));
        }
        Action::Continue
    }
}

/// # Panics
/// Panics if a tracked leaf allows writes.
fn leaf_of(leaf: format::Leaf, level: Level) -> Leaf {
    let withheld = if leaf.write_tracked {
        Permissions::WRITE
    } else {
        Permissions::NONE
    };
    let both = leaf.write_tracked && leaf.permissions.allows(withheld);
    assert!(!both, "writable and tracked at once: {leaf:x?}");
    Leaf {
        level: level.number().into(),
        hpa: leaf.hpa.0,
        permissions: leaf.permissions.union(withheld),
        memory: leaf.memory,
        accessed: leaf.accessed,
        dirty: leaf.dirty,
        tracked: leaf.write_tracked,
    }
}

fn fault_of(fault: WriteFault) -> Fault {
    match fault {
        WriteFault::Released(range) => Fault::Released(pages_of(range)),
        WriteFault::Writable => Fault::Writable,
        WriteFault::Denied => Fault::Denied,
        WriteFault::Absent => Fault::Absent,
    }
}

fn attributes_of(attributes: Attributes) -> stage2::Attributes {
    stage2::Attributes {
        permissions: attributes.permissions,
        memory: attributes.memory,
        largest: level_of(attributes.largest),
    }
}

fn level_of(level: u32) -> Level {
    let level = u8::try_from(level).ok().and_then(Level::new);
    level.unwrap_or_else(|| panic!("there is no such level"))
}

fn range_of(range: &Pages) -> GpaRange {
    let pages = GpaRange::from_pages(range.start, range.end - range.start);
    pages.unwrap_or_else(|error| panic!("{error}"))
}

fn pages_of(range: GpaRange) -> Pages {
    range.first_page()..range.end_page()
}

fn map_failure(error: MapError) -> Failure {
    match error {
        MapError::Beyond { .. } => Failure::Beyond,
        MapError::Unsupported(what) => unsupported(what),
        MapError::Occupied { at } => Failure::Occupied(at.page()),
        MapError::Exhausted(exhausted) => Failure::Exhausted(exhausted.reached.page()),
        MapError::Contended { .. } | MapError::Unflushed | MapError::Unforgotten => {
            panic!("{error}")
        }
    }
}

fn change_failure(error: ChangeError) -> Failure {
    match error {
        ChangeError::NotOpen(_) => Failure::NotOpen,
        ChangeError::Beyond { .. } => Failure::Beyond,
        ChangeError::Unsupported(what) => unsupported(what),
        ChangeError::Exhausted { reached } => Failure::Exhausted(reached.page()),
        ChangeError::Contended { .. } | ChangeError::Unflushed => panic!("{error}"),
    }
}

fn unsupported(what: Unsupported) -> Failure {
    match what {
        Unsupported::Permissions(_) => Failure::Permissions,
        Unsupported::Memory(_) => Failure::Memory,
        Unsupported::Address(_) => Failure::Address,
        Unsupported::Level(_) => panic!("{what}"),
    }
}
