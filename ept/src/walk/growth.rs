//! Where a walk gets new tables from, if it may make any.

use crate::sync::atomic::Ordering;
use core::convert::Infallible;

use crate::format::{Allocate, Entry, Format, OutOfTables, TableId, Tables};
use crate::walk::Exhausted;
use crate::walk::cursor::Cursor;

/// Whether and how a walk gets new tables.
pub(crate) trait Growth<T: Tables> {
    type Error;

    /// Makes a table of `entry`, whose raw value is `raw`, and links it as `replacing` has the new raw value.
    fn fill(
        &self,
        cursor: &Cursor<'_, T>,
        raw: u64,
        entry: Entry<<T::Format as Format>::Leaf>,
        replacing: impl Fn(u64) -> u64,
    ) -> Result<Filled, Self::Error>;
}

pub(crate) enum Filled {
    /// The entry is now this table.
    Linked(TableId),
    /// Somebody else changed the entry first.
    Changed,
    /// This walk makes no tables.
    Never,
}

/// Absent entries and leaves stay what they are.
pub(crate) struct NoGrowth;

impl<T: Tables> Growth<T> for NoGrowth {
    type Error = Infallible;

    fn fill(
        &self,
        _: &Cursor<'_, T>,
        _: u64,
        _: Entry<<T::Format as Format>::Leaf>,
        _: impl Fn(u64) -> u64,
    ) -> Result<Filled, Infallible> {
        Ok(Filled::Never)
    }
}

/// Tables are made where the visitor asks for them.
pub(crate) struct Growing;

impl<T: Allocate> Growth<T> for Growing {
    type Error = Exhausted;

    /// The new table is complete before the exchange links it; the loser of a race gives its back.
    #[cold]
    fn fill(
        &self,
        cursor: &Cursor<'_, T>,
        raw: u64,
        entry: Entry<<T::Format as Format>::Leaf>,
        replacing: impl Fn(u64) -> u64,
    ) -> Result<Filled, Exhausted> {
        let (tables, level) = (cursor.tables(), cursor.level());
        let below = level.down();
        let first_page = cursor.span().first_page();
        let table = tables
            .grow(below, first_page, entry)
            .map_err(|OutOfTables| Exhausted {
                reached: cursor.gpa(),
            })?;
        let new = replacing(tables.format().encode(Entry::Table(table), level));
        match cursor
            .slot()
            .compare_exchange(raw, new, Ordering::SeqCst, Ordering::Relaxed)
        {
            Ok(_) => Ok(Filled::Linked(table)),
            Err(_) => {
                tables.give_back(below, table);
                Ok(Filled::Changed)
            }
        }
    }
}
