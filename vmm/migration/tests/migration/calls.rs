//! Guests of which each call can be observed, so that something happens at a chosen one.

use std::sync::{Arc, Mutex};

use ept::{Gpa, GpaRange, Tracker};
use migration::{Description, DestinationGuest, GuestError, Section, SourceGuest};

/// A moment around one call of a method.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Moment {
    pub(crate) method: &'static str,
    /// The number of the call among those of this method, from 1.
    pub(crate) nth: usize,
    pub(crate) when: When,
}

/// Before or after the method does its work.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum When {
    Before,
    After,
}

/// The calls of one guest's methods so far, and what happens at one of them.
#[derive(Default)]
pub(crate) struct Calls {
    seen: Mutex<Vec<Moment>>,
    at: Option<(Moment, Box<dyn Fn() + Send + Sync>)>,
}

impl Calls {
    /// Does nothing but record the calls.
    pub(crate) fn recorded() -> Arc<Self> {
        Arc::default()
    }

    /// Does `action` at `moment`.
    pub(crate) fn at(moment: Moment, action: impl Fn() + Send + Sync + 'static) -> Arc<Self> {
        Arc::new(Self {
            seen: Mutex::default(),
            at: Some((moment, Box::new(action))),
        })
    }

    /// The first two calls of each method, before and after, in the order in which they came.
    pub(crate) fn moments(&self) -> Vec<Moment> {
        let seen = self.seen.lock().unwrap();
        seen.iter()
            .filter(|moment| moment.nth <= 2)
            .copied()
            .collect()
    }

    /// Returns true if the action was done.
    pub(crate) fn struck(&self) -> bool {
        let seen = self.seen.lock().unwrap();
        self.at.as_ref().is_some_and(|(at, _)| seen.contains(at))
    }

    fn around<T>(&self, method: &'static str, call: impl FnOnce() -> T) -> T {
        let nth = {
            let seen = self.seen.lock().unwrap();
            let before = seen
                .iter()
                .filter(|moment| moment.method == method && moment.when == When::Before);
            before.count() + 1
        };
        self.reach(Moment {
            method,
            nth,
            when: When::Before,
        });
        let answer = call();
        self.reach(Moment {
            method,
            nth,
            when: When::After,
        });
        answer
    }

    fn reach(&self, moment: Moment) {
        self.seen.lock().unwrap().push(moment);
        if let Some((at, action)) = &self.at
            && *at == moment
        {
            action();
        }
    }
}

/// A guest and its calls.
pub(crate) struct Observed<'a, G> {
    pub(crate) guest: &'a mut G,
    pub(crate) calls: Arc<Calls>,
}

impl<G: SourceGuest> SourceGuest for Observed<'_, G> {
    type Memory = G::Memory;

    fn describe(&self) -> Result<Description, GuestError> {
        self.calls.around("describe", || self.guest.describe())
    }

    fn memory(&self) -> &G::Memory {
        self.calls.around("memory", || self.guest.memory())
    }

    fn tracker(&self) -> &Arc<Tracker> {
        self.calls.around("tracker", || self.guest.tracker())
    }

    fn populated(&self) -> Result<Vec<GpaRange>, GuestError> {
        self.calls.around("populated", || self.guest.populated())
    }

    fn start_log(&mut self) -> Result<(), GuestError> {
        self.calls.around("start_log", || self.guest.start_log())
    }

    fn sync_log(&mut self) -> Result<(), GuestError> {
        self.calls.around("sync_log", || self.guest.sync_log())
    }

    fn clear_log(&mut self, range: GpaRange, dirty: &[u64]) -> Result<(), GuestError> {
        let clear = || self.guest.clear_log(range, dirty);
        self.calls.around("clear_log", clear)
    }

    fn stop_log(&mut self) -> Result<(), GuestError> {
        self.calls.around("stop_log", || self.guest.stop_log())
    }

    fn throttle(&mut self, percent: u32) -> Result<(), GuestError> {
        let throttle = || self.guest.throttle(percent);
        self.calls.around("throttle", throttle)
    }

    fn pause(&mut self) -> Result<(), GuestError> {
        self.calls.around("pause", || self.guest.pause())
    }

    fn resume(&mut self) -> Result<(), GuestError> {
        self.calls.around("resume", || self.guest.resume())
    }

    fn save(&self) -> Result<Vec<Section>, GuestError> {
        self.calls.around("save", || self.guest.save())
    }
}

impl<G: DestinationGuest> DestinationGuest for Observed<'_, G> {
    type Memory = G::Memory;

    fn prepare(&mut self, description: &Description) -> Result<(), GuestError> {
        let prepare = || self.guest.prepare(description);
        self.calls.around("prepare", prepare)
    }

    fn memory(&self) -> Option<&G::Memory> {
        self.calls.around("memory", || self.guest.memory())
    }

    fn tracker(&self) -> Option<&Arc<Tracker>> {
        self.calls.around("tracker", || self.guest.tracker())
    }

    fn write_pages(&self, start: Gpa, bytes: &[u8]) -> Result<(), GuestError> {
        let write = || self.guest.write_pages(start, bytes);
        self.calls.around("write_pages", write)
    }

    fn populated(&self) -> Result<Vec<GpaRange>, GuestError> {
        self.calls.around("populated", || self.guest.populated())
    }

    fn restore(&mut self, sections: &[Section]) -> Result<(), GuestError> {
        self.calls
            .around("restore", || self.guest.restore(sections))
    }

    fn taken_over(&mut self) {
        self.calls.around("taken_over", || self.guest.taken_over());
    }

    fn resume(&mut self) -> Result<(), GuestError> {
        self.calls.around("resume", || self.guest.resume())
    }
}
