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
//! | "The caller must also assure that the proper mmu_notifier functions are called" | an [`OpenRange`] that covers the range is an argument: without one, nothing can be called |
//! | "you must call mmu notifier range and they can not happen under lock" | the range is opened before the call, by the caller; the function is handed nothing that could open or close one, and the walk holds no lock |
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
//! apply_to_pfn_range(&stage2, range, &open, Existing::Refuse, |entry, _| {
//!     entry.fetch_and(!(1 << 1), Ordering::SeqCst);
//!     Ok::<(), ()>(())
//! })
//! .unwrap();
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```

use crate::sync::atomic::AtomicU64;
use core::fmt;

use crate::addr::{Gpa, GpaRange};
use crate::format::{Entry, HardwareFormat, Tables};
use crate::notify::OpenRange;
use crate::stage2::{Stage2, entries_of};
use crate::walk::{Action, Change, Exhausted, NotOpen, Outcome, Place, Run, Visitor, Walk};

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
/// The entry is live: change it with one atomic read-modify-write. Flush what was changed before `open` closes.
///
/// # Errors
/// The first error of `function`, and [`ApplyError`]; everything before it was visited.
pub fn apply_to_pfn_range<F: HardwareFormat, E>(
    stage2: &Stage2<'_, F>,
    range: GpaRange,
    open: &OpenRange,
    huge: Existing,
    function: impl FnMut(&AtomicU64, Gpa) -> Result<(), E>,
) -> Result<(), ApplyError<E>> {
    let huge = match huge {
        Existing::Refuse => Huge::Refuse,
        Existing::Skip => Huge::Skip,
    };
    let mut applying = Applying {
        absent: Absent::Skip,
        huge,
        function,
    };
    let walk = checked(stage2, range, open)?;
    settled(walk.run(&mut applying))
}

/// As [`apply_to_pfn_range`], and fills in tables that are missing.
///
/// # Errors
/// The first error of `function`, and [`AllocatingError`]; everything before it was visited.
pub fn apply_to_pfn_range_allocating<F: HardwareFormat, E>(
    stage2: &Stage2<'_, F>,
    range: GpaRange,
    open: &OpenRange,
    huge: Missing,
    function: impl FnMut(&AtomicU64, Gpa) -> Result<(), E>,
) -> Result<(), AllocatingError<E>> {
    let huge = match huge {
        Missing::Refuse => Huge::Refuse,
        Missing::Split => Huge::Split,
    };
    let mut applying = Applying {
        absent: Absent::Fill,
        huge,
        function,
    };
    let walk = checked(stage2, range, open).map_err(AllocatingError::Apply)?;
    match walk.run_allocating(&mut applying) {
        Ok(outcome) => settled(outcome).map_err(AllocatingError::Apply),
        Err(exhausted) => Err(AllocatingError::Exhausted(exhausted)),
    }
}

/// Linux's `apply_to_page_range`: fills in missing tables, and takes no huge leaves.
///
/// # Errors
/// As [`apply_to_pfn_range_allocating`].
pub fn apply_to_page_range<F: HardwareFormat, E>(
    stage2: &Stage2<'_, F>,
    range: GpaRange,
    open: &OpenRange,
    function: impl FnMut(&AtomicU64, Gpa) -> Result<(), E>,
) -> Result<(), AllocatingError<E>> {
    apply_to_pfn_range_allocating(stage2, range, open, Missing::Refuse, function)
}

fn checked<'t, 'm, 'o, F: HardwareFormat, E>(
    stage2: &'t Stage2<'m, F>,
    range: GpaRange,
    open: &'o OpenRange,
) -> Result<Walk<'t, Stage2<'m, F>, Change<'o>>, ApplyError<E>> {
    let span = stage2.geometry().span();
    if !span.covers(&range) {
        return Err(ApplyError::Beyond { range, span });
    }
    Walk::change(stage2, range, open).map_err(ApplyError::NotOpen)
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

struct Applying<C> {
    absent: Absent,
    huge: Huge,
    function: C,
}

impl<'t, 'm, 'o, F, C, E> Visitor<'t, Stage2<'m, F>, Change<'o>> for Applying<C>
where
    'm: 't,
    F: HardwareFormat,
    C: FnMut(&AtomicU64, Gpa) -> Result<(), E>,
{
    type Stop = Stop<E>;

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
        for (page, slot) in entries_of(run) {
            // A page of a range is below the end of the space.
            let gpa = Gpa::from_page(page).unwrap_or_default();
            if let Err(error) = (self.function)(slot, gpa) {
                return Action::Stop(Stop::Callback(page, error));
            }
        }
        Action::Continue
    }
}
