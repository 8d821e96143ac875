//! vm-memory's `Bitmap` over a tracker: device models mark the pages that they write by way of vm-memory.

use alloc::sync::Arc;
use alloc::vec::Vec;
use core::fmt;
use core::num::NonZeroUsize;
use core::sync::atomic::{Ordering, fence};
use std::sync::OnceLock;

use vm_memory::bitmap::{AtomicBitmap, Bitmap, NewBitmap, RefSlice, WithBitmapSlice};

use crate::addr::{Gpa, GpaRange, PAGE_SHIFT, PAGE_SIZE};
use crate::counters::Source;
use crate::epoch::take_for_bitmaps;
use crate::tracker::Tracker;

/// Dirty bitmap of one vm-memory region. Offsets count from the start of the region.
///
/// There are two ways to make one:
/// - [`TrackerBitmap::new`] makes a view of a tracker. For `MmapRegionBuilder::new_with_bitmap`, by a monitor that knows
///   the region's guest address before it maps the memory.
/// - `TrackerBitmap::with_len`, of vm-memory's `NewBitmap`, makes a bitmap with its own bits. vm-memory calls it in
///   `MmapRegion::build`, `GuestRegionMmap::from_range` and `GuestMemoryMmap::from_ranges`. After the monitor has placed
///   the region, [`TrackerBitmap::attach`] makes the bitmap a view of the tracker and marks there what was marked before:
///   `(**region).bitmap().attach(&tracker, start, source)`, where `region` is a `&GuestRegionMmap<TrackerBitmap>`.
///
/// Clones share their bits and the tracker. A slice borrows the bitmap, so that vm-memory can make one for each access at
/// no cost.
#[derive(Clone, Debug)]
pub struct TrackerBitmap {
    shared: Arc<Shared>,
}

#[derive(Debug)]
struct Shared {
    /// Pages that were marked before the bitmap was attached.
    early: AtomicBitmap,
    view: OnceLock<View>,
}

/// Place of an attached bitmap in the machine's memory.
#[derive(Debug)]
struct View {
    tracker: Arc<Tracker>,
    base: Gpa,
    source: Source,
}

/// Reason why [`TrackerBitmap::attach`] failed. The bitmap still has its own bits, and all of them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum AttachError {
    /// The bitmap is a view of a tracker already.
    Attached,
    /// The bitmap has no pages. [`TrackerBitmap::default`] makes such a one.
    Empty,
    /// This guest address is no multiple of the page size, or the region would end beyond the 64-bit space.
    Misplaced(Gpa),
    /// Not all of these pages lie in regions of the tracker. Call [`Tracker::add_region`] first.
    NoRegion(GpaRange),
}

impl fmt::Display for AttachError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Attached => f.write_str("the bitmap is attached to a tracker already"),
            Self::Empty => f.write_str("the bitmap has no pages"),
            Self::Misplaced(base) => write!(f, "no region of this size can be at {base}"),
            Self::NoRegion(range) => write!(
                f,
                "the tracker has no region for all of {range} (add the region first)"
            ),
        }
    }
}

impl core::error::Error for AttachError {}

impl TrackerBitmap {
    /// Creates the bitmap of a region at `base`. Pages that are marked through it count for `source`.
    pub fn new(tracker: Arc<Tracker>, base: Gpa, source: Source) -> Self {
        let bitmap = Self::default();
        let _unattached = bitmap.shared.view.set(View {
            tracker,
            base,
            source,
        });
        bitmap
    }

    /// Makes the bitmap a view of `tracker`, for a region at `base` that `tracker` has. Pages that were marked before are
    /// marked in `tracker` now. All of them count for `source`.
    ///
    /// Other threads may mark meanwhile: each of their marks is in `tracker` when both calls have returned.
    ///
    /// # Errors
    /// Returns
    /// - [`AttachError::Attached`] if the bitmap is attached, or was made by [`TrackerBitmap::new`];
    /// - [`AttachError::Empty`] if the bitmap has no pages;
    /// - [`AttachError::Misplaced`] if `base` is not page-aligned, or the region would leave the 64-bit space;
    /// - [`AttachError::NoRegion`] if the region is not, or not all of it, in regions of `tracker`.
    pub fn attach(
        &self,
        tracker: &Arc<Tracker>,
        base: Gpa,
        source: Source,
    ) -> Result<(), AttachError> {
        if self.shared.view.get().is_some() {
            return Err(AttachError::Attached);
        }
        let pages = self.shared.early.len() as u64;
        if pages == 0 {
            return Err(AttachError::Empty);
        }
        let misplaced = AttachError::Misplaced(base);
        let bytes = pages.checked_mul(PAGE_SIZE).ok_or(misplaced)?;
        let range = GpaRange::with_len(base, bytes).map_err(|_| misplaced)?;
        if !tracker.tracks(range) {
            return Err(AttachError::NoRegion(range));
        }
        let view = View {
            tracker: tracker.clone(),
            base,
            source,
        };
        let set = self.shared.view.set(view);
        set.map_err(|_| AttachError::Attached)?;
        // Pairs with the fence in `mark_dirty`: a marker that does not see the view yet has set its bit before this reads it.
        fence(Ordering::SeqCst);
        let early = self.shared.early.get_and_reset();
        tracker.mark_words(base, &early, source);
        Ok(())
    }

    /// Returns the pages that were marked since the last call or since [`TrackerBitmap::reset`], one bit a page from the
    /// start of the region, and makes them clean for the next call. The same as vm-memory's
    /// `AtomicBitmap::get_and_reset`, so that code for it works unchanged.
    ///
    /// Of an attached bitmap, the result has every page of the region that any source marked in the tracker, vCPUs
    /// included. All bitmaps of a tracker share one consumer for this, which is registered beside the epochs when one of
    /// them calls this or [`TrackerBitmap::reset`] for the first time. Before that, nothing records what is clean: the
    /// first result has every page of the region. If there is no memory or no place for the consumer, every result has.
    /// Other epochs lose no page.
    ///
    /// An [`Epoch`](crate::Epoch) does more: its harvests can be rolled back.
    pub fn get_and_reset(&self) -> Vec<u64> {
        let Some(view) = self.shared.view.get() else {
            return self.shared.early.get_and_reset();
        };
        let Some(range) = self.range_in(view) else {
            return Vec::new();
        };
        match take_for_bitmaps(&view.tracker, range) {
            Some(harvest) => {
                let words = harvest.words_in(range).collect();
                harvest.commit();
                words
            }
            None => all_pages(range),
        }
    }

    /// Makes every page of the region clean for [`TrackerBitmap::get_and_reset`], as vm-memory's `AtomicBitmap::reset`.
    /// Epochs do not notice.
    pub fn reset(&self) {
        self.get_and_reset();
    }

    /// The pages of the region in guest memory; `None` if no region of the tracker is there.
    fn range_in(&self, view: &View) -> Option<GpaRange> {
        let region = view.tracker.region_at(view.base)?;
        match self.shared.early.len() as u64 {
            // Made by `new`, which is not told the region's size.
            0 => region.range.from(view.base),
            pages => GpaRange::from_pages(view.base.page(), pages).ok(),
        }
    }
}

impl Shared {
    fn new(len: usize) -> Self {
        const PAGE: NonZeroUsize = NonZeroUsize::new(1 << PAGE_SHIFT).unwrap();
        Self {
            early: AtomicBitmap::new(len, PAGE),
            view: OnceLock::new(),
        }
    }
}

impl View {
    fn mark(&self, offset: usize, len: usize) {
        self.tracker.mark(self.gpa(offset), len as u64, self.source);
    }

    /// Returns the guest-physical address of `offset`; the last one of the space if it lies beyond.
    fn gpa(&self, offset: usize) -> Gpa {
        Gpa(self.base.0.saturating_add(offset as u64))
    }
}

/// Returns a bitmap of `range` in which every page is set.
fn all_pages(range: GpaRange) -> Vec<u64> {
    let starts = (range.first_page()..range.end_page()).step_by(64);
    let words = starts.map(|start| u64::MAX >> (64 - (range.end_page() - start).min(64)));
    words.collect()
}

/// A bitmap without pages. It cannot be attached.
impl Default for TrackerBitmap {
    fn default() -> Self {
        Self::with_len(0)
    }
}

impl NewBitmap for TrackerBitmap {
    /// Creates a bitmap with its own bits for a region of `len` bytes. See [`TrackerBitmap::attach`].
    fn with_len(len: usize) -> Self {
        Self {
            shared: Arc::new(Shared::new(len)),
        }
    }
}

impl<'a> WithBitmapSlice<'a> for TrackerBitmap {
    type S = RefSlice<'a, Self>;
}

impl Bitmap for TrackerBitmap {
    fn mark_dirty(&self, offset: usize, len: usize) {
        if let Some(view) = self.shared.view.get() {
            return view.mark(offset, len);
        }
        self.shared.early.mark_dirty(offset, len);
        // Pairs with the fence in `attach`: either `attach` reads the bit, or the view that it set is seen here.
        fence(Ordering::SeqCst);
        if let Some(view) = self.shared.view.get() {
            view.mark(offset, len);
        }
    }

    fn dirty_at(&self, offset: usize) -> bool {
        match self.shared.view.get() {
            Some(view) => view.tracker.dirty_at(view.gpa(offset)),
            None => self.shared.early.dirty_at(offset),
        }
    }

    fn slice_at(&self, offset: usize) -> RefSlice<'_, Self> {
        RefSlice::new(self, offset)
    }
}
