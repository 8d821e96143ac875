//! What a visitor is shown: one entry, or one leaf table's run, and no more than its walk allows.

use crate::sync::atomic::{AtomicU64, Ordering};
use core::marker::PhantomData;

use crate::addr::{GpaRange, Level};
use crate::format::{Entry, Format, TableId, Tables};
use crate::notify::OpenRange;
use crate::walk::cursor::Cursor;

/// Access of a walk that only looks.
#[derive(Debug)]
pub enum Look {}

/// Access of a walk inside an open notifier range, which stays open as long as the walk lasts.
#[derive(Debug)]
pub struct Change<'o>(PhantomData<&'o OpenRange>);

/// Access of a walk that records dirtiness and changes no translation.
#[derive(Debug)]
pub(crate) enum Record {}

/// The accesses that lend atomics. Sealed.
pub trait Writes: sealed::Sealed {}

mod sealed {
    pub trait Sealed {}
    impl Sealed for super::Change<'_> {}
    impl Sealed for super::Record {}
}

impl Writes for Change<'_> {}
impl Writes for Record {}

type LeafOf<T> = <<T as Tables>::Format as Format>::Leaf;

/// An entry above level 0, as it was when the walk read it.
pub struct Place<'c, 't, T: Tables, A> {
    cursor: &'c Cursor<'t, T>,
    raw: u64,
    entry: Entry<LeafOf<T>>,
    access: PhantomData<A>,
}

impl<'c, 't, T: Tables, A> Place<'c, 't, T, A> {
    #[inline]
    pub(crate) fn new(cursor: &'c Cursor<'t, T>) -> Self {
        let raw = cursor.slot().load(Ordering::SeqCst);
        let entry = cursor.tables().format().decode(raw, cursor.level());
        Self {
            cursor,
            raw,
            entry,
            access: PhantomData,
        }
    }

    /// The entry's level, 1 or higher.
    pub fn level(&self) -> Level {
        self.cursor.level()
    }

    /// What the entry said.
    pub fn entry(&self) -> Entry<LeafOf<T>> {
        self.entry
    }

    /// The raw value that it was decoded from.
    pub fn raw(&self) -> u64 {
        self.raw
    }

    /// Everything the entry maps, also where that exceeds the walk's range.
    pub fn span(&self) -> GpaRange {
        self.cursor.span()
    }

    /// The part of the span that lies in the walk's range.
    pub fn part(&self) -> GpaRange {
        self.cursor.part()
    }
}

impl<'t, T: Tables, A: Writes> Place<'_, 't, T, A> {
    /// The live entry, lent for this visit. A change of it is one atomic read-modify-write; where a compare-exchange
    /// against [`Place::raw`] fails, answer [`Action::Again`](crate::walk::Action::Again).
    ///
    /// It cannot be kept for when the open range is closed:
    ///
    /// ```compile_fail
    /// # use core::sync::atomic::AtomicU64;
    /// # use ept::format::Tables;
    /// # use ept::walk::{Action, Change, Place, Run, Visitor};
    /// struct Keep<'t>(Vec<&'t AtomicU64>);
    /// impl<'t, 'o, T: Tables> Visitor<'t, T, Change<'o>> for Keep<'t> {
    ///     type Stop = ();
    ///     fn entry(&mut self, place: &Place<'_, 't, T, Change<'o>>) -> Action<()> {
    ///         self.0.push(place.slot());
    ///         Action::Continue
    ///     }
    ///     fn run(&mut self, _: &Run<'_, 't, T, Change<'o>>) -> Action<()> {
    ///         Action::Continue
    ///     }
    /// }
    /// ```
    pub fn slot(&self) -> &AtomicU64 {
        self.cursor.slot()
    }

    /// The tables from this entry's up to the root, each with the index taken in it.
    #[inline]
    pub(crate) fn ancestors(&self) -> impl Iterator<Item = (&'t T::Upper, usize)> {
        ancestors(self.cursor)
    }
}

/// The part of one leaf table that lies in the walk's range.
pub struct Run<'c, 't, T: Tables, A> {
    cursor: &'c Cursor<'t, T>,
    id: TableId,
    table: T::Leaf<'t>,
    access: PhantomData<A>,
}

impl<'c, 't, T: Tables, A> Run<'c, 't, T, A> {
    #[inline]
    pub(crate) fn new(cursor: &'c Cursor<'t, T>, table: TableId) -> Self {
        Self {
            cursor,
            id: table,
            table: cursor.tables().leaf(table),
            access: PhantomData,
        }
    }

    /// Everything the table maps.
    #[inline]
    pub fn span(&self) -> GpaRange {
        self.cursor.span()
    }

    /// The pages of the run.
    #[inline]
    pub fn part(&self) -> GpaRange {
        self.cursor.part()
    }

    /// The raw value of the table's entry `index` (0 to 511, counted from the span's start).
    pub fn peek(&self, index: usize) -> u64 {
        T::peek(self.table, index)
    }

    pub(crate) fn decode(&self, index: usize) -> Entry<LeafOf<T>> {
        let format = self.cursor.tables().format();
        format.decode(self.peek(index), Level::PAGE)
    }
}

impl<'t, T: Tables, A: Writes> Run<'_, 't, T, A> {
    /// The live table, lent for this visit as [`Place::slot`] is.
    #[inline]
    pub fn table(&self) -> T::Leaf<'_> {
        let tables: &T = self.cursor.tables();
        tables.leaf(self.id)
    }

    /// The live table, for as long as the tables are lent.
    #[inline]
    pub(crate) fn live_table(&self) -> T::Leaf<'t> {
        self.table
    }

    /// The tables above the leaf table, lowest first, each with the index taken in it.
    #[inline]
    pub(crate) fn ancestors(&self) -> impl Iterator<Item = (&'t T::Upper, usize)> {
        ancestors(self.cursor)
    }
}

#[inline]
fn ancestors<'t, T: Tables>(cursor: &Cursor<'t, T>) -> impl Iterator<Item = (&'t T::Upper, usize)> {
    let mut next = Some(cursor.level());
    core::iter::from_fn(move || {
        let level = next?;
        next = (level < cursor.root_level()).then(|| level.up());
        Some((cursor.table(level), cursor.index(level)))
    })
}
