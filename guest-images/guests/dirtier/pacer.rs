//! Time by the time-stamp counter, which may jump in either direction when a guest is moved.

use crate::cpu::time_stamp;
use crate::dirtier::Config;

/// Holds a vCPU to its part of `rate=`.
pub(crate) struct Pacer {
    /// Ticks a page, times the rate; kept apart for exactness.
    ticks_by_rate: u64,
    rate: u64,
    due: u64,
}

impl Pacer {
    /// `None` if the vCPU is to run as fast as it can.
    pub(crate) fn new(config: &Config) -> Option<Self> {
        let (rate, tsc_khz) = (config.rate?, config.tsc_khz?);
        // Both are at most 2^32: no overflow, here or for the pages of a chunk.
        let ticks_by_rate = tsc_khz * 1000 * u64::from(config.cpus);
        Some(Self {
            ticks_by_rate,
            rate,
            due: time_stamp(),
        })
    }

    /// Pages that take about a millisecond, so that a low rate does not come in bursts.
    pub(crate) fn chunk(&self, cpus: u32) -> u64 {
        self.rate / (u64::from(cpus) * 1000)
    }

    /// Puts the next moment off by what `pages` pages take.
    pub(crate) fn spend(&mut self, pages: u64) {
        self.due = self.due.wrapping_add(self.ticks(pages));
    }

    fn ticks(&self, pages: u64) -> u64 {
        pages * self.ticks_by_rate / self.rate
    }

    /// Whether the moment has come.
    ///
    /// Whoever is late by more than a tenth of a second, because of a pause, faults or a jump of
    /// the counter, does not catch up.
    pub(crate) fn is_due(&mut self) -> bool {
        let now = time_stamp();
        let early = self.due.wrapping_sub(now).cast_signed();
        let tenth = (self.ticks_by_rate / 10).cast_signed();
        let longest = tenth + self.ticks(256).cast_signed();
        if early < -tenth || early > longest {
            self.due = now;
        }
        early <= 0 || early > longest
    }
}

/// Says when to look at the serial port: so seldom that the looking costs about 3 % of the time,
/// whatever a look costs on this host.
pub(crate) struct Poll {
    last: u64,
    cost: u64,
}

impl Poll {
    /// One look in so many times its own cost.
    const SELDOM: u64 = 32;

    pub(crate) fn new() -> Self {
        Self {
            last: time_stamp(),
            cost: 1000,
        }
    }

    /// Whether it is time to look. A counter that went back counts as time passed.
    #[inline]
    pub(crate) fn is_due(&self) -> bool {
        time_stamp().wrapping_sub(self.last) >= self.cost * Self::SELDOM
    }

    /// Looks, and learns what it costs. A guest that was stopped meanwhile must not learn that a
    /// look takes minutes: the estimate grows fourfold at most.
    pub(crate) fn look<T>(&mut self, look: impl FnOnce() -> T) -> T {
        let before = time_stamp();
        let found = look();
        self.last = time_stamp();
        self.cost = self.last.saturating_sub(before).clamp(100, self.cost * 4);
        found
    }
}
