//! Guest memory as it is described to a back end: memory files, with guest-physical addresses and addresses in this
//! process.

use std::os::fd::AsRawFd;

use vhost::VhostUserMemoryRegionInfo;
use vm_memory::{
    Address, FileOffset, GuestMemory, GuestMemoryBackend, GuestMemoryRegion, MemoryRegionAddress,
};

use crate::virtio::queue::{QueueError, QueueSnapshot};
use crate::virtio::spec::USED_BYTES;

/// Size of a descriptor, of an entry of the available ring, and of what a ring has besides its entries: flags, index,
/// and event index (virtio 1.2, 2.7).
const DESCRIPTOR_BYTES: u64 = 16;
const AVAILABLE_BYTES: u64 = 2;
const RING_EXTRA_BYTES: u64 = 6;

/// Memory table of one guest.
pub(super) struct MemoryTable {
    regions: Vec<VhostUserMemoryRegionInfo>,
    /// Keeps the files open whose descriptors are in `regions`.
    files: Vec<FileOffset>,
}

/// Addresses of a queue's rings in this process. The back end translates them by the memory table.
pub(super) struct RingAddresses {
    pub(super) descriptor_table: u64,
    pub(super) available: u64,
    pub(super) used: u64,
}

impl MemoryTable {
    /// Creates the table of all of `memory`. Returns `None` if a region is not a file.
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

    /// Returns the guest-physical address behind the last byte of guest memory.
    pub(super) fn end(&self) -> u64 {
        let ends = self.regions.iter();
        ends.map(|region| region.guest_phys_addr.saturating_add(region.memory_size))
            .max()
            .unwrap_or(0)
    }

    /// Returns the addresses of the rings of a queue.
    ///
    /// # Errors
    /// Returns [`QueueError::RingOutside`] if a ring is not wholly within one region.
    pub(super) fn rings(&self, queue: &QueueSnapshot) -> Result<RingAddresses, QueueError> {
        let entries = u64::from(queue.size);
        let of = |address, bytes| self.find(address, bytes).ok_or(QueueError::RingOutside);
        Ok(RingAddresses {
            descriptor_table: of(queue.descriptor_table, entries * DESCRIPTOR_BYTES)?,
            available: of(
                queue.available_ring,
                entries * AVAILABLE_BYTES + RING_EXTRA_BYTES,
            )?,
            used: of(queue.used_ring, used_ring_bytes(queue))?,
        })
    }

    /// Returns the address in this process of `bytes` bytes at the guest-physical `address`.
    fn find(&self, address: u64, bytes: u64) -> Option<u64> {
        self.regions.iter().find_map(|region| {
            let offset = address.checked_sub(region.guest_phys_addr)?;
            let inside = offset.checked_add(bytes)? <= region.memory_size;
            inside.then(|| region.userspace_addr + offset)
        })
    }
}

/// Returns the size of a queue's used ring in bytes.
pub(super) fn used_ring_bytes(queue: &QueueSnapshot) -> u64 {
    u64::from(queue.size) * USED_BYTES + RING_EXTRA_BYTES
}
