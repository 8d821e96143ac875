//! The one range walker.
//!
//! A [`Walk`] goes over the pages of a range in order of address, in the tables of a [`Tables`] store. It shows a
//! [`Visitor`] every entry above level 0 that meets the range (tables, huge leaves and holes, with level, true span and the
//! value that was read), and each leaf table as one [`Run`]. The visitor returns an [`Action`].
//!
//! The type of a walk says what it may do:
//! - [`Walk::look`] cannot change anything, because its visitors get no reference to an atomic.
//! - [`Walk::change`] requires an open notifier range that covers it.
//! - [`Walk::run`] cannot run out of memory, and has no error for it. [`Walk::run_allocating`] can, and its error says how
//!   far it got.
//!
//! A visitor gets no access to anything that could open a notifier range or flush.

mod cursor;
mod each;
mod growth;
mod place;

use core::fmt;
use core::marker::PhantomData;

use crate::addr::{Gpa, GpaRange, Level};
use crate::format::{Allocate, Entry, OutOfTables, TableId, Tables};
use crate::notify::OpenRange;

pub use each::{EachEntry, Page, PageVisitor};
pub(crate) use place::Record;
pub use place::{Change, Look, Place, Run, Writes};

use cursor::Cursor;
use growth::{Filled, Growing, Growth, NoGrowth};

/// Maximum number of times in a row that a visitor may return [`Action::Again`].
pub const AGAIN_LIMIT: u32 = 64;

/// Result of a visit: how the walk continues.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Action<S> {
    /// Go into a table, and past anything else.
    Continue,
    /// Go into a table. If the entry is absent and the walk allocates, make a table for it and go into that. Otherwise like
    /// `Continue`.
    Descend,
    /// Go past this entry, also if it is a table.
    Skip,
    /// If the entry is a leaf and the walk allocates, replace it with a table that says the same, and go into that.
    /// Otherwise like `Continue`.
    Split,
    /// Read this entry again and show it again, at most [`AGAIN_LIMIT`] times in a row.
    Again,
    /// End the walk here with a value.
    Stop(S),
}

/// How a walk ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outcome<S> {
    /// Every page was visited.
    Completed,
    /// The visitor returned [`Action::Stop`].
    Stopped {
        /// Value that the visitor returned.
        value: S,
        /// First page of the range in the entry at which it stopped.
        at: Gpa,
    },
    /// The visitor returned [`Action::Again`] more than [`AGAIN_LIMIT`] times for an entry, because other threads kept
    /// changing it. No page from there on was visited.
    Contended {
        /// Address at which to resume.
        at: Gpa,
    },
}

/// Error of an allocating walk that ran out of tables. The tables are consistent. All pages before `reached` were visited,
/// and no page from there on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Exhausted {
    /// Address of the first page that was not visited.
    pub reached: Gpa,
}

impl fmt::Display for Exhausted {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "out of tables at {}", self.reached)
    }
}

impl core::error::Error for Exhausted {
    fn source(&self) -> Option<&(dyn core::error::Error + 'static)> {
        Some(&OutOfTables)
    }
}

/// Error of a walk that would change pages which its notifier range does not cover.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct NotOpen {
    /// Range of the walk.
    pub range: GpaRange,
    /// Range that is open.
    pub open: GpaRange,
}

impl fmt::Display for NotOpen {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "{} is not inside the open range {}",
            self.range, self.open
        )
    }
}

impl core::error::Error for NotOpen {}

/// Visitor of the entries of a walk over `T`, with access `A`.
pub trait Visitor<'t, T: Tables, A> {
    /// Value of [`Action::Stop`].
    type Stop;

    /// Returns the first index in `from..to` of a table above level 0 that is to be visited, or `to` if there is none.
    ///
    /// Visitors of formats that have summaries skip clean entries here. By default every index is visited.
    fn seek(&mut self, level: Level, table: &'t T::Upper, window: Window) -> usize {
        let _ = (level, table);
        window.from
    }

    /// Visits an entry above level 0.
    fn entry(&mut self, place: &Place<'_, 't, T, A>) -> Action<Self::Stop>;

    /// Returns the raw value that replaces a live leaf when it is split. `table` is the raw value of the entry for the new
    /// table.
    fn replacing(&self, table: u64) -> u64 {
        table
    }

    /// Called after a live leaf that mapped `span` was replaced by a table that says the same.
    fn was_split(&mut self, span: GpaRange) {
        let _ = span;
    }

    /// Visits the part of one leaf table that lies in the range. `Descend`, `Skip` and `Split` mean `Continue` here.
    fn run(&mut self, run: &Run<'_, 't, T, A>) -> Action<Self::Stop>;
}

/// The part of a table that remains to be visited.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Window {
    /// First index.
    pub from: usize,
    /// Index after the last one.
    pub to: usize,
    /// Current page of the walk, in the span of index `from`.
    pub page: u64,
}

impl Window {
    /// Returns a page in the span of the last index, for a table of `level`.
    pub(crate) fn last_page(&self, level: Level) -> u64 {
        let first = self.page >> level.shift();
        (first + (self.to - 1 - self.from) as u64) << level.shift()
    }
}

/// A walk that has not begun.
pub struct Walk<'t, T, A> {
    tables: &'t T,
    range: GpaRange,
    access: PhantomData<A>,
}

impl<'t, T: Tables> Walk<'t, T, Look> {
    /// Creates a walk that changes nothing.
    pub fn look(tables: &'t T, range: GpaRange) -> Self {
        Self::over(tables, range)
    }
}

impl<'t, 'o, T: Tables> Walk<'t, T, Change<'o>> {
    /// Creates a walk that changes entries inside an open notifier range.
    ///
    /// The operations of a [`Stage2`](crate::stage2::Stage2), and [`apply`](crate::apply), take turns where their
    /// ranges overlap, note what is to be flushed, and break before they make on Arm. A walk of one's own does none of
    /// that for its visitor: nobody else may change the range meanwhile, and where the format
    /// [breaks](crate::format::HardwareFormat::BREAKS), [`Stage2::split`](crate::stage2::Stage2::split) comes first.
    ///
    /// `open` is taken as the proof that nobody uses the range's translations. It is one where it is of the notifier
    /// that they all subscribe to, which is for the caller to know: a notifier without subscribers proves nothing.
    ///
    /// It cannot outlast the open range:
    ///
    /// ```compile_fail,E0505
    /// # use ept::{GpaRange, Notifier, format::Allocate, walk::{Change, Visitor, Walk}};
    /// # fn f<'t, T: Allocate>(tables: &'t T, v: &mut impl for<'o> Visitor<'t, T, Change<'o>>) {
    /// let open = Notifier::new().open(GpaRange::ALL).unwrap();
    /// let walk = Walk::change(tables, GpaRange::ALL, &open).unwrap();
    /// drop(open);
    /// walk.run(v);
    /// # }
    /// ```
    ///
    /// # Errors
    /// Returns [`NotOpen`] if `open` does not cover `range`.
    pub fn change(tables: &'t T, range: GpaRange, open: &'o OpenRange) -> Result<Self, NotOpen> {
        if !open.range().covers(&range) {
            return Err(NotOpen {
                range,
                open: open.range(),
            });
        }
        Ok(Self::over(tables, range))
    }
}

impl<'t, T: Tables> Walk<'t, T, Record> {
    /// Creates a walk that records properties of pages. It changes no translation, so it needs no notifier range.
    pub(crate) fn record(tables: &'t T, range: GpaRange) -> Self {
        Self::over(tables, range)
    }
}

impl<'t, T: Tables, A> Walk<'t, T, A> {
    fn over(tables: &'t T, range: GpaRange) -> Self {
        Self {
            tables,
            range,
            access: PhantomData,
        }
    }

    /// Returns the range of the walk.
    pub fn range(&self) -> GpaRange {
        self.range
    }

    /// Returns the same walk for the part of its range that lies in `range`, for instance a step of a longer walk, or the
    /// rest after a stop. `None` if the part is empty.
    pub fn within(&self, range: GpaRange) -> Option<Self> {
        let part = self.range.intersection(&range)?;
        Some(Self::over(self.tables, part))
    }

    /// Walks without allocating tables: absent entries and leaves are never replaced.
    #[inline]
    pub fn run<V: Visitor<'t, T, A>>(self, visitor: &mut V) -> Outcome<V::Stop> {
        let _reading = self.tables.reading();
        self.run_in_turn(visitor)
    }

    /// As [`Walk::run`], for who knows that no table of the range goes out of use meanwhile.
    #[inline]
    pub(crate) fn run_in_turn<V: Visitor<'t, T, A>>(self, visitor: &mut V) -> Outcome<V::Stop> {
        match self.drive(visitor, &NoGrowth) {
            Ok(outcome) => outcome,
            Err(never) => match never {},
        }
    }

    #[inline]
    fn drive<V, G>(self, visitor: &mut V, growth: &G) -> Result<Outcome<V::Stop>, G::Error>
    where
        V: Visitor<'t, T, A>,
        G: Growth<T>,
    {
        let Some(range) = self.range.intersection(&self.tables.geometry().span()) else {
            return Ok(Outcome::Completed);
        };
        let mut cursor = Cursor::new(self.tables, range);
        let mut tries = 0;
        while cursor.seek(visitor) {
            let step = step(&mut cursor, visitor, growth)?;
            match step {
                Step::Moved => tries = 0,
                Step::Same if tries < AGAIN_LIMIT => tries += 1,
                Step::Same => return Ok(Outcome::Contended { at: cursor.gpa() }),
                Step::Ended(value) => {
                    let at = cursor.gpa();
                    return Ok(Outcome::Stopped { value, at });
                }
            }
        }
        Ok(Outcome::Completed)
    }
}

impl<'t, T: Allocate, A: Writes> Walk<'t, T, A> {
    /// Walks, and allocates a table when the visitor descends into an absent entry or splits a leaf.
    ///
    /// # Errors
    /// Returns [`Exhausted`], which says how far the walk got, if there is no table.
    #[inline]
    pub fn run_allocating<V: Visitor<'t, T, A>>(
        self,
        visitor: &mut V,
    ) -> Result<Outcome<V::Stop>, Exhausted> {
        let _reading = self.tables.reading();
        self.drive(visitor, &Growing)
    }

    /// As [`Walk::run_allocating`], for who knows that no table of the range goes out of use meanwhile.
    ///
    /// # Errors
    /// As there.
    #[inline]
    pub(crate) fn run_allocating_in_turn<V: Visitor<'t, T, A>>(
        self,
        visitor: &mut V,
    ) -> Result<Outcome<V::Stop>, Exhausted> {
        self.drive(visitor, &Growing)
    }
}

/// Result of one step.
enum Step<S> {
    Moved,
    Same,
    Ended(S),
}

/// Shows the visitor the current entry, and executes the action that it returns.
#[inline]
fn step<'t, T, A, V, G>(
    cursor: &mut Cursor<'t, T>,
    visitor: &mut V,
    growth: &G,
) -> Result<Step<V::Stop>, G::Error>
where
    T: Tables,
    V: Visitor<'t, T, A>,
    G: Growth<T>,
{
    let place = Place::new(cursor);
    let (raw, entry) = (place.raw(), place.entry());
    match (visitor.entry(&place), entry) {
        (Action::Again, _) => Ok(Step::Same),
        (Action::Stop(value), _) => Ok(Step::Ended(value)),
        (Action::Continue | Action::Descend | Action::Split, Entry::Table(table)) => {
            Ok(enter(cursor, visitor, table))
        }
        (Action::Descend, Entry::Absent) | (Action::Split, Entry::Leaf(_)) => {
            let replacing = |table| match entry {
                Entry::Leaf(_) => visitor.replacing(table),
                Entry::Absent | Entry::Table(_) => table,
            };
            match growth.fill(cursor, raw, entry, replacing)? {
                Filled::Linked(table) => {
                    if let Entry::Leaf(_) = entry {
                        visitor.was_split(cursor.span());
                    }
                    Ok(enter(cursor, visitor, table))
                }
                Filled::Changed => Ok(Step::Same),
                Filled::Never => {
                    cursor.advance();
                    Ok(Step::Moved)
                }
            }
        }
        (Action::Continue | Action::Descend | Action::Skip | Action::Split, _) => {
            cursor.advance();
            Ok(Step::Moved)
        }
    }
}

/// Goes into a table. A leaf table is shown to the visitor as one run, and left again.
#[inline]
fn enter<'t, T, A, V>(cursor: &mut Cursor<'t, T>, visitor: &mut V, table: TableId) -> Step<V::Stop>
where
    T: Tables,
    V: Visitor<'t, T, A>,
{
    if cursor.level() > Level::PAGE.up() {
        cursor.descend(table);
        return Step::Moved;
    }
    match visitor.run(&Run::new(cursor, table)) {
        Action::Again => Step::Same,
        Action::Stop(value) => Step::Ended(value),
        Action::Continue | Action::Descend | Action::Skip | Action::Split => {
            cursor.advance();
            Step::Moved
        }
    }
}
