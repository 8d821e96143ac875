//! An open notifier range.

use alloc::sync::Arc;
use alloc::vec::Vec;
use core::fmt;

use crate::addr::GpaRange;
use crate::notify::OpenError;
use crate::notify::state::{State, Subscribed};
use crate::sync::SpinLock;

/// Proof that a range is open: no subscriber uses its translations while this value lives.
///
/// Dropping it closes the range and calls `end` of every subscriber.
#[must_use = "dropping an open range closes it"]
pub struct OpenRange {
    state: Arc<SpinLock<State>>,
    id: u64,
    range: GpaRange,
    subscribers: Vec<Arc<Subscribed>>,
    /// Number of subscribers whose `start` was called. `end` must be called for each.
    started: usize,
}

impl OpenRange {
    /// Registers the range, which makes its readers retry. No subscriber is called yet.
    pub(crate) fn register(
        state: &Arc<SpinLock<State>>,
        range: GpaRange,
    ) -> Result<Self, OpenError> {
        let (id, subscribers) = state.lock().open(range)?;
        Ok(Self {
            state: state.clone(),
            id,
            range,
            subscribers,
            started: 0,
        })
    }

    /// Returns the pages that may be changed.
    pub fn range(&self) -> GpaRange {
        self.range
    }

    /// First pass: calls `start` of every subscriber.
    pub(crate) fn start(&mut self) {
        while let Some(entry) = self.subscribers.get(self.started) {
            // Counted first: if the call panics, it may have had its effect.
            self.started += 1;
            entry.subscriber.start(self.range);
        }
    }

    /// Second pass: calls `wait` of every subscriber. The error names those that did not stop.
    pub(crate) fn wait(&self) -> Result<(), OpenError> {
        let mut unresponsive = Vec::new();
        for entry in self.waited_for() {
            if let Err(one) = entry.subscriber.wait(self.range)
                && entry.is_active()
            {
                unresponsive.push(one);
            }
        }
        if unresponsive.is_empty() {
            Ok(())
        } else {
            Err(OpenError::Unresponsive(unresponsive))
        }
    }

    /// Second pass for callers that must not wait: calls `stopped` of every subscriber.
    pub(crate) fn check(&self) -> Result<(), OpenError> {
        let running = self.waited_for();
        let count = running
            .filter(|entry| !entry.subscriber.stopped(self.range))
            .count();
        if count == 0 {
            Ok(())
        } else {
            Err(OpenError::WouldBlock(count))
        }
    }

    fn waited_for(&self) -> impl Iterator<Item = &Arc<Subscribed>> {
        self.subscribers.iter().filter(|entry| entry.is_active())
    }
}

impl Drop for OpenRange {
    fn drop(&mut self) {
        let late = self.state.lock().close(self.id);
        let started = self.subscribers.iter().take(self.started);
        let late = late.iter().filter(|one| one.settle()).map(|one| &one.entry);
        let range = self.range;
        Ends {
            left: started.chain(late),
            range,
        }
        .run();
    }
}

/// Subscribers whose `end` must still be called, even if `end` of an earlier one panics.
struct Ends<'s, I: Iterator<Item = &'s Arc<Subscribed>>> {
    left: I,
    range: GpaRange,
}

impl<'s, I: Iterator<Item = &'s Arc<Subscribed>>> Ends<'s, I> {
    fn run(&mut self) {
        for entry in &mut self.left {
            entry.subscriber.end(self.range);
        }
    }
}

impl<'s, I: Iterator<Item = &'s Arc<Subscribed>>> Drop for Ends<'s, I> {
    fn drop(&mut self) {
        self.run();
    }
}

impl fmt::Debug for OpenRange {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("OpenRange").field(&self.range).finish()
    }
}
