//! Memory figures of a running process from `/proc`.

use std::{fs, io};

/// Resident memory of a process by type, in KiB.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Resident {
    /// Anonymous memory (`RssAnon`): heap, stacks.
    pub anonymous_kib: u64,
    /// Mapped files (`RssFile`): the program's text, libraries.
    pub file_kib: u64,
    /// Shared memory (`RssShmem`): guest RAM, where it is a memfd.
    pub shared_kib: u64,
}

impl Resident {
    /// Reads `/proc/PID/status`.
    ///
    /// # Errors
    /// Returns the error of the operating system, or `InvalidData` if a line is missing.
    pub fn of(pid: u32) -> io::Result<Self> {
        let text = fs::read_to_string(format!("/proc/{pid}/status"))?;
        let field = |name: &str| {
            kib(&text, name).ok_or_else(|| {
                let message = format!(
                    "no {name} in /proc/{pid}/status: the process has no memory of its own"
                );
                io::Error::new(io::ErrorKind::InvalidData, message)
            })
        };
        Ok(Self {
            anonymous_kib: field("RssAnon:")?,
            file_kib: field("RssFile:")?,
            shared_kib: field("RssShmem:")?,
        })
    }

    /// Returns the memory of the monitor beyond guest RAM. Guest RAM must be a memfd.
    pub fn beyond_guest_kib(&self) -> u64 {
        self.anonymous_kib + self.file_kib
    }
}

fn kib(text: &str, name: &str) -> Option<u64> {
    let line = text.lines().find(|line| line.starts_with(name))?;
    line[name.len()..]
        .trim()
        .strip_suffix("kB")?
        .trim()
        .parse()
        .ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn own_memory_is_counted_by_kind() {
        let before = Resident::of(std::process::id()).unwrap();
        let block = vec![1_u8; 32 << 20];
        let after = Resident::of(std::process::id()).unwrap();
        assert!(
            after.anonymous_kib >= before.anonymous_kib + 30 * 1024,
            "{before:?} {after:?}"
        );
        assert!(after.file_kib > 0);
        drop(block);
    }

    #[test]
    fn a_process_that_is_not_there_is_an_error() {
        assert!(Resident::of(u32::MAX).is_err());
    }
}
