//! Notifier ranges: code that changes entries notifies the users of these entries before and after the change.
//!
//! ```text
//! open: start every subscriber ─▶ wait for every subscriber ─▶ change, flush ─▶ close
//! ```
//!
//! There are two passes over the subscribers, so that the kicks of many vCPUs overlap. An [`OpenRange`] closes when it is
//! dropped, also by an early return or a panic. Ranges can nest and overlap. No subscriber is called under a lock.
//!
//! A reader that uses a translation without an open range follows the sequence protocol: [`Notifier::begin_read`], work,
//! then [`Notifier::retry`] under a lock that the code which changes entries also takes.

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

/// A user of translations: a vCPU thread, an IOMMU, a cache of mappings.
///
/// `start` and `end` must return soon, and `end` must not panic. Both may call the notifier, but `start` must not close a
/// range.
pub trait Subscriber: Send + Sync {
    /// Begins to stop using `range`, which is about to change. Must not wait until that is done.
    fn start(&self, range: GpaRange);

    /// Waits until this subscriber no longer uses `range`. It must not use it again before `end`. The implementation limits
    /// the wait, and kicks again before it gives up.
    ///
    /// # Errors
    /// Returns [`Unresponsive`] if the subscriber did not stop in time.
    fn wait(&self, range: GpaRange) -> Result<(), Unresponsive>;

    /// Returns whether `wait` would return at once.
    fn stopped(&self, range: GpaRange) -> bool;

    /// Called when the change of `range` is over, once for each `start`.
    fn end(&self, range: GpaRange);
}

/// Error of a subscriber that did not stop in time.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Unresponsive {
    /// Name of the subscriber, such as `vcpu3`.
    pub name: String,
}

impl Unresponsive {
    /// Creates the error of the subscriber called `name`.
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

/// Reason why a range could not be opened. `end` was called for every subscriber whose `start` was called.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum OpenError {
    /// These subscribers, at least one, did not stop in time.
    Unresponsive(Vec<Unresponsive>),
    /// The call would have had to wait for this number of subscribers.
    WouldBlock(usize),
    /// There is no memory to register the range.
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

/// Notifies subscribers of ranges that change. Clones share their subscribers and open ranges.
#[derive(Clone)]
pub struct Notifier {
    state: Arc<SpinLock<State>>,
}

impl Notifier {
    /// Creates a notifier without subscribers.
    pub fn new() -> Self {
        Self {
            state: Arc::new(SpinLock::new(State::default())),
        }
    }

    /// Adds a subscriber. Dropping the subscription removes it.
    ///
    /// The subscriber is notified of every range that opens after this. For ranges that are open already, this calls `start`
    /// before it returns, and the subscriber gets their `end`. `wait` is not called for these, because the subscriber cannot
    /// have used a translation before.
    ///
    /// # Errors
    /// Returns [`OpenError::OutOfMemory`] if there is no memory.
    pub fn subscribe(&self, subscriber: Arc<dyn Subscriber>) -> Result<Subscription, OpenError> {
        let entry = Subscribed::new(subscriber);
        let open = self.state.lock().subscribe(&entry)?;
        let subscription = Subscription {
            state: self.state.clone(),
            entry: entry.clone(),
        };
        // None of these ranges closes before `start` was called for it.
        for joined in open {
            joined.deliver(&entry);
        }
        Ok(subscription)
    }

    /// Opens `range`: calls `start` of every subscriber, then `wait` of every subscriber.
    ///
    /// From when this returns until the [`OpenRange`] is dropped, no subscriber uses a translation of the range.
    ///
    /// # Errors
    /// Returns an error that names the subscribers that did not stop in time, or [`OpenError::OutOfMemory`].
    pub fn open(&self, range: GpaRange) -> Result<OpenRange, OpenError> {
        let mut open = OpenRange::register(&self.state, range)?;
        open.start();
        open.wait()?;
        Ok(open)
    }

    /// Opens `range` as [`Notifier::open`], for callers that must not wait. Closing the range may still wait briefly, if a
    /// subscriber was added while it was open and its `start` is being called.
    ///
    /// # Errors
    /// Returns [`OpenError::WouldBlock`] if a subscriber did not stop at once, and [`OpenError::OutOfMemory`] if there is no
    /// memory.
    pub fn try_open(&self, range: GpaRange) -> Result<OpenRange, OpenError> {
        let mut open = OpenRange::register(&self.state, range)?;
        open.start();
        open.check()?;
        Ok(open)
    }

    /// Returns the number of open ranges.
    pub fn open_count(&self) -> usize {
        self.state.lock().open_count()
    }

    /// Begins to use translations of `range` without an open range. See [`Notifier::retry`].
    pub fn begin_read(&self, range: GpaRange) -> ReadTicket {
        ReadTicket::new(&self.state, range)
    }

    /// Returns whether a range that overlaps the ticket's is open, or was open since the ticket was made. If so, the caller
    /// must discard its work. The answer is only reliable under the lock under which entries are changed; otherwise a "no"
    /// may be out of date. Changes of other ranges cause no retry.
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

/// Registration of a subscriber.
///
/// Dropping it removes the subscriber: later ranges do not call it, and no range waits for it. It must have stopped using
/// translations for good before. A `start` that was called is still followed by its `end`.
#[must_use = "dropping a subscription ends it"]
pub struct Subscription {
    state: Arc<SpinLock<State>>,
    entry: Arc<Subscribed>,
}

impl Drop for Subscription {
    fn drop(&mut self) {
        self.entry.leave();
        let gone = self.state.lock().unsubscribe(&self.entry);
        // This may drop the subscriber, which must not happen under the lock.
        drop(gone);
    }
}

impl fmt::Debug for Subscription {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Subscription").finish_non_exhaustive()
    }
}
