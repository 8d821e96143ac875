//! View of guest memory for devices: the mappings of the monitor, but writes are marked with [`Source::Device`].
//!
//! This file has `unsafe` code because a second vm-memory region over an existing mapping is built from its address.
#![allow(unsafe_code)]

use std::io;
use std::ops::Deref;
use std::sync::Arc;

use ept::{Gpa, Source, TrackerBitmap};
use vm_memory::mmap::MmapRegionBuilder;
use vm_memory::{
    Address, GuestAddressSpace, GuestMemoryBackend, GuestMemoryRegion, GuestRegionMmap,
};

use super::backing::mmap_error;
use super::{GuestMemory, GuestRam};

/// Guest memory for device models. Writes through it are marked dirty with [`Source::Device`]. Clones share the same
/// view.
#[derive(Clone, Debug)]
pub struct DeviceMemory {
    view: Arc<DeviceRegions>,
}

/// Regions of a [`DeviceMemory`], which all of its clones share.
#[derive(Debug)]
struct DeviceRegions {
    regions: GuestMemory,
    /// Owner of the mappings that `regions` point to.
    _ram: Arc<GuestRam>,
}

impl DeviceMemory {
    /// Creates a view of all of `ram`, which it keeps alive.
    ///
    /// # Errors
    /// Returns an error if vm-memory rejects a region, which does not happen for regions that it accepted before.
    pub fn new(ram: &Arc<GuestRam>) -> io::Result<Self> {
        let regions = ram
            .memory()
            .iter()
            .map(|region| second_region(ram, region))
            .collect::<io::Result<_>>()?;
        let regions = GuestMemory::from_regions(regions).map_err(io::Error::other)?;
        Ok(Self {
            view: Arc::new(DeviceRegions {
                regions,
                _ram: Arc::clone(ram),
            }),
        })
    }
}

/// Builds a region over the mapping of `region` that marks writes as those of a device.
fn second_region(
    ram: &GuestRam,
    region: &GuestRegionMmap<TrackerBitmap>,
) -> io::Result<GuestRegionMmap<TrackerBitmap>> {
    let start = region.start_addr();
    let bitmap = TrackerBitmap::new(
        Arc::clone(ram.tracker()),
        Gpa(start.raw_value()),
        Source::Device,
    );
    let mut builder = MmapRegionBuilder::new_with_bitmap(region.size(), bitmap)
        .with_mmap_prot(region.prot())
        .with_mmap_flags(region.flags());
    // A vhost-user back end needs the file to map the memory.
    if let Some(file) = region.file_offset() {
        builder = builder.with_file_offset(file.clone());
    }
    // SAFETY: pointer and size are those of the mapping of `region`, which belongs to a `GuestRam` that `DeviceRegions`
    // keeps alive. A region that is built from a raw pointer does not unmap it.
    let builder = unsafe { builder.with_raw_mmap_pointer(region.as_ptr()) };
    let mapping = builder.build().map_err(mmap_error)?;
    GuestRegionMmap::new(mapping, start).ok_or_else(|| io::ErrorKind::InvalidInput.into())
}

impl Deref for DeviceMemory {
    type Target = GuestMemory;

    fn deref(&self) -> &GuestMemory {
        &self.view.regions
    }
}

impl GuestAddressSpace for DeviceMemory {
    type M = GuestMemory;
    type T = Self;

    fn memory(&self) -> Self {
        self.clone()
    }
}

#[cfg(test)]
mod tests {
    use vm_memory::{Bytes, GuestAddress};

    use super::super::Backing;
    use super::*;

    #[test]
    fn what_devices_write_is_theirs_in_the_tracker_and_the_monitors_in_memory() {
        for backing in [Backing::Memfd, Backing::Anonymous] {
            let ram = Arc::new(GuestRam::new(8 << 20, backing).unwrap());
            let memory = DeviceMemory::new(&ram).unwrap();
            let before = ram.tracker().counters();
            memory
                .write_slice(&[7; 8192], GuestAddress(0x3000))
                .unwrap();
            let byte: u8 = ram.memory().read_obj(GuestAddress(0x4fff)).unwrap();
            assert_eq!(byte, 7);
            assert!(ram.tracker().dirty_at(Gpa(0x4000)));
            let after = ram.tracker().counters();
            let since = after.since(&before);
            let by = |source| since.dirtied_by(source);
            assert_eq!((by(Source::Device), by(Source::Monitor)), (2, 0));
        }
    }

    #[test]
    fn the_memory_outlives_whoever_made_it() {
        let ram = Arc::new(GuestRam::new(5 << 30, Backing::Memfd).unwrap());
        let memory = DeviceMemory::new(&ram).unwrap();
        drop(ram);
        let high = GuestAddress(super::super::HIGH_RAM_START);
        memory.write_obj(9_u64, high).unwrap();
        let found: u64 = memory.read_obj(high).unwrap();
        assert_eq!(found, 9);
    }
}
