//! Figures that a table keeps.

use crate::sync::atomic::{AtomicU64, Ordering};

/// A clock that only goes forward, in nanoseconds from any origin.
pub type Clock = fn() -> u64;

/// Figures of a [`Stage2`](crate::stage2::Stage2) since it was made.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct FiguresSnapshot {
    /// Huge leaves that were split.
    pub splits: u64,
    /// Tables that became huge leaves.
    pub collapses: u64,
    /// Write faults that gave a page back to the guest.
    pub faults: u64,
    /// The longest time for which one change held its range, in nanoseconds. 0 without a clock
    /// ([`Stage2::with_clock`](crate::stage2::Stage2::with_clock)).
    pub longest_turn_ns: u64,
}

#[derive(Debug)]
pub(super) struct Figures {
    clock: Option<Clock>,
    pub(super) splits: AtomicU64,
    pub(super) collapses: AtomicU64,
    pub(super) faults: AtomicU64,
    pub(super) longest_turn_ns: AtomicU64,
}

impl Figures {
    pub(super) fn new(clock: Option<Clock>) -> Self {
        Self {
            clock,
            splits: AtomicU64::new(0),
            collapses: AtomicU64::new(0),
            faults: AtomicU64::new(0),
            longest_turn_ns: AtomicU64::new(0),
        }
    }

    /// The time, or 0 without a clock.
    pub(super) fn now_ns(&self) -> u64 {
        self.clock.map_or(0, |clock| clock())
    }

    pub(super) fn snapshot(&self) -> FiguresSnapshot {
        let get = |figure: &AtomicU64| figure.load(Ordering::Relaxed);
        FiguresSnapshot {
            splits: get(&self.splits),
            collapses: get(&self.collapses),
            faults: get(&self.faults),
            longest_turn_ns: get(&self.longest_turn_ns),
        }
    }
}

/// Adds to a figure; nothing is written where there is nothing to add.
pub(super) fn add(figure: &AtomicU64, more: u64) {
    if more != 0 {
        figure.fetch_add(more, Ordering::Relaxed);
    }
}
