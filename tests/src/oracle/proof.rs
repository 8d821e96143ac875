//! Proof of a hardware format of `ferry-ept`: emulated hardware walks the tables that the crate writes.
//!
//! It compares three parties: [`Stage2`](ept::stage2::Stage2) of the crate, in memory that stands for that of the
//! machine; the [`Model`], which defines the expected result; and the machine, which walks the bytes that the crate has
//! written. One round:
//!
//! 1. Performs operations on the table of the crate and on the model. After each operation both must report the same
//!    result and have the same leaves in its range.
//! 2. Lets a guest probe addresses. The machine walks the table, and the model predicts the outcome of each probe.
//! 3. Loads the tables of the machine, with the flags that it has set, into the memory of the crate. Each leaf that the
//!    crate decodes must equal that of the model, flags included. The accessed flags that hardware sets in table entries
//!    stay, and must not affect later operations.
//! 4. In every third round, handles each refused write to a tracked page as a write fault, repeats it, tries a write to
//!    the neighbouring page, and repeats step 3.
//! 5. In every second round, cleans the whole table. The crate must record exactly the dirty pages of the model.
//!
//! The next round continues with the same table. Expected results never come from the crate.
//!
//! The proof does not cover stale translations, because each probe walks the table anew (the range to flush is compared
//! with the model); accesses before a flush (Arm's broken entries have tests of their own); the effect of memory types,
//! which emulators ignore; and other privilege levels.
//!
//! All random choices derive from one seed, which every message contains. The variable `FERRY_SEED` sets it.

mod answer;
mod attempts;
mod chance;
mod ground;
mod probes;
mod seen;
mod table;

use std::collections::BTreeMap;
use std::sync::atomic::AtomicU64;

use ept::format::{HardwareFormat, TableId};

use crate::oracle::model::{
    Attributes, Failure, Fault, Model, Operation, Pages, Refusal, Report, Shape,
};
use crate::oracle::{Access, Oracle, Probe};

use attempts::Attempt;
use chance::Chance;
use ground::Ground;
use seen::{Event, Seen};
use table::Table;

const PAGE_SHIFT: u32 = 12;

/// Number of tables besides the root, few enough to run out of them.
const TABLES: u64 = 320;

const TABLE_ENTRIES: u64 = 512;

/// Maximum number of write faults in one round. Each can take as many tables as there are levels.
const FAULTS: usize = 60;

const ACCESSES: [Access; 3] = [Access::Read, Access::Write, Access::Execute];

/// Format under test, and the machine that walks its tables.
pub struct Subject<'a, F> {
    /// Machine that walks the tables.
    pub machine: &'a dyn Oracle,
    /// Format of the crate.
    pub format: F,
    /// Properties of the format according to its manual.
    pub shape: Shape,
    /// Returns the control registers of the machine for a root.
    pub control: fn(&F, TableId) -> [u64; 4],
    /// Returns the expected syndrome of a refused access, in the bits of `syndrome_mask`.
    pub syndrome: fn(Access, Refusal) -> u64,
    /// Bits of a syndrome that are compared.
    pub syndrome_mask: u64,
    /// Whether the machine has a log of dirtied pages.
    pub logs: bool,
    /// Level of leaves whose accessed flag the machine can set although it refuses the access.
    pub marks_refused: Option<u32>,
}

/// Extent of a proof.
#[derive(Clone, Copy, Debug)]
pub struct Effort {
    /// Number of rounds.
    pub rounds: u32,
    /// Minimum number of operations in each round.
    pub operations: u32,
    /// Number of probes in each round.
    pub probes: usize,
}

/// Runs all rounds.
///
/// # Panics
/// Panics if the crate or the machine deviates from the model, or if too few kinds of events occurred.
pub fn prove<F: HardwareFormat>(subject: &Subject<'_, F>, effort: Effort) {
    let seed = chance::seed();
    let roots = subject.shape.root_entries.div_ceil(TABLE_ENTRIES);
    let words: Vec<_> = (0..(roots + TABLES) * TABLE_ENTRIES)
        .map(|_| AtomicU64::new(0))
        .collect();
    let mut proof = Proof::new(subject, &words, seed);
    let context = proof.context.clone();
    proof.map_reserved();
    for number in 0..effort.rounds {
        proof.context = format!("{context}, round {number}");
        proof.round(effort, number % 3 == 1);
        if number % 2 == 0 {
            proof.clean();
        }
    }
    println!("{context}\n{}", proof.seen);
    let rare = proof.seen.too_rare(&subject.shape);
    assert!(rare.is_empty(), "{context}: too rare: {rare:?}");
}

struct Proof<'a, F> {
    subject: &'a Subject<'a, F>,
    table: Table<'a, F>,
    model: Model,
    ground: Ground,
    chance: Chance,
    seen: Seen,
    /// Description of the current step, for messages.
    context: String,
}

impl<'a, F: HardwareFormat> Proof<'a, F> {
    fn new(subject: &'a Subject<'a, F>, words: &'a [AtomicU64], seed: u64) -> Self {
        let layout = subject.machine.layout();
        Self {
            subject,
            table: Table::new(subject.format, words, layout.tables),
            model: Model::new(subject.shape, TABLES),
            ground: Ground::new(subject.shape, &layout),
            // Gives each format of a machine its own sequence of random numbers.
            chance: Chance::new(seed ^ u64::from(subject.shape.root_level) << 32),
            seen: Seen::default(),
            context: format!("{}, FERRY_SEED={seed}", subject.machine.name()),
        }
    }

    /// Maps the pages that the guest of the machine needs.
    fn map_reserved(&mut self) {
        for page in self.subject.machine.layout().guest_pages {
            let first = page.gpa >> PAGE_SHIFT;
            let attributes = Attributes {
                permissions: ept::format::Permissions::ALL,
                memory: self.subject.shape.memory[0],
                largest: 0,
            };
            let operation = Operation::Map {
                range: first..first + 1,
                hpa: page.hpa,
                attributes,
            };
            self.attempt(&Attempt::new(operation));
        }
    }

    /// Runs one round.
    fn round(&mut self, effort: Effort, handles_faults: bool) {
        for _ in 0..effort.operations {
            self.operate();
        }
        for attempt in self.ground.large_leaves(&mut self.chance) {
            self.attempt(&attempt);
        }
        let everything = 0..self.subject.shape.end();
        self.compare(&everything, "after the operations");
        let model = &self.model;
        let probes = self.ground.probes(&mut self.chance, model, effort.probes);
        let refused = self.ask(probes);
        if handles_faults {
            self.handle(refused);
        }
    }

    /// Handles refused writes to tracked pages as write faults, and lets the guest try again.
    fn handle(&mut self, mut refused: Vec<Probe>) {
        // Pages that cannot be probed cannot be tried again.
        refused.sort_by_key(|probe| !self.leads_to_frames(probe.gpa >> PAGE_SHIFT));
        let mut again = Vec::new();
        for probe in &refused[..refused.len().min(FAULTS)] {
            let page = probe.gpa >> PAGE_SHIFT;
            let range = page..page + 1;
            self.attempt(&Attempt::new(Operation::WriteFault { range }));
            again.extend([page, page ^ 1]);
        }
        again.retain(|&page| self.ground.can_be_probed(&self.model, page, Access::Write));
        let is_released = |page: &&u64| {
            let leaf = self.model.at(**page);
            leaf.is_some_and(|(_, leaf)| leaf.allows(Access::Write))
        };
        let released = again.iter().filter(is_released).count();
        let probe = |page| Probe {
            gpa: page << PAGE_SHIFT,
            access: Access::Write,
        };
        let refused = self.ask(again.into_iter().map(probe).collect());
        self.seen.add(Event::Resumed, released as u64);
        self.seen.add(Event::StillTracked, refused.len() as u64);
    }

    fn leads_to_frames(&self, page: u64) -> bool {
        self.model.at(page).is_some_and(|(first, leaf)| {
            let hpa = leaf.hpa + ((page - first) << PAGE_SHIFT);
            self.ground.frame(hpa).is_some()
        })
    }

    fn operate(&mut self) {
        for attempt in self.ground.attempts(&mut self.chance, &self.model) {
            self.attempt(&attempt);
        }
    }

    /// Performs an operation on the table of the crate and on the model, and compares the results.
    fn attempt(&mut self, attempt: &Attempt) {
        let Attempt { operation, open } = attempt;
        let before = Leaves::of(&self.model, operation);
        let mut report = self.table.perform(operation, open);
        let expected = self.expected(operation, open);
        self.note(operation, &expected, &before);
        if self.wanted_table(&expected) {
            // The crate can also flush the range of a split that failed.
            self.check_covers(operation, &report, &expected);
            report.interval.clone_from(&expected.interval);
        }
        let context = &self.context;
        assert!(
            report == expected,
            "{context}: {operation:x?}\nreported {report:x?}\nexpected {expected:x?}"
        );
        let (free, expected_free) = (self.table.free(), self.model.free());
        assert_eq!(
            free, expected_free,
            "{context}: tables after {operation:x?}"
        );
        let around = self.around(operation.range(), &report);
        self.compare(&around, &format!("after {operation:x?}"));
    }

    fn expected(&mut self, operation: &Operation, open: &Pages) -> Report {
        let range = operation.range();
        let is_open = open.start <= range.start && range.end <= open.end;
        if is_open || !operation.needs_open() {
            self.model.perform(operation)
        } else {
            Report::new(Err(Failure::NotOpen))
        }
    }

    /// Whether a split failed because no table was free.
    fn wanted_table(&self, report: &Report) -> bool {
        match (&report.result, &report.fault) {
            (Err(Failure::Exhausted(_)), _) => true,
            (_, Some(Fault::Released(span))) => self.subject.shape.breaks && is_large(span),
            _ => false,
        }
    }

    fn check_covers(&self, operation: &Operation, report: &Report, expected: &Report) {
        let covers = match (&report.interval, &expected.interval) {
            (_, None) => true,
            (None, Some(_)) => false,
            (Some(all), Some(part)) => all.start <= part.start && part.end <= all.end,
        };
        let context = &self.context;
        assert!(
            covers,
            "{context}: {operation:x?}: {report:?}, {expected:?}"
        );
    }

    /// Returns the range of an operation and of its changes, and one page on either side.
    fn around(&self, range: &Pages, report: &Report) -> Pages {
        let changed = report.interval.as_ref().unwrap_or(range);
        let end = self.subject.shape.end();
        let start = range
            .start
            .min(changed.start)
            .saturating_sub(1)
            .min(end - 1);
        start..(range.end.max(changed.end) + 1).min(end)
    }

    fn note(&mut self, operation: &Operation, report: &Report, before: &Leaves) {
        let after = Leaves::of(&self.model, operation);
        let event = match report.result {
            Ok(()) => Event::Done(operation.name()),
            Err(Failure::Occupied(_)) => Event::Failed(Failure::Occupied(0)),
            Err(Failure::Exhausted(_)) => Event::Failed(Failure::Exhausted(0)),
            Err(failure) => Event::Failed(failure),
        };
        self.seen.add(event, 1);
        self.seen.add(Event::Split, report.splits);
        if let (Event::Done(name), true) = (event, before.are_tracked()) {
            self.seen.add(Event::OnTracked(name), 1);
        }
        if matches!(operation, Operation::Collapse { .. }) {
            for level in 1..=self.subject.shape.largest_leaf {
                let more = after.count(level) > before.count(level);
                self.seen.add(Event::Collapsed(level), more.into());
                let more = after.count_tracked(level) > before.count_tracked(level);
                self.seen.add(Event::CollapsedTracked(level), more.into());
            }
        }
        if let Some(fault) = &report.fault {
            self.seen.add(Event::of_fault(fault), 1);
        }
        if matches!(operation, Operation::Clean { .. }) {
            let pages = report.recorded.iter().map(|run| run.end - run.start);
            self.seen.add(Event::Cleaned, pages.sum());
        }
    }

    /// Compares the leaves that the crate decodes with those of the model.
    fn compare(&self, range: &Pages, when: &str) {
        let leaves = self.table.leaves(range);
        let expected: Vec<_> = self.model.leaves(range.clone()).collect();
        let context = &self.context;
        for ((first, leaf), (expected_first, expected)) in leaves.iter().zip(&expected) {
            assert_eq!(
                (first, leaf),
                (expected_first, expected),
                "{context}: a leaf (at page {first:#x}) {when}"
            );
        }
        assert_eq!(leaves.len(), expected.len(), "{context}: leaves {when}");
    }

    /// Cleans the whole table.
    fn clean(&mut self) {
        let range = 0..self.subject.shape.end();
        self.attempt(&Attempt::new(Operation::Clean { range }));
    }
}

/// Numbers of leaves in the range of an operation, by level and tracking.
struct Leaves(BTreeMap<(u32, bool), u64>);

impl Leaves {
    fn of(model: &Model, operation: &Operation) -> Self {
        let mut counts = BTreeMap::new();
        for (_, leaf) in model.leaves(operation.range().clone()) {
            *counts.entry((leaf.level, leaf.tracked)).or_default() += 1;
        }
        Self(counts)
    }

    fn count_tracked(&self, level: u32) -> u64 {
        *self.0.get(&(level, true)).unwrap_or(&0)
    }

    fn count(&self, level: u32) -> u64 {
        self.count_tracked(level) + self.0.get(&(level, false)).unwrap_or(&0)
    }

    fn are_tracked(&self) -> bool {
        self.0.keys().any(|(_, tracked)| *tracked)
    }
}

const fn is_large(span: &Pages) -> bool {
    span.end - span.start > 1
}
