//! Reads the memory file of a running guest from the host without populating pages: their contents, and which pages the
//! file lacks.

use std::collections::BTreeSet;
use std::fs::{self, File};
use std::io;
use std::ops::Range;
use std::os::unix::fs::FileExt;

use rustix::fs::{SeekFrom, seek};
use rustix::io::Errno;

/// Size of a page in bytes.
pub const PAGE: u64 = 4096;
const PAGE_BYTES: usize = 4096;
/// Size of the buffer for reading in bytes.
const STEP: usize = 1 << 20;

/// Memory file (memfd) of a guest whose RAM lies below the MMIO hole only, so that offsets are guest-physical
/// addresses.
#[derive(Debug)]
pub struct GuestMemory(File);

impl GuestMemory {
    /// Opens the memory file of the monitor with this process id.
    ///
    /// # Errors
    /// Returns the error of the operating system, or `NotFound` if the monitor has no memory file.
    pub fn of(pid: u32) -> io::Result<Self> {
        for entry in fs::read_dir(format!("/proc/{pid}/fd"))? {
            let path = entry?.path();
            // A descriptor that was closed in the meantime is not the memory file.
            let Ok(target) = fs::read_link(&path) else {
                continue;
            };
            if target.to_string_lossy().starts_with("/memfd:guest-ram") {
                return Ok(Self(File::open(path)?));
            }
        }
        Err(io::ErrorKind::NotFound.into())
    }

    /// Returns the populated byte ranges, or the whole file if its file system does not support SEEK_DATA.
    ///
    /// # Errors
    /// Returns the error of the operating system.
    pub fn populated(&self) -> io::Result<Vec<Range<u64>>> {
        let mut found = Vec::new();
        let mut from = 0;
        loop {
            let start = match seek(&self.0, SeekFrom::Data(from)) {
                Ok(start) => start,
                Err(Errno::NXIO) => return Ok(found),
                Err(error) => return Err(error.into()),
            };
            from = seek(&self.0, SeekFrom::Hole(start))?;
            found.push(start..from);
        }
    }

    /// Returns the numbers of the pages that contain `line` at an offset that is a multiple of its length.
    ///
    /// # Errors
    /// Returns the error of the operating system.
    pub fn pages_with(&self, line: &[u8]) -> io::Result<BTreeSet<u64>> {
        let mut pages = BTreeSet::new();
        let mut buffer = vec![0; STEP];
        for range in self.populated()? {
            for start in range.clone().step_by(STEP) {
                let left = usize::try_from(range.end - start).unwrap_or(STEP);
                let part = &mut buffer[..left.min(STEP)];
                self.0.read_exact_at(part, start)?;
                let numbered = (start / PAGE..).zip(part.chunks(PAGE_BYTES));
                let found = numbered
                    .filter(|(_, page)| page.chunks_exact(line.len()).any(|chunk| chunk == line));
                pages.extend(found.map(|(number, _)| number));
            }
        }
        Ok(pages)
    }

    /// Returns those of `pages` that are not populated.
    ///
    /// # Errors
    /// Returns the error of the operating system.
    pub fn absent(&self, pages: &BTreeSet<u64>) -> io::Result<BTreeSet<u64>> {
        let mut absent = pages.clone();
        for range in self.populated()? {
            let numbers = range.start / PAGE..range.end.div_ceil(PAGE);
            for present in pages.range(numbers) {
                absent.remove(present);
            }
        }
        Ok(absent)
    }
}

#[cfg(test)]
mod tests {
    use rustix::fs::MemfdFlags;

    use super::*;

    #[test]
    fn what_is_there_is_told_from_what_is_not() {
        let name = "guest-ram of a test";
        let file = File::from(rustix::fs::memfd_create(name, MemfdFlags::CLOEXEC).unwrap());
        file.set_len(100 * PAGE).unwrap();
        file.write_all_at(b"0123456789abcdef", 3 * PAGE + 32)
            .unwrap();
        file.write_all_at(b"x0123456789abcdef", 70 * PAGE).unwrap();
        let memory = GuestMemory::of(std::process::id()).unwrap();
        let page = |number| number * PAGE..(number + 1) * PAGE;
        assert_eq!(memory.populated().unwrap(), [page(3), page(70)]);
        let found = memory.pages_with(b"0123456789abcdef").unwrap();
        assert_eq!(found, BTreeSet::from([3]));
        let absent = memory.absent(&BTreeSet::from([2, 3, 4, 70, 99])).unwrap();
        assert_eq!(absent, BTreeSet::from([2, 4, 99]));
    }

    #[test]
    fn a_process_without_a_guest_has_no_such_memory() {
        let mut sleeper = std::process::Command::new("sleep")
            .arg("60")
            .spawn()
            .unwrap();
        let found = GuestMemory::of(sleeper.id());
        sleeper.kill().unwrap();
        sleeper.wait().unwrap();
        assert_eq!(found.unwrap_err().kind(), io::ErrorKind::NotFound);
    }
}
