//! Finds the populated pages of guest RAM: those for which the host has allocated memory.
//!
//! Unpopulated pages are zero. Reading them would allocate memory for them, so that pre-copy rounds and digests skip
//! them.

use std::fs::File;
use std::io;
use std::os::fd::AsFd;
use std::os::unix::fs::FileExt;

use ept::{Gpa, GpaRange, PAGE_SIZE};
use rustix::fs::SeekFrom;

use super::backing::BackedRange;
use super::{Backing, GuestRam, MemoryError, byte_len};

impl GuestRam {
    /// Returns the populated ranges of RAM in ascending order. All other pages are zero.
    ///
    /// Guest and devices may write during the call. A page that becomes populated meanwhile may be missing.
    ///
    /// # Errors
    /// Returns [`MemoryError::Populated`] if the kernel does not report the populated pages.
    pub fn populated(&self) -> Result<Vec<GpaRange>, MemoryError> {
        self.populated_in(GpaRange::ALL)
    }

    /// Returns the populated ranges within `range`, like [`Self::populated`].
    ///
    /// # Errors
    /// Returns [`MemoryError::Populated`] if the kernel does not report the populated pages.
    pub fn populated_in(&self, range: GpaRange) -> Result<Vec<GpaRange>, MemoryError> {
        let mut found = Vec::new();
        for backed in &self.backed {
            let Some(part) = backed.range.intersection(&range) else {
                continue;
            };
            match (&backed.file, self.backing) {
                (Some(file), Backing::Memfd) => data_extents(file, backed.range, part, &mut found),
                _ => present_pages(backed, part, &mut found),
            }
            .map_err(MemoryError::Populated)?;
        }
        Ok(found)
    }
}

/// Appends the extents of `file` within `part` that contain data, found by lseek(2) with SEEK_DATA and SEEK_HOLE.
/// Swapped-out pages count as data. The file holds the RAM of the range `whole`.
fn data_extents(
    file: &File,
    whole: GpaRange,
    part: GpaRange,
    found: &mut Vec<GpaRange>,
) -> io::Result<()> {
    let mut at = part.start().0 - whole.start().0;
    let end = at + byte_len(&part);
    while at < end {
        let data = match rustix::fs::seek(file.as_fd(), SeekFrom::Data(at)) {
            Ok(data) => data,
            Err(rustix::io::Errno::NXIO) => return Ok(()),
            Err(error) => return Err(error.into()),
        };
        if data >= end {
            return Ok(());
        }
        let hole = rustix::fs::seek(file.as_fd(), SeekFrom::Hole(data))?.min(end);
        push_merged(found, whole, data, hole - data)?;
        at = hole;
    }
    Ok(())
}

/// Bits of a page's entry in /proc/self/pagemap (Linux Documentation/admin-guide/mm/pagemap.rst).
const PAGEMAP_PRESENT: u64 = 1 << 63;
const PAGEMAP_SWAPPED: u64 = 1 << 62;

/// Appends the pages of `part` that are present or swapped out in this process's page tables. This is exact for private
/// memory, and for huge pages as long as no other process maps them.
fn present_pages(
    backed: &BackedRange,
    part: GpaRange,
    found: &mut Vec<GpaRange>,
) -> io::Result<()> {
    const CHUNK_PAGES: u64 = 8192;
    let pagemap = File::open("/proc/self/pagemap")?;
    let mut first = part.first_page() - backed.range.first_page();
    let end = first + part.pages();
    let mut entries = Vec::new();
    while first < end {
        let count = CHUNK_PAGES.min(end - first);
        entries.resize(usize::try_from(count * 8).map_err(io::Error::other)?, 0);
        pagemap.read_exact_at(&mut entries, (backed.host_address / PAGE_SIZE + first) * 8)?;
        for (index, entry) in (first..).zip(entries.as_chunks::<8>().0) {
            if u64::from_ne_bytes(*entry) & (PAGEMAP_PRESENT | PAGEMAP_SWAPPED) != 0 {
                push_merged(found, backed.range, index * PAGE_SIZE, PAGE_SIZE)?;
            }
        }
        first += count;
    }
    Ok(())
}

/// Appends the range of `bytes` at `offset` from the start of `whole`. If the range touches the last one in `found`,
/// the two are merged.
fn push_merged(
    found: &mut Vec<GpaRange>,
    whole: GpaRange,
    offset: u64,
    bytes: u64,
) -> io::Result<()> {
    let start = Gpa(whole.start().0 + offset);
    let mut new = GpaRange::with_len(start, bytes).map_err(io::Error::other)?;
    let touches = |last: &GpaRange| last.end() == Some(start);
    if let Some(last) = found.pop_if(|last| touches(last)) {
        new =
            GpaRange::with_len(last.start(), byte_len(&last) + bytes).map_err(io::Error::other)?;
    }
    found.push(new);
    Ok(())
}
