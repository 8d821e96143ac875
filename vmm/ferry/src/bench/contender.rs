//! A program whose guest is measured: started, listened to, and ended.

use std::io::Read;
use std::process::{Child, ChildStdout, Command, Stdio};
use std::time::{Duration, Instant};
use std::{fmt, fs};

use rustix::event::{PollFd, PollFlags, Timespec, poll};

use crate::Failure;

/// A program that measures a guest of its own. It is gone when this is dropped.
pub(super) struct Contender {
    name: &'static str,
    child: Child,
    output: ChildStdout,
    /// What was read of a line that is not whole yet.
    unread: Vec<u8>,
    began: Instant,
}

/// Why a contender could not be measured.
#[derive(Debug)]
enum Trouble {
    Ended,
    Silent(Duration),
}

impl fmt::Display for Trouble {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Ended => write!(f, "it ended before its guest said all"),
            Self::Silent(limit) => write!(f, "its guest said nothing more for {limit:?}"),
        }
    }
}

impl Contender {
    /// Starts `command`, whose standard output is its guest's serial port.
    pub(super) fn start(name: &'static str, mut command: Command) -> Result<Self, Failure> {
        command
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped());
        let began = Instant::now();
        let mut child = command
            .spawn()
            .map_err(|error| format!("{name}: {:?}: {error}", command.get_program()))?;
        let output = child.stdout.take().ok_or("a piped output is not there")?;
        Ok(Self {
            name,
            child,
            output,
            unread: Vec::new(),
            began,
        })
    }

    /// When it was started.
    pub(super) fn began(&self) -> Instant {
        self.began
    }

    /// What its guest says next, within `limit`.
    pub(super) fn read(&mut self, buffer: &mut [u8], limit: Duration) -> Result<usize, Failure> {
        let patience = Timespec::try_from(limit)?;
        let mut descriptors = [PollFd::new(&self.output, PollFlags::IN)];
        if poll(&mut descriptors, Some(&patience))? == 0 {
            return Err(self.failed(&Trouble::Silent(limit)));
        }
        match self.output.read(buffer)? {
            0 => Err(self.failed(&Trouble::Ended)),
            count => Ok(count),
        }
    }

    /// The next whole line that its guest says, each part of it within `limit`.
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

    /// Its memory beyond the guest's, in KiB, where that is a memory file: what is private, and the program's text.
    pub(super) fn beyond_guest_kib(&self) -> Result<u64, Failure> {
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

    /// What went wrong, with the program's own last words.
    fn failed(&mut self, trouble: &Trouble) -> Failure {
        self.end();
        let mut said = String::new();
        if let Some(stderr) = &mut self.child.stderr {
            // Without its words the trouble itself has to do.
            let _unreadable = stderr.read_to_string(&mut said);
        }
        format!("{}: {trouble}; it says: {:?}", self.name, said.trim()).into()
    }

    fn end(&mut self) {
        // One that has ended by itself is only collected.
        let _ended = self.child.kill();
        let _collected = self.child.wait();
    }
}

impl Drop for Contender {
    fn drop(&mut self) {
        self.end();
    }
}
