//! A table, the list of its pages, and the operations that owe no flush.

use ept::format::{Entry, HardwareFormat, Leaf, MemoryType, Permissions};
use ept::stage2::{Attributes, Flush, MapError, Stage2};
use ept::{GpaRange, Hpa, Level};

use crate::formats::{Hardware, Kept};
use crate::mmu::{Mmu, Touch};
use crate::model::Pages;
use crate::pages::{count, gpa, pages};
use crate::stage2::script::{Fate, Lead, Looks, Step, Window};

/// What should hold for a page.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct Page {
    /// How far it leads, modulo 2⁶⁴: the same for all pages of a leaf.
    distance: u64,
    permissions: Permissions,
    memory: MemoryType,
    accessed: bool,
    pub(super) dirty: bool,
}

impl Page {
    pub(super) fn writable(self) -> bool {
        self.permissions.allows(Permissions::WRITE)
    }

    /// Whether one leaf can say both.
    pub(super) fn like(self, other: Self) -> bool {
        let Self {
            accessed, dirty, ..
        } = other;
        let other_flags = Self {
            accessed,
            dirty,
            ..self
        };
        other_flags == other
    }

    pub(super) fn with_flags_of(self, other: Self) -> Self {
        Self {
            accessed: self.accessed || other.accessed,
            dirty: self.dirty || other.dirty,
            ..self
        }
    }

    pub(super) fn leads_to(self, page: u64) -> u64 {
        (page << 12).wrapping_add(self.distance)
    }
}

/// Flushes that are not done at one time, at most.
const MOST_OWED: usize = 48;

/// A table under test.
pub(super) struct Guest<'t, 'm, F> {
    pub(super) stage2: &'t Stage2<'m, F>,
    pub(super) format: F,
    pub(super) hardware: Hardware,
    pub(super) mmu: Mmu<'m>,
    pub(super) window: Window,
    pub(super) model: Pages<Page>,
    put_off: Vec<Flush<'t, 'm, F>>,
    /// Flushes that nobody will ever do.
    forgotten: usize,
    /// Tables in them.
    lost: usize,
}

impl<'t, 'm, F: HardwareFormat> Guest<'t, 'm, F> {
    pub(super) fn new(
        stage2: &'t Stage2<'m, F>,
        format: F,
        hardware: Hardware,
        mmu: Mmu<'m>,
        window: Window,
    ) -> Self {
        Self {
            stage2,
            format,
            hardware,
            mmu,
            window,
            model: Pages::default(),
            put_off: Vec::new(),
            forgotten: 0,
            lost: 0,
        }
    }

    pub(super) fn step(&mut self, step: Step) {
        match step {
            Step::Map(at, lead, looks) => self.map(self.window.range(at), lead, looks),
            Step::Change(change, at, open, fate) => {
                self.change(change, self.window.range(at), open, fate);
            }
            Step::Apply(apply, at, open) => self.apply(apply, self.window.range(at), open),
            Step::Touch { at, write, stride } => {
                self.touch(self.window.range(at), write, u64::from(stride) + 1);
            }
            Step::Lookup(page) => self.lookup(page),
            Step::Dump(at) => self.dump(self.window.range(at)),
            Step::Flush => self.put_off.drain(..).for_each(Flush::done),
        }
    }

    /// Flushes that are not done.
    pub(super) fn owed(&self) -> usize {
        self.put_off.len() + self.forgotten
    }

    /// What can become of a flush: entries that are broken until it is done would not be found by the hardware that
    /// the list of pages is compared with, and a table bears no more than 64 that are not done.
    fn bearable(&self, flush: &Flush<'t, 'm, F>, fate: Fate) -> Fate {
        let broken = F::BREAKS && flush.tally().splits + flush.tally().collapses > 0;
        if broken || self.owed() >= MOST_OWED {
            Fate::Done
        } else {
            fate
        }
    }

    pub(super) fn owe(&mut self, flush: Flush<'t, 'm, F>, fate: Fate) {
        let (before, tables) = (self.stage2.available(), flush.tables());
        match self.bearable(&flush, fate) {
            Fate::Done => {
                flush.done();
                assert_eq!(self.stage2.available(), before + tables);
            }
            Fate::Later => self.put_off.push(flush),
            Fate::Never => {
                self.lost += tables;
                self.forgotten += usize::from(flush.interval().is_some());
                drop(flush);
                assert_eq!(self.stage2.available(), before, "never flushed, used again");
            }
        }
    }

    fn map(&mut self, range: GpaRange, lead: Lead, looks: Looks) {
        let hpa = lead.hpa(range, self.format.hpa_bits());
        let attributes = looks.attributes();
        let enough = self.stage2.worst_case(range) <= self.stage2.available();
        let result = self.stage2.map(range, hpa, attributes);
        let taken = self.model.first(range);
        let end = match result {
            Ok(()) => {
                assert!(taken.is_none(), "{range} had page {taken:x?}");
                range.end_page()
            }
            Err(MapError::Occupied { at }) => {
                assert_eq!(Some(at.page()), taken);
                at.page()
            }
            Err(MapError::Exhausted(exhausted)) => {
                assert_eq!(self.stage2.available(), 0, "{exhausted}");
                assert!(!enough, "the worst case was there");
                let reached = exhausted.reached.page();
                assert!(range.contains(exhausted.reached));
                assert!(taken.is_none_or(|page| reached <= page));
                reached
            }
            Err(MapError::Beyond { .. }) => {
                assert!(!self.window.span.covers(&range));
                return;
            }
            Err(MapError::Unsupported(_)) => {
                assert!(!self.supports(range, hpa, attributes));
                return;
            }
            Err(MapError::Unforgotten) => {
                assert!(F::BREAKS && self.owed() > 0);
                return;
            }
            Err(error @ (MapError::Contended { .. } | MapError::Unflushed)) => panic!("{error}"),
        };
        assert!(self.supports(range, hpa, attributes));
        assert!(self.window.span.covers(&range));
        if range.first_page() < end {
            let page = self.fresh(range, hpa, attributes);
            self.model.set(pages(range.first_page(), end), page);
        }
        self.compare(range);
    }

    /// Whether the format has leaves for all of it.
    fn supports(&self, range: GpaRange, Hpa(hpa): Hpa, attributes: Attributes) -> bool {
        let end = u128::from(hpa) + range.bytes();
        end <= 1 << self.format.hpa_bits()
            && hpa.is_multiple_of(4096)
            && self.format.admits(attributes.permissions)
            && self.format.caches(attributes.memory)
    }

    /// A page as a map makes it.
    fn fresh(&self, range: GpaRange, hpa: Hpa, attributes: Attributes) -> Page {
        let Attributes {
            permissions,
            memory,
            ..
        } = attributes;
        // A memory type that is written as bits may have a name.
        let leaf = Leaf::new(Hpa(0), permissions, memory);
        let raw = self.format.encode(Entry::Leaf(leaf), Level::PAGE);
        let Entry::Leaf(Leaf { memory, .. }) = self.format.decode(raw, Level::PAGE) else {
            panic!("{leaf:?} is no leaf");
        };
        let page = Page {
            distance: hpa.0.wrapping_sub(range.first_page() << 12),
            permissions,
            memory,
            accessed: self.hardware.accessed == Kept::Always,
            dirty: false,
        };
        self.counted(page)
    }

    /// The page, dirty where nobody could say that it is not.
    pub(super) fn counted(&self, page: Page) -> Page {
        let counts = self.hardware.dirty == Kept::Always && page.writable();
        Page {
            dirty: page.dirty || counts,
            ..page
        }
    }

    pub(super) fn permitted(&self, page: Page, permissions: Permissions) -> Page {
        self.counted(Page {
            permissions,
            ..page
        })
    }

    pub(super) fn cleaned(&self, page: Page) -> Page {
        self.counted(Page {
            dirty: false,
            ..page
        })
    }

    pub(super) fn aged(&self, page: Page) -> Page {
        Page {
            accessed: self.hardware.accessed == Kept::Always,
            ..page
        }
    }

    pub(super) fn is_accessed(page: Page) -> bool {
        page.accessed
    }

    /// What the guest does is noted by hardware for the whole of a leaf.
    fn touch(&mut self, range: GpaRange, write: bool, stride: u64) {
        let pages = range.first_page()..range.end_page();
        for page in pages.step_by(usize::try_from(stride).unwrap()).take(64) {
            let Some(found) = self.model.get(page) else {
                continue;
            };
            let allowed = if write {
                found.writable()
            } else {
                found.permissions.allows(Permissions::READ)
            };
            if !allowed || self.hardware.accessed == Kept::Never {
                continue;
            }
            let touch = if write { Touch::Write } else { Touch::Read };
            self.mmu.touch(gpa(page).0, touch);
            let dirties = write && self.hardware.dirty == Kept::Hardware;
            self.model.update(self.leaf(page), |old| {
                old.map(|old| Page {
                    accessed: true,
                    dirty: old.dirty || dirties,
                    ..old
                })
            });
        }
    }

    /// The pages of the leaf over `page`, as hardware reads it; as the crate does, while hardware is not to use it.
    pub(super) fn leaf(&self, page: u64) -> GpaRange {
        let found = self.mmu.leaf_pages(gpa(page).0);
        let broken = || F::BREAKS.then(|| self.stage2.lookup(page).0.pages());
        let span = found.or_else(broken).expect("a page is mapped");
        let first = page & !(span - 1);
        pages(first, first + span)
    }

    /// `range`, and all of the leaves that lie across its edges.
    pub(super) fn widened(&self, range: GpaRange) -> GpaRange {
        let ends = [range.first_page(), range.end_page() - 1];
        ends.iter()
            .filter(|page| self.model.get(**page).is_some())
            .fold(range, |wide, page| wide.hull(&self.leaf(*page)))
    }

    /// The leaves that meet `range`.
    pub(super) fn leaves(&self, range: GpaRange) -> Vec<GpaRange> {
        let mut leaves = Vec::new();
        for (run, _) in self.model.runs(range) {
            let mut next = run.first_page();
            while next < run.end_page() {
                let leaf = self.leaf(next);
                next = leaf.end_page();
                leaves.push(leaf);
            }
        }
        leaves.dedup();
        leaves
    }

    fn lookup(&self, page: u64) {
        let (level, entry) = self.stage2.lookup(page);
        match (entry, self.model.get(page)) {
            (Entry::Absent, None) => {}
            (Entry::Leaf(leaf), Some(page_of)) => {
                let first = page & !(level.pages() - 1);
                assert_eq!(leaf, leaf_of(page_of, first), "page {page:#x}");
            }
            (entry, expected) => panic!("page {page:#x} is {entry:?} and not {expected:?}"),
        }
    }

    /// Every leaf of the range stands in a line, and no more lines than leaves are there.
    fn dump(&self, range: GpaRange) {
        let Some(known) = range.intersection(&self.window.span) else {
            return;
        };
        let dump = self.stage2.dump(range).to_string();
        let leaves = self.leaves(known);
        assert!(dump.lines().count() <= leaves.len(), "{dump}");
        let runs = self.model.runs(known);
        assert!(dump.lines().count() >= runs.len(), "{dump}");
        for (run, page) in runs {
            let mut lines = dump.lines();
            let first = self.leaf(run.first_page());
            if first.first_page() == run.first_page() {
                let starts = format!("{}..=", run.start());
                let line = lines.find(|line| line.starts_with(&starts));
                let leads = format!(
                    " -> {} {} ",
                    Hpa(page.leads_to(run.first_page())),
                    page.permissions
                );
                assert!(
                    line.is_some_and(|line| line.contains(&leads)),
                    "{run}: {dump}"
                );
            }
        }
    }

    /// Every page of `range` is what the model says, for the crate and for the raw words' own reader.
    pub(super) fn compare(&self, range: GpaRange) {
        let Some(range) = range.intersection(&self.window.span) else {
            return;
        };
        let runs = self.model.runs(range);
        let mut runs = runs.iter().peekable();
        let mut next = range.first_page();
        while next < range.end_page() {
            while runs.next_if(|(run, _)| run.end_page() <= next).is_some() {}
            let (level, entry) = self.stage2.lookup(next);
            let first = next & !(level.pages() - 1);
            let span = pages(first, first + level.pages());
            match entry {
                Entry::Leaf(leaf) => self.compare_leaf(span, leaf, next),
                _ => {
                    let ahead = runs.peek().filter(|(run, _)| run.overlaps(&span));
                    assert_eq!(ahead, None, "{span} is {entry:?}");
                    // One entry: whatever reads it finds the same for all of it.
                    assert_eq!(self.mmu.translate(gpa(next).0), None, "page {next:#x}");
                }
            }
            next = span.end_page();
        }
    }

    fn compare_leaf(&self, span: GpaRange, leaf: Leaf, next: u64) {
        let expected = self.model.runs(span);
        let [(run, page)] = expected.as_slice() else {
            panic!("{span} is {leaf:?} and not {expected:x?}");
        };
        assert_eq!(*run, span, "{leaf:?}");
        assert_eq!(leaf, leaf_of(*page, span.first_page()), "{span}");
        for at in [span.first_page(), next, span.end_page() - 1] {
            let found = self.mmu.translate(gpa(at).0);
            let expected = Some((page.leads_to(at), page.permissions));
            assert_eq!(found, expected, "page {at:#x} as hardware reads it");
        }
    }

    pub(super) fn audit(&self) {
        self.compare(self.window.span);
    }

    /// Unmaps everything: every table comes back.
    pub(super) fn end(mut self, tables: usize) {
        self.put_off.drain(..).for_each(Flush::done);
        let whole = self.window.span;
        let mapped = self.model.ranges(whole, |_| true);
        let (flush, result) = self.unmapped(whole);
        result.unwrap();
        if count(&mapped) > 0 {
            assert!(flush.tally().entries > 0);
        }
        flush.done();
        assert_eq!(
            self.stage2.available(),
            tables - self.lost,
            "tables were lost"
        );
        assert_eq!(self.stage2.dump(whole).to_string(), "");
    }
}

/// The leaf whose first page is `first`.
fn leaf_of(page: Page, first: u64) -> Leaf {
    Leaf {
        hpa: Hpa(page.leads_to(first)),
        permissions: page.permissions,
        memory: page.memory,
        accessed: page.accessed,
        dirty: page.dirty,
        write_tracked: false,
    }
}
