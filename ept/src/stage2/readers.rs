//! Which walks may still read a table that has gone out of use.
//!
//! A walk enters one of two crowds, the current one, and leaves it at its end. Tables given back by [`Flush::done`]
//! (nobody can find them in the tree any more) wait until the crowd that may have found them is gone: the other
//! crowd becomes the current one, and when the first is empty, they are free. Walks never wait; it is the tables that
//! do.
//!
//! At each change of crowds the other one is empty, so a walk that is still going on is in one of the last two, and
//! all of those that began before the change are in one. Source of the idea: Linux's SRCU (`kernel/rcu/srcutree.c`).
//!
//! [`Flush::done`]: crate::stage2::Flush::done

use crate::sync::atomic::{AtomicUsize, Ordering};

/// One crowd's size, on a cache line of its own.
#[derive(Debug)]
#[repr(align(64))]
struct Crowd(AtomicUsize);

/// The walks that are going on.
#[derive(Debug)]
pub(super) struct Readers {
    /// The crowd that walks enter: its lowest bit.
    current: AtomicUsize,
    crowds: [Crowd; 2],
}

impl Readers {
    pub(super) fn new() -> Self {
        Self {
            current: AtomicUsize::new(0),
            crowds: [Crowd(AtomicUsize::new(0)), Crowd(AtomicUsize::new(0))],
        }
    }

    /// A walk begins.
    #[inline]
    pub(super) fn enter(&self) -> Reading<'_> {
        loop {
            let current = self.current.load(Ordering::SeqCst);
            let reading = Reading {
                crowd: &self.crowds[current & 1],
            };
            reading.crowd.0.fetch_add(1, Ordering::SeqCst);
            // Counted in a crowd that is not the current one any more, nobody would wait for it.
            if self.current.load(Ordering::SeqCst) & 1 == current & 1 {
                return reading;
            }
        }
    }

    /// Whether the crowd that is not the current one is gone.
    pub(super) fn other_is_gone(&self) -> bool {
        let current = self.current.load(Ordering::SeqCst);
        self.crowds[!current & 1].0.load(Ordering::SeqCst) == 0
    }

    /// Makes the other crowd, which is gone, the current one. Callers come one at a time.
    pub(super) fn change(&self) {
        self.current.fetch_add(1, Ordering::SeqCst);
    }
}

/// A walk that is going on: no table that it can reach is used for anything else while this value lives.
#[derive(Debug)]
#[must_use = "dropping it says that the walk is over"]
pub struct Reading<'t> {
    crowd: &'t Crowd,
}

impl Drop for Reading<'_> {
    #[inline]
    fn drop(&mut self) {
        self.crowd.0.fetch_sub(1, Ordering::SeqCst);
    }
}
