//! Allocation of new tables during a walk.

use crate::sync::atomic::Ordering;
use core::convert::Infallible;

use crate::format::{Allocate, Entry, Format, OutOfTables, TableId, Tables};
use crate::walk::Exhausted;
use crate::walk::cursor::Cursor;

/// Policy of a walk for new tables.
pub(crate) trait Growth<T: Tables> {
    type Error;

    /// Replaces `entry`, whose raw value is `raw`, by a table that says the same. `replacing` maps the raw value of the new
    /// entry to the one that is written.
    fn fill(
        &self,
        cursor: &Cursor<'_, T>,
        raw: u64,
        entry: Entry<<T::Format as Format>::Leaf>,
        replacing: impl Fn(u64) -> u64,
    ) -> Result<Filled, Self::Error>;
}

pub(crate) enum Filled {
    /// The entry now points to this table.
    Linked(TableId),
    /// Another thread changed the entry first.
    Changed,
    /// This walk allocates no tables.
    Never,
}

/// Policy that allocates no tables.
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

/// Policy that allocates a table when the visitor asks for one.
pub(crate) struct Growing;

impl<T: Allocate> Growth<T> for Growing {
    type Error = Exhausted;

    /// The new table is complete before the compare-exchange links it. If that fails, the table is given back.
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
