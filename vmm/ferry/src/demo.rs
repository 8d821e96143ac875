//! `ferry demo`: the main job on built-in parts.
//!
//! Two more processes of this program are the source and the destination; the guest is the dirtier of
//! ferry-guest-images, which checks every page before it writes it anew. The verdict is that of two
//! witnesses: the digests of memory on both sides at the switchover, and the guest's own audit afterwards.

use std::cell::RefCell;
use std::io::{self, BufRead, BufReader, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, Command, Stdio};
use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};
use std::thread;
use std::time::{Duration, Instant};

use guest_images::dirtier::{Config, Pattern, Report, Size, Totals};
use serde_json::{Value, json};
use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM};
use signal_hook::iterator::Signals;

use super::arguments::{DemoArguments, Transport};
use super::report::{progress, send_and_watch, table};
use super::{Failure, say};
use migration::TimeoutStrategy;
use migration::{Phase, Report as MigrationReport};
use vmm::kvm::host::Host;
use vmm::monitor::SendMigrationData;

/// How long the guest may take to populate its memory; a first write costs tens of microseconds.
const READY_LIMIT: Duration = Duration::from_secs(300);
const START_LIMIT: Duration = Duration::from_secs(30);
const AUDIT_LIMIT: Duration = Duration::from_secs(300);
/// How long the guest works before the migration, and after it.
const WORK: Duration = Duration::from_millis(500);
const TIMEOUT_S: u64 = 120;
/// The demo's guest does nothing but dirty memory: on a busy host nothing less would let it go.
const THROTTLE_MAX: u32 = 90;

pub(super) fn demo(arguments: &DemoArguments) -> Result<u8, Failure> {
    let command_line = command_line(arguments)?;
    // Its message is better than that of a child.
    drop(Host::open()?);
    let directory = tempfile::Builder::new().prefix("ferry-demo-").tempdir()?;
    clean_up_on_signals(directory.path().to_owned())?;
    let output = Output {
        json: arguments.json,
        failed: RefCell::new(None),
    };
    let pair = Pair::start(arguments, directory.path(), &command_line)?;
    output.event(
        "demo/started",
        &json!({ "memory_bytes": arguments.memory, "cpus": arguments.cpus }),
    );
    let verdict = pair.migrate(arguments, &output)?;
    output.verdict(arguments, &verdict);
    if let Some(error) = output.failed.take() {
        return Err(format!("standard output: {error}").into());
    }
    Ok(u8::from(!verdict.verified()))
}

/// A demo that is told to end leaves nothing behind: its two processes end with it.
fn clean_up_on_signals(directory: PathBuf) -> std::io::Result<()> {
    let mut signals = Signals::new([SIGTERM, SIGINT, SIGHUP])?;
    thread::spawn(move || {
        if let Some(signal) = signals.forever().next() {
            // The processes may still be making sockets there, and there is nobody left to tell.
            let _left = std::fs::remove_dir_all(&directory);
            std::process::exit(128 + signal);
        }
    });
    Ok(())
}

fn command_line(arguments: &DemoArguments) -> Result<String, Failure> {
    let total = arguments
        .hot
        .checked_add(arguments.cold)
        .ok_or("--hot and --cold: too large")?;
    if total >= arguments.memory {
        return Err(format!(
            "--hot and --cold together are {total} bytes: they must be less than --memory, {} bytes",
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

fn size(what: &str, bytes: u64) -> Result<Size, Failure> {
    if !bytes.is_multiple_of(1 << 20) {
        return Err(format!("{what}: {bytes} bytes are no whole number of MiB").into());
    }
    let mib =
        u32::try_from(bytes >> 20).map_err(|_| format!("{what}: {bytes} bytes are too many"))?;
    Ok(Size::from_mib(mib))
}

/// What the two witnesses said.
struct Verdict {
    migration: MigrationReport,
    audit: Option<Totals>,
    complaint: Option<String>,
    source_status: Option<i32>,
    destination_status: Option<i32>,
}

impl Verdict {
    fn digest_equal(&self) -> bool {
        self.migration.phase == Phase::Completed && self.migration.digest.is_some()
    }

    fn lost_writes(&self) -> u64 {
        let audited = self.audit.map_or(0, |totals| totals.lost + totals.torn);
        audited.max(u64::from(self.complaint.is_some()))
    }

    fn verified(&self) -> bool {
        self.digest_equal()
            && self.audit.is_some()
            && self.lost_writes() == 0
            && self.source_status == Some(0)
            && self.destination_status == Some(0)
    }
}

/// The source and the destination.
struct Pair {
    source: Ferry,
    destination: Ferry,
    destination_url: String,
}

impl Pair {
    fn start(
        arguments: &DemoArguments,
        directory: &Path,
        command_line: &str,
    ) -> Result<Self, Failure> {
        let kernel = directory.join("dirtier.elf");
        std::fs::write(&kernel, guest_images::DIRTIER)?;
        let url = match arguments.transport {
            Transport::Tcp => "tcp:127.0.0.1:0".to_owned(),
            Transport::Unix => format!("unix:{}", directory.join("migration.sock").display()),
        };
        let mut destination = Ferry::start(directory, "destination", &["receive", &url])?;
        let destination_url = destination.wait_for_url()?;
        let source = Ferry::start(
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

    fn migrate(mut self, arguments: &DemoArguments, output: &Output) -> Result<Verdict, Failure> {
        self.source
            .wait_for(READY_LIMIT, |report| matches!(report, Report::Ready { .. }))?;
        output.event("demo/guest-ready", &json!({}));
        thread::sleep(WORK);
        let wish = SendMigrationData {
            destination_url: self.destination_url.clone(),
            downtime_ms: arguments.downtime_ms,
            timeout_s: TIMEOUT_S,
            timeout_strategy: TimeoutStrategy::Ignore,
            throttle_max: THROTTLE_MAX,
            verify: true,
        };
        let mut rounds_shown = 0;
        let migration = send_and_watch(&self.source.socket, &wish, |snapshot| {
            rounds_shown = output.rounds(snapshot, rounds_shown);
        })?;
        output.rounds(&migration, rounds_shown);
        let source_status = self.source.wait_for_exit(START_LIMIT)?;
        thread::sleep(WORK);
        self.destination.stdin.write_all(b"q")?;
        let (audit, complaint) = self.destination.audit()?;
        let destination_status = self.destination.wait_for_exit(START_LIMIT)?;
        Ok(Verdict {
            migration,
            audit,
            complaint,
            source_status,
            destination_status,
        })
    }
}

/// A process of this program. It ends with this value.
struct Ferry {
    name: &'static str,
    child: Child,
    stdin: ChildStdin,
    lines: Receiver<String>,
    socket: PathBuf,
}

impl Ferry {
    fn start(directory: &Path, name: &'static str, arguments: &[&str]) -> Result<Self, Failure> {
        let socket = directory.join(format!("{name}.sock"));
        let mut child = Command::new(std::env::current_exe()?)
            .args(arguments)
            .args(["--end-with-parent", &std::process::id().to_string()])
            .args(["--serial", "stdio", "--api-socket"])
            .arg(&socket)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()?;
        let stdin = child
            .stdin
            .take()
            .ok_or("the child has no standard input")?;
        let stdout = child
            .stdout
            .take()
            .ok_or("the child has no standard output")?;
        let (sender, lines) = channel();
        thread::spawn(move || {
            for line in BufReader::new(stdout).split(b'\n').map_while(Result::ok) {
                if sender
                    .send(String::from_utf8_lossy(&line).into_owned())
                    .is_err()
                {
                    return;
                }
            }
        });
        Ok(Self {
            name,
            child,
            stdin,
            lines,
            socket,
        })
    }

    /// The address that a destination listens on.
    fn wait_for_url(&mut self) -> Result<String, Failure> {
        let began = Instant::now();
        while began.elapsed() < START_LIMIT {
            if let Some(status) = self.child.try_wait()? {
                return Err(format!("the {} ended too early ({status})", self.name).into());
            }
            if let Ok(snapshot) = progress(&self.socket)
                && snapshot.phase == Phase::Listening
                && let Some(url) = snapshot.url
            {
                return Ok(url);
            }
            thread::sleep(Duration::from_millis(5));
        }
        Err(format!(
            "the {} does not listen after {} s",
            self.name,
            START_LIMIT.as_secs()
        )
        .into())
    }

    /// Waits for the guest's report that is `wanted`; any complaint of it is an error.
    fn wait_for(
        &self,
        limit: Duration,
        wanted: impl Fn(&Report) -> bool,
    ) -> Result<Report, Failure> {
        let deadline = Instant::now() + limit;
        loop {
            let line = self.line_before(deadline)?;
            match Report::parse(&line) {
                Some(report) if wanted(&report) => return Ok(report),
                Some(Report::Status(_)) => {}
                _ => return Err(format!("the guest at the {} says: {line}", self.name).into()),
            }
        }
    }

    /// The guest's verdict, and its complaint if it has one.
    fn audit(&self) -> Result<(Option<Totals>, Option<String>), Failure> {
        let deadline = Instant::now() + AUDIT_LIMIT;
        loop {
            let line = self.line_before(deadline)?;
            match Report::parse(&line) {
                Some(Report::AuditPassed(totals)) => return Ok((Some(totals), None)),
                Some(Report::AuditFailed(totals)) => return Ok((Some(totals), Some(line))),
                Some(Report::Status(_) | Report::Ready { .. }) => {}
                _ => return Ok((None, Some(line))),
            }
        }
    }

    fn line_before(&self, deadline: Instant) -> Result<String, Failure> {
        let left = deadline.saturating_duration_since(Instant::now());
        self.lines.recv_timeout(left).map_err(|error| {
            let name = self.name;
            match error {
                RecvTimeoutError::Timeout => format!("the guest at the {name} says nothing"),
                RecvTimeoutError::Disconnected => format!("the {name} ended too early"),
            }
            .into()
        })
    }

    fn wait_for_exit(&mut self, limit: Duration) -> Result<Option<i32>, Failure> {
        let began = Instant::now();
        loop {
            if let Some(status) = self.child.try_wait()? {
                return Ok(status.code());
            }
            if began.elapsed() >= limit {
                return Err(format!("the {} does not end", self.name).into());
            }
            thread::sleep(Duration::from_millis(2));
        }
    }
}

impl Drop for Ferry {
    fn drop(&mut self) {
        // Both fail only for a child that has ended and was waited for.
        let _ended = self.child.kill();
        let _waited = self.child.wait();
    }
}

/// Where the demo says what it does.
struct Output {
    json: bool,
    /// The first line that could not be written: the demo goes on without its reader, and says so at the end.
    failed: RefCell<Option<io::Error>>,
}

impl Output {
    fn say(&self, line: &str) {
        if let Err(error) = say(line) {
            self.failed.borrow_mut().get_or_insert(error);
        }
    }

    fn event(&self, event: &str, fields: &Value) {
        if self.json {
            let mut object = json!({ "event": event });
            if let (Some(object), Some(fields)) = (object.as_object_mut(), fields.as_object()) {
                object.extend(fields.clone());
            }
            self.say(&object.to_string());
        } else if event == "demo/guest-ready" {
            self.say("The guest has populated its memory and rewrites it; migrating.");
        }
    }

    /// Tells the rounds that are complete and were not told yet. Returns how many have been told.
    fn rounds(&self, snapshot: &MigrationReport, told: usize) -> usize {
        for (number, round) in (1..).zip(&snapshot.rounds).skip(told) {
            self.event("demo/round", &json!({ "round": number, "figures": round }));
        }
        snapshot.rounds.len().max(told)
    }

    fn verdict(&self, arguments: &DemoArguments, verdict: &Verdict) {
        let migration = &verdict.migration;
        if self.json {
            self.event(
                "demo/finished",
                &json!({
                    "verified": verdict.verified(),
                    "digest_equal": verdict.digest_equal(),
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
        self.say(&format!("\n{}", table(migration)));
        let digest = migration.digest.as_deref().unwrap_or("differs");
        self.say(&format!("digest    {digest}"));
        let audit = match (&verdict.audit, &verdict.complaint) {
            (_, Some(complaint)) => complaint.clone(),
            (Some(totals), None) => format!("audit passed: {totals}"),
            (None, None) => "no audit".into(),
        };
        self.say(&format!("guest     {audit}"));
        let text = match verdict.verified() {
            true => "verified: memory was equal at the switchover, and no write was lost",
            false => "NOT verified",
        };
        self.say(&format!("\n{text}"));
    }
}
