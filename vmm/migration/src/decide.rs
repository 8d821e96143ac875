//! The decision after each round: a pure function of the measurements and the user's limits.

use std::time::Duration;

use serde::{Deserialize, Serialize};

/// What to do when the rounds take longer than [`Limits::timeout`].
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum TimeoutStrategy {
    /// Give up: the guest goes on at the source. Ends a round that has begun.
    #[default]
    #[serde(alias = "Cancel")]
    Cancel,
    /// Pause the guest after the current round and send the rest, whatever downtime that takes.
    #[serde(alias = "Ignore")]
    Ignore,
}

/// Limits of the rounds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// Downtime to stay within. 300 ms by default.
    pub downtime: Duration,
    /// Time for the rounds. An hour by default.
    pub timeout: Duration,
    /// What to do after that time. [`TimeoutStrategy::Cancel`] by default.
    pub strategy: TimeoutStrategy,
    /// Highest percentage of the time for which vCPUs may be held so that the rounds converge, from 0 to 99. 80 by
    /// default.
    pub throttle_max: u32,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            downtime: Duration::from_millis(300),
            timeout: Duration::from_secs(3600),
            strategy: TimeoutStrategy::Cancel,
            throttle_max: 80,
        }
    }
}

/// Measurements after a harvest.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Measured {
    /// Bytes of dirty pages.
    pub(crate) left_bytes: u64,
    /// Bytes a second that the last rounds sent; none before the first round.
    pub(crate) bandwidth: Option<f64>,
    /// Bytes a second that the guest dirtied in the last round; none before the first round.
    pub(crate) dirty_rate: Option<f64>,
    /// Duration of the switchover without its pages: state, digest, hand-over.
    pub(crate) overhead: Duration,
    /// Time since the first round began.
    pub(crate) elapsed: Duration,
    /// Number of rounds in a row, up to now, in which the guest dirtied nearly as much as was sent, or more.
    pub(crate) losing_rounds: u32,
    /// Percentage of the time for which the vCPUs are held now.
    pub(crate) throttle: u32,
}

/// What to do next.
#[derive(Clone, Debug, PartialEq)]
pub(crate) enum Decision {
    /// Send the dirty pages while the guest runs, with its vCPUs held for this percentage of the time.
    Round {
        /// From 0 to 99.
        throttle: u32,
    },
    /// Pause the guest and send the rest.
    StopAndCopy,
    /// Give up, for this reason: the rounds do not converge and the downtime would be too long.
    GiveUp(String),
}

/// A round is lost if the guest dirties at least this share of the bytes that are sent meanwhile.
pub(crate) const LOSING_SHARE: f64 = 0.75;
/// Number of lost rounds in a row after which unthrottled rounds are not expected to converge.
pub(crate) const LOSING_ROUNDS: u32 = 2;
/// First throttle percentage, and each step up from it.
const THROTTLE_STEP: u32 = 20;

/// Returns the throttle percentage of the next round: one step more after each lost round, never less.
#[must_use]
fn next_throttle(measured: &Measured, limits: &Limits) -> u32 {
    match measured.losing_rounds >= LOSING_ROUNDS {
        true => (measured.throttle + THROTTLE_STEP)
            .min(limits.throttle_max)
            .max(measured.throttle),
        false => measured.throttle,
    }
}

/// Returns the downtime to expect if the guest were paused now; none before a round has shown the bandwidth.
#[must_use]
fn predicted_downtime(measured: &Measured) -> Option<Duration> {
    let bandwidth = measured.bandwidth.filter(|bandwidth| *bandwidth > 0.0)?;
    let copy = Duration::try_from_secs_f64(seconds(measured.left_bytes, bandwidth)).ok()?;
    Some(copy + measured.overhead)
}

/// Returns why more rounds will not help and what would, once that can be said.
#[must_use]
pub(crate) fn will_not_converge(measured: &Measured) -> Option<String> {
    let (dirty, link) = (measured.dirty_rate?, measured.bandwidth?);
    (measured.losing_rounds >= LOSING_ROUNDS).then(|| {
        format!(
            "will not converge: dirties {:.0} MiB/s, link {:.0} MiB/s; allow {} ms of downtime, a \
             faster link, or less load in the guest",
            mib(dirty),
            mib(link),
            predicted_downtime(measured)
                .unwrap_or_default()
                .as_millis()
                .max(1)
        )
    })
}

/// Decides what follows a harvest.
#[must_use]
pub(crate) fn decide(measured: &Measured, limits: &Limits) -> Decision {
    if measured.left_bytes == 0 && measured.bandwidth.is_some() {
        return Decision::StopAndCopy;
    }
    match predicted_downtime(measured) {
        None => {
            return Decision::Round {
                throttle: measured.throttle,
            };
        }
        Some(predicted) if predicted <= limits.downtime => return Decision::StopAndCopy,
        Some(_) => {}
    }
    if measured.elapsed < limits.timeout {
        return Decision::Round {
            throttle: next_throttle(measured, limits),
        };
    }
    match limits.strategy {
        TimeoutStrategy::Ignore => Decision::StopAndCopy,
        TimeoutStrategy::Cancel => {
            Decision::GiveUp(will_not_converge(measured).unwrap_or_else(|| {
                format!(
                    "after {} s the downtime would still be {} ms, {} ms are allowed",
                    limits.timeout.as_secs(),
                    predicted_downtime(measured).unwrap_or_default().as_millis(),
                    limits.downtime.as_millis()
                )
            }))
        }
    }
}

/// Returns the time for `bytes`. Both numbers are far below 2^52, where floating point is exact enough.
#[allow(clippy::cast_precision_loss)]
fn seconds(bytes: u64, bandwidth: f64) -> f64 {
    bytes as f64 / bandwidth
}

fn mib(bytes: f64) -> f64 {
    bytes / f64::from(1 << 20)
}

#[cfg(test)]
mod tests {
    use super::*;

    const MIB: f64 = 1024.0 * 1024.0;
    const LIMITS: Limits = Limits {
        downtime: Duration::from_millis(50),
        timeout: Duration::from_secs(10),
        strategy: TimeoutStrategy::Cancel,
        throttle_max: 50,
    };
    const ROUND: Decision = Decision::Round { throttle: 0 };

    fn measured(left_mib: u64) -> Measured {
        Measured {
            left_bytes: left_mib << 20,
            bandwidth: Some(1000.0 * MIB),
            dirty_rate: Some(100.0 * MIB),
            overhead: Duration::from_millis(10),
            elapsed: Duration::from_secs(1),
            losing_rounds: 0,
            throttle: 0,
        }
    }

    #[test]
    fn nothing_is_predicted_before_a_round_has_shown_the_bandwidth() {
        let first = Measured {
            bandwidth: None,
            dirty_rate: None,
            ..measured(0)
        };
        assert_eq!(predicted_downtime(&first), None);
        assert_eq!(decide(&first, &LIMITS), ROUND);
    }

    #[test]
    fn the_guest_is_stopped_once_the_rest_fits_the_downtime() {
        // 40 MiB at 1000 MiB/s and 10 ms beside: 50 ms.
        assert_eq!(decide(&measured(40), &LIMITS), Decision::StopAndCopy);
        assert_eq!(decide(&measured(41), &LIMITS), ROUND);
        let slow = Measured {
            overhead: Duration::from_millis(60),
            ..measured(1)
        };
        assert_eq!(decide(&slow, &LIMITS), ROUND);
    }

    #[test]
    fn a_guest_that_dirties_nothing_is_stopped_even_where_the_overhead_is_too_long() {
        let slow = Measured {
            overhead: Duration::from_secs(1),
            ..measured(0)
        };
        assert_eq!(decide(&slow, &LIMITS), Decision::StopAndCopy);
    }

    #[test]
    fn after_the_timeout_the_strategy_counts() {
        let late = Measured {
            elapsed: LIMITS.timeout,
            ..measured(500)
        };
        match decide(&late, &LIMITS) {
            Decision::GiveUp(why) => assert!(why.contains("510 ms"), "{why}"),
            other => panic!("{other:?}"),
        }
        let ignore = Limits {
            strategy: TimeoutStrategy::Ignore,
            ..LIMITS
        };
        assert_eq!(decide(&late, &ignore), Decision::StopAndCopy);
    }

    #[test]
    fn a_lost_race_is_said_early_with_both_rates() {
        let losing = Measured {
            dirty_rate: Some(2000.0 * MIB),
            losing_rounds: LOSING_ROUNDS,
            ..measured(500)
        };
        let why = will_not_converge(&losing).unwrap();
        assert!(why.contains("dirties 2000 MiB/s, link 1000 MiB/s"), "{why}");
        assert!(why.contains("510 ms"), "{why}");
        assert_eq!(decide(&losing, &LIMITS), Decision::Round { throttle: 20 });
        let not_yet = Measured {
            losing_rounds: LOSING_ROUNDS - 1,
            ..losing
        };
        assert_eq!(will_not_converge(&not_yet), None);
    }

    #[test]
    fn throttling_goes_up_by_steps_to_its_limit_and_never_down() {
        let mut now = Measured {
            losing_rounds: LOSING_ROUNDS,
            ..measured(500)
        };
        let mut seen = Vec::new();
        for _ in 0..4 {
            now.throttle = next_throttle(&now, &LIMITS);
            seen.push(now.throttle);
        }
        assert_eq!(seen, [20, 40, 50, 50]);
        let winning = Measured {
            losing_rounds: 0,
            ..now
        };
        assert_eq!(next_throttle(&winning, &LIMITS), 50);
        let never = Limits {
            throttle_max: 0,
            ..LIMITS
        };
        assert_eq!(next_throttle(&Measured { throttle: 0, ..now }, &never), 0);
    }

    #[test]
    fn a_link_without_any_throughput_never_stops_the_guest() {
        let dead = Measured {
            bandwidth: Some(0.0),
            ..measured(1)
        };
        assert_eq!(decide(&dead, &LIMITS), ROUND);
    }
}
