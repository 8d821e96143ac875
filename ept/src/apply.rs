//! The interface of the 2019 thread, by name: `apply_to_page_range` and `apply_to_pfn_range`.
//!
//! Linux's `apply_to_page_range` calls a function on every entry of a range and fills in missing tables. The patch
//! "mm: Add an apply_to_pfn_range interface" (Thomas Hellstrom, April 2019) made the filling in optional; the
//! discussion of it named what was still missing. This module has both functions on top of the range walker, and
//! answers each point:
//!
//! | the thread | here |
//! |---|---|
//! | "Allocating missing parts of the page table becomes optional, which means that the function can be guaranteed not to error if allocation is disabled" | [`apply_to_pfn_range`] allocates nothing, and its error has no variant for memory; [`apply_to_pfn_range_allocating`] has one, [`AllocatingError::Exhausted`], that says how far it got |
//! | "we keep apply_to_page_range as a wrapper" | [`apply_to_page_range`] is one |
//! | "it will skip non-present parts" | so it does; entries of a table that is there are shown also where they are absent, as `ptefn` was called for them |
//! | the loop ends at the first error | [`ApplyError::Callback`], with the error and the page |
//! | "The caller must ensure that the range does not contain huge pages" (`BUG_ON(pud_huge)`) | the caller chooses: [`Existing`] refuses or skips them, [`Missing`] refuses or splits them; there is nothing to ensure, and no panic |
//! | "this can only be used against mmap of device file" | a table here is a guest's, and what kind of memory a page is stands in its region ([`RegionKind`](crate::RegionKind)): trackers refuse to protect private copy-on-write memory with a typed error, and an entry's memory type is part of its [`Leaf`](crate::format::Leaf) |
//! | "The caller must also assure that the proper mmu_notifier functions are called" | an [`OpenRange`] that covers the range is an argument: without one, nothing can be called. What is to be flushed before it closes comes back as a [`Flush`] |
//! | "you must call mmu notifier range and they can not happen under lock" | the range is opened before the call, by the caller; the function is handed nothing that could open or close one. No lock on tables is held; the range itself is, so the function must not change the same range by another call |
//! | "if it ends up splitting a pmd, mmu_notifier_invalidate_range is called again, within the first range. Docs aren't really clear whether that's permitted or not. Is it?" | it is not needed: an open range says that nobody uses the translations of the range, and a split changes none of them. Ranges nest, too: opening a second one is permitted, and counted |
//!
//! ```
//! use core::sync::atomic::{AtomicU64, Ordering};
//! use ept::apply::{Existing, apply_to_pfn_range};
//! use ept::format::Npt;
//! use ept::stage2::Stage2;
//! use ept::{GpaRange, Gpa, Hpa, Notifier};
//!
//! let words: Vec<AtomicU64> = (0..8 * 512).map(|_| AtomicU64::new(0)).collect();
//! let stage2 = Stage2::new(Npt::FourLevels, &words, Hpa(0x10_0000))?;
//! let range = GpaRange::with_len(Gpa(0), 1 << 21)?;
//! let open = Notifier::new().open(range)?;
//! // Nothing is mapped: the function is never called, and nothing can fail for memory.
//! let (flush, result) = apply_to_pfn_range(&stage2, range, &open, Existing::Refuse, |entry, _| {
//!     entry.fetch_and(!(1 << 1), Ordering::SeqCst);
//!     Ok::<(), ()>(())
//! });
//! result.unwrap();
//! assert_eq!(flush.interval(), None);
//! flush.done();
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```

use core::fmt;

use crate::addr::{Gpa, GpaRange};
use crate::format::{Entry, HardwareFormat};
use crate::notify::OpenRange;
use crate::stage2::{Flush, Pages, Refused, Stage2, UNFLUSHED, entries_of};
use crate::sync::atomic::{AtomicU64, Ordering};
use crate::walk::{Action, Change, Exhausted, NotOpen, Outcome, Place, Run, Visitor};

/// What a walk that allocates nothing does with a huge leaf.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Existing {
    /// It ends there, with [`ApplyError::HugeLeaf`].
    Refuse,
    /// It goes on behind it.
    Skip,
}

/// What a walk that fills in missing tables does with a huge leaf.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Missing {
    /// It ends there, with [`ApplyError::HugeLeaf`].
    Refuse,
    /// It replaces it by a table that says the same.
    Split,
}

/// Why the function was not called for every entry. `E` is its own error.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ApplyError<E> {
    /// The notifier range that is open does not cover the range; nothing was called.
    NotOpen(NotOpen),
    /// The range is not inside what the table can describe; nothing was called.
    Beyond {
        /// The range.
        range: GpaRange,
        /// What can be described.
        span: GpaRange,
    },
    /// The function said no.
    Callback {
        /// The page.
        at: Gpa,
        /// What it said.
        error: E,
    },
    /// A huge leaf, which was to be refused.
    HugeLeaf {
        /// Its first page in the range.
        at: Gpa,
    },
    /// Others kept changing an entry.
    Contended {
        /// Where.
        at: Gpa,
    },
    /// So many flushes of this table are not done that no more changes can be noted; nothing was called.
    Unflushed,
}

impl<E> From<NotOpen> for ApplyError<E> {
    fn from(error: NotOpen) -> Self {
        Self::NotOpen(error)
    }
}

impl<E> From<Refused> for ApplyError<E> {
    fn from(refused: Refused) -> Self {
        match refused {
            Refused::Beyond { range, span } => Self::Beyond { range, span },
            Refused::Unflushed => Self::Unflushed,
        }
    }
}

impl<E> From<NotOpen> for AllocatingError<E> {
    fn from(error: NotOpen) -> Self {
        Self::Apply(error.into())
    }
}

impl<E> From<Refused> for AllocatingError<E> {
    fn from(refused: Refused) -> Self {
        Self::Apply(refused.into())
    }
}

/// As [`ApplyError`], and tables may run out.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum AllocatingError<E> {
    /// As without allocation.
    Apply(ApplyError<E>),
    /// No table is left; says how far it got.
    Exhausted(Exhausted),
}

impl<E: fmt::Display> fmt::Display for ApplyError<E> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::NotOpen(error) => error.fmt(f),
            Self::Beyond { range, span } => write!(f, "{range} is not inside {span}"),
            Self::Callback { at, error } => write!(f, "at {at}: {error}"),
            Self::HugeLeaf { at } => write!(f, "there is a huge leaf at {at}"),
            Self::Contended { at } => write!(f, "the entry at {at} keeps changing"),
            Self::Unflushed => UNFLUSHED.fmt(f),
        }
    }
}

impl<E: fmt::Display> fmt::Display for AllocatingError<E> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Apply(error) => error.fmt(f),
            Self::Exhausted(error) => error.fmt(f),
        }
    }
}

impl<E: fmt::Debug + fmt::Display> core::error::Error for ApplyError<E> {}
impl<E: fmt::Debug + fmt::Display> core::error::Error for AllocatingError<E> {}

/// Calls `function` on every 4 KiB entry of the tables that are there in `range`, with the first byte of its page.
/// Allocates nothing, and cannot fail for memory.
///
/// The entry is live: change it with one atomic read-modify-write. The [`Flush`] names the entries that are not what
/// they were before the call.
///
/// # Errors
/// The first error of `function`, and [`ApplyError`]; everything before it was visited.
pub fn apply_to_pfn_range<'t, 'm, F: HardwareFormat, E>(
    stage2: &'t Stage2<'m, F>,
    range: GpaRange,
    open: &OpenRange,
    huge: Existing,
    function: impl FnMut(&AtomicU64, Gpa) -> Result<(), E>,
) -> (Flush<'t, 'm, F>, Result<(), ApplyError<E>>) {
    let huge = match huge {
        Existing::Refuse => Huge::Refuse,
        Existing::Skip => Huge::Skip,
    };
    stage2.change(range, open, |walk, flush| {
        let absent = Absent::Skip;
        settled(walk.run_in_turn(&mut Applying {
            absent,
            huge,
            function,
            flush,
        }))
    })
}

/// As [`apply_to_pfn_range`], and fills in tables that are missing.
///
/// # Errors
/// The first error of `function`, and [`AllocatingError`]; everything before it was visited.
pub fn apply_to_pfn_range_allocating<'t, 'm, F: HardwareFormat, E>(
    stage2: &'t Stage2<'m, F>,
    range: GpaRange,
    open: &OpenRange,
    huge: Missing,
    function: impl FnMut(&AtomicU64, Gpa) -> Result<(), E>,
) -> (Flush<'t, 'm, F>, Result<(), AllocatingError<E>>) {
    let huge = match huge {
        Missing::Refuse => Huge::Refuse,
        Missing::Split => Huge::Split,
    };
    stage2.change(range, open, |walk, flush| {
        let absent = Absent::Fill;
        let ended = walk.run_allocating_in_turn(&mut Applying {
            absent,
            huge,
            function,
            flush,
        });
        match ended {
            Ok(outcome) => settled(outcome).map_err(AllocatingError::Apply),
            Err(exhausted) => Err(AllocatingError::Exhausted(exhausted)),
        }
    })
}

/// Linux's `apply_to_page_range`: fills in missing tables, and takes no huge leaves.
///
/// # Errors
/// As [`apply_to_pfn_range_allocating`].
pub fn apply_to_page_range<'t, 'm, F: HardwareFormat, E>(
    stage2: &'t Stage2<'m, F>,
    range: GpaRange,
    open: &OpenRange,
    function: impl FnMut(&AtomicU64, Gpa) -> Result<(), E>,
) -> (Flush<'t, 'm, F>, Result<(), AllocatingError<E>>) {
    apply_to_pfn_range_allocating(stage2, range, open, Missing::Refuse, function)
}

fn settled<E>(outcome: Outcome<Stop<E>>) -> Result<(), ApplyError<E>> {
    match outcome {
        Outcome::Completed => Ok(()),
        Outcome::Contended { at } => Err(ApplyError::Contended { at }),
        Outcome::Stopped { value, at } => Err(match value {
            Stop::Huge => ApplyError::HugeLeaf { at },
            Stop::Callback(page, error) => ApplyError::Callback {
                at: Gpa::from_page(page).unwrap_or(at),
                error,
            },
        }),
    }
}

enum Absent {
    Skip,
    Fill,
}

enum Huge {
    Refuse,
    Skip,
    Split,
}

enum Stop<E> {
    Huge,
    Callback(u64, E),
}

struct Applying<'f, 't, 'm, F, C> {
    absent: Absent,
    huge: Huge,
    function: C,
    flush: &'f mut Flush<'t, 'm, F>,
}

impl<'t, 'm, 'o, F, C, E> Visitor<'t, Stage2<'m, F>, Change<'o>> for Applying<'_, 't, 'm, F, C>
where
    'm: 't,
    F: HardwareFormat,
    C: FnMut(&AtomicU64, Gpa) -> Result<(), E>,
{
    type Stop = Stop<E>;

    fn replacing(&self, table: u64) -> u64 {
        self.flush.replacing(table)
    }

    fn was_split(&mut self, span: GpaRange) {
        self.flush.split(span);
    }

    fn entry(&mut self, place: &Place<'_, 't, Stage2<'m, F>, Change<'o>>) -> Action<Stop<E>> {
        match (place.entry(), &self.absent, &self.huge) {
            (Entry::Table(_), ..) => Action::Continue,
            (Entry::Absent, Absent::Fill, _) => Action::Descend,
            (Entry::Absent, Absent::Skip, _) | (Entry::Leaf(_), _, Huge::Skip) => Action::Skip,
            (Entry::Leaf(_), _, Huge::Split) => Action::Split,
            (Entry::Leaf(_), _, Huge::Refuse) => Action::Stop(Stop::Huge),
        }
    }

    fn run(&mut self, run: &Run<'_, 't, Stage2<'m, F>, Change<'o>>) -> Action<Stop<E>> {
        let mut changed = Pages::default();
        let mut stop = Action::Continue;
        for (page, slot) in entries_of(run) {
            // A page of a range is below the end of the space.
            let gpa = Gpa::from_page(page).unwrap_or_default();
            let before = slot.load(Ordering::Relaxed);
            let answer = (self.function)(slot, gpa);
            // What was absent cannot be cached.
            if before != 0 && slot.load(Ordering::Relaxed) != before {
                changed.add(page);
            }
            if let Err(error) = answer {
                stop = Action::Stop(Stop::Callback(page, error));
                break;
            }
        }
        self.flush.changed_pages(changed);
        stop
    }
}
