//! `page-table-generic` 0.9 with entries as on x86_64: `map` without huge pages, `unmap`, which frees tables,
//! `protect_region`, `walk`, and `split_huge_page_with` with a table that was reserved before
//! (`prepare_huge_split`). Its changes are plain stores.

use page_table_generic::{
    FrameAllocator, HugeSplitDeposit, MapConfig, PageTable as Table, PageTableEntry, PhysAddr,
    TableMeta, VirtAddr,
};

use super::{BLOCK, BLOCKS, FIRST, LEN, PageTable, Protects, Splits, Unmaps, frames};

pub(crate) struct Generic {
    table: Table<Meta, Frames>,
    reserved: Vec<HugeSplitDeposit<Meta, Frames>>,
}

#[derive(Clone, Copy)]
struct Frames;

impl FrameAllocator for Frames {
    fn alloc_frame(&self) -> Option<PhysAddr> {
        frames::take().map(PhysAddr::from_usize)
    }

    fn dealloc_frame(&self, frame: PhysAddr) {
        frames::give_back(frame.as_usize());
    }

    fn phys_to_virt(&self, frame: PhysAddr) -> *mut u8 {
        frames::pointer(frame.as_usize())
    }
}

#[derive(Clone, Copy)]
struct Meta;

impl TableMeta for Meta {
    type P = X86Entry;
    const PAGE_SIZE: usize = 4096;
    const LEVEL_BITS: &[usize] = &[9, 9, 9, 9];
    const MAX_BLOCK_LEVEL: usize = 3;

    fn flush(_: Option<VirtAddr>) {}
}

const PRESENT: u64 = 1;
const WRITE: u64 = 1 << 1;
const USER: u64 = 1 << 2;
const HUGE: u64 = 1 << 7;
const ADDRESS: u64 = 0x000f_ffff_ffff_f000;

#[derive(Clone, Copy, Debug)]
struct X86Entry(u64);

impl PageTableEntry for X86Entry {
    /// The flag bits.
    type PteConfig = u64;

    fn new_page(address: PhysAddr, flags: u64, is_huge: bool) -> Self {
        let huge = if is_huge { HUGE } else { 0 };
        Self(address.as_usize() as u64 & ADDRESS | flags | huge)
    }

    fn new_table(address: PhysAddr) -> Self {
        Self(address.as_usize() as u64 & ADDRESS | PRESENT | WRITE | USER)
    }

    fn paddr(&self, _: bool) -> PhysAddr {
        PhysAddr::from_usize(usize::try_from(self.0 & ADDRESS).expect("64 bits"))
    }

    fn config(&self, is_dir: bool) -> u64 {
        let flags = self.0 & !ADDRESS;
        if is_dir { flags & !HUGE } else { flags }
    }

    fn present(&self) -> bool {
        self.0 & PRESENT != 0
    }

    fn huge(&self, is_dir: bool) -> bool {
        is_dir && self.0 & HUGE != 0
    }

    fn unused(&self) -> bool {
        self.0 == 0
    }

    fn clear(&mut self) {
        self.0 = 0;
    }
}

fn bytes(len: u64) -> usize {
    usize::try_from(len).expect("64 bits")
}

fn at(address: u64) -> VirtAddr {
    VirtAddr::from_usize(bytes(address))
}

impl Generic {
    fn put(&mut self, len: u64, allow_huge: bool) {
        let mapped = self.table.map(&MapConfig {
            vaddr: at(FIRST),
            paddr: PhysAddr::from_usize(bytes(FIRST)),
            size: bytes(len),
            pte: PRESENT | WRITE | USER,
            allow_huge,
            flush: false,
        });
        mapped.expect("it is absent");
    }

    fn allow(&mut self, flags: u64) {
        let changed = self.table.protect_region(at(FIRST), bytes(LEN), flags);
        changed.expect("it is mapped");
    }

    fn pages(&self) -> impl Iterator<Item = X86Entry> {
        let present = self.table.walk(at(FIRST), at(FIRST + LEN));
        present.filter(|info| info.level == 1).map(|info| info.pte)
    }
}

impl PageTable for Generic {
    const NAME: &'static str = "page-table-generic";

    fn new() -> Self {
        Self {
            table: Table::new(Frames).expect("a frame"),
            reserved: Vec::new(),
        }
    }

    fn map(&mut self) {
        self.put(LEN, false);
    }

    fn sum(&self) -> u64 {
        let mut sum = 0_u64;
        for entry in self.pages() {
            sum = sum.wrapping_add(entry.0 & ADDRESS);
        }
        sum
    }
}

impl Unmaps for Generic {
    fn unmap(&mut self) {
        let unmapped = self.table.unmap(at(FIRST), bytes(LEN));
        unmapped.expect("it is mapped");
    }
}

impl Protects for Generic {
    fn protect(&mut self) {
        self.allow(PRESENT | USER);
    }

    fn release(&mut self) {
        self.allow(PRESENT | WRITE | USER);
    }

    fn writable(&self) -> u64 {
        self.pages().filter(|entry| entry.0 & WRITE != 0).count() as u64
    }
}

impl Splits for Generic {
    fn fill(&mut self) {
        *self = Self::new();
        self.put(BLOCKS * BLOCK, true);
        // The last one first: `split` takes them from the end.
        for block in (0..BLOCKS).rev() {
            let reserved = self.table.prepare_huge_split(at(FIRST + block * BLOCK));
            self.reserved.push(reserved.expect("it is huge"));
        }
    }

    fn split(&mut self, block: u64) {
        let reserved = self.reserved.pop().expect("one for each block");
        assert_eq!(reserved.block_vaddr(), at(FIRST + block * BLOCK));
        let split = self.table.split_huge_page_with(reserved);
        split.expect("it is huge");
    }
}
