//! `x86_64` 0.15: its `OffsetPageTable` maps, unmaps and changes a page at a time, which is looped here. It has no
//! walk over a range: its tables are looped over by hand. Nor has it a split: the huge page is unmapped and 512
//! pages are mapped. Its changes are plain stores; nothing is flushed (`ignore`).
//!
//! Unsafe, because changing a page table is for that crate, whose tables are the ones that are active. These are
//! active nowhere: they map nothing that this process uses.
#![allow(unsafe_code, reason = "see above")]

use x86_64::structures::paging::mapper::{CleanUp, MapToError};
use x86_64::structures::paging::page::PageRangeInclusive;
use x86_64::structures::paging::{
    FrameAllocator, FrameDeallocator, Mapper, OffsetPageTable, Page, PageSize, PageTable as Table,
    PageTableFlags, PhysFrame, Size2MiB, Size4KiB,
};
use x86_64::{PhysAddr, VirtAddr};

use super::{BLOCK, BLOCKS, FIRST, PAGE, PAGES, PageTable, Protects, Splits, Unmaps, frames};

const READ_ONLY: PageTableFlags = PageTableFlags::PRESENT.union(PageTableFlags::USER_ACCESSIBLE);
const FLAGS: PageTableFlags = READ_ONLY.union(PageTableFlags::WRITABLE);

pub(crate) struct X86(OffsetPageTable<'static>);

struct Frames;

// SAFETY: a frame is given out to one until it is given back.
unsafe impl FrameAllocator<Size4KiB> for Frames {
    fn allocate_frame(&mut self) -> Option<PhysFrame> {
        let frame = frames::take()?;
        Some(PhysFrame::containing_address(PhysAddr::new(frame as u64)))
    }
}

impl FrameDeallocator<Size4KiB> for Frames {
    unsafe fn deallocate_frame(&mut self, frame: PhysFrame) {
        let address = frame.start_address().as_u64();
        frames::give_back(usize::try_from(address).expect("64 bits"));
    }
}

fn table(frame: PhysFrame) -> *const Table {
    let address = frame.start_address().as_u64();
    frames::pointer(usize::try_from(address).expect("64 bits"))
}

fn page<S: PageSize>(address: u64) -> Page<S> {
    Page::containing_address(VirtAddr::new(address))
}

fn frame<S: PageSize>(address: u64) -> PhysFrame<S> {
    PhysFrame::containing_address(PhysAddr::new(address))
}

fn addresses() -> impl Iterator<Item = u64> {
    (0..PAGES).map(|page| FIRST + page * PAGE)
}

impl X86 {
    fn map_one<S: PageSize>(&mut self, address: u64) -> Result<(), MapToError<S>>
    where
        OffsetPageTable<'static>: Mapper<S>,
    {
        let (page, frame) = (page(address), frame(address));
        // SAFETY: the table is not active.
        let flush = unsafe { self.0.map_to(page, frame, FLAGS, &mut Frames) };
        flush.map(|flush| flush.ignore())
    }

    fn allow(&mut self, flags: PageTableFlags) {
        for address in addresses() {
            // SAFETY: the table is not active.
            let flush = unsafe { self.0.update_flags(page::<Size4KiB>(address), flags) };
            flush.expect("it is mapped").ignore();
        }
    }

    /// The tables below `table` that are linked.
    fn below(table: &Table) -> impl Iterator<Item = &Table> {
        let frames = table.iter().filter_map(|entry| entry.frame().ok());
        // SAFETY: the frames of tables are ours, and nobody changes them while `self` is borrowed.
        frames.map(|frame| unsafe { &*self::table(frame) })
    }

    fn leaf_tables(&self) -> impl Iterator<Item = &Table> {
        Self::below(self.0.level_4_table())
            .flat_map(Self::below)
            .flat_map(Self::below)
    }
}

impl PageTable for X86 {
    const NAME: &'static str = "x86_64";

    fn new() -> Self {
        let root = frames::take().expect("a frame");
        let root: *mut Table = frames::pointer(root);
        // SAFETY: the frame is aligned and nobody else's, and any words are a page table; frames lie where their
        // addresses say, so the offset is 0.
        unsafe {
            root.write(Table::new());
            Self(OffsetPageTable::new(&mut *root, VirtAddr::zero()))
        }
    }

    fn map(&mut self) {
        for address in addresses() {
            self.map_one::<Size4KiB>(address).expect("it is absent");
        }
    }

    fn sum(&self) -> u64 {
        let mut sum = 0_u64;
        for table in self.leaf_tables() {
            for entry in table.iter() {
                if entry.flags().contains(PageTableFlags::PRESENT) {
                    sum = sum.wrapping_add(entry.addr().as_u64());
                }
            }
        }
        sum
    }
}

impl Unmaps for X86 {
    fn unmap(&mut self) {
        for address in addresses() {
            let unmapped = self.0.unmap(page::<Size4KiB>(address));
            unmapped.expect("it is mapped").1.ignore();
        }
    }
}

impl Protects for X86 {
    fn protect(&mut self) {
        self.allow(READ_ONLY);
    }

    fn release(&mut self) {
        self.allow(FLAGS);
    }

    fn writable(&self) -> u64 {
        let entries = self.leaf_tables().flat_map(Table::iter);
        let writable = entries.filter(|entry| entry.flags().contains(FLAGS));
        writable.count() as u64
    }
}

impl Splits for X86 {
    fn fill(&mut self) {
        for address in (0..BLOCKS * BLOCK / PAGE).map(|page| FIRST + page * PAGE) {
            if let Ok((_, flush)) = self.0.unmap(page::<Size4KiB>(address)) {
                flush.ignore();
            }
        }
        let range = PageRangeInclusive {
            start: page(FIRST),
            end: page(FIRST + BLOCKS * BLOCK - 1),
        };
        // SAFETY: nothing in the range is used.
        unsafe { self.0.clean_up_addr_range(range, &mut Frames) };
        for block in 0..BLOCKS {
            self.map_one::<Size2MiB>(FIRST + block * BLOCK)
                .expect("it is absent");
        }
    }

    fn split(&mut self, block: u64) {
        let first = FIRST + block * BLOCK;
        let unmapped = self.0.unmap(page::<Size2MiB>(first));
        unmapped.expect("it is huge").1.ignore();
        for address in (0..512).map(|page| first + page * PAGE) {
            self.map_one::<Size4KiB>(address).expect("it is absent");
        }
    }
}
