//! A child process that never outlives its test.

use std::io;
use std::path::Path;
use std::process::{Child, ChildStdin, Command, ExitStatus, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use crate::console::Console;

/// How often a process is asked whether it has ended.
const POLL: Duration = Duration::from_millis(1);

/// Why a process could not be run to its end.
#[derive(Debug, thiserror::Error)]
pub enum ProcessError {
    /// It could not be started.
    #[error("{program}: cannot be started; is it installed?")]
    Start {
        /// The program's name or path.
        program: String,
        /// The system's reason.
        source: io::Error,
    },
    /// The system refused to tell about it.
    #[error("{program}: cannot be waited for")]
    Wait {
        /// The program's name or path.
        program: String,
        /// The system's reason.
        source: io::Error,
    },
    /// It was still running at the deadline; it has been killed.
    #[error(
        "{program}: still running after {limit:?}, killed; stdout:\n{stdout}\nstderr:\n{stderr}"
    )]
    TimedOut {
        /// The program's name or path.
        program: String,
        /// How long it was given.
        limit: Duration,
        /// What it had written to stdout.
        stdout: String,
        /// What it had written to stderr.
        stderr: String,
    },
}

/// How a process ended and what it wrote.
#[derive(Clone, Debug)]
pub struct Ended {
    /// The exit status.
    pub status: ExitStatus,
    /// All of stdout.
    pub stdout: String,
    /// All of stderr.
    pub stderr: String,
}

/// Sends SIGTERM to a process that a test started.
///
/// # Errors
/// `kill` cannot be run, or there is no such process.
pub fn terminate(pid: u32) -> io::Result<()> {
    let script = format!("kill -TERM {pid}");
    let status = Command::new("sh").args(["-c", &script]).status()?;
    if status.success() {
        Ok(())
    } else {
        Err(io::Error::other(format!("kill -TERM {pid}: {status}")))
    }
}

/// What a process has of its own when it starts [`apart`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Apart {
    /// Mounts.
    Mounts,
    /// Mounts and a network, which has nothing in it.
    MountsAndNetwork,
}

/// `program` in namespaces of its own, which end with it; the commands of the shell in `prepare` are run there first.
/// The process that is started becomes the program. Arguments are added by the caller.
///
/// # Errors
/// The system will not tell who runs the tests.
pub fn apart(program: &Path, apart: Apart, prepare: &str) -> Result<Command, ProcessError> {
    let user = run(Command::new("id").arg("-u"), Duration::from_secs(20))?;
    let mut command = Command::new("unshare");
    // Who is not root is root in a user namespace.
    if user.stdout.trim() != "0" {
        command.arg("-r");
    }
    command.arg("-m");
    if apart == Apart::MountsAndNetwork {
        command.arg("-n");
    }
    let script = format!("{prepare} && exec \"$0\" \"$@\"");
    command.args(["sh", "-c", &script]).arg(program);
    Ok(command)
}

/// A running process with piped stdin, stdout and stderr; killed and reaped when dropped.
#[derive(Debug)]
pub struct Process {
    program: String,
    child: Child,
    stdin: Option<ChildStdin>,
    stdout: Console,
    stderr: Console,
}

impl Process {
    /// Starts `command`.
    ///
    /// # Errors
    /// [`ProcessError::Start`] with the program's name.
    pub fn start(command: &mut Command) -> Result<Self, ProcessError> {
        let program = command.get_program().to_string_lossy().into_owned();
        command
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped());
        let started = command.spawn();
        let mut child = started.map_err(|source| ProcessError::Start {
            program: program.clone(),
            source,
        })?;
        let stdout = child.stdout.take().map(Console::follow).unwrap_or_default();
        let stderr = child.stderr.take().map(Console::follow).unwrap_or_default();
        let stdin = child.stdin.take();
        Ok(Self {
            program,
            child,
            stdin,
            stdout,
            stderr,
        })
    }

    /// The process id.
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// What it writes to stdout.
    pub fn stdout(&self) -> &Console {
        &self.stdout
    }

    /// What it writes to stderr.
    pub fn stderr(&self) -> &Console {
        &self.stderr
    }

    /// Writes to its stdin.
    ///
    /// # Errors
    /// The system's error, also when stdin was closed.
    pub fn type_in(&mut self, text: &str) -> io::Result<()> {
        use std::io::Write;
        let stdin = self.stdin.as_mut().ok_or(io::ErrorKind::BrokenPipe)?;
        stdin.write_all(text.as_bytes())?;
        stdin.flush()
    }

    /// Closes its stdin.
    pub fn close_stdin(&mut self) {
        self.stdin = None;
    }

    /// Whether it is still running.
    pub fn is_running(&mut self) -> bool {
        matches!(self.child.try_wait(), Ok(None))
    }

    /// Kills it (SIGKILL) and reaps it.
    pub fn kill(&mut self) {
        // Both fail only where the process is gone already, which is what is wanted.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }

    /// Waits for its end; kills it at the deadline.
    ///
    /// # Errors
    /// [`ProcessError::TimedOut`] with all that it wrote, or the system's error.
    pub fn wait(&mut self, limit: Duration) -> Result<Ended, ProcessError> {
        let deadline = Instant::now() + limit;
        loop {
            let asked = self.child.try_wait();
            let program = || self.program.clone();
            match asked.map_err(|source| ProcessError::Wait {
                program: program(),
                source,
            })? {
                Some(status) => return Ok(self.ended(status)),
                None if Instant::now() >= deadline => return Err(self.overdue(limit)),
                None => thread::sleep(POLL),
            }
        }
    }

    /// The pipes may be kept open by a grandchild: what is not there a moment after the end is not waited for.
    fn ended(&self, status: ExitStatus) -> Ended {
        self.stdout.wait_end(Duration::from_secs(2));
        self.stderr.wait_end(Duration::from_secs(2));
        Ended {
            status,
            stdout: self.stdout.text(),
            stderr: self.stderr.text(),
        }
    }

    fn overdue(&mut self, limit: Duration) -> ProcessError {
        self.kill();
        ProcessError::TimedOut {
            program: self.program.clone(),
            limit,
            stdout: self.stdout.text(),
            stderr: self.stderr.text(),
        }
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        self.kill();
    }
}

/// Runs a command to its end.
///
/// # Errors
/// As [`Process::start`] and [`Process::wait`].
pub fn run(command: &mut Command, limit: Duration) -> Result<Ended, ProcessError> {
    let mut process = Process::start(command)?;
    process.close_stdin();
    process.wait(limit)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn output_and_status_come_back() {
        let mut command = Command::new("sh");
        command.args(["-c", "echo out; echo err >&2; exit 3"]);
        let ended = run(&mut command, Duration::from_secs(20)).unwrap();
        assert_eq!(ended.status.code(), Some(3));
        assert_eq!(
            (ended.stdout.as_str(), ended.stderr.as_str()),
            ("out\n", "err\n")
        );
    }

    #[test]
    fn an_overdue_process_is_killed() {
        let mut command = Command::new("sleep");
        let mut process = Process::start(command.arg("600")).unwrap();
        let outcome = process.wait(Duration::from_millis(50));
        assert!(
            matches!(outcome, Err(ProcessError::TimedOut { .. })),
            "{outcome:?}"
        );
        assert!(!process.is_running());
    }

    #[test]
    fn a_dropped_process_is_gone() {
        let process = Process::start(Command::new("sleep").arg("600")).unwrap();
        let entry = format!("/proc/{}", process.pid());
        assert!(Path::new(&entry).exists());
        drop(process);
        assert!(!Path::new(&entry).exists());
    }

    #[test]
    fn a_process_apart_has_a_network_of_its_own_and_keeps_its_id() {
        let shell = Path::new("/bin/sh");
        let mut command = apart(shell, Apart::MountsAndNetwork, "true").unwrap();
        let mut process = Process::start(command.args(["-c", "echo $$; cat"])).unwrap();
        let own_id = format!("{}\n", process.pid());
        let limit = Duration::from_secs(20);
        process.stdout().wait_for(&own_id, limit).unwrap();
        let network = |pid: &str| std::fs::read_link(format!("/proc/{pid}/ns/net")).unwrap();
        assert_ne!(network(&process.pid().to_string()), network("self"));
        process.close_stdin();
        assert!(process.wait(limit).unwrap().status.success());
    }

    #[test]
    fn a_program_that_is_not_there_is_named() {
        let error = run(&mut Command::new("no-such-program"), Duration::from_secs(1)).unwrap_err();
        assert!(error.to_string().contains("no-such-program"), "{error}");
    }
}
