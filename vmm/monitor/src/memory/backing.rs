//! Host memory behind guest RAM: memory files and anonymous mappings.
//!
//! This file has `unsafe` for one call: madvise(2) works on addresses.
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

/// What guest RAM is made of.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Backing {
    /// A memory file of 4 KiB pages, which another process could map too.
    #[default]
    Memfd,
    /// Private anonymous memory, in transparent huge pages where the kernel has them: a page that was never
    /// written may then count as populated, because its neighbours were.
    Anonymous,
    /// A memory file of huge pages of 2 MiB, reserved when the guest is made. Only whole ones can be given back, and
    /// what was is reserved no longer: a guest that wants one again stands until the host has one.
    Hugetlb,
}

impl Backing {
    /// The page size, in bytes.
    #[must_use]
    pub fn page_size(self) -> u64 {
        match self {
            Self::Memfd | Self::Anonymous => PAGE_SIZE,
            Self::Hugetlb => 2 << 20,
        }
    }
}

/// One contiguous piece of RAM: one KVM memory slot.
#[derive(Debug)]
pub(super) struct BackedRange {
    pub(super) range: GpaRange,
    pub(super) host_address: u64,
    pub(super) file: Option<Arc<File>>,
}

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
        // Huge pages are reserved at once: later there is no way to say that they ran out.
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

/// Asks for transparent huge pages: a fault then brings 2 MiB, and the guest's own translations are short.
fn advise_huge_pages(mapping: &MmapRegion<TrackerBitmap>) {
    let (start, bytes) = (mapping.as_ptr().cast(), mapping.size());
    // SAFETY: the range is this mapping, and the advice changes nothing that can be read from it.
    let advised = unsafe { rustix::mm::madvise(start, bytes, Advice::LinuxHugepage) };
    // A kernel without them gives small pages, as without the advice.
    let _without = advised;
}

pub(super) fn mmap_error(error: vm_memory::mmap::MmapRegionError) -> io::Error {
    match error {
        vm_memory::mmap::MmapRegionError::Mmap(source) => source,
        other => io::Error::other(other),
    }
}

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
    // Another process that has it could make it shorter otherwise, and the next access would end this one.
    rustix::fs::fcntl_add_seals(&file, SealFlags::SHRINK | SealFlags::GROW | SealFlags::SEAL)?;
    Ok(Some(file))
}
