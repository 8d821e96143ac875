//! Raw disk image on the host. Data moves between guest memory and the file without a copy.

use std::fs::File;
use std::io;

use rustix::fs::{FallocateFlags, SeekFrom, fallocate, fdatasync, seek};
use rustix::io::Errno;
use vm_memory::bitmap::BitmapSlice;
use vm_memory::{
    GuestAddressSpace, Permissions, ReadVolatile, VolatileMemoryError, VolatileSlice, WriteVolatile,
};

use super::super::active_queues::ActiveQueues;
use super::super::buffer::Buffer;
use super::super::queue::QueueError;
use super::spec::SECTOR_BYTES;

/// Range of an image in bytes. It lies wholly within the image.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Extent {
    pub(super) offset: u64,
    pub(super) bytes: u64,
}

/// Image file, or block device of the host.
pub(super) struct Image {
    file: File,
    sectors: u64,
}

impl Image {
    /// Opens the image in `file`, whose file position nobody else may use. Bytes behind the last whole sector are not
    /// visible to the guest.
    pub(super) fn new(file: File) -> io::Result<Self> {
        let bytes = seek(&file, SeekFrom::End(0))?;
        Ok(Self {
            file,
            sectors: bytes / SECTOR_BYTES,
        })
    }

    /// Returns the size of the image in sectors.
    pub(super) fn sectors(&self) -> u64 {
        self.sectors
    }

    /// Returns the extent of `bytes` bytes from `sector` on, if they are whole sectors within the image.
    pub(super) fn extent(&self, sector: u64, bytes: u64) -> Option<Extent> {
        let whole = bytes > 0 && bytes.is_multiple_of(SECTOR_BYTES);
        let end = sector.checked_add(bytes / SECTOR_BYTES)?;
        (whole && end <= self.sectors).then(|| Extent {
            offset: sector * SECTOR_BYTES,
            bytes,
        })
    }

    /// Fills `buffer` from the image at `offset`.
    pub(super) fn read<M: GuestAddressSpace>(
        &self,
        offset: u64,
        buffer: &Buffer,
        queues: &ActiveQueues<'_, M>,
    ) -> Result<io::Result<()>, QueueError> {
        let mut result = self.seek(offset);
        if result.is_ok() {
            queues.each_slice(buffer, Permissions::Write, |mut slice| {
                result = self.read_slice(&mut slice);
                result.is_ok()
            })?;
        }
        Ok(result)
    }

    /// Writes `buffer` to the image at `offset`.
    pub(super) fn write<M: GuestAddressSpace>(
        &self,
        offset: u64,
        buffer: &Buffer,
        queues: &ActiveQueues<'_, M>,
    ) -> Result<io::Result<()>, QueueError> {
        let mut result = self.seek(offset);
        if result.is_ok() {
            queues.each_slice(buffer, Permissions::Read, |slice| {
                result = (&self.file)
                    .write_all_volatile(&slice)
                    .map_err(into_io_error);
                result.is_ok()
            })?;
        }
        Ok(result)
    }

    /// Makes all earlier writes durable.
    pub(super) fn flush(&self) -> io::Result<()> {
        Ok(fdatasync(&self.file)?)
    }

    /// Deallocates `extent`, which the guest does not need any more. Has no effect if the file system cannot
    /// deallocate.
    pub(super) fn discard(&self, extent: Extent) -> io::Result<()> {
        match self.punch(extent) {
            Err(Errno::OPNOTSUPP) => Ok(()),
            result => Ok(result?),
        }
    }

    /// Writes zeros to `extent` by changing its allocation. The extent stays allocated unless `may_shrink` allows
    /// otherwise.
    ///
    /// # Errors
    /// Returns an error of kind [`io::ErrorKind::Unsupported`] if the file system cannot do this.
    pub(super) fn write_zeroes(&self, extent: Extent, may_shrink: MayShrink) -> io::Result<()> {
        if may_shrink == MayShrink::Yes {
            return Ok(self.punch(extent)?);
        }
        let zero = FallocateFlags::ZERO_RANGE | FallocateFlags::KEEP_SIZE;
        match fallocate(&self.file, zero, extent.offset, extent.bytes) {
            // tmpfs can punch holes and allocate, but has no single operation for both.
            Err(Errno::OPNOTSUPP) => {
                self.punch(extent)?;
                let keep = FallocateFlags::KEEP_SIZE;
                Ok(fallocate(&self.file, keep, extent.offset, extent.bytes)?)
            }
            result => Ok(result?),
        }
    }

    /// Deallocates `extent`.
    fn punch(&self, extent: Extent) -> rustix::io::Result<()> {
        let punch = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
        fallocate(&self.file, punch, extent.offset, extent.bytes)
    }

    fn seek(&self, offset: u64) -> io::Result<()> {
        seek(&self.file, SeekFrom::Start(offset))?;
        Ok(())
    }

    fn read_slice<B: BitmapSlice>(&self, slice: &mut VolatileSlice<'_, B>) -> io::Result<()> {
        (&self.file)
            .read_exact_volatile(slice)
            .map_err(into_io_error)
    }
}

/// Whether an extent may be deallocated when it becomes zeros.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum MayShrink {
    Yes,
    No,
}

fn into_io_error(error: VolatileMemoryError) -> io::Error {
    match error {
        VolatileMemoryError::IOError(error) => error,
        other => io::Error::other(other),
    }
}
