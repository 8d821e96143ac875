//! `page_table_multiarch` 0.6: its x86_64 tables; `map_region`, `unmap_region`, `protect_region` and `walk`. It has
//! no split: the huge page is unmapped and 512 pages are mapped. Its changes are plain stores; outside of a bare
//! machine it flushes nothing. An unmapped region's tables stay until the whole is dropped.

use std::cell::Cell;

use memory_addr::{PhysAddr, VirtAddr};
use page_table_multiarch::x86_64::X64PageTable;
use page_table_multiarch::{GenericPTE, MappingFlags, PageSize, PagingHandler};

use super::{BLOCK, BLOCKS, FIRST, LEN, PageTable, Protects, Splits, Unmaps, frames};

pub(crate) struct MultiArch(X64PageTable<Frames>);

struct Frames;

impl PagingHandler for Frames {
    fn alloc_frames(count: usize, _: usize) -> Option<PhysAddr> {
        assert_eq!(count, 1, "it is asked for one at a time");
        frames::take().map(PhysAddr::from_usize)
    }

    fn dealloc_frames(frame: PhysAddr, count: usize) {
        assert_eq!(count, 1);
        frames::give_back(frame.as_usize());
    }

    fn phys_to_virt(frame: PhysAddr) -> VirtAddr {
        VirtAddr::from_usize(frame.as_usize())
    }
}

/// The level of 4 KiB entries.
const LEAVES: usize = 3;

fn flags() -> MappingFlags {
    MappingFlags::READ | MappingFlags::WRITE | MappingFlags::EXECUTE | MappingFlags::USER
}

fn at(address: u64) -> VirtAddr {
    VirtAddr::from_usize(bytes(address))
}

fn bytes(len: u64) -> usize {
    usize::try_from(len).expect("64 bits")
}

fn itself(address: VirtAddr) -> PhysAddr {
    PhysAddr::from_usize(address.as_usize())
}

impl MultiArch {
    fn map_region(&mut self, from: u64, len: u64) {
        let mut cursor = self.0.cursor();
        let mapped = cursor.map_region(at(from), itself, bytes(len), flags(), false);
        mapped.expect("it is absent");
    }

    fn allow(&mut self, flags: MappingFlags) {
        let mut cursor = self.0.cursor();
        let changed = cursor.protect_region(at(FIRST), bytes(LEN), flags);
        changed.expect("it is mapped");
    }
}

impl PageTable for MultiArch {
    const NAME: &'static str = "page_table_multiarch";

    fn new() -> Self {
        Self(X64PageTable::try_new().expect("a frame"))
    }

    fn map(&mut self) {
        self.map_region(FIRST, LEN);
    }

    fn sum(&self) -> u64 {
        let sum = Cell::new(0_u64);
        let add = |level: usize, _: usize, _: VirtAddr, entry: &_| {
            if level == LEAVES {
                let address = GenericPTE::paddr(entry).as_usize() as u64;
                sum.set(sum.get().wrapping_add(address));
            }
        };
        self.0.walk(usize::MAX, Some(&add), None);
        sum.get()
    }
}

impl Unmaps for MultiArch {
    fn unmap(&mut self) {
        let unmapped = self.0.cursor().unmap_region(at(FIRST), bytes(LEN));
        unmapped.expect("it is mapped");
    }
}

impl Protects for MultiArch {
    fn protect(&mut self) {
        self.allow(flags() - MappingFlags::WRITE);
    }

    fn release(&mut self) {
        self.allow(flags());
    }

    fn writable(&self) -> u64 {
        let writable = Cell::new(0);
        let count = |level: usize, _: usize, _: VirtAddr, entry: &_| {
            if level == LEAVES && GenericPTE::flags(entry).contains(MappingFlags::WRITE) {
                writable.set(writable.get() + 1);
            }
        };
        self.0.walk(usize::MAX, Some(&count), None);
        writable.get()
    }
}

impl Splits for MultiArch {
    fn fill(&mut self) {
        *self = Self::new();
        for block in (0..BLOCKS).map(|block| at(FIRST + block * BLOCK)) {
            let mut cursor = self.0.cursor();
            let mapped = cursor.map(block, itself(block), PageSize::Size2M, flags());
            mapped.expect("it is absent");
        }
    }

    fn split(&mut self, block: u64) {
        let first = FIRST + block * BLOCK;
        let unmapped = self.0.cursor().unmap(at(first));
        unmapped.expect("it is mapped");
        self.map_region(first, BLOCK);
    }
}
