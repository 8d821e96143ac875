//! One command with a time limit and a log.

use std::fs::{self, File};
use std::io;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process_group};

use crate::results::Runner;
use crate::session::{Failed, Session};

/// How often a running command is asked whether it has ended.
const POLL: Duration = Duration::from_millis(20);
/// How long a command may take to end after SIGTERM. cargo-nextest uses it to end its tests.
const GRACE: Duration = Duration::from_secs(20);

/// A command to be run as one step.
pub(crate) struct Step {
    pub(crate) name: String,
    limit: Duration,
    command: Command,
    pub(crate) runner: Option<Runner>,
    pub(crate) output: Output,
}

/// What becomes of the log of a step that succeeds. The log of a step that fails is always printed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Output {
    /// It stays in its file.
    Kept,
    /// It is printed: it holds figures that a person wants to see.
    Shown,
}

/// How the command of a step ended.
pub(crate) enum End {
    /// It ended by itself.
    Exited(ExitStatus),
    /// It was still running at its limit, and was ended.
    OverLimit(Duration),
    /// It was ended because the run was interrupted.
    Interrupted,
}

impl Step {
    /// A step of the given name that is ended after `limit_s` seconds. The name is also the log's.
    pub(crate) fn new(name: impl Into<String>, limit_s: u64, command: Command) -> Self {
        Self {
            name: name.into(),
            limit: Duration::from_secs(limit_s),
            command,
            runner: None,
            output: Output::Kept,
        }
    }

    /// Counts the tests that `runner` reports. A step that reports none has failed.
    pub(crate) fn tests(mut self, runner: Runner) -> Self {
        self.runner = Some(runner);
        self
    }

    /// Prints the log of the step also when it succeeds.
    pub(crate) fn shown(mut self) -> Self {
        self.output = Output::Shown;
        self
    }

    /// Runs the step, reports it, and returns its log.
    ///
    /// # Errors
    /// Returns [`Failed`] if the command failed, a test failed, or the run was interrupted. The failure has been
    /// reported.
    pub(crate) fn run(mut self, session: &Session) -> Result<String, Failed> {
        if session.is_interrupted() {
            return Err(Failed);
        }
        session.say(&format!("       {}", self.name));
        let file = session.places.logs.join(format!("{}.log", self.name));
        let began = Instant::now();
        let end = self.run_command(&file, session);
        // Test programs and guests can print anything.
        let log = String::from_utf8_lossy(&fs::read(&file).unwrap_or_default()).into_owned();
        session.judge(&self, end, began.elapsed(), log)
    }

    /// The command leads a process group, so that it can be ended together with all processes that it started.
    fn run_command(&mut self, log: &Path, session: &Session) -> io::Result<End> {
        let output = File::create(log)?;
        self.command
            .stdin(Stdio::null())
            .stdout(output.try_clone()?)
            .stderr(output)
            .process_group(0);
        let mut child = self.command.spawn().map_err(|error| {
            let program = self.command.get_program().display();
            io::Error::new(error.kind(), format!("cannot start {program}: {error}"))
        })?;
        let deadline = Instant::now() + self.limit;
        loop {
            if let Some(status) = child.try_wait()? {
                return Ok(End::Exited(status));
            }
            if session.is_interrupted() {
                end_group(&mut child)?;
                return Ok(End::Interrupted);
            }
            if Instant::now() >= deadline {
                end_group(&mut child)?;
                return Ok(End::OverLimit(self.limit));
            }
            thread::sleep(POLL);
        }
    }
}

/// Ends a command and its process group: SIGTERM, then SIGKILL for what is still there after [`GRACE`].
fn end_group(child: &mut Child) -> io::Result<()> {
    let group = Pid::from_child(child);
    // A group without processes cannot be signalled, which is what is wanted.
    let _ = kill_process_group(group, Signal::TERM);
    let deadline = Instant::now() + GRACE;
    while child.try_wait()?.is_none() && Instant::now() < deadline {
        thread::sleep(POLL);
    }
    let _ = kill_process_group(group, Signal::KILL);
    child.wait().map(drop)
}
