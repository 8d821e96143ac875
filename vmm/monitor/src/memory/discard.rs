//! Giving guest memory back to the host.
//!
//! This file has `unsafe` for one call: madvise(2) works on addresses.
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
    /// Gives the pages of `range` back to the host and marks them for `source`: they read as zeros from now on, which
    /// is a change of memory like any other. The parts of `range` that are no RAM are left out.
    ///
    /// # Errors
    /// The kernel's. What could not be given back stays as it is; what could was marked.
    pub fn discard(&self, range: GpaRange, source: Source) -> io::Result<()> {
        for backed in &self.backed {
            if let Some(part) = backed.range.intersection(&range) {
                self.discard_part(backed, part)?;
                self.tracker.mark(part.start(), byte_len(&part), source);
            }
        }
        Ok(())
    }

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
        // SAFETY: the range is a part of this RAM's private mapping, which nobody in this process refers to but by
        // volatile copies; its pages become zeros, as if they had been written.
        unsafe { rustix::mm::madvise(address.as_ptr().cast(), bytes, Advice::LinuxDontNeed)? };
        Ok(())
    }
}

/// Takes ballooned pages away from a guest while its vCPUs stand.
pub(crate) struct NotifiedDiscard {
    pub(crate) ram: Arc<GuestRam>,
    pub(crate) notifier: Notifier,
}

impl Discard for NotifiedDiscard {
    /// One range is opened round all of them: vCPUs are stopped once.
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
