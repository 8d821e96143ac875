//! Tables that hardware walks: a [`Stage2`] of any [`HardwareFormat`], in memory lent by its embedder.
//!
//! Every operation is a walk of the one range walker:
//!
//! | operation | entries | needs | afterwards |
//! |---|---|---|---|
//! | [`Stage2::map`] | absent → leaf | tables | nothing: no translation was there |
//! | [`Stage2::reserve`] | absent → empty table | tables | nothing |
//! | [`Stage2::unmap`] | leaf → absent | an open notifier range; tables for a split | [`Flush`] |
//! | [`Stage2::protect`] | permissions | an open notifier range; tables for a split | [`Flush`] |
//! | [`Stage2::clean`] | dirty → clean, and recorded | an open notifier range | [`Flush`] |
//! | [`Stage2::age`] | accessed → not, and recorded | an open notifier range | [`Flush`] |
//! | [`Stage2::split`] | huge leaf → table | an open notifier range, tables | [`Flush`] |
//! | [`Stage2::collapse`] | table → huge leaf | an open notifier range | [`Flush`] |
//! | [`Stage2::track_writes`] | writable → its first write faults | an open notifier range; tables for a split | [`Flush`] |
//! | [`Stage2::write_fault`] | that page writable again, and recorded | tables for a split, if there are any | [`Flush`] |
//! | [`Stage2::untrack_writes`] | all writable again | tables for a split | [`Flush`] |
//!
//! Two ways to find out what the guest writes (S15), for any range: *clean-and-record* takes the dirty flags that
//! hardware sets ([`Stage2::clean`]); *write-protect* lets the first write to each page fault
//! ([`Stage2::track_writes`]), for hardware without such flags and for ranges that are rarely written.
//!
//! Order (S14): open → change → flush what [`Flush::interval`] names → [`Flush::done`] → close. Tables that went
//! out of use travel in the `Flush`, and are used again only after it is done.
//!
//! A split inside a range that is open already needs no notification of its own: the notification says that
//! nobody uses the translations of the range, and a split changes none of them.
//!
//! A closure that panics ends its change where it stands. What it was given is its own, and nothing else was taken from
//! the entries; but nobody can say any more what is to be flushed, so it counts as a flush that is never done: changes
//! of an overlapping range are to flush all of it, tables that the change took out stay out of use, and on Arm what it
//! split stays out of the guest's reach.
//!
//! Every change of an entry is one atomic read-modify-write, so that the accessed and dirty flags which hardware
//! sets meanwhile are never lost. Threads change disjoint ranges at once without waiting for each other; changes of
//! overlapping ranges come one after the other. Walks that only look never wait, and no table that one may be reading
//! is used for anything else before it is over.

mod collapse;
mod dump;
mod figures;
mod flush;
mod harvest;
mod map;
mod order;
mod pool;
mod protect;
mod readers;
mod reserve;
mod track;
mod unmap;

use crate::sync::atomic::{AtomicU64, Ordering};
use alloc::collections::TryReserveError;
use core::fmt;

use crate::addr::{Gpa, GpaRange, Hpa, Level, PAGE_SIZE, TABLE_ENTRIES};
use crate::clock::Clock;
use crate::format::{
    Allocate, Entry, HardwareFormat, Leaf, OutOfTables, TableId, Tables, Unsupported,
};
use crate::geometry::Geometry;
use crate::notify::OpenRange;
use crate::walk::{Change, Exhausted, NotOpen, Outcome, Run, Walk, Writes};

pub use dump::Dump;
pub use figures::Figures;
pub use flush::Flush;
pub(crate) use flush::Pages;
pub use map::{Attributes, MapError};
pub use readers::Reading;
pub use track::WriteFault;

use order::{NoPlace, Order, Turn};
use pool::Pool;

/// A stage-2 table of a hardware format.
pub struct Stage2<'m, F> {
    format: F,
    geometry: Geometry,
    pool: Pool<'m>,
    order: Order,
}

/// Why memory is no place for tables.
#[derive(Debug)]
pub enum PoolError {
    /// It is not aligned to this many bytes, as the root must be.
    Misaligned(u64),
    /// It ends beyond what an entry of the format can point to, which is an address of so many bits.
    Unreachable(u32),
    /// It has fewer 64-bit words than the root needs.
    TooSmall(usize),
    /// There is no memory for the list of free tables.
    OutOfMemory(TryReserveError),
}

impl fmt::Display for PoolError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Misaligned(bytes) => write!(f, "the tables are not aligned to {bytes} bytes"),
            Self::Unreachable(bits) => {
                write!(
                    f,
                    "the tables lie beyond the {bits} bits of an entry's address"
                )
            }
            Self::TooSmall(words) => write!(f, "the root alone takes {words} words"),
            Self::OutOfMemory(_) => f.write_str("no memory for the list of free tables"),
        }
    }
}

impl core::error::Error for PoolError {
    fn source(&self) -> Option<&(dyn core::error::Error + 'static)> {
        match self {
            Self::OutOfMemory(source) => Some(source),
            Self::Misaligned(_) | Self::Unreachable(_) | Self::TooSmall(_) => None,
        }
    }
}

/// Why entries could not be changed. Everything before what it names is done, nothing from there on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ChangeError {
    /// The notifier range that is open does not cover the range.
    NotOpen(NotOpen),
    /// The range is not inside what the tables can describe.
    Beyond {
        /// The range.
        range: GpaRange,
        /// What can be described.
        span: GpaRange,
    },
    /// A huge leaf lies across an edge of the range, and there is no table to split it with.
    Exhausted {
        /// The first page that was not changed.
        reached: Gpa,
    },
    /// No entry of this format allows just these permissions.
    Unsupported(Unsupported),
    /// Others kept changing an entry.
    Contended {
        /// The first page that was not changed.
        reached: Gpa,
    },
    /// So many flushes of this table are not done that no more changes can be noted. Nothing was changed.
    Unflushed,
}

impl From<NotOpen> for ChangeError {
    fn from(error: NotOpen) -> Self {
        Self::NotOpen(error)
    }
}

/// Why a change was not even begun.
pub(crate) enum Refused {
    Beyond { range: GpaRange, span: GpaRange },
    Unflushed,
}

impl From<Refused> for ChangeError {
    fn from(refused: Refused) -> Self {
        match refused {
            Refused::Beyond { range, span } => Self::Beyond { range, span },
            Refused::Unflushed => Self::Unflushed,
        }
    }
}

impl fmt::Display for ChangeError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::NotOpen(error) => error.fmt(f),
            Self::Beyond { range, span } => write!(f, "{range} is not inside {span}"),
            Self::Exhausted { reached } => write!(f, "no table is left to split at {reached}"),
            Self::Unsupported(error) => error.fmt(f),
            Self::Contended { reached } => write!(f, "the entry at {reached} keeps changing"),
            Self::Unflushed => UNFLUSHED.fmt(f),
        }
    }
}

impl core::error::Error for ChangeError {}

/// What errors say of a table whose flushes are forgotten.
pub(crate) const UNFLUSHED: &str =
    "64 earlier changes wait for their flush: call `Flush::done` after each";

/// What a change really changed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Tally {
    /// Entries whose old translation is to be flushed; a huge leaf is one. What a write fault gave back is not counted:
    /// a stale translation there is only too strict.
    pub entries: u64,
    /// Huge leaves that were split for it. A write fault's split is to be flushed only where the format breaks.
    pub splits: u64,
    /// Tables that became huge leaves; each counts as an entry, too.
    pub collapses: u64,
}

impl<'m, F: HardwareFormat> Stage2<'m, F> {
    /// An empty table. `words` is the memory that hardware finds at `base`, all zero: the root, then room for
    /// tables of 4 KiB each; it is used by nobody else while the hardware may walk it.
    ///
    /// # Errors
    /// Memory that cannot hold the root, or that entries cannot point to.
    pub fn new(format: F, words: &'m [AtomicU64], base: Hpa) -> Result<Self, PoolError> {
        let stage2 = Self::over(format, words, base)?;
        for word in stage2.root() {
            word.store(0, Ordering::Relaxed);
        }
        Ok(stage2)
    }

    fn over(format: F, words: &'m [AtomicU64], base: Hpa) -> Result<Self, PoolError> {
        let geometry = format.geometry();
        let entries = geometry.root_entries();
        let root_tables = entries.div_ceil(TABLE_ENTRIES);
        // Roots of several tables are aligned to their size.
        let alignment = root_tables.next_power_of_two() as u64 * PAGE_SIZE;
        if !base.0.is_multiple_of(alignment) {
            return Err(PoolError::Misaligned(alignment));
        }
        let end = base.0.checked_add(size_of_val(words) as u64);
        let bits = format.hpa_bits();
        if end.is_none_or(|end| end > 1 << bits) {
            return Err(PoolError::Unreachable(bits));
        }
        if words.len() < root_tables * TABLE_ENTRIES {
            return Err(PoolError::TooSmall(root_tables * TABLE_ENTRIES));
        }
        let pool = Pool::try_new(words, base, root_tables).map_err(PoolError::OutOfMemory)?;
        Ok(Self {
            format,
            geometry,
            pool,
            order: Order::new(),
        })
    }

    /// The same table with a clock, so that it can say for how long changes held their range.
    #[must_use]
    pub fn with_clock(mut self, clock: Clock) -> Self {
        self.order.set_clock(clock);
        self
    }

    /// The figures so far.
    pub fn figures(&self) -> Figures {
        self.order.figures()
    }

    /// The root, for the register that points to it: [`Ept::pointer`](crate::format::Ept::pointer), VTTBR_EL2,
    /// [`GStage::hgatp`](crate::format::GStage::hgatp), N_CR3.
    pub fn root_id(&self) -> TableId {
        self.pool.root_id()
    }

    /// Tables that are still free.
    pub fn available(&self) -> usize {
        self.pool.available()
    }

    /// The most tables that mapping, unmapping or protecting `range` can need.
    pub fn worst_case(&self, range: GpaRange) -> usize {
        (0..self.geometry.root_level().number())
            .filter_map(Level::new)
            .map(|level| {
                let shift = level.up().shift();
                ((range.end_page() - 1) >> shift) - (range.first_page() >> shift) + 1
            })
            .sum::<u64>()
            .try_into()
            .unwrap_or(usize::MAX)
    }

    /// What the entry that covers `page` says, and its level; a hole is as large as the entry.
    pub fn lookup(&self, page: u64) -> (Level, Entry<Leaf>) {
        let mut level = self.geometry.root_level();
        if !self.geometry.span().contains_page(page) {
            return (level, Entry::Absent);
        }
        let _reading = self.reading();
        let mut table: &[AtomicU64] = self.root();
        loop {
            let raw = table[self.geometry.index(page, level)].load(Ordering::Acquire);
            match self.format.decode(raw, level) {
                Entry::Table(below) => {
                    level = level.down();
                    table = self.pool.table(below);
                }
                entry => return (level, entry),
            }
        }
    }

    /// Does what `body` does to the entries of `range`, in its turn. What is owed to the hardware for that is noted
    /// before anybody else gets a turn there.
    pub(crate) fn change<'t, 'o, E: From<NotOpen> + From<Refused>>(
        &'t self,
        range: GpaRange,
        open: &'o OpenRange,
        body: impl FnOnce(Walk<'t, Self, Change<'o>>, &mut Flush<'t, 'm, F>) -> Result<(), E>,
    ) -> (Flush<'t, 'm, F>, Result<(), E>) {
        if let Err(refused) = self.inside(range) {
            return (Flush::nothing(self), Err(refused.into()));
        }
        let walk = match Walk::change(self, range, open) {
            Ok(walk) => walk,
            Err(error) => return (Flush::nothing(self), Err(error.into())),
        };
        self.in_turn(range, |flush| body(walk, flush))
    }

    /// As [`Stage2::change`], for changes that need no notifier range.
    fn in_turn<'t, E: From<Refused>>(
        &'t self,
        range: GpaRange,
        body: impl FnOnce(&mut Flush<'t, 'm, F>) -> Result<(), E>,
    ) -> (Flush<'t, 'm, F>, Result<(), E>) {
        let mut flush = Flush::nothing(self);
        let result = self.turn(range).map_err(E::from).and_then(|turn| {
            flush.at(turn.id());
            let result = body(&mut flush);
            let owed = turn.end_owing(flush.interval(), flush.figures());
            flush.owe(owed);
            result
        });
        (flush, result)
    }

    /// Waits for the turn of a change of `range`.
    fn turn(&self, range: GpaRange) -> Result<Turn<'_>, Refused> {
        self.inside(range)?;
        let turn = self.order.turn(range);
        turn.map_err(|NoPlace| Refused::Unflushed)
    }

    /// Whether the tables can describe all of `range`.
    fn inside(&self, range: GpaRange) -> Result<(), Refused> {
        let span = self.geometry.span();
        if span.covers(&range) {
            Ok(())
        } else {
            Err(Refused::Beyond { range, span })
        }
    }
}

impl<F: HardwareFormat> Tables for Stage2<'_, F> {
    type Format = F;
    type Upper = [AtomicU64];
    type Leaf<'t>
        = &'t [AtomicU64]
    where
        Self: 't;
    type Reading<'t>
        = Reading<'t>
    where
        Self: 't;

    #[inline]
    fn reading(&self) -> Reading<'_> {
        self.pool.reading()
    }

    fn format(&self) -> &F {
        &self.format
    }

    fn geometry(&self) -> Geometry {
        self.geometry
    }

    #[inline]
    fn root(&self) -> &[AtomicU64] {
        self.pool.root(self.geometry.root_entries())
    }

    #[inline]
    fn upper(&self, table: TableId) -> &[AtomicU64] {
        self.pool.table(table)
    }

    #[inline]
    fn leaf(&self, table: TableId) -> &[AtomicU64] {
        self.pool.table(table)
    }

    #[inline]
    fn peek(leaf: &[AtomicU64], index: usize) -> u64 {
        leaf[index].load(Ordering::Acquire)
    }
}

impl<F: HardwareFormat> Allocate for Stage2<'_, F> {
    fn grow(&self, level: Level, _: u64, entry: Entry<Leaf>) -> Result<TableId, OutOfTables> {
        let table = self.pool.allocate()?;
        let (mut raw, step) = match entry {
            Entry::Leaf(_) => (
                self.format.encode(entry, level),
                F::PAGE_STEP << level.shift(),
            ),
            Entry::Absent | Entry::Table(_) => (0, 0),
        };
        for word in self.pool.table(table) {
            // Nobody has the table yet; the exchange that links it publishes it.
            word.store(raw, Ordering::Relaxed);
            raw = raw.wrapping_add(step);
        }
        Ok(table)
    }

    fn give_back(&self, _: Level, table: TableId) {
        self.pool.give_back(table);
    }
}

impl<F> fmt::Debug for Stage2<'_, F> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Stage2")
            .field("geometry", &self.geometry)
            .field("available", &self.pool.available())
            .finish_non_exhaustive()
    }
}

/// The stop of a walk that never stops.
enum Never {}

/// How a changing walk ended.
fn settled(ended: Result<Outcome<Never>, Exhausted>) -> Result<(), ChangeError> {
    match ended {
        Ok(Outcome::Completed) => Ok(()),
        Ok(Outcome::Stopped { value, .. }) => match value {},
        Ok(Outcome::Contended { at }) => Err(ChangeError::Contended { reached: at }),
        Err(Exhausted { reached }) => Err(ChangeError::Exhausted { reached }),
    }
}

/// The entries of a run, each with the number of its page.
pub(crate) fn entries_of<'t, 'm, F: HardwareFormat, A: Writes>(
    run: &Run<'_, 't, Stage2<'m, F>, A>,
) -> impl Iterator<Item = (u64, &'t AtomicU64)>
where
    'm: 't,
{
    let part = run.part();
    let base = run.span().first_page();
    let index = |page: u64| usize::try_from(page - base).unwrap_or(usize::MAX);
    let slots = &run.live_table()[index(part.first_page())..index(part.end_page())];
    (part.first_page()..).zip(slots)
}

/// Changes the entries of a run: each that `wanted` has another value for is given to `change`, with its page, what it
/// was and what it is to be.
#[inline]
fn change_entries<'t, 'm, F: HardwareFormat, A: Writes>(
    run: &Run<'_, 't, Stage2<'m, F>, A>,
    wanted: impl Fn(u64) -> u64,
    mut change: impl FnMut(u64, &'t AtomicU64, u64, u64),
) where
    'm: 't,
{
    for (page, slot) in entries_of(run) {
        let raw = slot.load(Ordering::Relaxed);
        let new = wanted(raw);
        // A locked operation only where it changes something.
        if raw != new {
            change(page, slot, raw, new);
        }
    }
}
