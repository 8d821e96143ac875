//! Named consumers of a tracker.

use alloc::string::String;
use alloc::sync::Arc;
use core::fmt;

use crate::addr::{Gpa, GpaRange};
use crate::counters::Counters;
use crate::harvest::{Harvest, Pieces};
use crate::tracker::Tracker;
use crate::tracking::{
    Bitmap, Bits, Every, MarkTally, PLANE_WORDS, Plane, Sink, Taken, Tracked, Tree,
};

/// Consumers that one tracker can have at a time.
pub const MAX_EPOCHS: usize = 16;

/// What a new epoch finds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Start {
    /// Only what is marked from now on.
    Clean,
    /// Every page of every region, for this epoch alone.
    AllDirty,
}

/// Why an epoch could not begin.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum EpochError {
    /// [`MAX_EPOCHS`] are registered; this one is not.
    TooMany(String),
    /// No memory for this epoch.
    OutOfMemory(String),
}

impl fmt::Display for EpochError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::TooMany(name) => {
                write!(f, "epoch {name:?} would be one more than {MAX_EPOCHS}")
            }
            Self::OutOfMemory(name) => write!(f, "no memory for epoch {name:?}"),
        }
    }
}

impl core::error::Error for EpochError {}

/// Why a harvest was not made. Every page that was dirty still is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum HarvestError {
    /// No memory to record what is dirty from this page on.
    OutOfMemory(Gpa),
}

impl fmt::Display for HarvestError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::OutOfMemory(at) => write!(f, "no memory to record the dirty pages at {at}"),
        }
    }
}

impl core::error::Error for HarvestError {}

/// A registered consumer: what is dirty for it and not in the shared tree any more.
#[derive(Debug)]
pub(crate) struct Consumer {
    name: String,
    pub(crate) pending: Tree<1>,
}

impl Consumer {
    /// Makes the pages of `range` that lie in regions pending.
    fn mark(&self, range: GpaRange) -> MarkTally {
        let regions = self.pending.regions();
        self.pending.mark(range, &Tracked { range, regions })
    }
}

/// A consumer of a tracker's dirty pages, with a view of its own of what it has seen.
///
/// Dropping it ends the registration.
#[derive(Debug)]
pub struct Epoch {
    tracker: Arc<Tracker>,
    consumer: Arc<Consumer>,
}

impl Epoch {
    /// Registers a consumer. Names are for people and need not differ.
    ///
    /// # Errors
    /// Too many epochs, or no memory.
    pub fn begin(
        tracker: &Arc<Tracker>,
        name: impl Into<String>,
        start: Start,
    ) -> Result<Self, EpochError> {
        let name = name.into();
        let Ok(pending) = tracker.pending_tree() else {
            return Err(EpochError::OutOfMemory(name));
        };
        let consumer = Arc::new(Consumer { name, pending });
        match start {
            Start::Clean => {}
            Start::AllDirty => {
                let tally = consumer.mark(GpaRange::ALL);
                tracker.all_counters().coarse(tally.coarse);
            }
        }
        register(tracker, consumer.clone(), start)?;
        Ok(Self {
            tracker: tracker.clone(),
            consumer,
        })
    }

    /// The name it began with.
    pub fn name(&self) -> &str {
        &self.consumer.name
    }

    /// The tracker it consumes.
    pub fn tracker(&self) -> &Arc<Tracker> {
        &self.tracker
    }

    /// Takes every page of `range` that is dirty for this consumer.
    ///
    /// What was marked before the call is in the harvest; what is marked later is in it or stays
    /// dirty, or both. No other consumer loses a page by it.
    ///
    /// # Errors
    /// No memory to record the pages; all of them are dirty as before.
    pub fn harvest(&self, range: GpaRange) -> Result<Harvest, HarvestError> {
        self.harvest_up_to(range, u64::MAX)
    }

    /// As [`Epoch::harvest`], ending after `max_pages` pages (at least one; up to 511 more, and more
    /// where there is no memory to split a coarse entry). [`Harvest::rest`] is what was not
    /// looked at.
    ///
    /// # Errors
    /// As [`Epoch::harvest`].
    pub fn harvest_up_to(&self, range: GpaRange, max_pages: u64) -> Result<Harvest, HarvestError> {
        // Made first: should anything unwind below, its drop makes all it holds dirty again, after
        // the lock is free.
        let mut harvest = Harvest::new(self.tracker.clone(), self.consumer.clone());
        let taken = self.take_timed(range, max_pages.max(1), harvest.pieces_mut());
        match taken {
            Taken::All => Ok(harvest),
            Taken::Limit(at) => {
                harvest.set_rest(range.from(at));
                Ok(harvest)
            }
            Taken::NoRoom(at) => Err(HarvestError::OutOfMemory(at)),
        }
    }

    fn take_timed(&self, range: GpaRange, limit: u64, pieces: &mut Pieces) -> Taken {
        let consumers = self.tracker.consumers().lock();
        let Some(clock) = self.tracker.clock() else {
            return self.take(&consumers, range, limit, pieces);
        };
        let began_ns = clock();
        let taken = self.take(&consumers, range, limit, pieces);
        let took_ns = clock().saturating_sub(began_ns);
        self.tracker.all_counters().harvest_took(took_ns);
        taken
    }

    /// Takes what is dirty, with the lock of the consumers held.
    fn take(
        &self,
        consumers: &[Arc<Consumer>],
        range: GpaRange,
        limit: u64,
        pieces: &mut Pieces,
    ) -> Taken {
        let pending = &self.consumer.pending;
        let shared = self.tracker.tree();
        let mut others = Pending {
            consumers,
            except: None,
            counters: self.tracker.all_counters(),
        };
        if pending.is_clean() {
            // Alone, or no later than the others: no detour through the own pending tree.
            others.except = Some(&self.consumer);
            return shared.take(range, limit, &mut Tee { pieces, others });
        }
        match shared.take(range, limit, &mut others) {
            Taken::All => pending.take(range, limit, pieces),
            Taken::Limit(at) | Taken::NoRoom(at) => {
                let looked_at = GpaRange::of(range.first_page(), at.page());
                match pending.take(looked_at, limit, pieces) {
                    Taken::All => Taken::Limit(at),
                    earlier => earlier,
                }
            }
        }
    }

    /// Makes every page of `range` that lies in a region dirty for this consumer alone, such as the
    /// pages that it must see once whether or not anybody writes to them.
    pub fn mark(&self, range: GpaRange) {
        let tally = self.consumer.mark(range);
        self.tracker.all_counters().coarse(tally.coarse);
    }

    /// Whether the page at `gpa` is dirty for this consumer. For tests and diagnosis.
    pub fn dirty_at(&self, gpa: Gpa) -> bool {
        let _drain = self.tracker.consumers().lock();
        let page = gpa.page();
        self.tracker.tree().regions().at(page).is_some()
            && (self.tracker.tree().has(page, Plane::Dirty)
                || self.consumer.pending.has(page, Plane::Dirty))
    }
}

impl Drop for Epoch {
    fn drop(&mut self) {
        let mut consumers = self.tracker.consumers().lock();
        consumers.retain(|other| !Arc::ptr_eq(other, &self.consumer));
    }
}

fn register(tracker: &Tracker, consumer: Arc<Consumer>, start: Start) -> Result<(), EpochError> {
    let mut consumers = tracker.consumers().lock();
    if consumers.len() >= MAX_EPOCHS {
        return Err(EpochError::TooMany(consumer.name.clone()));
    }
    if consumers.try_reserve(1).is_err() {
        return Err(EpochError::OutOfMemory(consumer.name.clone()));
    }
    if start == Start::Clean {
        // What was marked before belongs to the others only.
        let mut others = Pending {
            consumers: &consumers,
            except: None,
            counters: tracker.all_counters(),
        };
        tracker.tree().take(GpaRange::ALL, u64::MAX, &mut others);
    }
    consumers.push(consumer);
    Ok(())
}

/// Records what is taken as pending for consumers.
struct Pending<'a> {
    consumers: &'a [Arc<Consumer>],
    except: Option<&'a Arc<Consumer>>,
    counters: &'a Counters,
}

impl Pending<'_> {
    fn mark<B: Bits>(&self, range: GpaRange, bits: &B) {
        for consumer in self.consumers {
            let skipped = self.except.is_some_and(|one| Arc::ptr_eq(one, consumer));
            if !skipped {
                self.counters
                    .coarse(consumer.pending.mark(range, bits).coarse);
            }
        }
    }
}

impl Sink for Pending<'_> {
    /// Marking never fails.
    fn make_room(&mut self, _: usize) -> bool {
        true
    }

    fn range(&mut self, part: GpaRange) {
        self.mark(part, &Every);
    }

    fn words(&mut self, base: u64, words: &[u64; PLANE_WORDS], _: u64) {
        let bits = Bitmap {
            first_page: base,
            words,
        };
        self.mark(GpaRange::of(base, base + 64 * PLANE_WORDS as u64), &bits);
    }
}

/// Records what is taken for its harvester, and as pending for the others.
struct Tee<'a, 'p> {
    pieces: &'p mut Pieces,
    others: Pending<'a>,
}

impl Sink for Tee<'_, '_> {
    fn make_room(&mut self, parts: usize) -> bool {
        self.pieces.make_room(parts)
    }

    fn range(&mut self, part: GpaRange) {
        self.pieces.range(part);
        self.others.range(part);
    }

    fn words(&mut self, base: u64, words: &[u64; PLANE_WORDS], pages: u64) {
        self.pieces.words(base, words, pages);
        self.others.words(base, words, pages);
    }
}
