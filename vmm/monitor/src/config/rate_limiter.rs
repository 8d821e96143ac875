//! Rate limiters of disks and network interfaces in a guest's configuration.

use devices::{Rate, RateLimit};
use serde::{Deserialize, Serialize};

use super::ConfigError;

/// Rate limits of a disk or of a network interface.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, expecting = "an object")]
pub struct RateLimiterConfig {
    /// Limit of bytes.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub bandwidth: Option<TokenBucket>,
    /// Limit of requests or packets.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub ops: Option<TokenBucket>,
}

/// Token bucket: a rate with a burst. It is full at the start, and full again after it was unused for `refill_time`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, expecting = "an object")]
pub struct TokenBucket {
    /// Capacity of the bucket in tokens, 1 or more.
    pub size: u64,
    /// Time in which an empty bucket fills, in milliseconds, 1 or more.
    pub refill_time: u64,
}

impl TokenBucket {
    /// Returns the bucket as a rate per second with a burst.
    fn rate(self) -> Rate {
        let per_second = u128::from(self.size) * 1000 / u128::from(self.refill_time.max(1));
        Rate {
            per_second: u64::try_from(per_second).unwrap_or(u64::MAX),
            burst: self.size,
        }
    }
}

impl RateLimiterConfig {
    /// Returns the limits in the form that the device models take.
    #[must_use]
    pub fn limit(self) -> RateLimit {
        RateLimit {
            bytes: self.bandwidth.map(TokenBucket::rate),
            operations: self.ops.map(TokenBucket::rate),
        }
    }

    /// Checks that no bucket has a size or a refill time of 0. `path` is the path of the limiter in the JSON.
    pub(super) fn check(self, path: &str) -> Result<(), ConfigError> {
        for (name, bucket) in [("bandwidth", self.bandwidth), ("ops", self.ops)] {
            let is_empty = |bucket: &TokenBucket| bucket.size == 0 || bucket.refill_time == 0;
            if bucket.as_ref().is_some_and(is_empty) {
                return Err(ConfigError::new(
                    format!("{path}.{name}"),
                    "size and refill_time must be 1 or more: with 0, no request would ever pass",
                ));
            }
        }
        Ok(())
    }
}
