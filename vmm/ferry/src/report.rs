//! Migrations as a user sees them: a progress line while the migration runs, and a table of its report.

use std::path::Path;
use std::thread;
use std::time::Duration;

use super::progress::ProgressLine;
use migration::{Phase, Report};
use vmm::api::{ClientError, Method, NO_LIMIT, USUAL_LIMIT, call};
use vmm::monitor::SendMigrationData;

/// Time between two polls of the progress.
const POLL_INTERVAL: Duration = Duration::from_millis(50);
const MIB: f64 = 1024.0 * 1024.0;

/// Calls `vm.send-migration` of the monitor at `socket` and waits for the result. Meanwhile polls the progress, shows it on a
/// terminal and passes it to `on_progress`. Returns the final report.
pub(super) fn send_migration(
    socket: &Path,
    request: &SendMigrationData,
    mut on_progress: impl FnMut(&Report),
) -> Result<Report, ClientError> {
    let name = "vm.send-migration";
    let body = serde_json::to_value(request).map_err(|error| broken(name, &error.to_string()))?;
    let line = ProgressLine::new();
    thread::scope(|scope| {
        let sent = scope.spawn(|| call(socket, Method::Put, name, Some(&body), NO_LIMIT));
        while !sent.is_finished() {
            thread::sleep(POLL_INTERVAL);
            if let Ok(report) = migration_progress(socket) {
                show(&line, &report);
                on_progress(&report);
            }
        }
        drop(line);
        let answer = sent
            .join()
            .unwrap_or_else(|_| Err(broken(name, "the thread that made the call panicked")))?;
        decode(name, answer)
    })
}

/// Returns the progress of the migration into or out of the monitor at `socket`.
pub(super) fn migration_progress(socket: &Path) -> Result<Report, ClientError> {
    let name = "vm.migration-progress";
    decode(name, call(socket, Method::Get, name, None, USUAL_LIMIT)?)
}

fn decode(name: &str, answer: serde_json::Value) -> Result<Report, ClientError> {
    serde_json::from_value(answer).map_err(|error| broken(name, &error.to_string()))
}

fn broken(call: &str, why: &str) -> ClientError {
    ClientError::Broken {
        call: call.into(),
        why: why.into(),
    }
}

fn show(line: &ProgressLine, report: &Report) {
    let phase = match report.phase {
        Phase::Rounds => format!("round {}", report.rounds.len() + 1),
        other => other.to_string(),
    };
    let warning = report
        .message
        .as_deref()
        .map(|text| format!(", {text}"))
        .unwrap_or_default();
    let message = format!("{phase}, {:.0} MiB sent{warning}", mib(report.bytes_sent));
    line.show(report.round_pages_sent, report.round_pages, &message);
}

/// Formats the report: a table of the rounds, then the totals.
pub(super) fn table(report: &Report) -> String {
    let mut text = format!(
        "{:>6}  {:>9}  {:>9}  {:>10}  {:>9}  {:>12}\n",
        "round", "pages", "zero", "MiB", "ms", "dirty MiB/s"
    );
    for (number, round) in (1..).zip(&report.rounds) {
        let last = number == report.rounds.len();
        text += &format!(
            "{:>6}  {:>9}  {:>9}  {:>10.1}  {:>9.1}  {:>12}\n",
            if last {
                "final".into()
            } else {
                number.to_string()
            },
            round.pages,
            round.zero_pages,
            mib(round.bytes),
            round.ms,
            if last {
                "stopped".into()
            } else {
                format!("{:.0}", round.dirty_bytes_per_s / MIB)
            },
        );
    }
    text += &format!("\ntotal     {:>8.1} ms\n", report.total_ms);
    text += &format!(
        "downtime  {:>8.1} ms, of which {:.1} ms to stop the vCPUs and {:.1} ms for the digest\n",
        report.downtime_ms, report.pause_ms, report.digest_ms
    );
    if report.throttle_percent > 0 {
        text += &format!(
            "throttled {:>8} % of the time the vCPUs were held, at the end\n",
            report.throttle_percent
        );
    }
    text += &format!(
        "sent      {:>8.1} MiB for {:.0} MiB of guest memory\n",
        mib(report.bytes_sent),
        mib(report.memory_bytes)
    );
    text
}

#[allow(clippy::cast_precision_loss, reason = "byte counts are far below 2^52")]
fn mib(bytes: u64) -> f64 {
    bytes as f64 / MIB
}
