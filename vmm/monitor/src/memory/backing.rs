//! Host memory behind guest RAM: memory files and anonymous mappings.
//!
//! This file has `unsafe` code because madvise(2) takes addresses.
#![allow(unsafe_code)]

use std::fs::File;
use std::io;
use std::os::fd::OwnedFd;
use std::sync::Arc;

use ept::{GpaRange, PAGE_SIZE, Source, Tracker, TrackerBitmap};
use rustix::fs::{MemfdFlags, SealFlags};
use rustix::mm::Advice;
use serde::{Deserialize, Serialize};
use vm_memory::mmap::{MmapRegion, MmapRegionBuilder};
use vm_memory::{FileOffset, GuestAddress, GuestRegionMmap};

use super::byte_len;

/// Kind of host memory behind guest RAM.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Backing {
    /// Memory file (memfd) of 4 KiB pages, which another process can map.
    #[default]
    Memfd,
    /// Private anonymous memory, with transparent huge pages if the kernel offers them. A page that was never written
    /// may then count as populated, because a fault on a neighbour populates the whole huge page.
    Anonymous,
    /// Memory file of 2 MiB huge pages, which are reserved when the guest is created. Only whole huge pages can be
    /// released. A released page loses its reservation, so a vCPU that touches it again blocks until the host has a
    /// free huge page.
    Hugetlb,
}

impl Backing {
    /// Returns the page size in bytes.
    #[must_use]
    pub fn page_size(self) -> u64 {
        match self {
            Self::Memfd | Self::Anonymous => PAGE_SIZE,
            Self::Hugetlb => 2 << 20,
        }
    }
}

/// Contiguous range of RAM with one host mapping. It becomes one KVM memory slot.
#[derive(Debug)]
pub(super) struct BackedRange {
    /// Guest-physical range.
    pub(super) range: GpaRange,
    /// Host virtual address of the mapping.
    pub(super) host_address: u64,
    /// Memory file that is mapped. `None` for anonymous memory.
    pub(super) file: Option<Arc<File>>,
}

/// Allocates and maps host memory for the RAM in `range`.
pub(super) fn map_range(
    range: GpaRange,
    backing: Backing,
    tracker: &Arc<Tracker>,
) -> io::Result<(BackedRange, GuestRegionMmap<TrackerBitmap>)> {
    let size = usize::try_from(byte_len(&range)).map_err(io::Error::other)?;
    let file = memory_file(byte_len(&range), backing)?.map(Arc::new);
    let bitmap = TrackerBitmap::new(Arc::clone(tracker), range.start(), Source::Monitor);
    let sharing = match (&file, backing) {
        (None, _) => libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE,
        // mmap reserves the huge pages now. Without a reservation, a shortage would show only at the first access to a
        // page, where it cannot be reported.
        (Some(_), Backing::Hugetlb) => libc::MAP_SHARED,
        (Some(_), _) => libc::MAP_SHARED | libc::MAP_NORESERVE,
    };
    let mut builder = MmapRegionBuilder::new_with_bitmap(size, bitmap)
        .with_mmap_prot(libc::PROT_READ | libc::PROT_WRITE)
        .with_mmap_flags(sharing);
    if let Some(file) = &file {
        builder = builder.with_file_offset(FileOffset::from_arc(Arc::clone(file), 0));
    }
    let mapping = builder.build().map_err(mmap_error)?;
    if backing == Backing::Anonymous {
        advise_huge_pages(&mapping);
    }
    let host_address = mapping.as_ptr().addr() as u64;
    let region = GuestRegionMmap::new(mapping, GuestAddress(range.start().0))
        .ok_or(io::ErrorKind::InvalidInput)?;
    Ok((
        BackedRange {
            range,
            host_address,
            file,
        },
        region,
    ))
}

/// Advises transparent huge pages: one fault then populates 2 MiB, and KVM can map huge pages in its stage-2 tables.
fn advise_huge_pages(mapping: &MmapRegion<TrackerBitmap>) {
    let (start, bytes) = (mapping.as_ptr().cast(), mapping.size());
    // SAFETY: the range is exactly this mapping, and MADV_HUGEPAGE does not change its contents.
    let advised = unsafe { rustix::mm::madvise(start, bytes, Advice::LinuxHugepage) };
    // Without kernel support the advice fails, and the memory consists of small pages.
    let _unsupported = advised;
}

/// Returns the error of mmap(2) that vm-memory wraps.
pub(super) fn mmap_error(error: vm_memory::mmap::MmapRegionError) -> io::Error {
    match error {
        vm_memory::mmap::MmapRegionError::Mmap(source) => source,
        other => io::Error::other(other),
    }
}

/// Creates the memory file for a mapping. Returns `None` for anonymous memory.
fn memory_file(bytes: u64, backing: Backing) -> io::Result<Option<File>> {
    let flags = match backing {
        Backing::Anonymous => return Ok(None),
        Backing::Memfd => MemfdFlags::empty(),
        Backing::Hugetlb => MemfdFlags::HUGETLB | MemfdFlags::HUGE_2MB,
    };
    let flags = flags | MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING;
    let fd: OwnedFd = rustix::fs::memfd_create("guest-ram", flags)?;
    let file = File::from(fd);
    file.set_len(bytes)?;
    // The seals keep another process that maps the file from shrinking it, after which an access here would raise
    // SIGBUS.
    rustix::fs::fcntl_add_seals(&file, SealFlags::SHRINK | SealFlags::GROW | SealFlags::SEAL)?;
    Ok(Some(file))
}
