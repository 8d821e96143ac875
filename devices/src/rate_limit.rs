//! Token buckets that limit the bytes and operations of a device per second.
//!
//! An operation may start when the bucket is not empty. If it takes more tokens than there are, the bucket goes into
//! debt, and the next operation waits until the debt is paid. Operations larger than the bucket are therefore possible,
//! and the rate holds over time.

use std::io;
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};
use vmm_sys_util::timerfd::TimerFd;

/// Rate of a token bucket.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Rate {
    /// Bytes or operations per second, at least 1.
    pub per_second: u64,
    /// Size of the bucket in bytes or operations, at least 1: the maximum burst after an idle time.
    pub burst: u64,
}

/// Rate limits of one direction of a device. `None` means no limit.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct RateLimit {
    /// Limit on bytes.
    pub bytes: Option<Rate>,
    /// Limit on operations: block requests, or network packets.
    pub operations: Option<Rate>,
}

/// Tokens are counted in billionths, so that a token bucket does not lose fractions of a token that it gains in a
/// nanosecond.
const NANO: i128 = 1_000_000_000;

/// Token bucket for bytes or operations.
#[derive(Debug)]
struct Bucket {
    rate: Rate,
    /// Billionths of tokens. Negative if the bucket is in debt.
    level: i128,
    filled: Instant,
}

impl Bucket {
    fn new(rate: Rate, now: Instant) -> Self {
        let rate = Rate {
            per_second: rate.per_second.max(1),
            burst: rate.burst.max(1),
        };
        Self {
            rate,
            level: i128::from(rate.burst) * NANO,
            filled: now,
        }
    }

    /// Adds the tokens that the bucket has gained since the last call.
    fn fill(&mut self, now: Instant) {
        let elapsed = now.saturating_duration_since(self.filled).as_nanos();
        let elapsed = i128::try_from(elapsed).unwrap_or(i128::MAX);
        let gained = elapsed.saturating_mul(i128::from(self.rate.per_second));
        let full = i128::from(self.rate.burst) * NANO;
        self.level = self.level.saturating_add(gained).min(full);
        self.filled = now;
    }

    fn take(&mut self, tokens: u64) {
        self.level -= i128::from(tokens) * NANO;
    }

    /// Returns how long it takes until the bucket is not empty. Zero if it has tokens now.
    fn wait(&self) -> Duration {
        if self.level > 0 {
            return Duration::ZERO;
        }
        let missing = (1 - self.level).unsigned_abs();
        let nanos = missing.div_ceil(u128::from(self.rate.per_second));
        Duration::from_nanos(u64::try_from(nanos).unwrap_or(u64::MAX))
    }
}

/// Both token buckets of a rate limit.
#[derive(Debug)]
struct Buckets {
    bytes: Option<Bucket>,
    operations: Option<Bucket>,
}

impl Buckets {
    fn new(limit: RateLimit, now: Instant) -> Self {
        Self {
            bytes: limit.bytes.map(|rate| Bucket::new(rate, now)),
            operations: limit.operations.map(|rate| Bucket::new(rate, now)),
        }
    }

    /// Takes the tokens of an operation of `bytes` bytes from both buckets. Returns the time to wait if one of them is
    /// empty.
    fn take(&mut self, bytes: u64, now: Instant) -> Result<(), Duration> {
        let mut both: Vec<(&mut Bucket, u64)> = Vec::with_capacity(2);
        both.extend(self.bytes.as_mut().map(|bucket| (bucket, bytes)));
        both.extend(self.operations.as_mut().map(|bucket| (bucket, 1)));
        both.iter_mut().for_each(|(bucket, _)| bucket.fill(now));
        let wait = both.iter().map(|(bucket, _)| bucket.wait()).max();
        match wait {
            Some(wait) if !wait.is_zero() => Err(wait),
            _ => {
                for (bucket, tokens) in both {
                    bucket.take(tokens);
                }
                Ok(())
            }
        }
    }
}

/// Rate limit with a timer that expires when the device may continue.
///
/// The state of the buckets is not saved, because limits belong to the host.
pub(crate) struct RateLimiter {
    buckets: Buckets,
    timer: TimerFd,
    /// The timer is armed, or has expired and [`Self::timer_ran_out`] was not called yet.
    waiting: bool,
}

impl RateLimiter {
    pub(crate) fn new(limit: RateLimit) -> io::Result<Self> {
        Ok(Self {
            buckets: Buckets::new(limit, Instant::now()),
            timer: TimerFd::new()?,
            waiting: false,
        })
    }

    /// Returns whether an operation of `bytes` bytes may start now. If not, arms the timer.
    pub(crate) fn admit(&mut self, bytes: u64) -> io::Result<bool> {
        if self.waiting {
            return Ok(false);
        }
        match self.buckets.take(bytes, Instant::now()) {
            Ok(()) => Ok(true),
            Err(wait) => {
                self.timer.reset(wait, None)?;
                self.waiting = true;
                Ok(false)
            }
        }
    }

    /// Returns the timer. When it is readable, the caller calls [`Self::timer_ran_out`], and may then try
    /// [`Self::admit`] again.
    pub(crate) fn timer(&self) -> &TimerFd {
        &self.timer
    }

    /// Disarms the timer after it has expired, so that [`Self::admit`] tries again.
    pub(crate) fn timer_ran_out(&mut self) -> io::Result<()> {
        if std::mem::take(&mut self.waiting) {
            // The timer is readable, so this does not block.
            self.timer.wait()?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rate(per_second: u64, burst: u64) -> Option<Rate> {
        Some(Rate { per_second, burst })
    }

    fn buckets(bytes: Option<Rate>, operations: Option<Rate>) -> (Buckets, Instant) {
        let now = Instant::now();
        (Buckets::new(RateLimit { bytes, operations }, now), now)
    }

    #[test]
    fn no_limit_admits_everything() {
        let (mut buckets, now) = buckets(None, None);
        for _ in 0..1000 {
            buckets.take(u64::MAX, now).unwrap();
        }
    }

    #[test]
    fn a_burst_passes_and_then_the_rate_holds() {
        let (mut buckets, start) = buckets(rate(1000, 500), None);
        for _ in 0..5 {
            buckets.take(100, start).unwrap();
        }
        let mut now = start;
        let mut moved = 500;
        while now < start + Duration::from_secs(10) {
            match buckets.take(100, now) {
                Ok(()) => moved += 100,
                Err(wait) => now += wait,
            }
        }
        assert!((10_500..=10_600).contains(&moved), "{moved}");
    }

    #[test]
    fn an_operation_larger_than_the_bucket_is_paid_for_afterwards() {
        let (mut buckets, now) = buckets(rate(100, 10), None);
        buckets.take(1000, now).unwrap();
        let wait = buckets.take(1, now).unwrap_err();
        // The debt of 990 tokens takes 9.9 s at 100 tokens per second.
        assert_eq!(wait.as_millis(), 9_900);
        buckets
            .take(1, now + wait - Duration::from_millis(1))
            .unwrap_err();
        buckets.take(1, now + wait).unwrap();
    }

    #[test]
    fn both_limits_hold_and_a_refusal_costs_nothing() {
        let (mut buckets, now) = buckets(rate(1_000_000, 1_000_000), rate(10, 2));
        buckets.take(1, now).unwrap();
        buckets.take(1, now).unwrap();
        for _ in 0..50 {
            let wait = buckets.take(1, now).unwrap_err();
            assert!(wait <= Duration::from_millis(1), "{wait:?}");
        }
        buckets.take(1, now + Duration::from_millis(100)).unwrap();
        buckets
            .take(1, now + Duration::from_millis(100))
            .unwrap_err();
    }

    #[test]
    fn extreme_rates_do_not_overflow() {
        let (mut buckets, now) = buckets(rate(u64::MAX, u64::MAX), rate(0, 0));
        buckets.take(u64::MAX, now).unwrap();
        let later = now + Duration::from_secs(1 << 40);
        buckets.take(u64::MAX, later).unwrap();
    }

    #[test]
    fn the_timer_says_when_to_go_on() {
        let limit = RateLimit {
            bytes: rate(1000, 1),
            operations: None,
        };
        let mut limiter = RateLimiter::new(limit).unwrap();
        assert!(limiter.admit(20).unwrap());
        assert!(!limiter.admit(1).unwrap());
        assert!(!limiter.admit(1).unwrap());
        assert!(limiter.timer.is_armed().unwrap());
        limiter.timer_ran_out().unwrap();
        assert!(limiter.admit(1).unwrap());
        limiter.timer_ran_out().unwrap();
    }
}
