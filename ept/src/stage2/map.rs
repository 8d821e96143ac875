//! Mapping what was not mapped.

use crate::sync::atomic::{AtomicU64, Ordering};
use core::fmt;

use crate::addr::{Gpa, GpaRange, Hpa, Level, PAGE_SHIFT};
use crate::format::{Entry, HardwareFormat, Leaf, MemoryType, Permissions, Unsupported};
use crate::stage2::{Refused, Stage2, UNFLUSHED, entries_of};
use crate::walk::{Action, Exhausted, Outcome, Place, Record, Run, Visitor, Walk};

/// What holds for everything that is mapped in one call.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Attributes {
    /// What the guest may do.
    pub permissions: Permissions,
    /// How it is cached.
    pub memory: MemoryType,
    /// The largest leaves to use, where addresses are aligned for them: [`Level::PAGE`] for none but 4 KiB.
    pub largest: Level,
}

/// Why a range was not, or not wholly, mapped.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum MapError {
    /// The range is not inside what the tables can describe. Nothing was mapped.
    Beyond {
        /// The range.
        range: GpaRange,
        /// What can be described.
        span: GpaRange,
    },
    /// The format has no such entry. Nothing was mapped.
    Unsupported(Unsupported),
    /// Something is mapped already. Everything before it is mapped now.
    Occupied {
        /// Where.
        at: Gpa,
    },
    /// No table is left.
    Exhausted(Exhausted),
    /// Others kept changing an entry. Everything before it is mapped now.
    Contended {
        /// Where.
        at: Gpa,
    },
    /// So many flushes of this table are not done that no more changes can be noted. Nothing was mapped.
    Unflushed,
    /// A change of a part of the range is not flushed yet, and hardware of this format must have forgotten what was
    /// there before something else is ([`HardwareFormat::BREAKS`]). Nothing was mapped.
    Unforgotten,
}

impl From<Refused> for MapError {
    fn from(refused: Refused) -> Self {
        match refused {
            Refused::Beyond { range, span } => Self::Beyond { range, span },
            Refused::Unflushed => Self::Unflushed,
        }
    }
}

impl fmt::Display for MapError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Beyond { range, span } => write!(f, "{range} is not inside {span}"),
            Self::Unsupported(error) => error.fmt(f),
            Self::Occupied { at } => write!(f, "{at} is mapped already"),
            Self::Exhausted(error) => error.fmt(f),
            Self::Contended { at } => write!(f, "the entry at {at} keeps changing"),
            Self::Unflushed => UNFLUSHED.fmt(f),
            Self::Unforgotten => {
                f.write_str("a change of this range is to be flushed before it is mapped")
            }
        }
    }
}

impl core::error::Error for MapError {}

impl<F: HardwareFormat> Stage2<'_, F> {
    /// Maps `range`, of which nothing is mapped, to the memory from `hpa` on, with the largest leaves that fit.
    ///
    /// No notifier range is needed and nothing is to be flushed: nobody can have a translation of what was
    /// absent (on RISC-V a hart may have cached that there is none: HFENCE.GVMA there where it faults all the same). Of what was unmapped somebody can, until that flush is done: on Arm such a range is refused before it
    /// is, elsewhere the guest may reach the old page meanwhile.
    ///
    /// # Errors
    /// [`MapError`]; except where it says otherwise, everything before the page that it names is mapped. With
    /// [`Stage2::worst_case`] tables available it is never [`MapError::Exhausted`].
    pub fn map(&self, range: GpaRange, hpa: Hpa, attributes: Attributes) -> Result<(), MapError> {
        self.check_ends(range, hpa, attributes)?;
        let turn = self.turn(range)?;
        if F::BREAKS && turn.meets_unflushed() {
            turn.end();
            return Err(MapError::Unforgotten);
        }
        let mut mapping = Mapping {
            stage2: self,
            first_page: range.first_page(),
            hpa,
            largest: attributes.largest.min(self.format.largest_leaf()),
            attributes,
            occupied: None,
        };
        let ended = Walk::record(self, range).run_allocating_in_turn(&mut mapping);
        turn.end();
        match ended {
            Ok(Outcome::Completed) => Ok(()),
            Ok(Outcome::Stopped { at, .. }) => Err(MapError::Occupied {
                at: mapping.occupied.unwrap_or(at),
            }),
            Ok(Outcome::Contended { at }) => Err(MapError::Contended { at }),
            Err(error) => Err(MapError::Exhausted(error)),
        }
    }

    /// All leaves of the range can be said if its first page and its last can.
    fn check_ends(
        &self,
        range: GpaRange,
        hpa: Hpa,
        attributes: Attributes,
    ) -> Result<(), MapError> {
        let last = hpa.0.checked_add((range.pages() - 1) << PAGE_SHIFT);
        let last = last.ok_or(MapError::Unsupported(Unsupported::Address(hpa)))?;
        for end in [hpa, Hpa(last)] {
            let leaf = Leaf::new(end, attributes.permissions, attributes.memory);
            self.format
                .check(&leaf, Level::PAGE)
                .map_err(MapError::Unsupported)?;
        }
        Ok(())
    }
}

struct Mapping<'t, 'm, F> {
    stage2: &'t Stage2<'m, F>,
    first_page: u64,
    hpa: Hpa,
    largest: Level,
    attributes: Attributes,
    occupied: Option<Gpa>,
}

/// Something is mapped already.
struct Occupied;

impl<F: HardwareFormat> Mapping<'_, '_, F> {
    fn hpa_of(&self, page: u64) -> Hpa {
        Hpa(self.hpa.0 + ((page - self.first_page) << PAGE_SHIFT))
    }

    fn raw(&self, page: u64, level: Level) -> u64 {
        let Attributes {
            permissions,
            memory,
            ..
        } = self.attributes;
        let leaf = Leaf::new(self.hpa_of(page), permissions, memory);
        self.stage2.format.encode(Entry::Leaf(leaf), level)
    }

    /// Links a leaf table for all of `place`, which is absent: filled before anybody has it, with plain stores.
    /// Without a table to be had it descends, which says so.
    fn link_full_table<'t, 'm>(
        &self,
        place: &Place<'_, 't, Stage2<'m, F>, Record>,
    ) -> Action<Occupied> {
        let Ok(table) = self.stage2.pool.allocate() else {
            return Action::Descend;
        };
        let mut raw = self.raw(place.span().first_page(), Level::PAGE);
        for word in self.stage2.pool.table(table) {
            word.store(raw, Ordering::Relaxed);
            raw = raw.wrapping_add(F::PAGE_STEP);
        }
        let entry = Entry::Table(table);
        let new = self.stage2.format.encode(entry, place.level());
        if replace(place.slot(), place.raw(), new).is_ok() {
            return Action::Skip;
        }
        self.stage2.pool.give_back(table);
        Action::Again
    }

    fn fits(&self, span: GpaRange, level: Level) -> bool {
        level <= self.largest
            && self
                .hpa_of(span.first_page())
                .0
                .is_multiple_of(level.span())
    }
}

impl<'t, 'm, F: HardwareFormat> Visitor<'t, Stage2<'m, F>, Record> for Mapping<'t, 'm, F>
where
    'm: 't,
{
    type Stop = Occupied;

    fn entry(&mut self, place: &Place<'_, 't, Stage2<'m, F>, Record>) -> Action<Occupied> {
        match place.entry() {
            Entry::Table(_) => Action::Continue,
            Entry::Leaf(_) => Action::Stop(Occupied),
            Entry::Absent
                if place.part() == place.span() && self.fits(place.span(), place.level()) =>
            {
                let new = self.raw(place.span().first_page(), place.level());
                match replace(place.slot(), place.raw(), new) {
                    Ok(()) => Action::Skip,
                    Err(_) => Action::Again,
                }
            }
            Entry::Absent if place.part() == place.span() && place.level() == Level::MIB2 => {
                self.link_full_table(place)
            }
            Entry::Absent => Action::Descend,
        }
    }

    fn run(&mut self, run: &Run<'_, 't, Stage2<'m, F>, Record>) -> Action<Occupied> {
        for (page, slot) in entries_of(run) {
            let mut old = slot.load(Ordering::Relaxed);
            loop {
                if self.stage2.format.decode(old, Level::PAGE) != Entry::Absent {
                    self.occupied = Gpa::from_page(page);
                    return Action::Stop(Occupied);
                }
                match replace(slot, old, self.raw(page, Level::PAGE)) {
                    Ok(()) => break,
                    Err(found) => old = found,
                }
            }
        }
        Action::Continue
    }
}

/// One atomic exchange; the value found instead where it was lost.
pub(super) fn replace(slot: &AtomicU64, old: u64, new: u64) -> Result<(), u64> {
    slot.compare_exchange(old, new, Ordering::SeqCst, Ordering::Relaxed)
        .map(drop)
}
