//! Releases guest memory to the host, for the balloon and for free page reporting.
//!
//! This file has `unsafe` code because madvise(2) takes addresses.
#![allow(unsafe_code)]

use std::io;
use std::ops::Range;
use std::sync::Arc;

use devices::virtio::Discard;
use ept::{Gpa, GpaRange, Notifier, Source};
use rustix::fs::{FallocateFlags, fallocate};
use rustix::mm::Advice;
use vm_memory::{GuestAddress, GuestMemoryBackend};

use super::backing::BackedRange;
use super::{GuestRam, byte_len};

impl GuestRam {
    /// Releases the pages of `range` to the host and marks them dirty for `source`. Afterwards they read as zeros,
    /// which is a change of memory like a write. Parts of `range` that are not RAM are ignored.
    ///
    /// # Errors
    /// Returns the error of the kernel. Pages that were released before the error are marked; the rest is unchanged.
    pub fn discard(&self, range: GpaRange, source: Source) -> io::Result<()> {
        for backed in &self.backed {
            if let Some(part) = backed.range.intersection(&range) {
                self.discard_part(backed, part)?;
                self.tracker.mark(part.start(), byte_len(&part), source);
            }
        }
        Ok(())
    }

    /// Releases the pages of `part`, which lies in `backed`: by a hole in the memory file, or by MADV_DONTNEED.
    fn discard_part(&self, backed: &BackedRange, part: GpaRange) -> io::Result<()> {
        if let Some(file) = &backed.file {
            let offset = part.start().0 - backed.range.start().0;
            let punch = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
            return Ok(fallocate(file, punch, offset, byte_len(&part))?);
        }
        let slice = self
            .memory
            .get_slice(
                GuestAddress(part.start().0),
                usize::try_from(byte_len(&part)).map_err(io::Error::other)?,
            )
            .map_err(io::Error::other)?;
        let (address, bytes) = (slice.ptr_guard_mut(), slice.len());
        // SAFETY: the range lies in this RAM's private mapping, and this process accesses the mapping only by volatile
        // copies. The advice zeroes the pages, which is the same as a write by the guest.
        unsafe { rustix::mm::madvise(address.as_ptr().cast(), bytes, Advice::LinuxDontNeed)? };
        Ok(())
    }
}

/// Releases the pages of a balloon inside a notifier range, so that no vCPU runs meanwhile.
pub(crate) struct NotifiedDiscard {
    pub(crate) ram: Arc<GuestRam>,
    pub(crate) notifier: Notifier,
}

impl Discard for NotifiedDiscard {
    /// Opens one notifier range around all `ranges`, so that the vCPUs are stopped only once.
    fn discard(&mut self, ranges: &[Range<u64>], taken_back: &dyn Fn() -> bool) -> io::Result<()> {
        let ranges = ranges
            .iter()
            .map(|range| GpaRange::with_len(Gpa(range.start), range.end - range.start))
            .collect::<Result<Vec<_>, _>>()
            .map_err(io::Error::other)?;
        let Some(hull) = ranges.iter().copied().reduce(|all, next| all.hull(&next)) else {
            return Ok(());
        };
        let open = self.notifier.open(hull).map_err(io::Error::other)?;
        if taken_back() {
            return Ok(());
        }
        let done = ranges
            .iter()
            .try_for_each(|range| self.ram.discard(*range, Source::Device));
        drop(open);
        done
    }
}

#[cfg(test)]
mod tests {
    use ept::{Epoch, Start};
    use vm_memory::Bytes;

    use super::super::Backing;
    use super::*;

    #[test]
    fn discarded_pages_are_zero_and_dirty_and_not_populated_and_their_neighbours_stay() {
        for backing in [Backing::Memfd, Backing::Anonymous] {
            let ram = Arc::new(GuestRam::new(8 << 20, backing).unwrap());
            ram.memory()
                .write_slice(&[7; 0x5000], GuestAddress(0x3000))
                .unwrap();
            let epoch = Epoch::begin(ram.tracker(), "test", Start::Clean).unwrap();
            let mut discard = NotifiedDiscard {
                ram: Arc::clone(&ram),
                notifier: Notifier::new(),
            };
            let ranges = [0x4000..0x5000, 0x6000..0x7000];
            discard.discard(&ranges, &|| true).unwrap();
            assert_eq!(epoch.harvest(GpaRange::ALL).unwrap().pages(), 0);
            discard.discard(&ranges, &|| false).unwrap();
            let read = |address| -> u8 { ram.memory().read_obj(GuestAddress(address)).unwrap() };
            let found = [
                0x3fff, 0x4000, 0x4fff, 0x5000, 0x5fff, 0x6000, 0x6fff, 0x7000,
            ]
            .map(read);
            assert_eq!(found, [7, 0, 0, 7, 7, 0, 0, 7], "{backing:?}");
            let harvest = epoch.harvest(GpaRange::ALL).unwrap();
            assert_eq!(harvest.pages(), 2, "{backing:?}");
        }
    }

    #[test]
    fn the_host_gets_discarded_memory_back() {
        let ram = GuestRam::new(8 << 20, Backing::Memfd).unwrap();
        ram.memory()
            .write_slice(&[7; 1 << 20], GuestAddress(0))
            .unwrap();
        let whole = GpaRange::with_len(Gpa(0), 1 << 20).unwrap();
        ram.discard(whole, Source::Device).unwrap();
        assert_eq!(ram.populated().unwrap(), []);
    }

    #[test]
    fn what_is_no_ram_is_left_out() {
        let ram = GuestRam::new(8 << 20, Backing::Memfd).unwrap();
        let beyond = GpaRange::with_len(Gpa(4 << 20), 8 << 20).unwrap();
        ram.discard(beyond, Source::Device).unwrap();
        assert!(ram.tracker().dirty_at(Gpa((8 << 20) - 4096)));
    }
}
