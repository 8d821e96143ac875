//! The memory map that both boot protocols hand to the kernel.

use vm_memory::{Address, GuestMemoryBackend, GuestMemoryRegion};

use super::{EBDA_START, FIRMWARE_START, KERNEL_MIN};
use crate::memory::GuestMemory;

/// Entry of the memory map.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct MemoryMapEntry {
    /// Guest-physical address of the first byte.
    pub(super) start: u64,
    /// Length in bytes.
    pub(super) bytes: u64,
    /// Type of the memory.
    pub(super) kind: MemoryKind,
}

/// Type of memory, with its number in the maps of both boot protocols (ACPI 6.5, table 15.4).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub(super) enum MemoryKind {
    Ram = 1,
    Reserved = 2,
}

/// Returns the memory map of a guest: its RAM, without the hole below 1 MiB, and the reserved firmware area.
pub(super) fn memory_map(memory: &GuestMemory) -> Vec<MemoryMapEntry> {
    let entry = |start, end: u64, kind| MemoryMapEntry {
        start,
        bytes: end - start,
        kind,
    };
    let mut map = vec![
        entry(0, EBDA_START, MemoryKind::Ram),
        entry(FIRMWARE_START, KERNEL_MIN, MemoryKind::Reserved),
    ];
    for region in memory.iter() {
        let end = region.start_addr().raw_value() + region.len();
        let start = region.start_addr().raw_value().max(KERNEL_MIN);
        map.push(entry(start, end, MemoryKind::Ram));
    }
    map
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::memory::{Backing, GuestRam};

    #[test]
    fn the_memory_map_has_the_hole_below_4_gib_and_reserves_the_firmware_area() {
        let map = |gib: u64| {
            let ram = GuestRam::new(gib << 30, Backing::Memfd).unwrap();
            let map = memory_map(ram.memory());
            let rows = map.iter().map(|e| (e.start, e.start + e.bytes, e.kind));
            rows.collect::<Vec<_>>()
        };
        let low = [
            (0, 0x9_fc00, MemoryKind::Ram),
            (0xe_0000, 0x10_0000, MemoryKind::Reserved),
        ];
        let below = (0x10_0000, 3 << 30, MemoryKind::Ram);
        assert_eq!(map(3), [&low[..], &[below]].concat());
        let above = (4 << 30, 6 << 30, MemoryKind::Ram);
        assert_eq!(map(5), [&low[..], &[below, above]].concat());
    }
}
