//! State of a notifier, under its lock: subscribers, open ranges, readers.

use crate::sync::atomic::{AtomicBool, Ordering};
use alloc::sync::Arc;
use alloc::vec::Vec;

use crate::addr::GpaRange;
use crate::notify::{OpenError, Subscriber};
use crate::sync::relax;

/// A registered subscriber.
pub(crate) struct Subscribed {
    pub(crate) subscriber: Arc<dyn Subscriber>,
    active: AtomicBool,
}

impl Subscribed {
    pub(crate) fn new(subscriber: Arc<dyn Subscriber>) -> Arc<Self> {
        Arc::new(Self {
            subscriber,
            active: AtomicBool::new(true),
        })
    }

    /// Ends the registration: from then on no range waits for the subscriber.
    pub(crate) fn leave(&self) {
        self.active.store(false, Ordering::SeqCst);
    }

    pub(crate) fn is_active(&self) -> bool {
        self.active.load(Ordering::SeqCst)
    }
}

/// An open range of which a new subscriber must be notified.
pub(crate) struct Joined {
    range: GpaRange,
    progress: Arc<Progress>,
}

impl Joined {
    /// Calls `start` of the subscriber. After that, the range may close.
    pub(crate) fn deliver(self, entry: &Subscribed) {
        // Recorded first: if the call panics, it may have had its effect.
        self.progress.started.store(true, Ordering::SeqCst);
        entry.subscriber.start(self.range);
        // The drop below lets the range close.
    }
}

impl Drop for Joined {
    fn drop(&mut self) {
        self.progress.settled.store(true, Ordering::Release);
    }
}

/// Whether a subscriber that was added while a range was open was notified of it.
#[derive(Default)]
struct Progress {
    /// `start` was called, so `end` must be.
    started: AtomicBool,
    /// The subscriber is not called any more.
    settled: AtomicBool,
}

/// A subscriber that was added while a range was open.
pub(crate) struct Late {
    pub(crate) entry: Arc<Subscribed>,
    progress: Arc<Progress>,
}

impl Late {
    /// Waits until `start` of the subscriber was called. Returns false if a panic prevented that.
    pub(crate) fn settle(&self) -> bool {
        let mut spins = 0;
        while !self.progress.settled.load(Ordering::Acquire) {
            relax(&mut spins);
        }
        self.progress.started.load(Ordering::SeqCst)
    }
}

struct Open {
    id: u64,
    range: GpaRange,
    late: Vec<Late>,
}

struct Reader {
    id: u64,
    range: GpaRange,
    stale: bool,
}

#[derive(Default)]
pub(crate) struct State {
    next_id: u64,
    subscribers: Vec<Arc<Subscribed>>,
    open: Vec<Open>,
    readers: Vec<Reader>,
}

impl State {
    fn id(&mut self) -> u64 {
        self.next_id += 1;
        self.next_id
    }

    /// Adds a subscriber, and returns the open ranges of which it must be notified.
    pub(crate) fn subscribe(&mut self, entry: &Arc<Subscribed>) -> Result<Vec<Joined>, OpenError> {
        let mut joined = Vec::new();
        joined
            .try_reserve_exact(self.open.len())
            .and_then(|()| self.subscribers.try_reserve(1))
            .map_err(|_| OpenError::OutOfMemory)?;
        for open in &mut self.open {
            open.late
                .try_reserve(1)
                .map_err(|_| OpenError::OutOfMemory)?;
        }
        for open in &mut self.open {
            let progress = Arc::new(Progress::default());
            open.late.push(Late {
                entry: entry.clone(),
                progress: progress.clone(),
            });
            joined.push(Joined {
                range: open.range,
                progress,
            });
        }
        self.subscribers.push(entry.clone());
        Ok(joined)
    }

    pub(crate) fn unsubscribe(&mut self, entry: &Arc<Subscribed>) -> Option<Arc<Subscribed>> {
        let mut entries = self.subscribers.iter();
        let position = entries.position(|other| Arc::ptr_eq(other, entry))?;
        Some(self.subscribers.swap_remove(position))
    }

    /// Registers an open range, and returns its id and the subscribers to notify.
    pub(crate) fn open(
        &mut self,
        range: GpaRange,
    ) -> Result<(u64, Vec<Arc<Subscribed>>), OpenError> {
        let mut told = Vec::new();
        told.try_reserve_exact(self.subscribers.len())
            .and_then(|()| self.open.try_reserve(1))
            .map_err(|_| OpenError::OutOfMemory)?;
        told.extend(self.subscribers.iter().cloned());
        let id = self.id();
        self.open.push(Open {
            id,
            range,
            late: Vec::new(),
        });
        for reader in &mut self.readers {
            reader.stale |= reader.range.overlaps(&range);
        }
        Ok((id, told))
    }

    /// Removes an open range, and returns the subscribers that were added while it was open.
    pub(crate) fn close(&mut self, id: u64) -> Vec<Late> {
        match self.open.iter().position(|open| open.id == id) {
            Some(position) => self.open.swap_remove(position).late,
            None => Vec::new(),
        }
    }

    pub(crate) fn open_count(&self) -> usize {
        self.open.len()
    }

    /// Registers a reader; `None` if there is no memory.
    pub(crate) fn begin_read(&mut self, range: GpaRange) -> Option<u64> {
        self.readers.try_reserve(1).ok()?;
        let stale = self.open.iter().any(|open| open.range.overlaps(&range));
        let id = self.id();
        self.readers.push(Reader { id, range, stale });
        Some(id)
    }

    pub(crate) fn is_stale(&self, reader: u64) -> bool {
        let found = self.readers.iter().find(|other| other.id == reader);
        found.is_none_or(|reader| reader.stale)
    }

    pub(crate) fn end_read(&mut self, reader: u64) {
        self.readers.retain(|other| other.id != reader);
    }
}
