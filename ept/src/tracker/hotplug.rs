//! Adding and removing regions while writers mark and epochs harvest.

use alloc::string::String;
use alloc::sync::Arc;
use alloc::vec::Vec;
use core::fmt;

use crate::addr::{Gpa, GpaRange};
use crate::region::{Contents, Region, Regions};
use crate::tracker::{Tracker, TrackerError};
use crate::tracking::{Discard, Tree};

/// Reason why [`Tracker::remove_region`] or [`Tracker::discard_region`] did not remove a region.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum RemoveError {
    /// No region has exactly these pages.
    NoSuchRegion(GpaRange),
    /// The region has dirty pages that an epoch has not harvested.
    Dirty {
        /// Name of the first such epoch; `bitmaps` if it is the consumer that all `TrackerBitmap`s share.
        epoch: String,
        /// Address of the first page that is dirty for it.
        at: Gpa,
    },
}

impl fmt::Display for RemoveError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::NoSuchRegion(range) => write!(f, "no region is exactly {range}"),
            Self::Dirty { epoch, at } => write!(
                f,
                "the page at {at} is dirty for epoch {epoch:?} (harvest it, or discard the region)"
            ),
        }
    }
}

impl core::error::Error for RemoveError {}

/// What to do with pages of a region that an epoch has not harvested when the region is removed.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Unharvested {
    Keep,
    Discard,
}

impl Tracker {
    /// Adds a region while writers mark and epochs harvest. Marks of its pages count from when this returns, so the guest
    /// and the devices must not be able to write to the region before.
    ///
    /// `contents` decides what open epochs are told. An epoch that began before has never seen the region: with
    /// [`Contents::Unknown`] all of it is dirty for every open epoch, and with [`Contents::Zero`] it is clean. For an
    /// epoch that begins later, [`Start`](crate::Start) decides as for any region.
    ///
    /// A page that was part of a removed region keeps nothing of its former state: it is not dirty unless `contents`
    /// says so, and not write-protected. There is one exception: if memory for 4 KiB detail was short, or if a writer or
    /// a rolled back harvest still referred to the removed region, pages may be dirty that need not be.
    ///
    /// The call holds the tracker's lock while it moves the pending pages of every epoch to larger tables. Harvests wait
    /// for it, and marks do not.
    ///
    /// ```
    /// use std::sync::Arc;
    /// use ept::{Contents, Epoch, Gpa, GpaRange, Region, RegionKind, Source, Start, Tracker};
    ///
    /// let ram = |first, pages| Region {
    ///     range: GpaRange::from_pages(first, pages).unwrap(),
    ///     kind: RegionKind::Ram,
    /// };
    /// let tracker = Arc::new(Tracker::new(&[ram(0, 512)])?);
    /// let migration = Epoch::begin(&tracker, "migration", Start::Clean)?;
    ///
    /// let dimm = ram(1 << 20, 512);
    /// tracker.add_region(dimm, Contents::Zero)?;
    /// tracker.mark(dimm.range.start(), 4096, Source::Vcpu);
    ///
    /// // The page must be harvested before the region can be removed.
    /// assert!(tracker.remove_region(dimm.range).is_err());
    /// migration.harvest(dimm.range)?.commit();
    /// tracker.remove_region(dimm.range)?;
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    ///
    /// # Errors
    /// Returns
    /// - [`TrackerError::Overlap`] if the region overlaps one that is there;
    /// - [`TrackerError::TooManyRegions`] if [`MAX_ADDED_REGIONS`](crate::MAX_ADDED_REGIONS) were added already;
    /// - [`TrackerError::OutOfMemory`] if there is no memory.
    ///
    /// After an error the tracker is as it was before.
    pub fn add_region(&self, region: Region, contents: Contents) -> Result<(), TrackerError> {
        let mut registry = self.registry();
        let regions = Arc::new(registry.regions().with(region)?);
        let consumers = registry.consumers().len();
        let pending = self.pending_trees(consumers, &regions);
        let pending = pending.ok_or(TrackerError::OutOfMemory)?;
        let tree = self.added.vacant(region.range, self.max_leaf_tables)?;
        // Nothing fails from here on.
        let coarse = registry.grow(regions, pending);
        self.all_counters().coarse(coarse);
        if contents == Contents::Unknown {
            self.mark_for_all(&registry, region.range);
        }
        tree.publish(region.range);
        Ok(())
    }

    /// Creates empty pending trees for `count` consumers; `None` if there is no memory.
    fn pending_trees(&self, count: usize, regions: &Arc<Regions>) -> Option<Vec<Tree<1>>> {
        let mut trees = Vec::new();
        trees.try_reserve_exact(count).ok()?;
        for _ in 0..count {
            trees.push(self.pending_tree(regions.clone())?);
        }
        Some(trees)
    }

    /// Removes the region with exactly the pages of `range`, if no epoch has a dirty page in it. Later marks there are
    /// counted in [`CountersSnapshot::outside`](crate::CountersSnapshot::outside).
    ///
    /// Before the call, the caller must
    /// 1. stop every writer of the region: unmap it from the guest, wait for DMA, and wait for calls of
    ///    [`Tracker::protect`] and [`Tracker::fault`] for its pages;
    /// 2. mark what back ends have logged of the region but the tracker does not know yet, such as KVM's dirty log of the
    ///    memory slot;
    /// 3. harvest the region in every open epoch, or decide that its last contents are not needed and call
    ///    [`Tracker::discard_region`] instead.
    ///
    /// A harvest that is neither committed nor rolled back holds no dirty page, so it does not prevent the removal. If it
    /// is rolled back afterwards, its pages of the removed region are dropped.
    ///
    /// # Errors
    /// Returns [`RemoveError::NoSuchRegion`] if no region has exactly these pages, and [`RemoveError::Dirty`] if an epoch
    /// has not harvested a dirty page of it. After an error every page is dirty and protected as before.
    pub fn remove_region(&self, range: GpaRange) -> Result<Region, RemoveError> {
        self.remove(range, Unharvested::Keep)
    }

    /// Removes the region with exactly the pages of `range`. Every epoch forgets its dirty pages there. The caller must have
    /// stopped every writer of the region, as for [`Tracker::remove_region`].
    ///
    /// # Errors
    /// Returns [`RemoveError::NoSuchRegion`] if no region has exactly these pages.
    pub fn discard_region(&self, range: GpaRange) -> Result<Region, RemoveError> {
        self.remove(range, Unharvested::Discard)
    }

    fn remove(&self, range: GpaRange, unharvested: Unharvested) -> Result<Region, RemoveError> {
        let mut registry = self.registry();
        let region = registry.regions().exact(range);
        let region = region.ok_or(RemoveError::NoSuchRegion(range))?;
        if unharvested == Unharvested::Keep {
            self.drain(&registry, range);
            if let Some((epoch, at)) = registry.first_dirty(range) {
                let epoch = epoch.into();
                return Err(RemoveError::Dirty { epoch, at });
            }
        }
        match self.added.tree_of(range) {
            // The tree is cleaned before it is reused.
            Some(tree) => tree.withdraw(),
            None => {
                self.tree.take(range, u64::MAX, &mut Discard);
                self.regions.remove(range);
            }
        }
        registry.remove(range);
        Ok(region)
    }
}
