//! What a stage-2 table must say after any operations and accesses.
//!
//! The model is to be believed by reading it. It keeps leaves in the model of pages that the suites of ept use, one run
//! for each leaf, and goes from leaf to leaf. It knows nothing of entries, bits and walks, and shares no code with the
//! crate that it judges, only the words for permissions and memory types.
//!
//! It keeps a set of tables too, as two things depend on them: a table that has become empty keeps a larger leaf
//! out of its place, and tables can run out.
//!
//! Pages are numbered: page `n` is at address `n * 4096`. Levels are numbered from 0, where a leaf is one page;
//! at each level above it is 512 times as long.

use std::collections::BTreeSet;
use std::ops::Range;

use ept::format::{MemoryType, Permissions};

use crate::oracle::Access;
use crate::oracle::page_model;

/// Page numbers.
pub type Pages = Range<u64>;

/// Bytes of a page.
const PAGE: u64 = 4096;

/// Entries of a table.
const ENTRIES: u64 = 512;

/// Pages of a leaf of this level.
pub const fn pages(level: u32) -> u64 {
    ENTRIES.pow(level)
}

/// What a kind of table can say, by its manual.
#[derive(Clone, Copy, Debug)]
pub struct Shape {
    /// The level of the root's entries.
    pub root_level: u32,
    /// How many entries the root has.
    pub root_entries: u64,
    /// The highest level that has leaves.
    pub largest_leaf: u32,
    /// The bits that a host-physical address may have.
    pub hpa_bits: u32,
    /// What leaves can allow.
    pub permissions: &'static [Permissions],
    /// The memory types that leaves can have; not all need be listed.
    pub memory: &'static [MemoryType],
    /// A memory type that leaves cannot have.
    pub no_memory: MemoryType,
    /// Whether the translations of a leaf must be forgotten before a table may stand in its place, though it says
    /// the same (break-before-make).
    pub breaks: bool,
    /// Whether a permission fault may be cached, so that what is allowed later faults until it is forgotten.
    pub caches_faults: bool,
}

impl Shape {
    /// The page after the last that can be mapped.
    pub const fn end(&self) -> u64 {
        self.root_entries * pages(self.root_level)
    }
}

/// A leaf.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Leaf {
    /// Its level.
    pub level: u32,
    /// The first byte that it maps to.
    pub hpa: u64,
    /// What it is to allow.
    pub permissions: Permissions,
    /// How it is cached.
    pub memory: MemoryType,
    /// Whether the guest has used it.
    pub accessed: bool,
    /// Whether the guest has written to it.
    pub dirty: bool,
    /// Whether the right to write, which is among `permissions`, is withheld until the guest uses it.
    pub tracked: bool,
}

/// What holds for all that is mapped at once.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Attributes {
    /// What the guest may do.
    pub permissions: Permissions,
    /// How it is cached.
    pub memory: MemoryType,
    /// The highest level to have leaves at.
    pub largest: u32,
}

/// What can be done to a table.
#[derive(Clone, Debug)]
pub enum Operation {
    /// Maps pages of which none is mapped, with the largest leaves that fit.
    Map {
        /// The pages.
        range: Pages,
        /// The first byte to map to.
        hpa: u64,
        /// What holds for all of them.
        attributes: Attributes,
    },
    /// Maps nothing there any more.
    Unmap {
        /// The pages.
        range: Pages,
    },
    /// Allows just this for what is mapped.
    Protect {
        /// The pages.
        range: Pages,
        /// What the guest may do.
        permissions: Permissions,
    },
    /// Splits what is larger.
    Split {
        /// The pages.
        range: Pages,
        /// The highest level to keep leaves at.
        largest: u32,
    },
    /// Makes leaves of whole tables that say what one leaf can say.
    Collapse {
        /// The pages.
        range: Pages,
        /// The highest level to have leaves at.
        to: u32,
    },
    /// Records what is dirty, and makes it clean.
    Clean {
        /// The pages.
        range: Pages,
    },
    /// Records what was used, and makes it unused.
    Age {
        /// The pages.
        range: Pages,
    },
    /// Withholds the right to write, so that it is told when the guest uses it.
    TrackWrites {
        /// The pages.
        range: Pages,
    },
    /// Withholds it no longer.
    UntrackWrites {
        /// The pages.
        range: Pages,
    },
    /// Tells that the guest's write to a page was refused.
    WriteFault {
        /// The one page.
        range: Pages,
    },
}

impl Operation {
    /// The pages that it is about.
    pub const fn range(&self) -> &Pages {
        match self {
            Self::Map { range, .. }
            | Self::Unmap { range }
            | Self::Protect { range, .. }
            | Self::Split { range, .. }
            | Self::Collapse { range, .. }
            | Self::Clean { range }
            | Self::Age { range }
            | Self::TrackWrites { range }
            | Self::UntrackWrites { range }
            | Self::WriteFault { range } => range,
        }
    }

    /// Its name.
    pub const fn name(&self) -> &'static str {
        match self {
            Self::Map { .. } => "map",
            Self::Unmap { .. } => "unmap",
            Self::Protect { .. } => "protect",
            Self::Split { .. } => "split",
            Self::Collapse { .. } => "collapse",
            Self::Clean { .. } => "clean",
            Self::Age { .. } => "age",
            Self::TrackWrites { .. } => "track_writes",
            Self::UntrackWrites { .. } => "untrack_writes",
            Self::WriteFault { .. } => "write_fault",
        }
    }

    /// Whether nobody may use the translations meanwhile: not where the guest may only do more than before.
    pub const fn needs_open(&self) -> bool {
        !matches!(
            self,
            Self::Map { .. } | Self::UntrackWrites { .. } | Self::WriteFault { .. }
        )
    }

    /// The same about other pages; a write fault is about the last of them.
    #[must_use]
    pub fn at(mut self, pages: Pages) -> Self {
        match &mut self {
            Self::Map { range, .. }
            | Self::Unmap { range }
            | Self::Protect { range, .. }
            | Self::Split { range, .. }
            | Self::Collapse { range, .. }
            | Self::Clean { range }
            | Self::Age { range }
            | Self::TrackWrites { range }
            | Self::UntrackWrites { range } => *range = pages,
            Self::WriteFault { range } => *range = pages.end - 1..pages.end,
        }
        self
    }
}

/// Why an operation was not, or not wholly, done. All before the page that is named was done.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Failure {
    /// Nobody has said that these translations are unused.
    NotOpen,
    /// The range is beyond what can be mapped.
    Beyond,
    /// No leaf allows just this.
    Permissions,
    /// No leaf has this memory type.
    Memory,
    /// No leaf points there.
    Address,
    /// This page is mapped already.
    Occupied(u64),
    /// No table was left at this page.
    Exhausted(u64),
}

/// What a refused write was about.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Fault {
    /// The right to write was withheld, and no longer is from these pages.
    Released(Pages),
    /// The page may be written.
    Writable,
    /// The page may not be written.
    Denied,
    /// There is no page.
    Absent,
}

/// What became of an operation.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Report {
    /// Whether it was done.
    pub result: Result<(), Failure>,
    /// The smallest range with all that was changed: the translations to flush.
    pub interval: Option<Pages>,
    /// The number of entries that were changed, splits apart. A table that goes counts as one, with all in it.
    pub entries: u64,
    /// The number of leaves that were split.
    pub splits: u64,
    /// The number of tables that went out of use.
    pub tables: u64,
    /// What was recorded, in ascending order, neighbours joined.
    pub recorded: Vec<Pages>,
    /// What a write fault was about.
    pub fault: Option<Fault>,
}

impl Report {
    /// With nothing changed.
    pub const fn new(result: Result<(), Failure>) -> Self {
        Self {
            result,
            interval: None,
            entries: 0,
            splits: 0,
            tables: 0,
            recorded: Vec::new(),
            fault: None,
        }
    }

    fn touched(&mut self, span: &Pages) {
        self.interval = Some(match &self.interval {
            Some(old) => old.start.min(span.start)..old.end.max(span.end),
            None => span.clone(),
        });
    }

    fn changed(&mut self, span: &Pages) {
        self.entries += 1;
        self.touched(span);
    }

    /// Records a range behind all others.
    pub fn record(&mut self, span: &Pages) {
        match self.recorded.last_mut() {
            Some(last) if last.end == span.start => last.end = span.end,
            _ => self.recorded.push(span.clone()),
        }
    }
}

/// What hardware must make of an access.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// It is done, at this host-physical page.
    Allowed {
        /// Its first byte.
        hpa: u64,
        /// The leaf's level.
        level: u32,
        /// Whether it is what makes the leaf dirty.
        first_write: bool,
    },
    /// It is refused.
    Refused(Refusal),
}

/// Why an access is refused.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Refusal {
    /// The level at which the walk ends.
    pub level: u32,
    /// What the leaf allows now; `None` where there is none.
    pub permissions: Option<Permissions>,
    /// Whether just this right is withheld: the write is to be told, and then done.
    pub withheld: bool,
}

/// A table that does what it should.
#[derive(Clone, Debug)]
pub struct Model {
    shape: Shape,
    /// Each leaf is a run of its own.
    leaves: page_model::Pages<Leaf>,
    /// All tables but the root: the level of the entry that a table stands at, and its first page.
    tables: BTreeSet<(u32, u64)>,
    /// How many tables more there can be.
    free: u64,
}

/// What to do with a leaf.
enum Step {
    Keep,
    Replace(Leaf),
    Remove,
    Split,
}

impl Model {
    /// An empty one, with room for so many tables besides the root.
    pub const fn new(shape: Shape, free: u64) -> Self {
        Self {
            shape,
            leaves: page_model::Pages::new(),
            tables: BTreeSet::new(),
            free,
        }
    }

    /// How many tables more there can be.
    pub const fn free(&self) -> u64 {
        self.free
    }

    /// The leaf that maps a page, and its first page.
    pub fn at(&self, page: u64) -> Option<(u64, Leaf)> {
        let (run, leaf) = self.leaves.run_at(page)?;
        Some((run.start, leaf))
    }

    /// The leaf that begins with this page.
    fn starting_at(&self, first: u64) -> Option<Leaf> {
        let (start, leaf) = self.at(first)?;
        (start == first).then_some(leaf)
    }

    fn put(&mut self, first: u64, leaf: Leaf) {
        self.leaves.set(first..first + pages(leaf.level), leaf);
    }

    /// The leaves that map any of these pages, each with its first page.
    pub fn leaves(&self, range: Pages) -> impl Iterator<Item = (u64, Leaf)> {
        let runs = self.leaves.runs_as_set(range);
        runs.map(|(run, leaf)| (run.start, leaf))
    }

    /// The guest tries something.
    pub fn access(&mut self, page: u64, access: Access) -> Verdict {
        let Some((first, leaf)) = self.at(page) else {
            return Verdict::Refused(Refusal {
                level: self.hole_level(page),
                permissions: None,
                withheld: false,
            });
        };
        if !leaf.allows(access) {
            return Verdict::Refused(Refusal {
                level: leaf.level,
                permissions: Some(leaf.allowed()),
                withheld: leaf.permissions.allows(needed(access)),
            });
        }
        let writes = access == Access::Write;
        self.set_flags(first, true, leaf.dirty || writes);
        Verdict::Allowed {
            hpa: leaf.hpa + (page - first) * PAGE,
            level: leaf.level,
            first_write: writes && !leaf.dirty,
        }
    }

    /// Sets the flags of the leaf that begins at `first`, if there is one.
    pub fn set_flags(&mut self, first: u64, accessed: bool, dirty: bool) {
        if let Some(leaf) = self.starting_at(first) {
            let leaf = Leaf {
                accessed,
                dirty,
                ..leaf
            };
            self.put(first, leaf);
        }
    }

    /// Does it. Tables that go out of use are free afterwards.
    pub fn perform(&mut self, operation: &Operation) -> Report {
        let mut report = Report::new(Ok(()));
        report.result = self
            .judge(operation)
            .and_then(|()| self.carry_out(operation, &mut report));
        self.free += report.tables;
        report
    }

    /// What can be refused without looking at the table.
    fn judge(&self, operation: &Operation) -> Result<(), Failure> {
        let range = operation.range();
        if range.end > self.shape.end() {
            return Err(Failure::Beyond);
        }
        match operation {
            Operation::Map {
                hpa, attributes, ..
            } => {
                let end = u128::from(*hpa) + u128::from((range.end - range.start) * PAGE);
                if !hpa.is_multiple_of(PAGE) || end > 1 << self.shape.hpa_bits {
                    return Err(Failure::Address);
                }
                if attributes.memory == self.shape.no_memory {
                    return Err(Failure::Memory);
                }
                self.judge_permissions(attributes.permissions)
            }
            Operation::Protect { permissions, .. } => self.judge_permissions(*permissions),
            _ => Ok(()),
        }
    }

    fn judge_permissions(&self, permissions: Permissions) -> Result<(), Failure> {
        if self.shape.permissions.contains(&permissions) {
            Ok(())
        } else {
            Err(Failure::Permissions)
        }
    }

    fn carry_out(&mut self, operation: &Operation, report: &mut Report) -> Result<(), Failure> {
        match operation {
            Operation::Map {
                range,
                hpa,
                attributes,
            } => self.map(range, *hpa, *attributes),
            Operation::Unmap { range } => self.unmap(range, report),
            Operation::Protect { range, permissions } => self.protect(range, *permissions, report),
            Operation::Split { range, largest } => self.each_leaf(range, report, |_, leaf| {
                if leaf.level > *largest {
                    Step::Split
                } else {
                    Step::Keep
                }
            }),
            Operation::Collapse { range, to } => {
                let to = (*to).min(self.shape.largest_leaf);
                (1..=to).for_each(|level| self.collapse(range, level, report));
                Ok(())
            }
            Operation::Clean { range } => self.take(range, report, |leaf| &mut leaf.dirty),
            Operation::Age { range } => self.take(range, report, |leaf| &mut leaf.accessed),
            Operation::TrackWrites { range } => self.replace(range, report, |leaf| Leaf {
                tracked: leaf.permissions.allows(Permissions::WRITE),
                ..leaf
            }),
            Operation::UntrackWrites { range } => self.replace(range, report, |leaf| Leaf {
                tracked: false,
                ..leaf
            }),
            Operation::WriteFault { range } => {
                report.fault = Some(self.write_fault(range.start, report));
                Ok(())
            }
        }
    }

    fn map(&mut self, range: &Pages, hpa: u64, attributes: Attributes) -> Result<(), Failure> {
        let mut page = range.start;
        while page < range.end {
            if self.at(page).is_some() {
                return Err(Failure::Occupied(page));
            }
            let hpa = hpa + (page - range.start) * PAGE;
            let level = self.largest_that_fits(&(page..range.end), hpa, attributes.largest);
            self.make_tables(page, level)?;
            let leaf = Leaf {
                level,
                hpa,
                permissions: attributes.permissions,
                memory: attributes.memory,
                accessed: false,
                dirty: false,
                tracked: false,
            };
            self.put(page, leaf);
            page += pages(level);
        }
        Ok(())
    }

    /// The level of the largest leaf for the first pages of `rest`, the first of which is not mapped.
    fn largest_that_fits(&self, rest: &Pages, hpa: u64, largest: u32) -> u32 {
        let fits = |&level: &u32| {
            rest.start.is_multiple_of(pages(level))
                && rest.start + pages(level) <= rest.end
                && hpa.is_multiple_of(pages(level) * PAGE)
                && !self.tables.contains(&(level, rest.start))
        };
        let levels = 0..=largest.min(self.shape.largest_leaf);
        levels.rev().find(fits).unwrap_or(0)
    }

    /// Makes the tables down to an entry of this level, from the root's on.
    fn make_tables(&mut self, page: u64, level: u32) -> Result<(), Failure> {
        for above in (level + 1..=self.shape.root_level).rev() {
            let table = (above, page - page % pages(above));
            if !self.tables.contains(&table) {
                self.take_table(page)?;
                self.tables.insert(table);
            }
        }
        Ok(())
    }

    fn take_table(&mut self, page: u64) -> Result<(), Failure> {
        self.free = self.free.checked_sub(1).ok_or(Failure::Exhausted(page))?;
        Ok(())
    }

    fn unmap(&mut self, range: &Pages, report: &mut Report) -> Result<(), Failure> {
        let result = self.each_leaf(range, report, |span, _| {
            if within(span, range) {
                Step::Remove
            } else {
                Step::Split
            }
        });
        let done = match result {
            Err(Failure::Exhausted(page)) => range.start..page,
            _ => range.clone(),
        };
        self.remove_tables(&done, report);
        result
    }

    /// Removes all tables that lie wholly in `range`.
    fn remove_tables(&mut self, range: &Pages, report: &mut Report) {
        let whole = |&(level, first): &(u32, u64)| within(&(first..first + pages(level)), range);
        for table in self.tables.extract_if(.., whole).collect::<Vec<_>>() {
            let (level, first) = table;
            report.tables += 1;
            if !self.in_whole_table(first, level, range) {
                report.changed(&(first..first + pages(level)));
            }
        }
    }

    /// Whether the table with the entry of this level for `page` is not the root, and lies wholly in `range`.
    fn in_whole_table(&self, page: u64, level: u32, range: &Pages) -> bool {
        let first = page - page % pages(level + 1);
        level < self.shape.root_level && within(&(first..first + pages(level + 1)), range)
    }

    /// What is tracked stays so while it has the right that is withheld.
    fn protect(
        &mut self,
        range: &Pages,
        permissions: Permissions,
        report: &mut Report,
    ) -> Result<(), Failure> {
        self.replace(range, report, |leaf| Leaf {
            permissions,
            tracked: leaf.tracked && permissions.allows(Permissions::WRITE),
            ..leaf
        })
    }

    /// Replaces leaves, of which only what is in `range` changes.
    fn replace(
        &mut self,
        range: &Pages,
        report: &mut Report,
        by: impl Fn(Leaf) -> Leaf,
    ) -> Result<(), Failure> {
        self.each_leaf(range, report, |span, leaf| {
            let new = by(leaf);
            if new == leaf {
                Step::Keep
            } else if within(span, range) {
                Step::Replace(new)
            } else {
                Step::Split
            }
        })
    }

    /// Gives a page, or all of a leaf that cannot be split, the right to write back. Nothing need be forgotten for
    /// that, so that it is no change to be flushed; but a split may be one.
    fn write_fault(&mut self, page: u64, report: &mut Report) -> Fault {
        loop {
            let Some((first, leaf)) = self.at(page) else {
                return Fault::Absent;
            };
            if leaf.allows(Access::Write) {
                if self.shape.caches_faults {
                    report.touched(&(page..page + 1));
                }
                return Fault::Writable;
            }
            if !leaf.tracked {
                return Fault::Denied;
            }
            let span = first..first + pages(leaf.level);
            if leaf.level > 0 && self.split(first, page).is_ok() {
                report.splits += 1;
                if self.shape.breaks {
                    report.touched(&span);
                }
                continue;
            }
            let released = Leaf {
                tracked: false,
                ..leaf
            };
            self.put(first, released);
            report.record(&span);
            if self.shape.caches_faults {
                report.touched(&span);
            }
            return Fault::Released(span);
        }
    }

    /// Records and clears a flag, of a leaf always as a whole.
    fn take(
        &mut self,
        range: &Pages,
        report: &mut Report,
        flag: fn(&mut Leaf) -> &mut bool,
    ) -> Result<(), Failure> {
        let mut taken = Report::new(Ok(()));
        self.each_leaf(range, report, |span, mut leaf| {
            // Somebody may have taken the flag for another part of the leaf, and not flushed.
            if span.start < range.start || span.end > range.end {
                taken.touched(span);
            }
            if !std::mem::take(flag(&mut leaf)) {
                return Step::Keep;
            }
            taken.record(span);
            Step::Replace(leaf)
        })?;
        report.recorded = taken.recorded;
        if let Some(across) = taken.interval {
            report.touched(&across);
        }
        Ok(())
    }

    /// Does what `decide` says to each leaf that has a page in `range`, and to the parts of a split one again.
    fn each_leaf(
        &mut self,
        range: &Pages,
        report: &mut Report,
        mut decide: impl FnMut(&Pages, Leaf) -> Step,
    ) -> Result<(), Failure> {
        let mut page = range.start;
        while let Some((first, leaf)) = self.next_leaf(page, range.end) {
            let span = first..first + pages(leaf.level);
            page = page.max(first);
            match decide(&span, leaf) {
                Step::Split => {
                    self.split(first, page)?;
                    report.splits += 1;
                    report.touched(&span);
                    continue;
                }
                Step::Keep => {}
                Step::Replace(new) => {
                    self.put(first, new);
                    report.changed(&span);
                }
                Step::Remove => {
                    self.leaves.clear(span.clone());
                    if !self.in_whole_table(first, leaf.level, range) {
                        report.changed(&span);
                    }
                }
            }
            page = span.end;
        }
        Ok(())
    }

    fn next_leaf(&self, page: u64, end: u64) -> Option<(u64, Leaf)> {
        if page >= end {
            return None;
        }
        let mut leaves = self.leaves(page..end);
        leaves.next()
    }

    /// Replaces a leaf by a table with its parts, for the sake of `page`.
    fn split(&mut self, first: u64, page: u64) -> Result<(), Failure> {
        let Some(leaf) = self.starting_at(first) else {
            return Ok(());
        };
        self.take_table(page)?;
        self.tables.insert((leaf.level, first));
        for index in 0..ENTRIES {
            self.put(first + index * pages(leaf.level - 1), leaf.part(index));
        }
        Ok(())
    }

    /// Makes leaves of the tables of this level that lie wholly in `range`, where one leaf says the same.
    fn collapse(&mut self, range: &Pages, level: u32, report: &mut Report) {
        let tables = self.tables.range((level, range.start)..(level, range.end));
        let spans = tables.map(|&(_, first)| first..first + pages(level));
        let whole: Vec<Pages> = spans.filter(|span| within(span, range)).collect();
        for span in whole {
            let Some(leaf) = self.together(&span, level) else {
                continue;
            };
            self.tables.remove(&(level, span.start));
            self.put(span.start, leaf);
            report.tables += 1;
            report.changed(&span);
        }
    }

    /// The one leaf that says what is said about these pages. It is accessed or dirty if any part was.
    fn together(&self, span: &Pages, level: u32) -> Option<Leaf> {
        let first = self.starting_at(span.start)?;
        if !first.hpa.is_multiple_of(pages(level) * PAGE) {
            return None;
        }
        let mut whole = Leaf { level, ..first };
        for index in 0..ENTRIES {
            let part = self.starting_at(span.start + index * pages(level - 1))?;
            let Leaf {
                accessed, dirty, ..
            } = part;
            let expected = Leaf {
                accessed,
                dirty,
                ..whole.part(index)
            };
            if part != expected {
                return None;
            }
            whole.accessed |= accessed;
            whole.dirty |= dirty;
        }
        Some(whole)
    }

    /// The level of the entry that says that a page is not mapped.
    pub fn hole_level(&self, page: u64) -> u32 {
        let has_table = |&level: &u32| self.tables.contains(&(level, page - page % pages(level)));
        let levels = 1..=self.shape.root_level;
        let lowest = levels.into_iter().find(has_table);
        lowest.map_or(self.shape.root_level, |level| level - 1)
    }
}

impl Leaf {
    /// What it allows now.
    pub const fn allowed(&self) -> Permissions {
        if self.tracked {
            self.permissions.without(Permissions::WRITE)
        } else {
            self.permissions
        }
    }

    /// Whether it allows an access now.
    pub const fn allows(&self, access: Access) -> bool {
        self.allowed().allows(needed(access))
    }

    /// Its part `index`, one level lower.
    const fn part(self, index: u64) -> Self {
        Self {
            level: self.level - 1,
            hpa: self.hpa + index * pages(self.level - 1) * PAGE,
            ..self
        }
    }
}

fn within(span: &Pages, range: &Pages) -> bool {
    range.start <= span.start && span.end <= range.end
}

/// The permission that an access takes.
const fn needed(access: Access) -> Permissions {
    match access {
        Access::Read => Permissions::READ,
        Access::Write => Permissions::WRITE,
        Access::Execute => Permissions::EXECUTE,
    }
}

#[cfg(test)]
mod tests;
