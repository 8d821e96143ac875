//! Events of a migration.

use std::sync::PoisonError;

use migration::{Attempt, Phase, Report};
use serde_json::json;

use super::Monitor;
use super::migration_record::MigrationRecord;
use crate::events::{EventSource, Events};

/// Whether a guest is sent or received.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Direction {
    Send,
    Receive,
}

impl Direction {
    /// Beginning of the names of the events.
    fn prefix(self) -> &'static str {
        match self {
            Self::Send => "migration",
            Self::Receive => "migration-receive",
        }
    }
}

impl Monitor {
    /// Makes `attempt` the one whose progress is reported, and tells of its phases in events.
    ///
    /// The end of the attempt is told by [`Self::tell_migration_end`], when the guest is in the state that follows
    /// from it.
    pub(super) fn begin_attempt(&self, attempt: Attempt, direction: Direction) -> MigrationRecord {
        let events = self.events.clone();
        let attempt = attempt.observed(move |before, report| {
            tell_phase(&events, direction, before, report);
        });
        let record = MigrationRecord::new(attempt);
        let mut last = self
            .migration
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        *last = Some(record.clone());
        record
    }

    /// Tells how a migration ended.
    pub(super) fn tell_migration_end(&self, attempt: &Attempt, direction: Direction) {
        let report = attempt.report();
        let (what, properties) = match report.phase {
            Phase::Completed => (
                "finished",
                json!({
                    "total_ms": report.total_ms,
                    "downtime_ms": report.downtime_ms,
                    "bytes_sent": report.bytes_sent,
                    "rounds": report.rounds.len(),
                    "message": report.message,
                }),
            ),
            Phase::HandedOverUnconfirmed => ("unconfirmed", json!({ "reason": report.message })),
            phase => (
                "failed",
                json!({ "phase": phase, "reason": report.message }),
            ),
        };
        let event = format!("{}-{what}", direction.prefix());
        self.events.tell(EventSource::Vm, &event, properties);
    }
}

fn tell_phase(events: &Events, direction: Direction, before: Phase, report: &Report) {
    let (what, properties) = match (before, report.phase) {
        (_, Phase::Connecting) | (Phase::Listening, Phase::Agreeing) => {
            ("started", json!({ "url": report.url }))
        }
        (_, phase) if phase.is_active() => ("phase", json!({ "phase": phase })),
        _ => return,
    };
    let event = format!("{}-{what}", direction.prefix());
    events.tell(EventSource::Vm, &event, properties);
}
