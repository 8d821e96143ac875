//! Looking a page up without changing anything.

use crate::addr::GpaRange;
use crate::format::{Entry, Tables};
use crate::tracking::{Flags, Never, Plane, Tree};
use crate::walk::{Action, Look, Place, Run, Visitor, Walk};

impl<const PLANES: usize> Tree<PLANES> {
    /// Whether page `page` is marked or, where memory was short, an entry over it.
    pub(crate) fn has(&self, page: u64, plane: Plane) -> bool {
        let mut lookup = Lookup { found: None };
        Walk::look(self, GpaRange::of(page, page + 1)).run(&mut lookup);
        lookup.found.is_some_and(|flags| flags.has(plane))
    }

    /// Whether nothing is dirty anywhere.
    pub(crate) fn is_clean(&self) -> bool {
        self.root().is_clean()
    }
}

/// Finds the flags of one page.
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
