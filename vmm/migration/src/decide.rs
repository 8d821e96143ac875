//! What to do after a round: a pure function of what was measured and what the user wants.

use std::time::Duration;

use serde::{Deserialize, Serialize};

/// What to do when the guest dirties memory for longer than the user's time.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum TimeoutStrategy {
    /// Give up; the guest runs on at the source.
    #[default]
    #[serde(alias = "Cancel")]
    Cancel,
    /// Stop the guest and copy the rest, whatever downtime that takes.
    #[serde(alias = "Ignore")]
    Ignore,
}

/// The user's limits.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    /// The downtime to stay within.
    pub downtime: Duration,
    /// How long the rounds may go on.
    pub timeout: Duration,
    /// What to do after that.
    pub strategy: TimeoutStrategy,
    /// How much of the time the vCPUs may be held so that the rounds converge, in percent: 0 to 99.
    pub throttle_max: u32,
}

/// What is known after a harvest.
#[derive(Clone, Copy, Debug)]
pub struct Measured {
    /// Bytes that the destination lacks now.
    pub left_bytes: u64,
    /// Bytes a second that the last rounds reached; none before the first round.
    pub bandwidth: Option<f64>,
    /// Bytes a second that the guest dirtied in the last round; none before the first round.
    pub dirty_rate: Option<f64>,
    /// What the switchover takes besides the copying: state, digest, hand-over.
    pub overhead: Duration,
    /// Since the first round began.
    pub elapsed: Duration,
    /// Rounds in a row, up to now, in which the guest dirtied nearly as much as was sent, or more.
    pub losing_rounds: u32,
    /// How much of the time the vCPUs are held now, in percent.
    pub throttle: u32,
}

/// What to do next.
#[derive(Clone, Debug, PartialEq)]
pub enum Decision {
    /// Send what is dirty while the guest runs, its vCPUs held for this percentage of the time.
    Round {
        /// 0 to 99.
        throttle: u32,
    },
    /// Stop the guest and send the rest.
    StopAndCopy,
    /// It does not converge, and the user wants no longer downtime.
    GiveUp(String),
}

/// A round is lost to the guest if it dirties at least this much of what was sent meanwhile.
pub const LOSING_SHARE: f64 = 0.75;
/// Rounds lost in a row after which more of the same are not expected to help.
pub const LOSING_ROUNDS: u32 = 2;
/// The first throttling, and each step up from it, in percent.
const THROTTLE_STEP: u32 = 20;

/// How much the vCPUs should be held in the next round: a step more for each round that is lost all the
/// same, never less.
#[must_use]
pub fn next_throttle(measured: &Measured, limits: &Limits) -> u32 {
    match measured.losing_rounds >= LOSING_ROUNDS {
        true => (measured.throttle + THROTTLE_STEP)
            .min(limits.throttle_max)
            .max(measured.throttle),
        false => measured.throttle,
    }
}

/// The downtime to expect if the guest were stopped now; none before a round has shown the bandwidth.
#[must_use]
pub fn predicted_downtime(measured: &Measured) -> Option<Duration> {
    let bandwidth = measured.bandwidth.filter(|bandwidth| *bandwidth > 0.0)?;
    let copy = Duration::try_from_secs_f64(seconds(measured.left_bytes, bandwidth)).ok()?;
    Some(copy + measured.overhead)
}

/// Why more rounds will not help, and what would, as soon as that can be said.
#[must_use]
pub fn will_not_converge(measured: &Measured) -> Option<String> {
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
pub fn decide(measured: &Measured, limits: &Limits) -> Decision {
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

/// Bytes over bytes a second. Both are far below 2^52, where floating point is exact enough.
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
