//! A monitor process whose guest is measured.

use std::io::Read;
use std::process::{Child, ChildStdout, Command, Stdio};
use std::time::{Duration, Instant};
use std::{fmt, fs};

use rustix::event::{PollFd, PollFlags, Timespec, poll};

use crate::Failure;

/// A child process that runs a guest whose serial port is its standard output. Dropping it kills the process.
pub(super) struct MonitorProcess {
    name: &'static str,
    child: Child,
    output: ChildStdout,
    /// Bytes that were read but not returned as a line yet.
    unread: Vec<u8>,
    began: Instant,
}

/// Reason why the output of a guest could not be read.
#[derive(Debug)]
enum ReadFailure {
    Ended,
    Silent(Duration),
}

impl fmt::Display for ReadFailure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Ended => write!(f, "the process exited before its guest finished"),
            Self::Silent(limit) => write!(f, "the guest printed nothing for {limit:?}"),
        }
    }
}

impl MonitorProcess {
    /// Starts `command`, which must connect the guest's serial port to its standard output.
    pub(super) fn start(name: &'static str, mut command: Command) -> Result<Self, Failure> {
        command
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped());
        let began = Instant::now();
        let mut child = command
            .spawn()
            .map_err(|error| format!("{name}: {:?}: {error}", command.get_program()))?;
        let output = child
            .stdout
            .take()
            .ok_or("the child process has no standard output")?;
        Ok(Self {
            name,
            child,
            output,
            unread: Vec::new(),
            began,
        })
    }

    /// Returns the time just before the process was started.
    pub(super) fn began(&self) -> Instant {
        self.began
    }

    /// Reads output of the guest. Waits at most `limit` for it.
    pub(super) fn read(&mut self, buffer: &mut [u8], limit: Duration) -> Result<usize, Failure> {
        let timeout = Timespec::try_from(limit)?;
        let mut descriptors = [PollFd::new(&self.output, PollFlags::IN)];
        if poll(&mut descriptors, Some(&timeout))? == 0 {
            return Err(self.failed(&ReadFailure::Silent(limit)));
        }
        match self.output.read(buffer)? {
            0 => Err(self.failed(&ReadFailure::Ended)),
            count => Ok(count),
        }
    }

    /// Reads a line of the guest. Waits at most `limit` for each part of the line.
    pub(super) fn read_line(&mut self, limit: Duration) -> Result<String, Failure> {
        loop {
            if let Some(end) = self.unread.iter().position(|byte| *byte == b'\n') {
                let line: Vec<u8> = self.unread.drain(..=end).collect();
                return Ok(String::from_utf8_lossy(&line).trim_end().into());
            }
            let mut more = [0; 4096];
            let count = self.read(&mut more, limit)?;
            self.unread.extend_from_slice(&more[..count]);
        }
    }

    /// Returns the resident memory of the process without guest memory, in KiB: anonymous memory and mapped files.
    ///
    /// Guest memory must be a memfd, which the kernel counts separately as shared memory (RssShmem).
    pub(super) fn overhead_kib(&self) -> Result<u64, Failure> {
        let path = format!("/proc/{}/status", self.child.id());
        let status = fs::read_to_string(&path).map_err(|error| format!("{path}: {error}"))?;
        let field = |name: &str| -> Result<u64, Failure> {
            let line = status.lines().find_map(|line| line.strip_prefix(name));
            let number = line.and_then(|line| line.trim().strip_suffix(" kB"));
            Ok(number
                .ok_or_else(|| format!("{path} has no {name}"))?
                .parse()?)
        };
        Ok(field("RssAnon:")? + field("RssFile:")?)
    }

    /// Returns an error with the standard error output of the process.
    fn failed(&mut self, failure: &ReadFailure) -> Failure {
        self.end();
        let mut said = String::new();
        if let Some(stderr) = &mut self.child.stderr {
            // If it cannot be read, the error has no output to show.
            let _unreadable = stderr.read_to_string(&mut said);
        }
        format!(
            "{}: {failure}; its standard error: {:?}",
            self.name,
            said.trim()
        )
        .into()
    }

    fn end(&mut self) {
        // Both fail only if the process has exited and was waited for.
        let _ended = self.child.kill();
        let _collected = self.child.wait();
    }
}

impl Drop for MonitorProcess {
    fn drop(&mut self) {
        self.end();
    }
}
