//! Pacing by the time-stamp counter, which may jump in either direction when the guest is migrated.

use crate::cpu::time_stamp;
use crate::dirtier::Config;

/// Limits a vCPU to its part of `rate=`.
pub(crate) struct Pacer {
    /// Ticks per page, multiplied by the rate to avoid rounding.
    ticks_by_rate: u64,
    rate: u64,
    due: u64,
}

impl Pacer {
    /// Creates a pacer, or returns `None` if the configuration sets no rate.
    pub(crate) fn new(config: &Config) -> Option<Self> {
        let (rate, tsc_khz) = (config.rate?, config.tsc_khz?);
        // Both are at most 2^32, so that neither this product nor that with the pages of a chunk overflows.
        let ticks_by_rate = tsc_khz * 1000 * u64::from(config.cpus);
        Some(Self {
            ticks_by_rate,
            rate,
            due: time_stamp(),
        })
    }

    /// Returns the number of pages that take about a millisecond, so that a low rate causes no bursts.
    pub(crate) fn chunk(&self, cpus: u32) -> u64 {
        self.rate / (u64::from(cpus) * 1000)
    }

    /// Delays the next chunk by the time of `pages` pages.
    pub(crate) fn spend(&mut self, pages: u64) {
        self.due = self.due.wrapping_add(self.ticks(pages));
    }

    /// Returns the ticks that `pages` pages take at the rate.
    fn ticks(&self, pages: u64) -> u64 {
        pages * self.ticks_by_rate / self.rate
    }

    /// Returns true if the next chunk is due.
    ///
    /// A delay of more than a tenth of a second, because of a pause, page faults or a jump of the
    /// counter, is not caught up.
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

/// Schedule of the polls of the serial port. It limits them to about 3 % of the time, regardless of
/// the cost of a poll on this host.
pub(crate) struct Poll {
    last: u64,
    cost: u64,
}

impl Poll {
    /// Time between two polls, as a multiple of the cost of a poll.
    const SELDOM: u64 = 32;

    pub(crate) fn new() -> Self {
        Self {
            last: time_stamp(),
            cost: 1000,
        }
    }

    /// Returns true if it is time to poll. A counter that jumped back counts as elapsed time.
    #[inline]
    pub(crate) fn is_due(&self) -> bool {
        time_stamp().wrapping_sub(self.last) >= self.cost * Self::SELDOM
    }

    /// Polls and measures the cost. The estimate grows at most fourfold, because the guest may have
    /// been stopped during the poll.
    pub(crate) fn look<T>(&mut self, look: impl FnOnce() -> T) -> T {
        let before = time_stamp();
        let found = look();
        self.last = time_stamp();
        self.cost = self.last.saturating_sub(before).clamp(100, self.cost * 4);
        found
    }
}
