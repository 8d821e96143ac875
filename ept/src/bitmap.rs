//! vm-memory's `Bitmap` over a tracker: device models mark what they write without knowing of it.

use alloc::sync::Arc;

use vm_memory::bitmap::{Bitmap, RefSlice, WithBitmapSlice};

use crate::addr::Gpa;
use crate::counters::Source;
use crate::tracker::Tracker;

/// The dirty bitmap of one memory region: offsets count from its base.
///
/// For `MmapRegionBuilder::new_with_bitmap` and `GuestMemoryMmap<TrackerBitmap>`. A slice of it borrows it, so that
/// making one, as every access does, costs nothing.
#[derive(Clone, Debug)]
pub struct TrackerBitmap {
    tracker: Arc<Tracker>,
    base: Gpa,
    source: Source,
}

impl TrackerBitmap {
    /// The bitmap of a region at `base`; marks count for `source`.
    pub fn new(tracker: Arc<Tracker>, base: Gpa, source: Source) -> Self {
        Self {
            tracker,
            base,
            source,
        }
    }

    /// The guest-physical address of `offset`; saturates at the end of the space.
    fn gpa(&self, offset: usize) -> Gpa {
        Gpa(self.base.0.saturating_add(offset as u64))
    }
}

impl<'a> WithBitmapSlice<'a> for TrackerBitmap {
    type S = RefSlice<'a, Self>;
}

impl Bitmap for TrackerBitmap {
    fn mark_dirty(&self, offset: usize, len: usize) {
        self.tracker.mark(self.gpa(offset), len as u64, self.source);
    }

    fn dirty_at(&self, offset: usize) -> bool {
        self.tracker.dirty_at(self.gpa(offset))
    }

    fn slice_at(&self, offset: usize) -> RefSlice<'_, Self> {
        RefSlice::new(self, offset)
    }
}
