//! Who changes which range now, and which changes still wait for their flush.
//!
//! Every change takes a [`Turn`] on its range first. Turns on overlapping ranges come one after the other, in the
//! order in which they got a place in the list; turns on disjoint ranges do not wait for each other. A turn is not a
//! lock on tables: it is the range itself that is held, so that two threads below one table get on side by side.
//!
//! Some places are kept for changes that can begin at once, so that a crowd that waits for one range holds up nobody
//! elsewhere; whoever finds no place comes again. Only where flushes that nobody does have taken all places is that an
//! error.
//!
//! A change that owes a flush keeps its place in the list until that is done. Whoever changes an overlapping range
//! meanwhile may find entries changed already whose old translations are still cached: it must flush its whole
//! range, not only what it touched itself (compare `mm_tlb_flush_nested` in Linux's `mm/mapping_dirty_helpers.c`).

use crate::addr::GpaRange;
use crate::clock::{Clock, now_ns};
use crate::stage2::figures::Figures;
use crate::sync::{SpinLock, relax};

/// Changes that are going on or wait for their flush at one time.
const PLACES: usize = 64;

/// Places that are not given to changes that have to wait.
const KEPT_FREE: u32 = 16;

/// Turns of waiting for a flush where all places wait for one, before it is said that nobody does them.
const PATIENCE: u32 = 1 << 16;

/// Which changes are going on, or wait for their flush.
pub(super) struct Order {
    state: SpinLock<State>,
    clock: Option<Clock>,
}

/// Every place is taken by a change that waits for its flush.
#[derive(Debug)]
pub(super) struct NoPlace;

/// The number of a change's place, 0 to 63.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct PlaceId(u8);

impl PlaceId {
    pub(super) fn number(self) -> u8 {
        self.0
    }
}

#[derive(Clone, Copy)]
enum Phase {
    /// It has its turn, or waits for it.
    Changing,
    /// Its turn is over; hardware may still use what it changed.
    Unflushed,
}

#[derive(Clone, Copy)]
struct Place {
    /// Lower ones go first.
    ticket: u64,
    range: GpaRange,
    phase: Phase,
}

struct State {
    next_ticket: u64,
    /// A bit for each place that is taken.
    taken: u64,
    places: [Place; PLACES],
    figures: Figures,
}

impl Default for State {
    fn default() -> Self {
        let place = Place {
            ticket: 0,
            range: GpaRange::ALL,
            phase: Phase::Unflushed,
        };
        Self {
            next_ticket: 0,
            taken: 0,
            places: [place; PLACES],
            figures: Figures::default(),
        }
    }
}

impl State {
    /// A place for a change of `range`; `None` if there is none for it now.
    fn enter(&mut self, range: GpaRange) -> Option<PlaceId> {
        let is_full = self.taken.count_zeros() <= KEPT_FREE;
        if is_full && self.changing().any(|place| place.range.overlaps(&range)) {
            return None;
        }
        let free = self.taken.trailing_ones();
        let index = usize::try_from(free).ok()?;
        *self.places.get_mut(index)? = Place {
            ticket: self.next_ticket,
            range,
            phase: Phase::Changing,
        };
        self.next_ticket += 1;
        self.taken |= 1 << free;
        u8::try_from(free).ok().map(PlaceId)
    }

    fn at(&mut self, id: PlaceId) -> &mut Place {
        &mut self.places[usize::from(id.0)]
    }

    fn vacate(&mut self, id: PlaceId) {
        self.taken &= !(1 << id.0);
    }

    /// The places in `set`, a bit for each.
    fn places(&self, mut set: u64) -> impl Iterator<Item = &Place> {
        core::iter::from_fn(move || {
            let index = usize::try_from(set.trailing_zeros()).ok()?;
            let place = self.places.get(index)?;
            set &= set - 1;
            Some(place)
        })
    }

    /// The changes that are not over.
    fn changing(&self) -> impl Iterator<Item = &Place> {
        self.places(self.taken)
            .filter(|place| matches!(place.phase, Phase::Changing))
    }

    /// The other changes that overlap the one at `id`.
    fn overlapping(&self, id: PlaceId) -> impl Iterator<Item = &Place> {
        let range = self.places[usize::from(id.0)].range;
        self.places(self.taken & !(1 << id.0))
            .filter(move |place| place.range.overlaps(&range))
    }

    fn must_wait(&self, id: PlaceId) -> bool {
        let own = self.places[usize::from(id.0)].ticket;
        self.overlapping(id)
            .any(|place| matches!(place.phase, Phase::Changing) && place.ticket < own)
    }

    fn has_unflushed(&self, id: PlaceId) -> bool {
        self.overlapping(id)
            .any(|place| matches!(place.phase, Phase::Unflushed))
    }
}

impl Order {
    pub(super) fn new() -> Self {
        Self {
            state: SpinLock::new(State::default()),
            clock: None,
        }
    }

    pub(super) fn set_clock(&mut self, clock: Clock) {
        self.clock = Some(clock);
    }

    /// The figures so far.
    pub(super) fn figures(&self) -> Figures {
        self.state.lock().figures
    }

    /// Waits for the turn of a change of `range`.
    pub(super) fn turn(&self, range: GpaRange) -> Result<Turn<'_>, NoPlace> {
        let mut turn = Turn {
            order: self,
            id: self.enter(range)?,
            began_ns: 0,
        };
        let mut spins = 0;
        while self.state.lock().must_wait(turn.id) {
            relax(&mut spins);
        }
        turn.began_ns = now_ns(self.clock);
        Ok(turn)
    }

    fn enter(&self, range: GpaRange) -> Result<PlaceId, NoPlace> {
        let (mut spins, mut patience) = (0, PATIENCE);
        loop {
            let mut state = self.state.lock();
            if let Some(id) = state.enter(range) {
                return Ok(id);
            }
            patience = match state.changing().next() {
                Some(_) => PATIENCE,
                None => patience.checked_sub(1).ok_or(NoPlace)?,
            };
            drop(state);
            relax(&mut spins);
        }
    }

    /// The change at `id` was flushed.
    pub(super) fn flushed(&self, id: PlaceId) {
        self.state.lock().vacate(id);
    }
}

/// A range that nobody else changes. Dropped without an end, by a panic for example, its flush stays owed for ever.
#[must_use = "a turn lasts as long as this value"]
pub(super) struct Turn<'o> {
    order: &'o Order,
    began_ns: u64,
    id: PlaceId,
}

impl Turn<'_> {
    /// Where the change stands in the list, until its flush is done.
    pub(super) fn id(&self) -> PlaceId {
        self.id
    }

    /// Whether a change that overlaps this one waits for its flush.
    pub(super) fn meets_unflushed(&self) -> bool {
        self.order.state.lock().has_unflushed(self.id)
    }

    /// Ends a turn that owes no flush.
    pub(super) fn end(self) {
        let figures = self.figures(Figures::default());
        let mut state = self.order.state.lock();
        state.figures.add(&figures);
        state.vacate(self.id);
        drop(state);
        core::mem::forget(self);
    }

    /// Ends a turn in which `touched` was changed; the result is what is to be flushed, until when the place is
    /// kept.
    pub(super) fn end_owing(self, touched: Option<GpaRange>, done: Figures) -> Option<GpaRange> {
        let figures = self.figures(done);
        let mut state = self.order.state.lock();
        state.figures.add(&figures);
        let owed = if state.has_unflushed(self.id) {
            let range = state.at(self.id).range;
            Some(touched.map_or(range, |touched| touched.hull(&range)))
        } else {
            touched
        };
        match owed {
            Some(_) => state.at(self.id).phase = Phase::Unflushed,
            None => state.vacate(self.id),
        }
        drop(state);
        core::mem::forget(self);
        owed
    }

    fn figures(&self, done: Figures) -> Figures {
        Figures {
            longest_turn_ns: now_ns(self.order.clock).saturating_sub(self.began_ns),
            ..done
        }
    }
}

impl Drop for Turn<'_> {
    fn drop(&mut self) {
        self.order.state.lock().at(self.id).phase = Phase::Unflushed;
    }
}
