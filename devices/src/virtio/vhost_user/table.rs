//! Guest memory as a back end gets it: the memory files, and where they lie for the guest and for this process.

use std::os::fd::AsRawFd;

use vhost::VhostUserMemoryRegionInfo;
use vm_memory::{
    Address, FileOffset, GuestMemory, GuestMemoryBackend, GuestMemoryRegion, MemoryRegionAddress,
};

use crate::virtio::queue::{QueueError, QueueSnapshot};
use crate::virtio::spec::USED_BYTES;

/// Bytes of a descriptor, and of an entry of the available ring; what either ring has besides its entries: flags, index,
/// and the event index (virtio 1.2, 2.7).
const DESCRIPTOR_BYTES: u64 = 16;
const AVAILABLE_BYTES: u64 = 2;
const AROUND_BYTES: u64 = 6;

/// The memory table of one guest.
pub(super) struct MemoryTable {
    regions: Vec<VhostUserMemoryRegionInfo>,
    /// Whose descriptors the regions name.
    files: Vec<FileOffset>,
}

/// Where the rings of a queue lie in this process: by these addresses a back end finds them in the table.
pub(super) struct RingAddresses {
    pub(super) descriptor_table: u64,
    pub(super) available: u64,
    pub(super) used: u64,
}

impl MemoryTable {
    /// All of `memory`; none where that is not all of files.
    pub(super) fn new<G: GuestMemory>(memory: &G) -> Option<Self> {
        let regions = memory.physical_memory()?;
        let mut table = Self {
            regions: Vec::new(),
            files: Vec::new(),
        };
        for region in regions.iter() {
            let file = region.file_offset()?;
            let host = region.get_host_address(MemoryRegionAddress(0)).ok()?;
            table.regions.push(VhostUserMemoryRegionInfo {
                guest_phys_addr: region.start_addr().raw_value(),
                memory_size: region.len(),
                userspace_addr: host.addr() as u64,
                mmap_offset: file.start(),
                mmap_handle: file.file().as_raw_fd(),
            });
            table.files.push(file.clone());
        }
        Some(table)
    }

    pub(super) fn regions(&self) -> &[VhostUserMemoryRegionInfo] {
        &self.regions
    }

    /// The guest-physical address behind the last byte.
    pub(super) fn end(&self) -> u64 {
        let ends = self.regions.iter();
        ends.map(|region| region.guest_phys_addr.saturating_add(region.memory_size))
            .max()
            .unwrap_or(0)
    }

    /// The rings of a queue that is ready.
    ///
    /// # Errors
    /// A ring that is not in one piece of guest memory.
    pub(super) fn rings(&self, queue: &QueueSnapshot) -> Result<RingAddresses, QueueError> {
        let entries = u64::from(queue.size);
        let of = |address, bytes| self.find(address, bytes).ok_or(QueueError::RingOutside);
        Ok(RingAddresses {
            descriptor_table: of(queue.descriptor_table, entries * DESCRIPTOR_BYTES)?,
            available: of(
                queue.available_ring,
                entries * AVAILABLE_BYTES + AROUND_BYTES,
            )?,
            used: of(queue.used_ring, used_ring_bytes(queue))?,
        })
    }

    /// Where `bytes` bytes at the guest-physical `address` lie in this process.
    fn find(&self, address: u64, bytes: u64) -> Option<u64> {
        self.regions.iter().find_map(|region| {
            let offset = address.checked_sub(region.guest_phys_addr)?;
            let inside = offset.checked_add(bytes)? <= region.memory_size;
            inside.then(|| region.userspace_addr + offset)
        })
    }
}

/// Bytes of a queue's used ring.
pub(super) fn used_ring_bytes(queue: &QueueSnapshot) -> u64 {
    u64::from(queue.size) * USED_BYTES + AROUND_BYTES
}
