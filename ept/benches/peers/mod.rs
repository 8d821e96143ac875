//! Ferry, the plain loops and other people's crates, each behind the same few functions.
//!
//! Page tables: 1 GiB from [`FIRST`] on, mapped to itself in 4 KiB entries, write-back, readable, writable and
//! executable. Dirty sets: one bit a page, of `pages` pages from 0 on.

pub(crate) mod aarch64;
pub(crate) mod atomic_bitmap;
pub(crate) mod ferry_table;
pub(crate) mod ferry_tracker;
mod frames;
pub(crate) mod generic;
pub(crate) mod multiarch;
pub(crate) mod plain_table;
pub(crate) mod roaring;
pub(crate) mod scan;
pub(crate) mod words;
pub(crate) mod x86_64;

use std::rc::Rc;

/// Pages that are mapped.
pub(crate) const PAGES: u64 = 1 << 18;
/// Bytes of a page.
pub(crate) const PAGE: u64 = 4096;
/// The first address; not 0, which some take for "nothing".
pub(crate) const FIRST: u64 = 1 << 30;
/// Bytes that are mapped.
pub(crate) const LEN: u64 = PAGES * PAGE;
/// Leaves of 2 MiB that are split in one round: their tables fit the first-level cache.
pub(crate) const BLOCKS: u64 = 8;
/// Bytes of one of them.
pub(crate) const BLOCK: u64 = 2 << 20;
/// The sum of all mapped addresses.
pub(crate) const SUM: u64 = FIRST * PAGES + PAGE * (PAGES * (PAGES - 1) / 2);

/// A table with an entry a page.
pub(crate) trait PageTable {
    const NAME: &'static str;

    /// Nothing is mapped.
    fn new() -> Self;

    /// Maps all pages, of which none is.
    fn map(&mut self);

    /// The sum of the addresses in present 4 KiB entries.
    fn sum(&self) -> u64;
}

pub(crate) trait Unmaps: PageTable {
    /// Unmaps all pages.
    fn unmap(&mut self);
}

pub(crate) trait Protects: PageTable {
    /// Nobody may write.
    fn protect(&mut self);

    /// Everybody may.
    fn release(&mut self);

    /// Pages that may be written to.
    fn writable(&self) -> u64;
}

pub(crate) trait Splits: PageTable {
    /// Whatever was mapped, now it is [`BLOCKS`] leaves of 2 MiB.
    fn fill(&mut self);

    /// Splits block `block` into 4 KiB entries.
    fn split(&mut self, block: u64);
}

pub(crate) trait Halves: Protects + Sync {
    /// Protects and releases the first half (0) or the second (1).
    fn toggle(&self, half: usize);
}

/// Takes maximal runs in order. Its digest says whether two saw the same.
#[derive(Default)]
pub(crate) struct Consumer {
    digest: u64,
    runs: u64,
}

impl Consumer {
    #[inline]
    pub(crate) fn run(&mut self, first_page: u64, pages: u64) {
        self.digest = self.digest.rotate_left(5) ^ (first_page << 20 | pages);
        self.runs += 1;
    }

    pub(crate) fn digest(&self) -> u64 {
        self.digest ^ self.runs << 32
    }
}

/// Pages to be dirtied: bit `i % 64` of word `i / 64` is page `i`.
pub(crate) type Dirt = Rc<Vec<u64>>;

/// A set of dirty pages that gives them away as runs.
pub(crate) trait DirtySet {
    const NAME: &'static str;

    /// A clean set, of 64 pages for each word of `dirt`.
    fn new(dirt: &Dirt) -> Self;

    /// Makes the pages of `dirt` dirty.
    fn dirty(&mut self, dirt: &Dirt);

    /// Takes all dirty pages, gives them to `consumer` and lets go of them; all is clean then.
    fn harvest(&mut self, consumer: &mut Consumer);

    /// Bytes held.
    fn bytes(&self) -> usize;
}

/// Pages of a run that is marked.
pub(crate) const RUN: u64 = 256;

/// Marks pages of a set, for one thread.
pub(crate) trait Marks {
    fn mark_page(&mut self, page: u64);

    /// Marks [`RUN`] pages from `first_page` on.
    fn mark_run(&mut self, first_page: u64);
}

/// A set that one thread marks.
pub(crate) trait MarkedSet: DirtySet {
    fn marks(&mut self) -> impl Marks;
}

/// A set that threads mark at the same time.
pub(crate) trait SharedSet: DirtySet + Sync {
    /// What one of them needs for that.
    fn shared_marks(&self) -> impl Marks;
}

impl<T: SharedSet> MarkedSet for T {
    fn marks(&mut self) -> impl Marks {
        self.shared_marks()
    }
}
