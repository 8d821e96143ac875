//! Measured rates: how fast the stream is, and how fast the guest dirties memory.

use std::time::{Duration, Instant};

use crate::decide::{LOSING_SHARE, Measured};

/// Fewest bytes of a round that show the bandwidth: a smaller round shows the latency.
const TELLING_BYTES: u64 = 4 << 20;

/// Rates of a running migration.
#[derive(Debug)]
pub(super) struct Rates {
    began: Instant,
    harvested_at: Instant,
    bandwidth: Option<f64>,
    dirty_rate: Option<f64>,
    losing_rounds: u32,
    /// Percentage of the time for which the vCPUs are held now.
    pub(super) throttle: u32,
}

impl Rates {
    /// Starts to measure.
    pub(super) fn begin() -> Self {
        let now = Instant::now();
        Self {
            began: now,
            harvested_at: now,
            bandwidth: None,
            dirty_rate: None,
            losing_rounds: 0,
            throttle: 0,
        }
    }

    /// Takes the bytes that a harvest found, dirtied since the harvest before it. Returns the bytes a second that
    /// the guest dirtied; none for the first harvest, which has all memory.
    pub(super) fn harvested(&mut self, dirty_bytes: u64) -> Option<f64> {
        let interval = self.harvested_at.elapsed();
        self.harvested_at = Instant::now();
        let bandwidth = self.bandwidth?;
        let rate = per_second(dirty_bytes, interval);
        let lost = rate >= LOSING_SHARE * bandwidth;
        self.losing_rounds = if lost { self.losing_rounds + 1 } else { 0 };
        self.dirty_rate = Some(rate);
        self.dirty_rate
    }

    /// Takes the bytes of a round, and how long it took until the destination had them.
    pub(super) fn sent(&mut self, bytes: u64, took: Duration) {
        if self.bandwidth.is_none() || bytes >= TELLING_BYTES {
            self.bandwidth = Some(per_second(bytes, took));
        }
    }

    /// Returns the measurements for a decision.
    pub(super) fn measured(&self, left_bytes: u64, overhead: Duration) -> Measured {
        Measured {
            left_bytes,
            bandwidth: self.bandwidth,
            dirty_rate: self.dirty_rate,
            overhead,
            elapsed: self.began.elapsed(),
            losing_rounds: self.losing_rounds,
            throttle: self.throttle,
        }
    }
}

/// Byte counts are far below 2^52, where floating point is exact.
#[allow(clippy::cast_precision_loss)]
fn per_second(bytes: u64, took: Duration) -> f64 {
    bytes as f64 / took.as_secs_f64().max(1e-6)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_harvest_says_nothing_of_the_guest() {
        let mut rates = Rates::begin();
        assert_eq!(rates.harvested(1 << 30), None);
        rates.sent(1 << 20, Duration::from_secs(1));
        assert!(rates.harvested(1 << 20).is_some());
    }

    #[test]
    fn a_small_round_says_nothing_of_the_link_unless_it_is_all_there_is() {
        let mut rates = Rates::begin();
        rates.sent(4096, Duration::from_secs(1));
        assert_eq!(rates.measured(0, Duration::ZERO).bandwidth, Some(4096.0));
        rates.sent(TELLING_BYTES, Duration::from_secs(1));
        rates.sent(4096, Duration::from_secs(1));
        let bandwidth = rates.measured(0, Duration::ZERO).bandwidth;
        assert_eq!(bandwidth, Some(4.0 * 1024.0 * 1024.0));
    }

    #[test]
    fn lost_rounds_are_counted_in_a_row() {
        let mut rates = Rates::begin();
        rates.sent(TELLING_BYTES, Duration::from_secs(1));
        // More than the link carries in any time that this test takes.
        for count in 1..=3 {
            rates.harvested(u64::MAX >> 12);
            assert_eq!(rates.measured(0, Duration::ZERO).losing_rounds, count);
        }
        rates.harvested(0);
        assert_eq!(rates.measured(0, Duration::ZERO).losing_rounds, 0);
    }
}
