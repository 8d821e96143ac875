//! Output of the demo: text, or one JSON object per line.

use std::cell::RefCell;
use std::io;

use serde_json::{Value, json};

use super::Verdict;
use crate::arguments::DemoArguments;
use crate::report::table;
use crate::{Failure, print_line};
use migration::Report;

/// Output of the demo on standard output.
///
/// If standard output fails, the demo continues, and [`Self::finish`] returns the first error.
pub(super) struct Output {
    json: bool,
    first_error: RefCell<Option<io::Error>>,
}

impl Output {
    pub(super) fn new(arguments: &DemoArguments) -> Self {
        Self {
            json: arguments.json,
            first_error: RefCell::new(None),
        }
    }

    /// Returns the first error of standard output, if there was one.
    pub(super) fn finish(self) -> Result<(), Failure> {
        match self.first_error.into_inner() {
            Some(error) => Err(format!("standard output: {error}").into()),
            None => Ok(()),
        }
    }

    fn print(&self, line: &str) {
        if let Err(error) = print_line(line) {
            self.first_error.borrow_mut().get_or_insert(error);
        }
    }

    /// Reports that the demo reached a step.
    pub(super) fn event(&self, event: &str, fields: &Value) {
        if self.json {
            let mut object = json!({ "event": event });
            if let (Some(object), Some(fields)) = (object.as_object_mut(), fields.as_object()) {
                object.extend(fields.clone());
            }
            self.print(&object.to_string());
        } else if event == "demo/guest-ready" {
            self.print("The guest has populated its memory and rewrites it; migrating.");
        }
    }

    /// Reports the completed pre-copy rounds after the first `reported` ones. Returns the number of rounds reported in total.
    pub(super) fn rounds(&self, report: &Report, reported: usize) -> usize {
        for (number, round) in (1..).zip(&report.rounds).skip(reported) {
            self.event("demo/round", &json!({ "round": number, "figures": round }));
        }
        report.rounds.len().max(reported)
    }

    /// Prints the report of the migration, the result of the audit and the verdict.
    pub(super) fn verdict(&self, arguments: &DemoArguments, verdict: &Verdict) {
        let migration = &verdict.migration;
        if self.json {
            self.event(
                "demo/finished",
                &json!({
                    "verified": verdict.is_verified(),
                    "digest_equal": verdict.is_digest_equal(),
                    "lost_writes": verdict.lost_writes(),
                    "rounds": migration.rounds.len(),
                    "total_ms": migration.total_ms,
                    "downtime_ms": migration.downtime_ms,
                    "pause_ms": migration.pause_ms,
                    "digest_ms": migration.digest_ms,
                    "throttle_percent": migration.throttle_percent,
                    "bytes_sent": migration.bytes_sent,
                    "memory_bytes": arguments.memory,
                    "cpus": arguments.cpus,
                }),
            );
            return;
        }
        self.print(&format!("\n{}", table(migration)));
        let digest = migration.digest.as_deref().unwrap_or("differs");
        self.print(&format!("digest    {digest}"));
        let audit = match (&verdict.audit, &verdict.complaint) {
            (_, Some(complaint)) => complaint.clone(),
            (Some(totals), None) => format!("audit passed: {totals}"),
            (None, None) => "no audit".into(),
        };
        self.print(&format!("guest     {audit}"));
        let text = match verdict.is_verified() {
            true => "verified: memory was equal at the switchover, and no write was lost",
            false => "NOT verified",
        };
        self.print(&format!("\n{text}"));
    }
}
