//! A ferry process that the demo starts, with its guest's serial port on pipes.

use std::io::{self, BufRead, BufReader, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, Command, Stdio};
use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};
use std::thread;
use std::time::{Duration, Instant};

use guest_images::dirtier::{GuestReport, Totals};

use crate::Failure;
use crate::report::migration_progress;
use migration::Phase;

/// Time limit for a destination to listen.
const LISTEN_LIMIT: Duration = Duration::from_secs(30);
/// Time limit for the guest to audit its memory.
const AUDIT_LIMIT: Duration = Duration::from_secs(300);

/// A child process that runs this program. Dropping it kills the process.
pub(super) struct FerryProcess {
    name: &'static str,
    child: Child,
    stdin: ChildStdin,
    /// Lines that the guest prints to its serial port.
    lines: Receiver<String>,
    /// API socket.
    pub(super) socket: PathBuf,
}

impl FerryProcess {
    /// Starts the program with `arguments` and an API socket in `directory`. `name` is used in errors.
    pub(super) fn start(
        directory: &Path,
        name: &'static str,
        arguments: &[&str],
    ) -> Result<Self, Failure> {
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
            .ok_or("the child process has no standard input")?;
        let stdout = child
            .stdout
            .take()
            .ok_or("the child process has no standard output")?;
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

    /// Waits until the process listens for a migration, and returns the address.
    pub(super) fn wait_for_url(&mut self) -> Result<String, Failure> {
        let began = Instant::now();
        while began.elapsed() < LISTEN_LIMIT {
            if let Some(status) = self.child.try_wait()? {
                return Err(
                    format!("the {} exited before it listened ({status})", self.name).into(),
                );
            }
            if let Ok(report) = migration_progress(&self.socket)
                && report.phase == Phase::Listening
                && let Some(url) = report.url
            {
                return Ok(url);
            }
            thread::sleep(Duration::from_millis(5));
        }
        Err(format!(
            "the {} does not listen for a migration after {} s",
            self.name,
            LISTEN_LIMIT.as_secs()
        )
        .into())
    }

    /// Waits for a report of the guest that satisfies `wanted`.
    ///
    /// # Errors
    /// Returns an error if the guest reports an error, if the process exits, or if no such report arrives within `limit`.
    pub(super) fn wait_for(
        &self,
        limit: Duration,
        wanted: impl Fn(&GuestReport) -> bool,
    ) -> Result<(), Failure> {
        let deadline = Instant::now() + limit;
        loop {
            let line = self.line_before(deadline)?;
            match GuestReport::parse(&line) {
                Some(report) if wanted(&report) => return Ok(()),
                Some(GuestReport::Status(_)) => {}
                _ => return Err(format!("the guest at the {} printed: {line}", self.name).into()),
            }
        }
    }

    /// Waits for the result of the guest's audit. Returns its totals, and the line in which the guest reported an error.
    pub(super) fn audit(&self) -> Result<(Option<Totals>, Option<String>), Failure> {
        let deadline = Instant::now() + AUDIT_LIMIT;
        loop {
            let line = self.line_before(deadline)?;
            match GuestReport::parse(&line) {
                Some(GuestReport::AuditPassed(totals)) => return Ok((Some(totals), None)),
                Some(GuestReport::AuditFailed(totals)) => return Ok((Some(totals), Some(line))),
                Some(GuestReport::Status(_) | GuestReport::Ready { .. }) => {}
                _ => return Ok((None, Some(line))),
            }
        }
    }

    /// Returns the next line that the guest prints.
    fn line_before(&self, deadline: Instant) -> Result<String, Failure> {
        let left = deadline.saturating_duration_since(Instant::now());
        self.lines.recv_timeout(left).map_err(|error| {
            let name = self.name;
            match error {
                RecvTimeoutError::Timeout => format!("the guest at the {name} prints nothing more"),
                RecvTimeoutError::Disconnected => {
                    format!("the {name} exited before its guest printed its result")
                }
            }
            .into()
        })
    }

    /// Types bytes into the guest's serial port.
    pub(super) fn type_in(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.stdin.write_all(bytes)
    }

    /// Waits until the process exits. Returns its exit status, or `None` if a signal killed it.
    pub(super) fn wait_for_exit(&mut self, limit: Duration) -> Result<Option<i32>, Failure> {
        let began = Instant::now();
        loop {
            if let Some(status) = self.child.try_wait()? {
                return Ok(status.code());
            }
            if began.elapsed() >= limit {
                return Err(format!(
                    "the {} does not exit within {} s",
                    self.name,
                    limit.as_secs()
                )
                .into());
            }
            thread::sleep(Duration::from_millis(2));
        }
    }
}

impl Drop for FerryProcess {
    fn drop(&mut self) {
        // Both fail only if the process has exited and was waited for.
        let _ended = self.child.kill();
        let _waited = self.child.wait();
    }
}
