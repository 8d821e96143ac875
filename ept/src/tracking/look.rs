//! Queries of a tree, which change nothing.

use crate::addr::{Gpa, GpaRange};
use crate::format::{Entry, Tables};
use crate::tracking::{Flags, Never, Plane, Tree};
use crate::walk::{Action, Look, Outcome, Place, Run, Visitor, Walk};

impl<const PLANES: usize> Tree<PLANES> {
    /// Returns whether page `page` has the property `plane`. If memory for 4 KiB detail was short, all pages of an entry
    /// have it together.
    pub(crate) fn has(&self, page: u64, plane: Plane) -> bool {
        let mut lookup = Lookup { found: None };
        Walk::look(self, GpaRange::of(page, page + 1)).run(&mut lookup);
        lookup.found.is_some_and(|flags| flags.has(plane))
    }

    /// Returns whether no page is dirty.
    pub(crate) fn is_clean(&self) -> bool {
        self.root().is_clean()
    }

    /// Returns the address of the first dirty page in `range`, all of which lies in one region.
    pub(crate) fn first_dirty(&self, range: GpaRange) -> Option<Gpa> {
        match Walk::look(self, range).run(&mut FirstDirty) {
            Outcome::Stopped { value, .. } => Some(value),
            // This visitor never answers `Again`, so the walk does not end as contended.
            Outcome::Completed | Outcome::Contended { .. } => None,
        }
    }
}

/// Stops at the first dirty page.
struct FirstDirty;

impl<'t, const PLANES: usize> Visitor<'t, Tree<PLANES>, Look> for FirstDirty {
    type Stop = Gpa;

    fn entry(&mut self, place: &Place<'_, 't, Tree<PLANES>, Look>) -> Action<Gpa> {
        match place.entry() {
            Entry::Leaf(flags) if flags.dirty() => Action::Stop(place.part().start()),
            Entry::Leaf(_) | Entry::Absent | Entry::Table(_) => Action::Continue,
        }
    }

    fn run(&mut self, run: &Run<'_, 't, Tree<PLANES>, Look>) -> Action<Gpa> {
        let base = run.span().first_page();
        let mut pages = run.part().first_page()..run.part().end_page();
        let dirty = pages.find(|page| {
            let index = usize::try_from(page - base);
            index.is_ok_and(|index| run.peek(index) & Plane::Dirty.flag() != 0)
        });
        match dirty {
            Some(page) => Action::Stop(GpaRange::of(page, page + 1).start()),
            None => Action::Continue,
        }
    }
}

/// Reads the flags of one page.
struct Lookup {
    found: Option<Flags>,
}

impl<'t, const PLANES: usize> Visitor<'t, Tree<PLANES>, Look> for Lookup {
    type Stop = Never;

    fn entry(&mut self, place: &Place<'_, 't, Tree<PLANES>, Look>) -> Action<Never> {
        if let Entry::Leaf(flags) = place.entry() {
            self.found = Some(flags);
        }
        Action::Continue
    }

    fn run(&mut self, run: &Run<'_, 't, Tree<PLANES>, Look>) -> Action<Never> {
        let index = run.part().first_page() - run.span().first_page();
        if let Ok(index) = usize::try_from(index)
            && let Entry::Leaf(flags) = run.decode(index)
        {
            self.found = Some(flags);
        }
        Action::Continue
    }
}
