//! Child processes that never outlive their test.

use std::io;
use std::path::Path;
use std::process::{Child, ChildStdin, Command, ExitStatus, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use crate::console::Console;

/// Interval between checks whether a process has ended.
const POLL: Duration = Duration::from_millis(1);

/// Why a process did not run to its end.
#[derive(Debug, thiserror::Error)]
pub enum ProcessError {
    /// The process could not be started.
    #[error("{program}: cannot be started; is it installed?")]
    Start {
        /// Name or path of the program.
        program: String,
        /// The error of the operating system.
        source: io::Error,
    },
    /// The exit status of the process could not be read.
    #[error("{program}: cannot be waited for")]
    Wait {
        /// Name or path of the program.
        program: String,
        /// The error of the operating system.
        source: io::Error,
    },
    /// The process was still running at the deadline, and was killed.
    #[error(
        "{program}: still running after {limit:?}, killed; stdout:\n{stdout}\nstderr:\n{stderr}"
    )]
    TimedOut {
        /// Name or path of the program.
        program: String,
        /// The time limit.
        limit: Duration,
        /// Its output on stdout so far.
        stdout: String,
        /// Its output on stderr so far.
        stderr: String,
    },
}

/// Exit status and output of a process.
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
/// Returns an error if `kill` cannot be run or there is no such process.
pub fn terminate(pid: u32) -> io::Result<()> {
    let script = format!("kill -TERM {pid}");
    let status = Command::new("sh").args(["-c", &script]).status()?;
    if status.success() {
        Ok(())
    } else {
        Err(io::Error::other(format!("kill -TERM {pid}: {status}")))
    }
}

/// Namespaces that a process started by [`apart`] does not share with the tests.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Apart {
    /// Mount namespace.
    Mounts,
    /// Mount and network namespaces. The network has no devices but a loopback that is down.
    MountsAndNetwork,
}

/// Returns a command that runs `program` in new namespaces, after the shell commands in `prepare`. The process that is
/// started becomes the program, so that its id stays the same. The caller adds the arguments.
///
/// # Errors
/// Returns [`ProcessError`] if `id` cannot be run.
pub fn apart(program: &Path, apart: Apart, prepare: &str) -> Result<Command, ProcessError> {
    let user = run(Command::new("id").arg("-u"), Duration::from_secs(20))?;
    let mut command = Command::new("unshare");
    // A user who is not root becomes root in a user namespace.
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

/// Running process with pipes for stdin, stdout and stderr. Dropping it kills and reaps the process.
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
    /// Returns [`ProcessError::Start`] if the program cannot be started.
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

    /// Id of the process.
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Output on stdout.
    pub fn stdout(&self) -> &Console {
        &self.stdout
    }

    /// Output on stderr.
    pub fn stderr(&self) -> &Console {
        &self.stderr
    }

    /// Writes to stdin of the process.
    ///
    /// # Errors
    /// Returns the error of the operating system. It is an error if stdin was closed.
    pub fn type_in(&mut self, text: &str) -> io::Result<()> {
        use std::io::Write;
        let stdin = self.stdin.as_mut().ok_or(io::ErrorKind::BrokenPipe)?;
        stdin.write_all(text.as_bytes())?;
        stdin.flush()
    }

    /// Closes stdin of the process.
    pub fn close_stdin(&mut self) {
        self.stdin = None;
    }

    /// Whether the process is still running.
    pub fn is_running(&mut self) -> bool {
        matches!(self.child.try_wait(), Ok(None))
    }

    /// Kills the process with SIGKILL and reaps it.
    pub fn kill(&mut self) {
        // Both fail only if the process has ended already.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }

    /// Waits for the process to end, and kills it at the deadline.
    ///
    /// # Errors
    /// Returns [`ProcessError::TimedOut`] with the output if the deadline passes, or [`ProcessError::Wait`].
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

    /// Collects the output. A grandchild can keep the pipes open, so this waits only a moment for their end.
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
/// Returns the errors of [`Process::start`] and [`Process::wait`].
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
