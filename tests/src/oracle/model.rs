//! Model of a stage-2 table: its expected contents after any sequence of operations and accesses.
//!
//! The model is simple enough to be checked by reading it. It keeps leaves in the model of pages that the suites of ept
//! use, one run for each leaf, and goes from leaf to leaf. It knows nothing of entries, bits and walks, and shares no
//! code with the crate under test but the types for permissions and memory types.
//!
//! It also keeps the set of tables, because an empty table prevents a larger leaf in its place, and because tables can
//! run out.
//!
//! Page `n` has the address `n * 4096`. Level 0 has leaves of one page; leaves of each level above are 512 times as
//! large.

use std::collections::BTreeSet;
use std::ops::Range;

use ept::format::{MemoryType, Permissions};

use crate::oracle::Access;
use crate::oracle::page_model;

/// Range of page numbers.
pub type Pages = Range<u64>;

/// Size of a page in bytes.
const PAGE: u64 = 4096;

/// Number of entries in a table.
const ENTRIES: u64 = 512;

/// Returns the number of pages in a leaf of this level.
pub const fn pages(level: u32) -> u64 {
    ENTRIES.pow(level)
}

/// Properties of a table format, according to its manual.
#[derive(Clone, Copy, Debug)]
pub struct Shape {
    /// Level of the entries in the root.
    pub root_level: u32,
    /// Number of entries in the root.
    pub root_entries: u64,
    /// Highest level with leaves.
    pub largest_leaf: u32,
    /// Width of host-physical addresses in bits.
    pub hpa_bits: u32,
    /// Permissions that leaves can have.
    pub permissions: &'static [Permissions],
    /// Memory types that leaves can have. The list need not be complete.
    pub memory: &'static [MemoryType],
    /// One memory type that leaves cannot have.
    pub no_memory: MemoryType,
    /// Whether the translations of a leaf must be flushed before a table with the same translations can replace it
    /// (break-before-make).
    pub breaks: bool,
    /// Whether the hardware can cache a permission fault, so that an access that is allowed later still faults until a
    /// flush.
    pub caches_faults: bool,
}

impl Shape {
    /// Returns the page after the last one that can be mapped.
    pub const fn end(&self) -> u64 {
        self.root_entries * pages(self.root_level)
    }
}

/// Leaf entry.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Leaf {
    /// Level of the leaf.
    pub level: u32,
    /// Host-physical address that it maps to.
    pub hpa: u64,
    /// Permissions of the leaf.
    pub permissions: Permissions,
    /// Memory type.
    pub memory: MemoryType,
    /// Accessed flag.
    pub accessed: bool,
    /// Dirty flag.
    pub dirty: bool,
    /// Whether writes are tracked: `permissions` contains the write permission, but the entry withholds it until the
    /// guest writes.
    pub tracked: bool,
}

/// Attributes of a mapping.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Attributes {
    /// Permissions of the guest.
    pub permissions: Permissions,
    /// Memory type.
    pub memory: MemoryType,
    /// Highest level of the leaves.
    pub largest: u32,
}

/// Operation on a table.
#[derive(Clone, Debug)]
pub enum Operation {
    /// Maps pages, none of which may be mapped, with the largest leaves that fit.
    Map {
        /// The pages.
        range: Pages,
        /// Host-physical address to map to.
        hpa: u64,
        /// Attributes of the mapping.
        attributes: Attributes,
    },
    /// Unmaps pages.
    Unmap {
        /// The pages.
        range: Pages,
    },
    /// Sets the permissions of mapped pages.
    Protect {
        /// The pages.
        range: Pages,
        /// Permissions of the guest.
        permissions: Permissions,
    },
    /// Splits leaves of higher levels.
    Split {
        /// The pages.
        range: Pages,
        /// Highest level of leaves that stay.
        largest: u32,
    },
    /// Collapses tables that one leaf can replace.
    Collapse {
        /// The pages.
        range: Pages,
        /// Highest level of the leaves.
        to: u32,
    },
    /// Records dirty leaves and clears their dirty flags.
    Clean {
        /// The pages.
        range: Pages,
    },
    /// Records accessed leaves and clears their accessed flags.
    Age {
        /// The pages.
        range: Pages,
    },
    /// Begins to track writes by withholding the write permission.
    TrackWrites {
        /// The pages.
        range: Pages,
    },
    /// Ends the tracking of writes.
    UntrackWrites {
        /// The pages.
        range: Pages,
    },
    /// Handles a refused write of the guest.
    WriteFault {
        /// The page, as a range of length 1.
        range: Pages,
    },
}

impl Operation {
    /// Returns the pages of the operation.
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

    /// Returns the name of the operation.
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

    /// Whether a notifier range must be open during the operation. Operations that only add permissions need none.
    pub const fn needs_open(&self) -> bool {
        !matches!(
            self,
            Self::Map { .. } | Self::UntrackWrites { .. } | Self::WriteFault { .. }
        )
    }

    /// Returns the same operation on other pages. A write fault takes the last of them.
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

/// Why an operation failed or stopped. It is complete for all pages before the page in the error.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Failure {
    /// The notifier range is not open.
    NotOpen,
    /// The range exceeds the address space of the table.
    Beyond,
    /// The format does not have these permissions.
    Permissions,
    /// The format does not have this memory type.
    Memory,
    /// The host-physical address is unaligned or too large.
    Address,
    /// This page is mapped already.
    Occupied(u64),
    /// No free table was left for this page.
    Exhausted(u64),
}

/// Cause of a refused write.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Fault {
    /// Writes to these pages were tracked. The pages are writable now.
    Released(Pages),
    /// The page is writable.
    Writable,
    /// The page is read-only.
    Denied,
    /// The page is not mapped.
    Absent,
}

/// Result of an operation.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Report {
    /// Success or failure.
    pub result: Result<(), Failure>,
    /// Smallest range that contains all changes: the translations to flush.
    pub interval: Option<Pages>,
    /// Number of changed entries, without splits. A removed table counts as one entry, whatever it contained.
    pub entries: u64,
    /// Number of split leaves.
    pub splits: u64,
    /// Number of tables that were freed.
    pub tables: u64,
    /// Recorded pages as maximal ranges in ascending order.
    pub recorded: Vec<Pages>,
    /// Cause of a write fault.
    pub fault: Option<Fault>,
}

impl Report {
    /// Returns a report without changes.
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

    /// Records a range that lies after all others.
    pub fn record(&mut self, span: &Pages) {
        match self.recorded.last_mut() {
            Some(last) if last.end == span.start => last.end = span.end,
            _ => self.recorded.push(span.clone()),
        }
    }
}

/// Expected outcome of an access.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// The access is done.
    Allowed {
        /// Host-physical address of the page.
        hpa: u64,
        /// Level of the leaf.
        level: u32,
        /// Whether the access sets the dirty flag.
        first_write: bool,
    },
    /// The access is refused.
    Refused(Refusal),
}

/// Why an access is refused.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Refusal {
    /// Level at which the walk ends.
    pub level: u32,
    /// Effective permissions of the leaf, or `None` if there is no leaf.
    pub permissions: Option<Permissions>,
    /// Whether the write is refused only because writes are tracked.
    pub withheld: bool,
}

/// Model of a table.
#[derive(Clone, Debug)]
pub struct Model {
    shape: Shape,
    /// Leaves; each is a run of its own.
    leaves: page_model::Pages<Leaf>,
    /// All tables but the root: the level of the entry that points to the table, and its first page.
    tables: BTreeSet<(u32, u64)>,
    /// Number of free tables.
    free: u64,
}

/// Change to a leaf.
enum Step {
    Keep,
    Replace(Leaf),
    Remove,
    Split,
}

impl Model {
    /// Returns an empty table with this number of free tables besides the root.
    pub const fn new(shape: Shape, free: u64) -> Self {
        Self {
            shape,
            leaves: page_model::Pages::new(),
            tables: BTreeSet::new(),
            free,
        }
    }

    /// Returns the number of free tables.
    pub const fn free(&self) -> u64 {
        self.free
    }

    /// Returns the leaf that maps a page, and the first page of the leaf.
    pub fn at(&self, page: u64) -> Option<(u64, Leaf)> {
        let (run, leaf) = self.leaves.run_at(page)?;
        Some((run.start, leaf))
    }

    /// Returns the leaf that begins with this page.
    fn starting_at(&self, first: u64) -> Option<Leaf> {
        let (start, leaf) = self.at(first)?;
        (start == first).then_some(leaf)
    }

    fn put(&mut self, first: u64, leaf: Leaf) {
        self.leaves.set(first..first + pages(leaf.level), leaf);
    }

    /// Returns the leaves that map any of these pages, each with its first page.
    pub fn leaves(&self, range: Pages) -> impl Iterator<Item = (u64, Leaf)> {
        let runs = self.leaves.runs_as_set(range);
        runs.map(|(run, leaf)| (run.start, leaf))
    }

    /// Performs an access of the guest.
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

    /// Sets the flags of the leaf that begins with page `first`, if there is one.
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

    /// Performs an operation. Tables that it empties are free afterwards.
    pub fn perform(&mut self, operation: &Operation) -> Report {
        let mut report = Report::new(Ok(()));
        report.result = self
            .judge(operation)
            .and_then(|()| self.carry_out(operation, &mut report));
        self.free += report.tables;
        report
    }

    /// Checks the arguments of an operation.
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

    /// Returns the level of the largest leaf that fits at the start of `rest`, whose first page is not mapped.
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

    /// Makes the missing tables from the root down to an entry of this level.
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

    /// Removes all tables that lie entirely within `range`.
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

    /// Whether the table with the entry of this level for `page` lies entirely within `range` and is not the root.
    fn in_whole_table(&self, page: u64, level: u32, range: &Pages) -> bool {
        let first = page - page % pages(level + 1);
        level < self.shape.root_level && within(&(first..first + pages(level + 1)), range)
    }

    /// Sets permissions. Writes stay tracked if the new permissions contain the write permission.
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

    /// Replaces leaves, and splits those that lie across an edge of `range`.
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

    /// Returns the write permission to a page, or to a whole leaf that cannot be split. Adding a permission needs no
    /// flush, but a split can need one.
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

    /// Records and clears a flag. A leaf is always recorded as a whole.
    fn take(
        &mut self,
        range: &Pages,
        report: &mut Report,
        flag: fn(&mut Leaf) -> &mut bool,
    ) -> Result<(), Failure> {
        let mut taken = Report::new(Ok(()));
        self.each_leaf(range, report, |span, mut leaf| {
            // Another caller can have cleared the flag by another part of the leaf, and not flushed yet.
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

    /// Applies `decide` to each leaf with a page in `range`, and again to the parts of a leaf that it splits.
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

    /// Replaces a leaf by a table with its parts. `page` is the page in the error if no table is free.
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

    /// Replaces the tables of this level within `range` by leaves if all entries of a table fit into one leaf.
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

    /// Returns the leaf that can replace all entries of a table. It is accessed or dirty if any part is.
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

    /// Returns the level of the absent entry for a page that is not mapped.
    pub fn hole_level(&self, page: u64) -> u32 {
        let has_table = |&level: &u32| self.tables.contains(&(level, page - page % pages(level)));
        let levels = 1..=self.shape.root_level;
        let lowest = levels.into_iter().find(has_table);
        lowest.map_or(self.shape.root_level, |level| level - 1)
    }
}

impl Leaf {
    /// Returns the effective permissions.
    pub const fn allowed(&self) -> Permissions {
        if self.tracked {
            self.permissions.without(Permissions::WRITE)
        } else {
            self.permissions
        }
    }

    /// Whether the leaf allows an access.
    pub const fn allows(&self, access: Access) -> bool {
        self.allowed().allows(needed(access))
    }

    /// Returns part `index` of the leaf, one level lower.
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

/// Returns the permission that an access needs.
const fn needed(access: Access) -> Permissions {
    match access {
        Access::Read => Permissions::READ,
        Access::Write => Permissions::WRITE,
        Access::Execute => Permissions::EXECUTE,
    }
}

#[cfg(test)]
mod tests;
