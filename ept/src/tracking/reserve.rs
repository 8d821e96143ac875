//! Allocating leaf tables before they are needed.

use crate::addr::GpaRange;
use crate::format::{Entry, OutOfTables};
use crate::tracking::{Never, Tree};
use crate::walk::{Action, Outcome, Place, Record, Run, Visitor, Walk};

impl<const PLANES: usize> Tree<PLANES> {
    /// Allocates every leaf table that `range` can need.
    pub(crate) fn reserve(&self, range: GpaRange) -> Result<(), OutOfTables> {
        for (part, _) in self.regions().parts(range) {
            let mut left = Some(part);
            while let Some(part) = left {
                let outcome = Walk::record(self, part).run_allocating(&mut Reserving);
                left = match outcome.map_err(|_| OutOfTables)? {
                    Outcome::Completed => None,
                    Outcome::Contended { at } => part.from(at),
                    Outcome::Stopped { value, .. } => match value {},
                };
            }
        }
        Ok(())
    }
}

/// A visitor that makes every table on its way.
struct Reserving;

impl<'t, const PLANES: usize> Visitor<'t, Tree<PLANES>, Record> for Reserving {
    type Stop = Never;

    fn entry(&mut self, place: &Place<'_, 't, Tree<PLANES>, Record>) -> Action<Never> {
        match place.entry() {
            Entry::Table(_) => Action::Continue,
            Entry::Absent => Action::Descend,
            Entry::Leaf(_) => Action::Split,
        }
    }

    fn run(&mut self, _: &Run<'_, 't, Tree<PLANES>, Record>) -> Action<Never> {
        Action::Continue
    }
}
