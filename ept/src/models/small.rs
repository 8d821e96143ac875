//! A hardware format with a small root, and its table in memory that a model can share between threads.
//!
//! `unsafe` because threads of a model must own what they use, and a table borrows its memory: both live in one value
//! here, which frees them in order.
#![allow(unsafe_code)]

extern crate std;

use alloc::boxed::Box;
use alloc::vec::Vec;
use core::ops::Deref;

use crate::addr::{GpaRange, Hpa, Level};
use crate::format::{
    ArmFlags, ArmStage2, Entry, Format, HardwareFormat, Leaf, MemoryType, Npt, Permissions, Tables,
};
use crate::geometry::Geometry;
use crate::notify::{Notifier, OpenRange};
use crate::stage2::{Attributes, Stage2};
use crate::sync::atomic::{AtomicU64, Ordering};

/// A format whose root has four entries of 2 MiB.
#[derive(Clone, Copy)]
pub(super) struct Small<F>(F);

impl<F: Format> Format for Small<F> {
    type Leaf = F::Leaf;

    fn decode(&self, raw: u64, level: Level) -> Entry<F::Leaf> {
        self.0.decode(raw, level)
    }

    fn encode(&self, entry: Entry<F::Leaf>, level: Level) -> u64 {
        self.0.encode(entry, level)
    }
}

impl<F: HardwareFormat> HardwareFormat for Small<F> {
    const BREAKS: bool = F::BREAKS;
    const CACHES_FAULTS: bool = F::CACHES_FAULTS;
    const WRITE_TRACKED: u64 = F::WRITE_TRACKED;
    const PAGE_STEP: u64 = F::PAGE_STEP;

    fn geometry(&self) -> Geometry {
        Geometry::with_root(1, 4)
    }

    fn largest_leaf(&self) -> Level {
        Level::MIB2
    }

    fn hpa_bits(&self) -> u32 {
        self.0.hpa_bits()
    }

    fn admits(&self, permissions: Permissions) -> bool {
        self.0.admits(permissions)
    }

    fn caches(&self, memory: MemoryType) -> bool {
        self.0.caches(memory)
    }

    fn with_permissions(&self, raw: u64, level: Level, permissions: Permissions) -> u64 {
        self.0.with_permissions(raw, level, permissions)
    }

    fn broken(&self, raw: u64, by: u8) -> u64 {
        self.0.broken(raw, by)
    }

    fn broken_by(&self, raw: u64) -> Option<u8> {
        self.0.broken_by(raw)
    }

    fn made(&self, raw: u64) -> u64 {
        self.0.made(raw)
    }

    fn dirty_bits(&self, raw: u64) -> u64 {
        self.0.dirty_bits(raw)
    }

    fn accessed_bits(&self, raw: u64) -> u64 {
        self.0.accessed_bits(raw)
    }
}

/// AMD's format: flags apart from permissions, no break-before-make.
pub(super) fn npt() -> Small<Npt> {
    Small(Npt::FourLevels)
}

/// Arm's: break-before-make.
pub(super) fn arm() -> Small<ArmStage2> {
    let arm = ArmStage2::new(40, ArmFlags::AccessedDirty);
    Small(arm.expect("40 bits are possible"))
}

/// A table of `F` with memory of its own.
pub(super) struct World<F: HardwareFormat + 'static> {
    stage2: Option<Stage2<'static, Small<F>>>,
    words: *mut [AtomicU64],
}

// SAFETY: the words are reached through shared references only, which the table's own bounds allow between threads; the
// pointer is used by `drop` alone.
unsafe impl<F: HardwareFormat + Send + Sync> Send for World<F> {}
// SAFETY: as above.
unsafe impl<F: HardwareFormat + Send + Sync> Sync for World<F> {}

impl<F: HardwareFormat> World<F> {
    /// An empty table with room for so many tables besides the root.
    pub(super) fn new(format: Small<F>, tables: usize) -> Self {
        let words: Vec<_> = (0..(1 + tables) * 512).map(|_| AtomicU64::new(0)).collect();
        let words = Box::into_raw(words.into_boxed_slice());
        // SAFETY: it came from `into_raw` just above, and is freed by `drop` after the table that borrows it.
        let lent: &'static [AtomicU64] = unsafe { &*words };
        let stage2 = Stage2::new(format, lent, Hpa(0x10_0000)).expect("room for the root");
        Self {
            stage2: Some(stage2),
            words,
        }
    }
}

impl<F: HardwareFormat> World<F> {
    /// The root's entry for `page`.
    pub(super) fn root_entry(&self, page: u64) -> &AtomicU64 {
        &self.root()[usize::try_from(page / 512).expect("it is in the space")]
    }

    /// The leaf table's entry for `page`.
    pub(super) fn table_entry(&self, page: u64) -> &AtomicU64 {
        let raw = self.root_entry(page).load(Ordering::SeqCst);
        match self.format().decode(raw, Level::MIB2) {
            Entry::Table(table) => {
                &self.leaf(table)[usize::try_from(page % 512).expect("it is below 512")]
            }
            Entry::Leaf(_) | Entry::Absent => panic!("page {page:#x} has no leaf table"),
        }
    }

    /// Whether hardware uses the root's entry for `page`.
    pub(super) fn is_made(&self, page: u64) -> bool {
        let raw = self.root_entry(page).load(Ordering::SeqCst);
        self.format().broken_by(raw).is_none()
    }
}

impl<F: HardwareFormat> Deref for World<F> {
    type Target = Stage2<'static, Small<F>>;

    fn deref(&self) -> &Self::Target {
        self.stage2.as_ref().expect("it is there until the drop")
    }
}

impl<F: HardwareFormat> Drop for World<F> {
    fn drop(&mut self) {
        self.stage2 = None;
        // SAFETY: it came from `into_raw` in `new`, and nothing borrows it any more.
        drop(unsafe { Box::from_raw(self.words) });
    }
}

/// Pages `first` to `first + count`.
pub(super) fn pages(first: u64, count: u64) -> GpaRange {
    GpaRange::from_pages(first, count).expect("it is in the space")
}

/// Everything is open.
pub(super) fn open() -> OpenRange {
    let open = Notifier::new().open(GpaRange::ALL);
    open.expect("nobody is subscribed")
}

pub(super) fn all(largest: Level) -> Attributes {
    Attributes {
        permissions: Permissions::ALL,
        memory: MemoryType::WriteBack,
        largest,
    }
}

/// The leaf that covers `page`, if there is one.
pub(super) fn leaf_at<F: HardwareFormat>(world: &World<F>, page: u64) -> Option<Leaf> {
    match world.lookup(page).1 {
        Entry::Leaf(leaf) => Some(leaf),
        Entry::Absent | Entry::Table(_) => None,
    }
}
