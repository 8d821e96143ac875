//! Rate limiters of disks and network interfaces in a guest's configuration.

use devices::{Rate, RateLimit};
use serde::{Deserialize, Serialize};

use super::ConfigError;

/// Limits of a disk or an interface.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, expecting = "an object")]
pub struct RateLimiterConfig {
    /// Of bytes.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub bandwidth: Option<TokenBucket>,
    /// Of requests or packets.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub ops: Option<TokenBucket>,
}

/// A bucket that is full at the beginning, and again after it rested for as long as it takes to fill.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, expecting = "an object")]
pub struct TokenBucket {
    /// How many tokens it holds, at least 1.
    pub size: u64,
    /// Milliseconds in which it fills, at least 1.
    pub refill_time: u64,
}

impl TokenBucket {
    fn rate(self) -> Rate {
        let per_second = u128::from(self.size) * 1000 / u128::from(self.refill_time.max(1));
        Rate {
            per_second: u64::try_from(per_second).unwrap_or(u64::MAX),
            burst: self.size,
        }
    }
}

impl RateLimiterConfig {
    /// As devices take it.
    #[must_use]
    pub fn limit(self) -> RateLimit {
        RateLimit {
            bytes: self.bandwidth.map(TokenBucket::rate),
            operations: self.ops.map(TokenBucket::rate),
        }
    }

    pub(super) fn check(self, path: &str) -> Result<(), ConfigError> {
        for (name, bucket) in [("bandwidth", self.bandwidth), ("ops", self.ops)] {
            let is_empty = |bucket: &TokenBucket| bucket.size == 0 || bucket.refill_time == 0;
            if bucket.as_ref().is_some_and(is_empty) {
                return Err(ConfigError::new(
                    format!("{path}.{name}"),
                    "size and refill_time are 1 or more: nothing would ever move",
                ));
            }
        }
        Ok(())
    }
}
