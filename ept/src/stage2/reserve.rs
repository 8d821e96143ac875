//! Making tables before they are needed.

use crate::addr::{GpaRange, Level};
use crate::format::{Entry, HardwareFormat};
use crate::stage2::{MapError, Never, Stage2};
use crate::walk::{Action, Outcome, Place, Record, Run, Visitor, Walk};

impl<F: HardwareFormat> Stage2<'_, F> {
    /// Makes every table that mapping `range` page by page can need, so that it cannot run out of tables later, however
    /// many others take meanwhile. Nothing is mapped by it. The tables stay until an
    /// unmap of all that they describe, or a collapse, takes them out.
    ///
    /// Huge leaves stay what they are: [`Stage2::split`] those.
    ///
    /// # Errors
    /// [`MapError::Beyond`], [`MapError::Unflushed`], [`MapError::Contended`]; [`MapError::Exhausted`] says up to where
    /// the tables are made.
    pub fn reserve(&self, range: GpaRange) -> Result<(), MapError> {
        let turn = self.turn(range)?;
        let ended = Walk::record(self, range).run_allocating_in_turn(&mut Reserving);
        turn.end();
        match ended {
            Ok(Outcome::Completed) => Ok(()),
            Ok(Outcome::Stopped { value, .. }) => match value {},
            Ok(Outcome::Contended { at }) => Err(MapError::Contended { at }),
            Err(error) => Err(MapError::Exhausted(error)),
        }
    }
}

/// Goes down everywhere but into huge leaves.
struct Reserving;

impl<'t, 'm, F: HardwareFormat> Visitor<'t, Stage2<'m, F>, Record> for Reserving
where
    'm: 't,
{
    type Stop = Never;

    fn entry(&mut self, place: &Place<'_, 't, Stage2<'m, F>, Record>) -> Action<Never> {
        match place.entry() {
            // A leaf table has nothing to be made below it.
            Entry::Table(_) if place.level() == Level::MIB2 => Action::Skip,
            Entry::Table(_) => Action::Continue,
            Entry::Absent => Action::Descend,
            Entry::Leaf(_) => Action::Skip,
        }
    }

    fn run(&mut self, _: &Run<'_, 't, Stage2<'m, F>, Record>) -> Action<Never> {
        Action::Continue
    }
}
