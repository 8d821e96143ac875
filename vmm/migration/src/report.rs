//! What can be read about a migration while it runs and after it: the phase, the rounds, the figures.

use std::fmt;

use serde::{Deserialize, Serialize};

/// The phase of a migration.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Phase {
    /// No migration has been started.
    #[default]
    None,
    /// The destination waits for a source to connect.
    Listening,
    /// The source connects to the destination.
    Connecting,
    /// The destination decides whether it can take the guest.
    Agreeing,
    /// Memory is sent while the guest runs.
    Rounds,
    /// The guest is paused at the source; the rest of its memory and its state are sent.
    Switchover,
    /// COMMIT has been sent; the destination has not confirmed it yet.
    Committed,
    /// The destination has the guest.
    Completed,
    /// The migration failed: the source has the guest, as before.
    Failed,
    /// The migration was cancelled: the source has the guest, as before.
    Cancelled,
    /// COMMIT was sent and its confirmation was lost. The guest stays paused at the source until
    /// [`Attempt::resolve`](crate::Attempt::resolve) says which side has it.
    HandedOverUnconfirmed,
}

impl Phase {
    /// Returns true while the engine works on the migration.
    #[must_use]
    pub fn is_active(self) -> bool {
        matches!(
            self,
            Self::Connecting | Self::Agreeing | Self::Rounds | Self::Switchover | Self::Committed
        )
    }
}

/// Writes the phase as it is written in JSON.
impl fmt::Display for Phase {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::None => "none",
            Self::Listening => "listening",
            Self::Connecting => "connecting",
            Self::Agreeing => "agreeing",
            Self::Rounds => "rounds",
            Self::Switchover => "switchover",
            Self::Committed => "committed",
            Self::Completed => "completed",
            Self::Failed => "failed",
            Self::Cancelled => "cancelled",
            Self::HandedOverUnconfirmed => "handed-over-unconfirmed",
        })
    }
}

/// Figures of one pre-copy round. The last round is sent while the guest is paused.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Round {
    /// Dirty pages that the round sent.
    pub pages: u64,
    /// Pages among them that held only zeros.
    pub zero_pages: u64,
    /// Bytes that the round wrote to the stream.
    pub bytes: u64,
    /// Duration in milliseconds, up to the acknowledgement by the destination.
    pub ms: f64,
    /// Bytes a second that the guest dirtied during the round, measured by the next harvest.
    pub dirty_bytes_per_s: f64,
}

/// Figures of one migration, as an API returns them. Times are in milliseconds.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Report {
    /// Current phase.
    pub phase: Phase,
    /// Address of the peer, or the address that a destination listens on.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub url: Option<String>,
    /// Reason of a failure, or a warning while the rounds run ("will not converge").
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub message: Option<String>,
    /// Rounds that are complete.
    pub rounds: Vec<Round>,
    /// Pages that the current round has to send.
    pub round_pages: u64,
    /// Pages that the current round has sent. At the destination: pages received in all rounds.
    pub round_pages_sent: u64,
    /// Percentage of the time for which the vCPUs are held so that the rounds converge.
    #[serde(default)]
    pub throttle_percent: u32,
    /// Bytes written to the stream so far. At the destination: bytes read from it.
    pub bytes_sent: u64,
    /// Time since the migration began, or its whole duration once it has ended.
    pub total_ms: f64,
    /// Time for which the guest was paused.
    pub downtime_ms: f64,
    /// Part of `downtime_ms` that pausing vCPUs and devices took.
    pub pause_ms: f64,
    /// Part of `downtime_ms` that the source's digest took.
    pub digest_ms: f64,
    /// Digest of all guest memory at the switchover, if one was asked for. The guest is only handed over if
    /// both sides compute the same digest.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub digest: Option<String>,
    /// Bytes of guest memory.
    pub memory_bytes: u64,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_phase_reads_the_same_in_json_and_in_messages() {
        let phases = [
            Phase::None,
            Phase::Listening,
            Phase::Connecting,
            Phase::Agreeing,
            Phase::Rounds,
            Phase::Switchover,
            Phase::Committed,
            Phase::Completed,
            Phase::Failed,
            Phase::Cancelled,
            Phase::HandedOverUnconfirmed,
        ];
        for phase in phases {
            assert_eq!(serde_json::to_value(phase).unwrap(), phase.to_string());
        }
    }

    #[test]
    fn the_fields_of_a_report_keep_their_names() {
        let report = Report {
            url: Some("unix:/a".into()),
            rounds: vec![Round::default()],
            ..Report::default()
        };
        let expected = serde_json::json!({
            "phase": "none",
            "url": "unix:/a",
            "rounds": [{
                "pages": 0, "zero_pages": 0, "bytes": 0, "ms": 0.0, "dirty_bytes_per_s": 0.0
            }],
            "round_pages": 0,
            "round_pages_sent": 0,
            "throttle_percent": 0,
            "bytes_sent": 0,
            "total_ms": 0.0,
            "downtime_ms": 0.0,
            "pause_ms": 0.0,
            "digest_ms": 0.0,
            "memory_bytes": 0,
        });
        assert_eq!(serde_json::to_value(&report).unwrap(), expected);
        assert_eq!(serde_json::from_value::<Report>(expected).unwrap(), report);
    }
}
