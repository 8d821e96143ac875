//! `ferry demo`: migrates a guest between two processes and verifies that no write was lost.
//!
//! The guest is the dirtier of ferry-guest-images, which checks each page before it writes the page again. Two independent
//! checks give the verdict: the engine compares the digests of guest memory on both sides at the switchover, and the guest
//! audits all its pages at the destination.

mod output;
mod process;

use std::fs;
use std::path::{Path, PathBuf};
use std::thread;
use std::time::Duration;

use guest_images::dirtier::{Config, GuestReport, Pattern, Size, Totals};
use serde_json::json;
use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM};
use signal_hook::iterator::Signals;

use super::Failure;
use super::arguments::{DemoArguments, Transport};
use super::report::send_migration;
use migration::{Phase, Report, TimeoutStrategy};
use output::Output;
use process::FerryProcess;
use vmm::kvm::host::Host;
use vmm::monitor::SendMigrationData;

/// Time limit for the guest to populate its memory. The first write to a page takes tens of microseconds.
const READY_LIMIT: Duration = Duration::from_secs(300);
/// Time limit for a ferry process to exit.
const EXIT_LIMIT: Duration = Duration::from_secs(30);
/// Time that the guest rewrites its memory before the migration, and again after it.
const WORK: Duration = Duration::from_millis(500);
/// Time limit of the migration. After it, the target downtime is ignored.
const TIMEOUT_S: u64 = 120;
/// Maximum throttling. The guest does nothing but dirty memory, so on a busy host less would not let pre-copy converge.
const THROTTLE_MAX: u32 = 90;

/// Runs the demo and prints the verdict. The exit status is 0 only if no write was lost.
pub(super) fn demo(arguments: &DemoArguments) -> Result<u8, Failure> {
    let command_line = command_line(arguments)?;
    // If KVM is missing, this error is clearer than that of a child process.
    drop(Host::open()?);
    let directory = tempfile::Builder::new().prefix("ferry-demo-").tempdir()?;
    clean_up_on_signals(directory.path().to_owned())?;
    let output = Output::new(arguments);
    let pair = Pair::start(arguments, directory.path(), &command_line)?;
    output.event(
        "demo/started",
        &json!({ "memory_bytes": arguments.memory, "cpus": arguments.cpus }),
    );
    let verdict = pair.migrate(arguments, &output)?;
    output.verdict(arguments, &verdict);
    output.finish()?;
    Ok(u8::from(!verdict.is_verified()))
}

/// Returns the kernel command line that gives the guest its task.
fn command_line(arguments: &DemoArguments) -> Result<String, Failure> {
    let total = arguments
        .hot
        .checked_add(arguments.cold)
        .ok_or("--hot and --cold are too large")?;
    if total >= arguments.memory {
        return Err(format!(
            "--hot and --cold together are {total} bytes; they must be less than --memory, which is {} bytes",
            arguments.memory
        )
        .into());
    }
    let config = Config {
        cpus: arguments.cpus,
        pattern: Pattern::Random,
        memory: Some(size("--hot and --cold", total)?),
        cold: Some(size("--cold", arguments.cold)?).filter(|_| arguments.cold > 0),
        ..Config::default()
    };
    Ok(config.command_line().map_err(|error| error.to_string())?)
}

fn size(option: &str, bytes: u64) -> Result<Size, Failure> {
    if !bytes.is_multiple_of(1 << 20) {
        return Err(format!("{option}: {bytes} bytes is not a multiple of 1 MiB").into());
    }
    let mib =
        u32::try_from(bytes >> 20).map_err(|_| format!("{option}: {bytes} bytes is too large"))?;
    Ok(Size::from_mib(mib))
}

/// Starts a thread that removes `directory` and exits on a signal. The child processes get SIGTERM when this process exits.
fn clean_up_on_signals(directory: PathBuf) -> std::io::Result<()> {
    let mut signals = Signals::new([SIGTERM, SIGINT, SIGHUP])?;
    thread::spawn(move || {
        if let Some(signal) = signals.forever().next() {
            // Fails if a child process creates a socket at the same time. The exit must not depend on it.
            let _left = fs::remove_dir_all(&directory);
            std::process::exit(128 + signal);
        }
    });
    Ok(())
}

/// The source and the destination of the migration.
struct Pair {
    source: FerryProcess,
    destination: FerryProcess,
    destination_url: String,
}

impl Pair {
    /// Starts both processes and boots the guest at the source.
    fn start(
        arguments: &DemoArguments,
        directory: &Path,
        command_line: &str,
    ) -> Result<Self, Failure> {
        let kernel = directory.join("dirtier.elf");
        fs::write(&kernel, guest_images::DIRTIER)?;
        let url = match arguments.transport {
            Transport::Tcp => "tcp:127.0.0.1:0".to_owned(),
            Transport::Unix => format!("unix:{}", directory.join("migration.sock").display()),
        };
        let mut destination = FerryProcess::start(directory, "destination", &["receive", &url])?;
        let destination_url = destination.wait_for_url()?;
        let source = FerryProcess::start(
            directory,
            "source",
            &[
                "run",
                "--kernel",
                &kernel.display().to_string(),
                "--memory",
                &arguments.memory.to_string(),
                "--cpus",
                &arguments.cpus.to_string(),
                "--cmdline",
                command_line,
            ],
        )?;
        Ok(Self {
            source,
            destination,
            destination_url,
        })
    }

    /// Migrates the guest and lets it audit its memory at the destination.
    fn migrate(mut self, arguments: &DemoArguments, output: &Output) -> Result<Verdict, Failure> {
        self.source.wait_for(READY_LIMIT, |report| {
            matches!(report, GuestReport::Ready { .. })
        })?;
        output.event("demo/guest-ready", &json!({}));
        thread::sleep(WORK);
        let request = SendMigrationData {
            destination_url: self.destination_url.clone(),
            downtime_ms: arguments.downtime_ms,
            timeout_s: TIMEOUT_S,
            timeout_strategy: TimeoutStrategy::Ignore,
            throttle_max: THROTTLE_MAX,
            verify: true,
        };
        let mut rounds_shown = 0;
        let migration = send_migration(&self.source.socket, &request, |report| {
            rounds_shown = output.rounds(report, rounds_shown);
        })?;
        output.rounds(&migration, rounds_shown);
        let source_status = self.source.wait_for_exit(EXIT_LIMIT)?;
        thread::sleep(WORK);
        self.destination.type_in(b"q")?;
        let (audit, complaint) = self.destination.audit()?;
        let destination_status = self.destination.wait_for_exit(EXIT_LIMIT)?;
        Ok(Verdict {
            migration,
            audit,
            complaint,
            source_status,
            destination_status,
        })
    }
}

/// Results of the digest comparison and of the guest's audit.
struct Verdict {
    migration: Report,
    /// Totals of the audit, or `None` if the guest did not complete it.
    audit: Option<Totals>,
    /// Line in which the guest reported an error.
    complaint: Option<String>,
    source_status: Option<i32>,
    destination_status: Option<i32>,
}

impl Verdict {
    /// Returns true if the digests of guest memory were equal at the switchover.
    fn is_digest_equal(&self) -> bool {
        self.migration.phase == Phase::Completed && self.migration.digest.is_some()
    }

    /// Returns the number of lost or torn writes that the guest found, at least 1 if it reported any error.
    fn lost_writes(&self) -> u64 {
        let audited = self.audit.map_or(0, |totals| totals.lost + totals.torn);
        audited.max(u64::from(self.complaint.is_some()))
    }

    /// Returns true if both checks passed and both processes exited with status 0.
    fn is_verified(&self) -> bool {
        self.is_digest_equal()
            && self.audit.is_some()
            && self.lost_writes() == 0
            && self.source_status == Some(0)
            && self.destination_status == Some(0)
    }
}
