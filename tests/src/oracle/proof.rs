//! The proof of a hardware format of `ferry-ept`: what the crate writes into a table, hardware reads that nobody
//! here wrote.
//!
//! Three take part: the crate's [`Stage2`](ept::stage2::Stage2), in memory that stands for the machine's; the
//! [`Model`], which says what must be; and the machine, which walks the bytes that the crate has written. A round
//! is this:
//!
//! 1. Operations are done on the crate's table and on the model. After each both report the same, and have the
//!    same leaves where it was done.
//! 2. A guest probes addresses. The machine walks; the model says what becomes of each probe.
//! 3. The machine's tables, with the flags that it has set, are loaded into the crate's memory. Each leaf, decoded
//!    by the crate, is what the model says, flags included. The accessed flags that hardware sets in the entries
//!    of tables stay, and must harm no later operation.
//! 4. In every third round each refused write to a page whose writes are tracked is handled as a write fault. It is
//!    tried again, as is a write to the page beside it, and 3 follows once more.
//! 5. In every second round the crate cleans everything, and records just what the model says is dirty.
//!
//! The next round goes on with the same table. The crate is never asked what is right.
//!
//! What this cannot see: anything that hardware keeps, as each probe walks anew (what is to be flushed is compared with
//! the model); what it meets before a flush is done (Arm's broken entries have tests of their own); what memory types
//! do, as emulators do nothing with them; and what only another privilege level would meet.
//!
//! All is drawn from one number, which stands in every message. The variable `FERRY_SEED` sets it.

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

/// Tables besides the root: few enough to run out of.
const TABLES: u64 = 320;

const TABLE_ENTRIES: u64 = 512;

/// So many write faults are handled at once: each may take as many tables as there are levels.
const FAULTS: usize = 60;

const ACCESSES: [Access; 3] = [Access::Read, Access::Write, Access::Execute];

/// A format, and the machine that walks its tables.
pub struct Subject<'a, F> {
    /// The machine.
    pub machine: &'a dyn Oracle,
    /// The format, in the crate's words.
    pub format: F,
    /// The format, in the manual's words.
    pub shape: Shape,
    /// The machine's control words for a root.
    pub control: fn(&F, TableId) -> [u64; 4],
    /// What the machine says of a refused access, in the bits of `syndrome_mask`.
    pub syndrome: fn(Access, Refusal) -> u64,
    /// The bits of a syndrome that are known.
    pub syndrome_mask: u64,
    /// Whether the machine logs which pages become dirty.
    pub logs: bool,
    /// The level of leaves that the machine may mark accessed although their rights refuse the access.
    pub marks_refused: Option<u32>,
}

/// How much is tried.
#[derive(Clone, Copy, Debug)]
pub struct Effort {
    /// Rounds.
    pub rounds: u32,
    /// Operations in each, at least.
    pub operations: u32,
    /// Probes in each.
    pub probes: usize,
}

/// Plays all rounds.
///
/// # Panics
/// The crate or the machine is not what the model says, or so little happened that it would prove nothing.
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
    /// What and where, for messages.
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
            // Otherwise formats of one machine would be tried with the same numbers.
            chance: Chance::new(seed ^ u64::from(subject.shape.root_level) << 32),
            seen: Seen::default(),
            context: format!("{}, FERRY_SEED={seed}", subject.machine.name()),
        }
    }

    /// Maps what the machine needs for itself.
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

    /// Operations, and what the machine makes of it.
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

    /// Handles refused writes to pages whose writes are tracked, and lets the guest try again.
    fn handle(&mut self, mut refused: Vec<Probe>) {
        // Others cannot be tried again.
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

    /// Does something with the crate's table and with the model.
    fn attempt(&mut self, attempt: &Attempt) {
        let Attempt { operation, open } = attempt;
        let before = Leaves::of(&self.model, operation);
        let mut report = self.table.perform(operation, open);
        let expected = self.expected(operation, open);
        self.note(operation, &expected, &before);
        if self.wanted_table(&expected) {
            // A split that did not come about may be flushed, too.
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

    /// Whether a split did not come about for want of a table.
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

    /// What an operation was about and what it changed, and a page on either side.
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

    /// Compares the leaves that the crate decodes with the model's.
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

    /// Cleans everything.
    fn clean(&mut self) {
        let range = 0..self.subject.shape.end();
        self.attempt(&Attempt::new(Operation::Clean { range }));
    }
}

/// How many leaves there are in an operation's range.
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
