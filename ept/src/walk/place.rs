//! Arguments of a visitor: an entry, or the run of a leaf table. They allow what the access of the walk allows.

use crate::sync::atomic::{AtomicU64, Ordering};
use core::marker::PhantomData;

use crate::addr::{GpaRange, Level};
use crate::format::{Entry, Format, TableId, Tables};
use crate::notify::OpenRange;
use crate::walk::cursor::Cursor;

/// Access of a walk that changes nothing.
#[derive(Debug)]
pub enum Look {}

/// Access of a walk inside an open notifier range. The range stays open for as long as the walk lasts.
#[derive(Debug)]
pub struct Change<'o>(PhantomData<&'o OpenRange>);

/// Access of a walk that records properties of pages and changes no translation.
#[derive(Debug)]
pub(crate) enum Record {}

/// Accesses that allow writes to entries. Sealed.
pub trait Writes: sealed::Sealed {}

mod sealed {
    pub trait Sealed {}
    impl Sealed for super::Change<'_> {}
    impl Sealed for super::Record {}
}

impl Writes for Change<'_> {}
impl Writes for Record {}

type LeafOf<T> = <<T as Tables>::Format as Format>::Leaf;

/// An entry above level 0, with the value that the walk read.
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

    /// Returns the level of the entry, which is 1 or higher.
    pub fn level(&self) -> Level {
        self.cursor.level()
    }

    /// Returns the decoded value of the entry.
    pub fn entry(&self) -> Entry<LeafOf<T>> {
        self.entry
    }

    /// Returns the raw value of the entry.
    pub fn raw(&self) -> u64 {
        self.raw
    }

    /// Returns everything that the entry maps, including pages outside the range of the walk.
    pub fn span(&self) -> GpaRange {
        self.cursor.span()
    }

    /// Returns the part of the span that lies in the range of the walk.
    pub fn part(&self) -> GpaRange {
        self.cursor.part()
    }
}

impl<'t, T: Tables, A: Writes> Place<'_, 't, T, A> {
    /// Returns the live entry, for the time of this visit. Change it by one atomic read-modify-write. If a compare-exchange
    /// against [`Place::raw`] fails, return [`Action::Again`](crate::walk::Action::Again).
    ///
    /// The reference cannot be kept until the open range is closed:
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

    /// Iterates over the tables from that of this entry up to the root, each with the index on the path.
    #[inline]
    pub(crate) fn ancestors(&self) -> impl Iterator<Item = (&'t T::Upper, usize)> {
        ancestors(self.cursor)
    }
}

/// The part of one leaf table that lies in the range of the walk.
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

    /// Returns everything that the table maps.
    #[inline]
    pub fn span(&self) -> GpaRange {
        self.cursor.span()
    }

    /// Returns the pages of the run.
    #[inline]
    pub fn part(&self) -> GpaRange {
        self.cursor.part()
    }

    /// Returns the raw value of entry `index` of the table (0 to 511, from the start of the span).
    pub fn peek(&self, index: usize) -> u64 {
        T::peek(self.table, index)
    }

    pub(crate) fn decode(&self, index: usize) -> Entry<LeafOf<T>> {
        let format = self.cursor.tables().format();
        format.decode(self.peek(index), Level::PAGE)
    }
}

impl<'t, T: Tables, A: Writes> Run<'_, 't, T, A> {
    /// Returns the live table, for the time of this visit, as [`Place::slot`].
    #[inline]
    pub fn table(&self) -> T::Leaf<'_> {
        let tables: &T = self.cursor.tables();
        tables.leaf(self.id)
    }

    /// Returns the live table, for as long as the tables are borrowed.
    #[inline]
    pub(crate) fn live_table(&self) -> T::Leaf<'t> {
        self.table
    }

    /// Iterates over the tables above the leaf table, lowest first, each with the index on the path.
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
