//! Requests to a block device (virtio 1.2, 5.2.6). A request consists of a header, data, and a status byte.

use std::io;
use std::sync::atomic::{AtomicU64, Ordering};

use vm_memory::GuestAddressSpace;

use super::super::active_queues::ActiveQueues;
use super::super::buffer::Buffer;
use super::super::device::DeviceError;
use super::super::queue::{Chain, QueueError};
use super::image::{Extent, MayShrink};
use super::spec::{
    FLUSH_FEATURE, HEADER_BYTES, ID_BYTES, RANGE_BYTES, RANGE_SECTORS_MAX, RANGE_UNMAP, RANGES_MAX,
    RequestType, SECTOR_BYTES, Status,
};
use super::{Access, Block};

/// Request whose parts have been separated.
struct Request {
    kind: RequestType,
    sector: u64,
    /// Data from the driver: sectors to write, or ranges.
    outgoing: Buffer,
    /// Room for data to the driver.
    incoming: Buffer,
}

/// Range to discard, or to fill with zeros.
#[derive(Clone, Copy)]
struct Range {
    extent: Extent,
    may_shrink: MayShrink,
}

/// Status of a request, and the number of data bytes written to guest memory.
type Reply = (Status, u64);

impl Block {
    /// Executes the request in `chain`. Returns the number of bytes written to its writable memory.
    pub(super) fn execute<M: GuestAddressSpace>(
        &self,
        queues: &ActiveQueues<'_, M>,
        chain: Chain,
    ) -> Result<u32, DeviceError> {
        let malformed = |what| QueueError::Request {
            head: chain.head,
            what,
        };
        let Chain {
            mut readable,
            mut writable,
            ..
        } = chain;
        let mut header = [0; HEADER_BYTES];
        if queues.read(&mut readable, &mut header)? < HEADER_BYTES {
            return Err(malformed("the readable memory is too small for a request header").into());
        }
        let mut status_byte = writable.take_last(1);
        if status_byte.is_empty() {
            return Err(malformed("the writable memory is too small for a status byte").into());
        }
        let [kind, _reserved] = [0, 4].map(|at| word(&header, at));
        let request = Request {
            kind: RequestType::of(kind),
            sector: long(&header, 8),
            outgoing: readable,
            incoming: writable,
        };
        let (status, written) = self.perform(queues, &request)?;
        if status == Status::IoError {
            count(&self.counters.errors, 1);
        }
        queues.write(&mut status_byte, &[status as u8])?;
        // The length in the used ring counts from the start of the writable memory (virtio 1.2, 2.7.8). The status byte
        // follows all of the data.
        let all = request.incoming.len();
        let written = if written == all { all + 1 } else { written };
        Ok(u32::try_from(written).unwrap_or(u32::MAX))
    }

    /// Executes a request. Returns its status and the number of data bytes written.
    fn perform<M: GuestAddressSpace>(
        &self,
        queues: &ActiveQueues<'_, M>,
        request: &Request,
    ) -> Result<Reply, QueueError> {
        let read_only = self.access == Access::ReadOnly;
        match request.kind {
            RequestType::Read => self.read(queues, request),
            RequestType::GetId => self.identify(queues, request),
            RequestType::Flush => Ok((status_of(&self.image.flush()), 0)),
            RequestType::Write | RequestType::Discard | RequestType::WriteZeroes if read_only => {
                Ok((Status::IoError, 0))
            }
            RequestType::Write => Ok((self.write(queues, request)?, 0)),
            RequestType::Discard | RequestType::WriteZeroes => {
                Ok((self.ranges(queues, request)?, 0))
            }
            RequestType::Unknown => Ok((Status::Unsupported, 0)),
        }
    }

    fn read<M: GuestAddressSpace>(
        &self,
        queues: &ActiveQueues<'_, M>,
        request: &Request,
    ) -> Result<Reply, QueueError> {
        let bytes = request.incoming.len();
        let Some(extent) = self.image.extent(request.sector, bytes) else {
            return Ok((Status::IoError, 0));
        };
        let result = self.image.read(extent.offset, &request.incoming, queues)?;
        if result.is_err() {
            return Ok((Status::IoError, 0));
        }
        count(&self.counters.read_ops, 1);
        count(&self.counters.read_bytes, bytes);
        Ok((Status::Ok, bytes))
    }

    fn write<M: GuestAddressSpace>(
        &self,
        queues: &ActiveQueues<'_, M>,
        request: &Request,
    ) -> Result<Status, QueueError> {
        let bytes = request.outgoing.len();
        let Some(extent) = self.image.extent(request.sector, bytes) else {
            return Ok(Status::IoError);
        };
        let mut result = self.image.write(extent.offset, &request.outgoing, queues)?;
        // A write must be durable when it completes if the driver cannot flush (virtio 1.2, 5.2.6.2).
        if result.is_ok() && queues.features() & FLUSH_FEATURE == 0 {
            result = self.image.flush();
        }
        if result.is_ok() {
            count(&self.counters.write_ops, 1);
            count(&self.counters.write_bytes, bytes);
        }
        Ok(status_of(&result))
    }

    /// Writes the identification of the disk, padded with zeros.
    fn identify<M: GuestAddressSpace>(
        &self,
        queues: &ActiveQueues<'_, M>,
        request: &Request,
    ) -> Result<Reply, QueueError> {
        if request.incoming.len() < ID_BYTES as u64 {
            return Ok((Status::IoError, 0));
        }
        let mut id = [0; ID_BYTES];
        id[..self.id.len()].copy_from_slice(&self.id);
        let written = queues.write(&mut request.incoming.clone(), &id)?;
        Ok((Status::Ok, written as u64))
    }

    /// Discards ranges, or fills them with zeros. Checks all ranges before it changes any.
    fn ranges<M: GuestAddressSpace>(
        &self,
        queues: &ActiveQueues<'_, M>,
        request: &Request,
    ) -> Result<Status, QueueError> {
        let mut left = request.outgoing.clone();
        let whole = left.len().is_multiple_of(RANGE_BYTES as u64);
        let number = left.len() / RANGE_BYTES as u64;
        if !whole || !(1..=u64::from(RANGES_MAX)).contains(&number) {
            return Ok(Status::IoError);
        }
        let mut ranges = Vec::new();
        while !left.is_empty() {
            let mut entry = [0; RANGE_BYTES];
            queues.read(&mut left, &mut entry)?;
            match self.range(request.kind, &entry) {
                Ok(range) => ranges.push(range),
                Err(status) => return Ok(status),
            }
        }
        for range in ranges {
            let result = match request.kind {
                RequestType::Discard => self.image.discard(range.extent),
                _ => self.image.write_zeroes(range.extent, range.may_shrink),
            };
            if result.is_err() {
                return Ok(status_of(&result));
            }
        }
        Ok(Status::Ok)
    }

    /// Decodes and checks a range. Returns the status of the request if the range is invalid.
    fn range(&self, kind: RequestType, entry: &[u8; RANGE_BYTES]) -> Result<Range, Status> {
        let (sector, sectors, flags) = (long(entry, 0), word(entry, 8), word(entry, 12));
        let known = match kind {
            RequestType::WriteZeroes => RANGE_UNMAP,
            _ => 0,
        };
        if flags & !known != 0 {
            return Err(Status::Unsupported);
        }
        if sectors > RANGE_SECTORS_MAX {
            return Err(Status::IoError);
        }
        let extent = self
            .image
            .extent(sector, u64::from(sectors) * SECTOR_BYTES)
            .ok_or(Status::IoError)?;
        let may_shrink = if flags & RANGE_UNMAP == 0 {
            MayShrink::No
        } else {
            MayShrink::Yes
        };
        Ok(Range { extent, may_shrink })
    }
}

/// Returns the status for the result of an operation on the image.
fn status_of(result: &io::Result<()>) -> Status {
    match result {
        Ok(()) => Status::Ok,
        Err(error) if error.kind() == io::ErrorKind::Unsupported => Status::Unsupported,
        Err(_) => Status::IoError,
    }
}

fn count(counter: &AtomicU64, more: u64) {
    counter.fetch_add(more, Ordering::Relaxed);
}

/// Returns the little-endian 32-bit value at byte `at`.
fn word(bytes: &[u8; 16], at: usize) -> u32 {
    u32::from_le_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]])
}

/// Returns the little-endian 64-bit value at byte `at`.
fn long(bytes: &[u8; 16], at: usize) -> u64 {
    u64::from(word(bytes, at)) | u64::from(word(bytes, at + 4)) << 32
}
