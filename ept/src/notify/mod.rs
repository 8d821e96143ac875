//! Notifier ranges: whoever changes entries tells those who may be using them, before and after.
//!
//! ```text
//! open: every subscriber is told to start ─▶ every one is waited for ─▶ change, flush ─▶ close
//! ```
//!
//! Two passes, so that the kicks of many vCPUs overlap. An [`OpenRange`] closes when it is dropped,
//! on every path. Ranges nest and overlap. No subscriber is ever called under a lock.
//!
//! Who works from a translation without holding a range open uses the sequence protocol:
//! [`Notifier::begin_read`], work, then [`Notifier::retry`] under the lock that the changer also
//! takes.

mod range;
mod read;
mod state;

use alloc::string::String;
use alloc::sync::Arc;
use alloc::vec::Vec;
use core::fmt;

use crate::addr::GpaRange;
use crate::sync::SpinLock;

pub use range::OpenRange;
pub use read::ReadTicket;

use state::{State, Subscribed};

/// Somebody who uses translations: a vCPU thread, an IOMMU, a cache of mappings.
///
/// `start` and `end` must return soon, must not panic in `end`, and may call back into the notifier
/// except to close a range from within `start`.
pub trait Subscriber: Send + Sync {
    /// `range` is about to change: begin to stop using it, without waiting for that.
    fn start(&self, range: GpaRange);

    /// Waits until nothing here uses `range` any more, which must hold until `end`. Bounded by the
    /// implementer, who kicks again before giving up.
    ///
    /// # Errors
    /// It did not stop in time.
    fn wait(&self, range: GpaRange) -> Result<(), Unresponsive>;

    /// Whether `wait` would return at once.
    fn stopped(&self, range: GpaRange) -> bool;

    /// The change of `range` is over. Called once for each `start`.
    fn end(&self, range: GpaRange);
}

/// A subscriber that did not stop in time.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Unresponsive {
    /// Its name, like `vcpu3`.
    pub name: String,
}

impl Unresponsive {
    /// The subscriber called `name`.
    pub fn new(name: impl Into<String>) -> Self {
        Self { name: name.into() }
    }
}

impl fmt::Display for Unresponsive {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} did not stop in time", self.name)
    }
}

impl core::error::Error for Unresponsive {}

/// Why a range could not be opened. Whoever was told to start has been told the end.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum OpenError {
    /// These subscribers did not stop in time; at least one.
    Unresponsive(Vec<Unresponsive>),
    /// Opening would have had to wait for this many subscribers.
    WouldBlock(usize),
    /// No memory to note the range.
    OutOfMemory,
}

impl fmt::Display for OpenError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Unresponsive(who) => {
                for (number, one) in who.iter().enumerate() {
                    write!(f, "{}{one}", if number == 0 { "" } else { ", " })?;
                }
                Ok(())
            }
            Self::WouldBlock(count) => write!(f, "{count} subscribers have not stopped yet"),
            Self::OutOfMemory => f.write_str("no memory to open a notifier range"),
        }
    }
}

impl core::error::Error for OpenError {
    fn source(&self) -> Option<&(dyn core::error::Error + 'static)> {
        match self {
            Self::Unresponsive(who) => who.first().map(|one| one as _),
            Self::WouldBlock(_) | Self::OutOfMemory => None,
        }
    }
}

/// Tells subscribers about ranges that change. Clones are the same notifier.
#[derive(Clone)]
pub struct Notifier {
    state: Arc<SpinLock<State>>,
}

impl Notifier {
    /// A notifier without subscribers.
    pub fn new() -> Self {
        Self {
            state: Arc::new(SpinLock::new(State::default())),
        }
    }

    /// Adds a subscriber until the subscription is dropped.
    ///
    /// It is told of every range that opens after this. For the ranges that are open now it has
    /// been told `start` when this returns, and gets their `end`; nobody waits for it, as it cannot
    /// have used anything before.
    ///
    /// # Errors
    /// No memory ([`OpenError::OutOfMemory`]).
    pub fn subscribe(&self, subscriber: Arc<dyn Subscriber>) -> Result<Subscription, OpenError> {
        let entry = Subscribed::new(subscriber);
        let open = self.state.lock().subscribe(&entry)?;
        let subscription = Subscription {
            state: self.state.clone(),
            entry: entry.clone(),
        };
        // Each of these ranges waits with its close until the start has been delivered.
        for joined in open {
            joined.deliver(&entry);
        }
        Ok(subscription)
    }

    /// Opens `range`: tells every subscriber to start, then waits for every one.
    ///
    /// After this returns nobody uses a stale translation of the range, until the `OpenRange` is
    /// dropped.
    ///
    /// # Errors
    /// Who did not stop in time, or no memory.
    pub fn open(&self, range: GpaRange) -> Result<OpenRange, OpenError> {
        let mut open = OpenRange::register(&self.state, range)?;
        open.start();
        open.wait()?;
        Ok(open)
    }

    /// As [`Notifier::open`] for callers that must not wait. (Closing it waits where a subscriber came while it was
    /// open, and is being told of it just then.)
    ///
    /// # Errors
    /// [`OpenError::WouldBlock`] where a subscriber has not stopped at once, or no memory.
    pub fn try_open(&self, range: GpaRange) -> Result<OpenRange, OpenError> {
        let mut open = OpenRange::register(&self.state, range)?;
        open.start();
        open.check()?;
        Ok(open)
    }

    /// Ranges that are open.
    pub fn open_count(&self) -> usize {
        self.state.lock().open_count()
    }

    /// Begins to work from translations of `range`.
    pub fn begin_read(&self, range: GpaRange) -> ReadTicket {
        ReadTicket::new(&self.state, range)
    }

    /// Whether a range that overlaps the ticket's was open since, or is: the work must be thrown
    /// away. Decisive if called under the lock under which changes are made; otherwise the answer
    /// "no" may be old when it arrives. Changes elsewhere cause no retry.
    pub fn retry(&self, ticket: &ReadTicket) -> bool {
        ticket.is_stale()
    }
}

impl Default for Notifier {
    fn default() -> Self {
        Self::new()
    }
}

impl fmt::Debug for Notifier {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Notifier")
            .field("open", &self.open_count())
            .finish_non_exhaustive()
    }
}

/// A subscriber's registration.
///
/// Dropping it ends it: ranges that open afterwards do not reach the subscriber, and nobody waits
/// for it any more, so it must have stopped using translations for good. A `start` that it was told is still followed by its `end`, also afterwards.
#[must_use = "dropping a subscription ends it"]
pub struct Subscription {
    state: Arc<SpinLock<State>>,
    entry: Arc<Subscribed>,
}

impl Drop for Subscription {
    fn drop(&mut self) {
        self.entry.leave();
        let gone = self.state.lock().unsubscribe(&self.entry);
        // The subscriber may be dropped with it, which must not happen under the lock.
        drop(gone);
    }
}

impl fmt::Debug for Subscription {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Subscription").finish_non_exhaustive()
    }
}
