//! Named consumers of a tracker.

use alloc::string::String;
use alloc::sync::Arc;
use core::fmt;

use crate::addr::{Gpa, GpaRange};
use crate::harvest::{Harvest, Pieces};
use crate::tracker::{Pending, Registry, Tracker, up_to};
use crate::tracking::{PLANE_WORDS, Sink, Taken};

/// Maximum number of epochs that one tracker can have at a time.
pub const MAX_EPOCHS: usize = 16;

/// Pages that are dirty for an epoch when it begins.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Start {
    /// No page. Only pages that are marked later become dirty.
    Clean,
    /// Every page of every region. Other epochs see no difference.
    AllDirty,
}

/// Reason why an epoch could not begin.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum EpochError {
    /// [`MAX_EPOCHS`] epochs are registered already. Holds the name of the one that was refused.
    TooMany(String),
    /// There is no memory for the epoch of this name.
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

/// Reason why a harvest failed. Every page that was dirty before is still dirty.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum HarvestError {
    /// There is no memory to record the dirty pages from this address on.
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

/// Identity of a registered consumer.
#[derive(Debug)]
pub(crate) struct Consumer {
    name: String,
}

impl Consumer {
    pub(crate) fn name(&self) -> &str {
        &self.name
    }
}

/// A consumer of a tracker's dirty pages. It has its own view of which pages it has harvested.
///
/// Dropping it ends the registration.
#[derive(Debug)]
pub struct Epoch {
    registration: Registration,
}

/// A consumer that is registered with a tracker.
#[derive(Debug)]
struct Registration {
    tracker: Arc<Tracker>,
    consumer: Arc<Consumer>,
}

impl Epoch {
    /// Registers a consumer. Two epochs may have the same name, which is only shown to people.
    ///
    /// # Errors
    /// Returns [`EpochError::TooMany`] if [`MAX_EPOCHS`] epochs are registered, and [`EpochError::OutOfMemory`] if there
    /// is no memory.
    pub fn begin(
        tracker: &Arc<Tracker>,
        name: impl Into<String>,
        start: Start,
    ) -> Result<Self, EpochError> {
        let name = name.into();
        let mut registry = tracker.registry();
        if registry.epochs() >= MAX_EPOCHS {
            return Err(EpochError::TooMany(name));
        }
        let consumer = Arc::new(Consumer { name });
        if register(tracker, &mut registry, &consumer, start).is_none() {
            return Err(EpochError::OutOfMemory(consumer.name.clone()));
        }
        Ok(Self {
            registration: Registration {
                tracker: tracker.clone(),
                consumer,
            },
        })
    }

    /// Returns the name that the epoch began with.
    pub fn name(&self) -> &str {
        self.registration.consumer.name()
    }

    /// Returns the tracker that the epoch consumes.
    pub fn tracker(&self) -> &Arc<Tracker> {
        &self.registration.tracker
    }

    /// Takes every page of `range` that is dirty for this consumer. The pages stay dirty for other consumers.
    ///
    /// A page that was marked before the call is in the harvest. A page that is marked during the call is in the harvest,
    /// or stays dirty, or both.
    ///
    /// # Errors
    /// Returns [`HarvestError::OutOfMemory`] if there is no memory to record the pages. All of them are dirty as before.
    pub fn harvest(&self, range: GpaRange) -> Result<Harvest, HarvestError> {
        self.harvest_up_to(range, u64::MAX)
    }

    /// As [`Epoch::harvest`], but ends after `max_pages` pages. It takes at least one page if any is dirty, and may exceed
    /// the limit by 511 pages; by more if there is no memory to split a coarse entry. [`Harvest::rest`] returns the part
    /// of `range` that was not looked at.
    ///
    /// # Errors
    /// As [`Epoch::harvest`].
    pub fn harvest_up_to(&self, range: GpaRange, max_pages: u64) -> Result<Harvest, HarvestError> {
        self.registration.harvest_up_to(range, max_pages)
    }

    /// Makes every page of `range` that lies in a region dirty for this consumer alone, for instance because it must see
    /// these pages once whether or not they are written.
    pub fn mark(&self, range: GpaRange) {
        let Registration { tracker, consumer } = &self.registration;
        tracker.mark_for(&tracker.registry(), consumer, range);
    }

    /// Returns whether the page at `gpa` is dirty for this consumer. For tests and diagnosis.
    pub fn dirty_at(&self, gpa: Gpa) -> bool {
        let Registration { tracker, consumer } = &self.registration;
        let registry = tracker.registry();
        tracker.is_marked(gpa.page()) || registry.is_pending_for(consumer, gpa.page())
    }
}

impl Drop for Epoch {
    fn drop(&mut self) {
        let Registration { tracker, consumer } = &self.registration;
        tracker.registry().unregister(consumer);
    }
}

impl Registration {
    /// As [`Epoch::harvest_up_to`].
    fn harvest_up_to(&self, range: GpaRange, max_pages: u64) -> Result<Harvest, HarvestError> {
        // Created first: if anything below panics, dropping the harvest makes its pages dirty again, after the lock was
        // released.
        let mut harvest = Harvest::new(self.tracker.clone(), self.consumer.clone());
        let taken = self.take_timed(range, max_pages.max(1), &mut harvest);
        match taken {
            Taken::All => Ok(harvest),
            Taken::Limit(at) => {
                harvest.set_rest(range.from(at));
                Ok(harvest)
            }
            Taken::NoRoom(at) => Err(HarvestError::OutOfMemory(at)),
        }
    }

    fn take_timed(&self, range: GpaRange, limit: u64, harvest: &mut Harvest) -> Taken {
        let registry = self.tracker.registry();
        harvest.set_version(registry.version());
        let pieces = harvest.pieces_mut();
        let Some(clock) = self.tracker.clock() else {
            return self.take(&registry, range, limit, pieces);
        };
        let began_ns = clock();
        let taken = self.take(&registry, range, limit, pieces);
        let took_ns = clock().saturating_sub(began_ns);
        self.tracker.all_counters().harvest_took(took_ns);
        taken
    }

    /// Takes the dirty pages of `range`. The caller holds the tracker's lock.
    fn take(&self, registry: &Registry, range: GpaRange, limit: u64, pieces: &mut Pieces) -> Taken {
        let Some(pending) = registry.pending_of(&self.consumer) else {
            return Taken::All;
        };
        let shared = self.tracker.tree();
        let mut others = self.tracker.pending(registry);
        // Pages of added regions become pending first, so that the pending tree returns all pages in order of address.
        let Some(mut looked_at) = self.tracker.drain_added(range, limit, &mut others) else {
            return Taken::Limit(range.start());
        };
        if looked_at == range && pending.is_clean() {
            // No page is pending, so the shared tree returns all pages in order of address.
            others.except = Some(&self.consumer);
            return shared.take(range, limit, &mut Tee { pieces, others });
        }
        if let Taken::Limit(at) | Taken::NoRoom(at) = shared.take(looked_at, limit, &mut others) {
            let Some(before) = up_to(looked_at, at) else {
                return Taken::Limit(range.start());
            };
            looked_at = before;
        }
        match (pending.take(looked_at, limit, pieces), looked_at.end()) {
            (Taken::All, Some(at)) if looked_at != range => Taken::Limit(at),
            (taken, _) => taken,
        }
    }
}

/// Registers `consumer`; `None` if there is no memory.
fn register(
    tracker: &Tracker,
    registry: &mut Registry,
    consumer: &Arc<Consumer>,
    start: Start,
) -> Option<()> {
    let pending = tracker.pending_tree(registry.regions().clone())?;
    registry.reserve_one()?;
    if start == Start::Clean {
        // Pages that were marked before belong to the other consumers only.
        tracker.drain(registry, GpaRange::ALL);
    }
    registry.register(consumer.clone(), pending);
    if start == Start::AllDirty {
        tracker.mark_for(registry, consumer, GpaRange::ALL);
    }
    Some(())
}

/// Takes every page of `range` that is dirty for the consumer that all `TrackerBitmap`s of `tracker` share, which is
/// registered first if it is not yet. `None` if there is no memory.
#[cfg(feature = "vm-memory")]
pub(crate) fn take_for_bitmaps(tracker: &Arc<Tracker>, range: GpaRange) -> Option<Harvest> {
    let mut registry = tracker.registry();
    let consumer = match registry.bitmaps() {
        Some(consumer) => consumer.clone(),
        None => {
            let name = String::from("bitmaps");
            let consumer = Arc::new(Consumer { name });
            register(tracker, &mut registry, &consumer, Start::AllDirty)?;
            registry.set_bitmaps(&consumer);
            consumer
        }
    };
    drop(registry);
    let registration = Registration {
        tracker: tracker.clone(),
        consumer,
    };
    registration.harvest_up_to(range, u64::MAX).ok()
}

/// A sink that records pages for the harvester and makes them pending for the other consumers.
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
