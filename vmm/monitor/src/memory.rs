//! Guest RAM: its guest-physical layout, the host memory behind it, and which of its pages are populated.
//!
//! The dirty tracker is the bitmap of the memory (`vm_memory::bitmap::Bitmap`). It therefore sees every write that the
//! monitor makes through [`GuestRam::memory`] and that a device makes through [`DeviceMemory`].

mod backing;
mod discard;
mod layout;
mod populated;
mod view;

use std::io;
use std::os::unix::fs::FileExt;
use std::sync::Arc;

use ept::{Gpa, GpaRange, Region, RegionKind, Source, Tracker, TrackerBitmap, TrackerError};
use vm_memory::{Bytes, GuestAddress};

use crate::size::size_text;
use backing::{BackedRange, map_range};

pub use backing::Backing;
pub(crate) use discard::NotifiedDiscard;
pub use layout::{HIGH_RAM_START, LOW_RAM_END, MEMORY_MAX, MEMORY_MIN, byte_len, layout};
pub use view::DeviceMemory;

/// Guest memory whose writes are marked in the dirty tracker.
pub type GuestMemory = vm_memory::GuestMemoryMmap<TrackerBitmap>;

/// Reasons why guest RAM cannot be allocated, tracked or examined.
#[derive(Debug, thiserror::Error)]
pub enum MemoryError {
    /// The size is out of range, or not a multiple of the page size.
    #[error(
        "guest memory of {} is not possible: choose from {} to {}, in steps of {} (memory.size)",
        size_text(*bytes), size_text(MEMORY_MIN), size_text(MEMORY_MAX), size_text(*step)
    )]
    Size {
        /// Requested size in bytes.
        bytes: u64,
        /// Page size of the backing, in bytes.
        step: u64,
    },
    /// The kernel refused to allocate the memory.
    #[error("{} of {backing:?} guest memory cannot be allocated: {source}{}", size_text(*bytes), hint(*backing))]
    Unavailable {
        /// Requested size in bytes.
        bytes: u64,
        /// Requested kind of host memory.
        backing: Backing,
        /// Error that the kernel returned.
        source: io::Error,
    },
    /// The tracker rejected the memory layout.
    #[error("guest memory cannot be tracked: {0}")]
    Tracker(#[from] TrackerError),
    /// The kernel did not report which pages are populated.
    #[error("cannot tell which guest pages are populated: {0}")]
    Populated(#[source] io::Error),
}

/// Returns the remedy if memory cannot be allocated.
fn hint(backing: Backing) -> &'static str {
    match backing {
        Backing::Hugetlb => "; reserve huge pages in /proc/sys/vm/nr_hugepages",
        Backing::Memfd | Backing::Anonymous => "; ask for less, or free some",
    }
}

/// RAM of a guest, with the tracker of writes to it.
#[derive(Debug)]
pub struct GuestRam {
    memory: GuestMemory,
    tracker: Arc<Tracker>,
    backed: Vec<BackedRange>,
    backing: Backing,
    bytes: u64,
}

impl GuestRam {
    /// Allocates `bytes` of zeroed RAM. None of it is populated, unless the backing is huge pages.
    ///
    /// # Errors
    /// Returns [`MemoryError::Size`] if the size is not valid, [`MemoryError::Unavailable`] if the kernel refuses the
    /// memory, and [`MemoryError::Tracker`] if the tracker rejects the layout.
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
        let mut backed = Vec::new();
        for range in ranges {
            let (range, region) = map_range(range, backing, &tracker).map_err(unavailable)?;
            backed.push(range);
            mapped.push(region);
        }
        let memory = GuestMemory::from_regions(mapped)
            .map_err(io::Error::other)
            .map_err(unavailable)?;
        Ok(Self {
            memory,
            tracker,
            backed,
            backing,
            bytes,
        })
    }

    /// Returns the view of the memory for the monitor itself. Writes through it are marked dirty with
    /// [`Source::Monitor`].
    #[must_use]
    pub fn memory(&self) -> &GuestMemory {
        &self.memory
    }

    /// Returns the dirty tracker of this memory.
    #[must_use]
    pub fn tracker(&self) -> &Arc<Tracker> {
        &self.tracker
    }

    /// Returns the size of the RAM in bytes.
    #[must_use]
    pub fn bytes(&self) -> u64 {
        self.bytes
    }

    /// Returns the kind of host memory behind the RAM.
    #[must_use]
    pub fn backing(&self) -> Backing {
        self.backing
    }

    /// Returns the guest-physical ranges of the RAM in ascending order.
    pub fn ranges(&self) -> impl Iterator<Item = GpaRange> + '_ {
        self.backed.iter().map(|backed| backed.range)
    }

    /// Returns each guest-physical range of the RAM with the host virtual address of its mapping.
    pub fn mappings(&self) -> impl Iterator<Item = (GpaRange, u64)> + '_ {
        self.backed
            .iter()
            .map(|backed| (backed.range, backed.host_address))
    }

    /// Writes `bytes` at `start` and marks the pages dirty. The result is the same as for a write through
    /// [`Self::memory`], but this is faster for pages that are not populated yet: a write through the memory file
    /// avoids the page fault and costs half as much.
    ///
    /// # Errors
    /// Returns an error if `start..start + bytes.len()` is not RAM, and the error of the kernel if it has no memory for
    /// the pages.
    pub fn write_pages(&self, start: Gpa, bytes: &[u8]) -> io::Result<()> {
        let backed = self
            .backed
            .iter()
            .find(|backed| backed.range.contains(start));
        match backed.map(|backed| (backed, &backed.file)) {
            Some((backed, Some(file))) if self.backing == Backing::Memfd => {
                let offset = start.0 - backed.range.start().0;
                if bytes.len() as u64 > byte_len(&backed.range) - offset {
                    return Err(io::ErrorKind::InvalidInput.into());
                }
                file.write_all_at(bytes, offset)?;
                self.fault_in(start, bytes.len())?;
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

    /// Maps the populated pages from `start` on into this process, by reading one byte of each window of the kernel's
    /// fault around. Without this, the first reader would take all these faults, and the first reader is the digest
    /// that is calculated while the guest is stopped.
    fn fault_in(&self, start: Gpa, bytes: usize) -> io::Result<()> {
        // Default of `fault_around_bytes` in mm/memory.c.
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
}

#[cfg(test)]
mod tests {
    use vm_memory::{GuestMemoryBackend, GuestMemoryRegion};

    use ept::PAGE_SIZE;

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
                    .starts_with(&format!("guest memory of {size} is not possible")),
                "{error}"
            );
        }
        assert!(layout(MEMORY_MIN + PAGE_SIZE, Backing::Hugetlb).is_err());
    }

    /// Checks that exactly the pages in `written` count as populated. With transparent huge pages, their neighbours may
    /// count too.
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
            // Pages in another block of 2 MiB are not populated.
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
