//! Making detail before it is needed.

use crate::addr::GpaRange;
use crate::format::{Entry, OutOfTables};
use crate::tracking::{Never, Tree};
use crate::walk::{Action, Outcome, Place, Record, Run, Visitor, Walk};

impl<const PLANES: usize> Tree<PLANES> {
    /// Makes every leaf table that `range` can need.
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

/// Goes down everywhere.
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
