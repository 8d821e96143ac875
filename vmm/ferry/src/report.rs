//! What a user sees of a migration: its progress while it runs, its rounds at the end.

use std::path::Path;
use std::thread;
use std::time::Duration;

use super::progress::ProgressLine;
use migration::{Phase, Report};
use vmm::api::{ClientError, Method, NO_LIMIT, USUAL_LIMIT, call};
use vmm::monitor::SendMigrationData;

const LOOK_EVERY: Duration = Duration::from_millis(50);
const MIB: f64 = 1024.0 * 1024.0;

/// Sends the guest of the monitor at `socket` away, and shows how that goes on a terminal. `on_progress`
/// sees every look that is taken.
pub(super) fn send_and_watch(
    socket: &Path,
    wish: &SendMigrationData,
    mut on_progress: impl FnMut(&Report),
) -> Result<Report, ClientError> {
    let body = encode(wish)?;
    let line = ProgressLine::new();
    thread::scope(|scope| {
        let sent = scope.spawn(|| {
            call(
                socket,
                Method::Put,
                "vm.send-migration",
                Some(&body),
                NO_LIMIT,
            )
        });
        while !sent.is_finished() {
            thread::sleep(LOOK_EVERY);
            if let Ok(snapshot) = progress(socket) {
                show(&line, &snapshot);
                on_progress(&snapshot);
            }
        }
        drop(line);
        let answer = sent.join().unwrap_or_else(|_| {
            Err(broken(
                "vm.send-migration",
                "the thread that waited for the answer panicked",
            ))
        })?;
        decode("vm.send-migration", answer)
    })
}

/// The progress of the migration into or out of the monitor at `socket`.
pub(super) fn progress(socket: &Path) -> Result<Report, ClientError> {
    let name = "vm.migration-progress";
    decode(name, call(socket, Method::Get, name, None, USUAL_LIMIT)?)
}

fn encode(wish: &SendMigrationData) -> Result<serde_json::Value, ClientError> {
    serde_json::to_value(wish).map_err(|error| broken("vm.send-migration", &error.to_string()))
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

fn show(line: &ProgressLine, snapshot: &Report) {
    let phase = match snapshot.phase {
        Phase::Rounds => format!("round {}", snapshot.rounds.len() + 1),
        other => format!("{other:?}").to_lowercase(),
    };
    let warning = snapshot
        .message
        .as_deref()
        .map(|text| format!(", {text}"))
        .unwrap_or_default();
    let message = format!("{phase}, {:.0} MiB sent{warning}", mib(snapshot.bytes_sent));
    line.show(snapshot.round_pages_sent, snapshot.round_pages, &message);
}

/// The rounds as a table, and the figures below it.
pub(super) fn table(snapshot: &Report) -> String {
    let mut text = format!(
        "{:>6}  {:>9}  {:>9}  {:>10}  {:>9}  {:>12}\n",
        "round", "pages", "zero", "MiB", "ms", "dirty MiB/s"
    );
    for (number, round) in (1..).zip(&snapshot.rounds) {
        let last = number == snapshot.rounds.len();
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
    text += &format!("\ntotal     {:>8.1} ms\n", snapshot.total_ms);
    text += &format!(
        "downtime  {:>8.1} ms, of which {:.1} ms to stop the vCPUs and {:.1} ms for the digest\n",
        snapshot.downtime_ms, snapshot.pause_ms, snapshot.digest_ms
    );
    if snapshot.throttle_percent > 0 {
        text += &format!(
            "throttled {:>8} % of the time the vCPUs were held, at the end\n",
            snapshot.throttle_percent
        );
    }
    text += &format!(
        "sent      {:>8.1} MiB for {:.0} MiB of guest memory\n",
        mib(snapshot.bytes_sent),
        mib(snapshot.memory_bytes)
    );
    text
}

/// Byte counts are far below 2^52, where floating point is exact.
#[allow(clippy::cast_precision_loss)]
fn mib(bytes: u64) -> f64 {
    bytes as f64 / MIB
}
