//! Guest RAM: where it lies in guest-physical space, what backs it, and which of it holds anything.
//!
//! Every write that the monitor makes through [`GuestRam::memory`], and a device through [`DeviceMemory`], is seen
//! by the tracker, because the tracker is the memory's bitmap.
//!
//! This file has `unsafe` for one call: madvise(2) works on addresses.
#![allow(unsafe_code)]

mod discard;
mod view;

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::FileExt;
use std::sync::Arc;

use ept::{
    Gpa, GpaRange, PAGE_SIZE, Region, RegionKind, Source, Tracker, TrackerBitmap, TrackerError,
};
use rustix::fs::{MemfdFlags, SealFlags, SeekFrom};
use rustix::mm::Advice;
use serde::{Deserialize, Serialize};
use vm_memory::mmap::{MmapRegion, MmapRegionBuilder};
use vm_memory::{Bytes, FileOffset, GuestAddress, GuestRegionMmap};

use crate::size::size_text;

pub(crate) use discard::NotifiedDiscard;
pub use view::DeviceMemory;

/// Guest memory whose every write is tracked.
pub type GuestMemory = vm_memory::GuestMemoryMmap<TrackerBitmap>;

/// RAM below 4 GiB ends here; from here to 4 GiB are interrupt controllers, firmware and device
/// registers, as on a PC.
pub const LOW_RAM_END: u64 = 3 << 30;
/// RAM that does not fit below [`LOW_RAM_END`] goes on from here.
pub const HIGH_RAM_START: u64 = 4 << 30;
/// The least RAM of a guest, in bytes: the first MiB is the boot protocols'.
pub const MEMORY_MIN: u64 = 2 << 20;
/// The most RAM of a guest, in bytes: one KVM memory slot takes less than 8 TiB (KVM_MEM_MAX_NR_PAGES in
/// include/linux/kvm_host.h).
pub const MEMORY_MAX: u64 = 4 << 40;

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

/// Why a guest's RAM could not be had.
#[derive(Debug, thiserror::Error)]
pub enum MemoryError {
    /// Too little, too much, or not whole pages.
    #[error(
        "guest memory of {} cannot be: from {} to {}, in steps of {} (--memory, or memory.size)",
        size_text(*bytes), size_text(MEMORY_MIN), size_text(MEMORY_MAX), size_text(*step)
    )]
    Size {
        /// What was asked for.
        bytes: u64,
        /// The page size of the backing.
        step: u64,
    },
    /// The kernel would not give it.
    #[error("{} of {backing:?} guest memory cannot be had: {source}{}", size_text(*bytes), hint(*backing))]
    Unavailable {
        /// What was asked for.
        bytes: u64,
        /// How it was to be backed.
        backing: Backing,
        /// What the kernel said.
        source: io::Error,
    },
    /// The memory map was refused by the tracker.
    #[error("guest memory cannot be tracked: {0}")]
    Tracker(#[from] TrackerError),
    /// The kernel does not say which pages hold anything.
    #[error("cannot tell which guest pages are populated: {0}")]
    Populated(#[source] io::Error),
}

fn hint(backing: Backing) -> &'static str {
    match backing {
        Backing::Hugetlb => "; reserve huge pages in /proc/sys/vm/nr_hugepages",
        Backing::Memfd | Backing::Anonymous => "; ask for less, or free some",
    }
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

/// The guest-physical ranges that `bytes` of RAM take: below the hole, and above it.
///
/// # Errors
/// A size out of range or not a multiple of the backing's page size.
pub fn layout(bytes: u64, backing: Backing) -> Result<Vec<GpaRange>, MemoryError> {
    let step = backing.page_size();
    let size_error = || MemoryError::Size { bytes, step };
    if !(MEMORY_MIN..=MEMORY_MAX).contains(&bytes) || !bytes.is_multiple_of(step) {
        return Err(size_error());
    }
    let low = bytes.min(LOW_RAM_END);
    let mut ranges = vec![range(0, low).ok_or_else(size_error)?];
    if bytes > low {
        ranges.push(range(HIGH_RAM_START, bytes - low).ok_or_else(size_error)?);
    }
    Ok(ranges)
}

fn range(start: u64, bytes: u64) -> Option<GpaRange> {
    GpaRange::with_len(Gpa(start), bytes).ok()
}

/// Bytes of a range of guest memory, which is never the whole 64-bit space.
#[must_use]
pub fn byte_len(range: &GpaRange) -> u64 {
    range.pages().saturating_mul(PAGE_SIZE)
}

/// One contiguous piece of RAM: one KVM memory slot.
#[derive(Debug)]
struct Piece {
    range: GpaRange,
    host_address: u64,
    file: Option<Arc<File>>,
}

/// A guest's RAM and the tracker of its writes.
#[derive(Debug)]
pub struct GuestRam {
    memory: GuestMemory,
    tracker: Arc<Tracker>,
    pieces: Vec<Piece>,
    backing: Backing,
    bytes: u64,
}

impl GuestRam {
    /// `bytes` of zeroed RAM, none of it populated unless the backing is huge pages.
    ///
    /// # Errors
    /// A size that cannot be, and memory that cannot be had.
    pub fn new(bytes: u64, backing: Backing) -> Result<Self, MemoryError> {
        let ranges = layout(bytes, backing)?;
        let regions: Vec<Region> = ranges
            .iter()
            .map(|range| Region {
                range: *range,
                kind: RegionKind::Ram,
            })
            .collect();
        let tracker = Arc::new(Tracker::new(&regions)?);
        let unavailable = |source| MemoryError::Unavailable {
            bytes,
            backing,
            source,
        };
        let mut mapped = Vec::new();
        let mut pieces = Vec::new();
        for range in ranges {
            let (piece, region) = map_piece(range, backing, &tracker).map_err(unavailable)?;
            pieces.push(piece);
            mapped.push(region);
        }
        let memory = GuestMemory::from_regions(mapped)
            .map_err(io::Error::other)
            .map_err(unavailable)?;
        Ok(Self {
            memory,
            tracker,
            pieces,
            backing,
            bytes,
        })
    }

    /// The memory, for the monitor itself. Writes through it are marked dirty.
    #[must_use]
    pub fn memory(&self) -> &GuestMemory {
        &self.memory
    }

    /// The one tracker of all writes to this memory.
    #[must_use]
    pub fn tracker(&self) -> &Arc<Tracker> {
        &self.tracker
    }

    /// Its size in bytes.
    #[must_use]
    pub fn bytes(&self) -> u64 {
        self.bytes
    }

    /// What it is made of.
    #[must_use]
    pub fn backing(&self) -> Backing {
        self.backing
    }

    /// Where it lies, in ascending order.
    pub fn ranges(&self) -> impl Iterator<Item = GpaRange> + '_ {
        self.pieces.iter().map(|piece| piece.range)
    }

    /// Each range and the host virtual address at which this process has it mapped.
    pub fn mappings(&self) -> impl Iterator<Item = (GpaRange, u64)> + '_ {
        self.pieces
            .iter()
            .map(|piece| (piece.range, piece.host_address))
    }

    /// Writes `bytes` at `start`, as through [`Self::memory`], marked dirty; made for pages that hold nothing
    /// yet.
    ///
    /// A write to a new page of a memory file costs half as much through the file as through the mapping,
    /// where it would fault first.
    ///
    /// # Errors
    /// Memory that is not there, and the kernel's.
    pub fn write_pages(&self, start: Gpa, bytes: &[u8]) -> io::Result<()> {
        let piece = self.pieces.iter().find(|piece| piece.range.contains(start));
        match piece.map(|piece| (piece, &piece.file)) {
            Some((piece, Some(file))) if self.backing == Backing::Memfd => {
                let offset = start.0 - piece.range.start().0;
                if bytes.len() as u64 > byte_len(&piece.range) - offset {
                    return Err(io::ErrorKind::InvalidInput.into());
                }
                file.write_all_at(bytes, offset)?;
                self.map(start, bytes.len())?;
                self.tracker
                    .mark(start, bytes.len() as u64, Source::Monitor);
                Ok(())
            }
            _ => self
                .memory
                .write_slice(bytes, GuestAddress(start.0))
                .map_err(io::Error::other),
        }
    }

    /// Has populated pages mapped here, by reading one byte of each window that the kernel maps at a fault.
    /// Otherwise the first to read them all would wait for every fault: the digest, while the guest stands.
    fn map(&self, start: Gpa, bytes: usize) -> io::Result<()> {
        // fault_around_bytes, in mm/memory.c.
        const WINDOW: u64 = 64 * 1024;
        let end = start.0 + bytes as u64;
        let later = (start.0 / WINDOW + 1) * WINDOW..end;
        let windows = std::iter::once(start.0).chain(later.step_by(64 * 1024));
        for address in windows.map(GuestAddress) {
            let byte: u8 = self.memory.read_obj(address).map_err(io::Error::other)?;
            std::hint::black_box(byte);
        }
        Ok(())
    }

    /// The parts of RAM that hold anything: all else is zero, and reading it would only populate it.
    ///
    /// Writers may go on meanwhile; a page that becomes populated during the call may be missing.
    ///
    /// # Errors
    /// The kernel's.
    pub fn populated(&self) -> Result<Vec<GpaRange>, MemoryError> {
        self.populated_in(GpaRange::ALL)
    }

    /// As [`Self::populated`], for the part of RAM that lies in `range`.
    ///
    /// # Errors
    /// The kernel's.
    pub fn populated_in(&self, range: GpaRange) -> Result<Vec<GpaRange>, MemoryError> {
        let mut found = Vec::new();
        for piece in &self.pieces {
            let Some(part) = piece.range.intersection(&range) else {
                continue;
            };
            match (&piece.file, self.backing) {
                (Some(file), Backing::Memfd) => data_extents(file, piece.range, part, &mut found),
                _ => present_pages(piece, part, &mut found),
            }
            .map_err(MemoryError::Populated)?;
        }
        Ok(found)
    }
}

fn map_piece(
    range: GpaRange,
    backing: Backing,
    tracker: &Arc<Tracker>,
) -> io::Result<(Piece, GuestRegionMmap<TrackerBitmap>)> {
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
        Piece {
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

fn mmap_error(error: vm_memory::mmap::MmapRegionError) -> io::Error {
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

/// The extents of a memory file that hold data, by lseek(2) SEEK_DATA and SEEK_HOLE: swapped-out pages
/// are among them. The file holds `piece`; only `part` of it is looked at.
fn data_extents(
    file: &File,
    piece: GpaRange,
    part: GpaRange,
    found: &mut Vec<GpaRange>,
) -> io::Result<()> {
    let mut at = part.start().0 - piece.start().0;
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
        push_merged(found, piece, data, hole - data)?;
        at = hole;
    }
    Ok(())
}

/// An entry of /proc/self/pagemap, one a page: Linux Documentation/admin-guide/mm/pagemap.rst.
const PAGEMAP_PRESENT: u64 = 1 << 63;
const PAGEMAP_SWAPPED: u64 = 1 << 62;

/// Pages of `part` that this process has mapped, from its page tables: right for private memory, and for
/// huge pages as long as no other process maps them.
fn present_pages(piece: &Piece, part: GpaRange, found: &mut Vec<GpaRange>) -> io::Result<()> {
    const CHUNK_PAGES: u64 = 8192;
    let pagemap = File::open("/proc/self/pagemap")?;
    let mut first = part.first_page() - piece.range.first_page();
    let end = first + part.pages();
    let mut entries = Vec::new();
    while first < end {
        let count = CHUNK_PAGES.min(end - first);
        entries.resize(usize::try_from(count * 8).map_err(io::Error::other)?, 0);
        pagemap.read_exact_at(&mut entries, (piece.host_address / PAGE_SIZE + first) * 8)?;
        for (index, entry) in (first..).zip(entries.as_chunks::<8>().0) {
            if u64::from_ne_bytes(*entry) & (PAGEMAP_PRESENT | PAGEMAP_SWAPPED) != 0 {
                push_merged(found, piece.range, index * PAGE_SIZE, PAGE_SIZE)?;
            }
        }
        first += count;
    }
    Ok(())
}

/// Adds `bytes` at `offset` in `piece`, as one range with the last where they touch.
fn push_merged(
    found: &mut Vec<GpaRange>,
    piece: GpaRange,
    offset: u64,
    bytes: u64,
) -> io::Result<()> {
    let start = Gpa(piece.start().0 + offset);
    let mut new = GpaRange::with_len(start, bytes).map_err(io::Error::other)?;
    let touches = |last: &GpaRange| last.end() == Some(start);
    if let Some(last) = found.pop_if(|last| touches(last)) {
        new =
            GpaRange::with_len(last.start(), byte_len(&last) + bytes).map_err(io::Error::other)?;
    }
    found.push(new);
    Ok(())
}

#[cfg(test)]
mod tests {
    use vm_memory::{GuestMemoryBackend, GuestMemoryRegion};

    use super::*;

    fn page(start: u64, pages: u64) -> GpaRange {
        GpaRange::with_len(Gpa(start), pages * PAGE_SIZE).unwrap()
    }

    #[test]
    fn ram_leaves_the_hole_below_4_gib_free() {
        let gib = 1 << 30;
        assert_eq!(
            layout(2 * gib, Backing::Memfd).unwrap(),
            [page(0, 2 * gib / PAGE_SIZE)]
        );
        let two = layout(5 * gib, Backing::Memfd).unwrap();
        assert_eq!(
            two,
            [
                page(0, 3 * gib / PAGE_SIZE),
                page(HIGH_RAM_START, 2 * gib / PAGE_SIZE),
            ]
        );
    }

    #[test]
    fn nobody_can_make_its_file_shorter() {
        let ram = GuestRam::new(8 << 20, Backing::Memfd).unwrap();
        let region = ram.memory().iter().next().unwrap();
        let file = region.file_offset().unwrap().file();
        for bytes in [0, 16 << 20] {
            file.set_len(bytes).unwrap_err();
        }
        ram.discard(page(0, 16), Source::Device).unwrap();
    }

    #[test]
    fn impossible_sizes_are_named() {
        for (bytes, size) in [
            (0, "0 bytes"),
            (MEMORY_MIN - PAGE_SIZE, "2044K"),
            (MEMORY_MIN + 1, "2097153 bytes"),
            (MEMORY_MAX + PAGE_SIZE, "4294967300K"),
        ] {
            let error = layout(bytes, Backing::Memfd).unwrap_err();
            assert!(
                error
                    .to_string()
                    .starts_with(&format!("guest memory of {size} cannot be")),
                "{error}"
            );
        }
        assert!(layout(MEMORY_MIN + PAGE_SIZE, Backing::Hugetlb).is_err());
    }

    /// Pages counted as populated: exactly those in `written`, or with transparent huge pages their
    /// neighbours too.
    fn assert_populated(ram: &GuestRam, part: GpaRange, written: &[GpaRange]) {
        let found = ram.populated_in(part).unwrap();
        if ram.backing() == Backing::Memfd {
            assert_eq!(found, written);
            return;
        }
        for range in written {
            assert!(
                found.iter().any(|f| f.covers(range)),
                "{range:?} in {found:?}"
            );
        }
        for range in &found {
            assert!(part.covers(range), "{range:?} beyond {part:?}");
        }
    }

    #[test]
    fn what_was_written_is_populated() {
        for backing in [Backing::Memfd, Backing::Anonymous] {
            let ram = GuestRam::new(64 << 20, backing).unwrap();
            assert_eq!(ram.populated().unwrap(), [], "{backing:?}");
            for address in [0x3000, 0x4000, 0x10_0fff] {
                ram.memory().write_obj(7_u8, GuestAddress(address)).unwrap();
            }
            let all = page(0, (64 << 20) / PAGE_SIZE);
            assert_populated(&ram, all, &[page(0x3000, 2), page(0x10_0000, 1)]);
            // The pages of another 2 MiB are not.
            assert_eq!(ram.populated_in(page(0x80_0000, 1024)).unwrap(), []);
        }
    }

    #[test]
    fn the_tracker_sees_what_the_monitor_writes() {
        let ram = GuestRam::new(8 << 20, Backing::Memfd).unwrap();
        assert!(!ram.tracker().dirty_at(Gpa(0x5000)));
        ram.memory()
            .write_slice(&[1; 8192], GuestAddress(0x4ffe))
            .unwrap();
        for address in [0x4000, 0x5000, 0x6000] {
            assert!(ram.tracker().dirty_at(Gpa(address)), "{address:#x}");
        }
        assert!(!ram.tracker().dirty_at(Gpa(0x7000)));
    }

    #[test]
    fn a_part_of_memory_is_looked_at_alone() {
        for backing in [Backing::Memfd, Backing::Anonymous] {
            let ram = GuestRam::new(8 << 20, backing).unwrap();
            ram.memory()
                .write_slice(&[1; 3 * 4096], GuestAddress(0x3000))
                .unwrap();
            for (part, written) in [
                (page(0, 3), vec![]),
                (page(0, 4), vec![page(0x3000, 1)]),
                (page(0x4000, 1), vec![page(0x4000, 1)]),
                (page(0x5000, 9), vec![page(0x5000, 1)]),
                (page(0x6000, 9), vec![]),
            ] {
                assert_populated(&ram, part, &written);
            }
        }
    }

    #[test]
    fn pages_written_through_the_file_are_in_the_mapping_and_in_the_tracker() {
        for backing in [Backing::Memfd, Backing::Anonymous] {
            let ram = GuestRam::new(8 << 20, backing).unwrap();
            ram.write_pages(Gpa(0x3000), &[7; 8192]).unwrap();
            assert_populated(&ram, page(0, 2048), &[page(0x3000, 2)]);
            let byte: u8 = ram.memory().read_obj(GuestAddress(0x4fff)).unwrap();
            assert_eq!(byte, 7);
            let dirty = |address| ram.tracker().dirty_at(Gpa(address));
            assert_eq!(
                [0x2000, 0x3000, 0x4000, 0x5000].map(dirty),
                [false, true, true, false]
            );
            ram.write_pages(Gpa((8 << 20) - 4096), &[1; 4096]).unwrap();
            ram.write_pages(Gpa((8 << 20) - 4096), &[1; 8192])
                .unwrap_err();
            ram.write_pages(Gpa(8 << 20), &[1; 4096]).unwrap_err();
        }
    }

    #[test]
    fn memory_that_cannot_be_had_is_an_error() {
        // More huge pages than any host of these tests has.
        let error = GuestRam::new(1 << 40, Backing::Hugetlb).unwrap_err();
        assert!(error.to_string().contains("nr_hugepages"), "{error}");
    }
}
