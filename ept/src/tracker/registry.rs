//! Registry of a tracker's regions and consumers.

use alloc::sync::Arc;
use alloc::vec::Vec;

use crate::addr::{Gpa, GpaRange};
use crate::counters::Counters;
use crate::epoch::Consumer;
use crate::harvest::{Pieces, Runs};
use crate::region::Regions;
use crate::tracker::Tracker;
use crate::tracking::{
    Bitmap, Bits, Discard, Every, PLANE_WORDS, Plane, Sink, Taken, Tracked, Tree,
};

/// The regions and the consumers of a tracker. The tracker's lock protects it.
pub(crate) struct Registry {
    /// All regions. The pending trees of the consumers cover them.
    regions: Arc<Regions>,
    /// Number of times that a region was added or removed.
    version: u64,
    consumers: Vec<Registered>,
    /// The consumer that all `TrackerBitmap`s share, if it is registered. It does not count as an epoch.
    bitmaps: Option<Arc<Consumer>>,
}

/// A registered consumer, and the pages that are dirty for it but no longer in a shared tree.
pub(crate) struct Registered {
    consumer: Arc<Consumer>,
    pending: Tree<1>,
}

impl Registry {
    pub(crate) fn new(regions: Arc<Regions>) -> Self {
        Self {
            regions,
            version: 0,
            consumers: Vec::new(),
            bitmaps: None,
        }
    }

    pub(crate) fn regions(&self) -> &Arc<Regions> {
        &self.regions
    }

    pub(crate) fn version(&self) -> u64 {
        self.version
    }

    pub(crate) fn consumers(&self) -> &[Registered] {
        &self.consumers
    }

    /// Returns the number of epochs.
    pub(crate) fn epochs(&self) -> usize {
        self.consumers.len() - usize::from(self.bitmaps.is_some())
    }

    #[cfg(feature = "vm-memory")]
    pub(crate) fn bitmaps(&self) -> Option<&Arc<Consumer>> {
        self.bitmaps.as_ref()
    }

    #[cfg(feature = "vm-memory")]
    pub(crate) fn set_bitmaps(&mut self, consumer: &Arc<Consumer>) {
        self.bitmaps = Some(consumer.clone());
    }

    /// Replaces the list of regions by a larger one, and the pending trees by empty trees of these regions, to which it
    /// moves the pending pages. Returns the number of entries that were marked whole because memory for 4 KiB detail was
    /// short.
    pub(crate) fn grow(&mut self, regions: Arc<Regions>, trees: Vec<Tree<1>>) -> u64 {
        let mut coarse = 0;
        for (one, tree) in self.consumers.iter_mut().zip(trees) {
            let mut moved = Moved::to(&tree);
            one.pending.take(GpaRange::ALL, u64::MAX, &mut moved);
            coarse += moved.coarse;
            one.pending = tree;
        }
        self.regions = regions;
        self.version += 1;
        coarse
    }

    /// Removes the region `range` and everything that is pending in it.
    pub(crate) fn remove(&mut self, range: GpaRange) {
        for one in &self.consumers {
            one.pending.take(range, u64::MAX, &mut Discard);
        }
        self.regions.remove(range);
        self.version += 1;
    }

    /// Returns the first page of region `range` that is pending for any consumer, and that consumer's name.
    pub(crate) fn first_dirty(&self, range: GpaRange) -> Option<(&str, Gpa)> {
        let mut consumers = self.consumers.iter();
        consumers.find_map(|one| Some((one.consumer.name(), one.pending.first_dirty(range)?)))
    }

    /// Allocates memory for one more consumer; `None` if there is none.
    pub(crate) fn reserve_one(&mut self) -> Option<()> {
        self.consumers.try_reserve(1).ok()
    }

    /// Adds a consumer, for which [`Registry::reserve_one`] has allocated memory.
    pub(crate) fn register(&mut self, consumer: Arc<Consumer>, pending: Tree<1>) {
        self.consumers.push(Registered { consumer, pending });
    }

    pub(crate) fn unregister(&mut self, consumer: &Arc<Consumer>) {
        self.consumers.retain(|one| !one.is(consumer));
    }

    /// Returns the pending tree of `consumer`; `None` if it is not registered any more.
    pub(crate) fn pending_of(&self, consumer: &Arc<Consumer>) -> Option<&Tree<1>> {
        let registered = self.consumers.iter().find(|one| one.is(consumer));
        registered.map(|one| &one.pending)
    }

    /// Returns whether page `page` is pending for any consumer.
    pub(crate) fn is_pending(&self, page: u64) -> bool {
        let mut consumers = self.consumers.iter();
        consumers.any(|one| one.has(page))
    }

    /// Returns whether page `page` is pending for `consumer`.
    pub(crate) fn is_pending_for(&self, consumer: &Arc<Consumer>, page: u64) -> bool {
        let mut consumers = self.consumers.iter();
        consumers.any(|one| one.is(consumer) && one.has(page))
    }

    pub(crate) fn pending_bytes(&self) -> usize {
        self.consumers.iter().map(|one| one.pending.bytes()).sum()
    }
}

impl Registered {
    pub(crate) fn is(&self, consumer: &Arc<Consumer>) -> bool {
        Arc::ptr_eq(&self.consumer, consumer)
    }

    fn has(&self, page: u64) -> bool {
        self.pending.regions().at(page).is_some() && self.pending.has(page, Plane::Dirty)
    }
}

/// A sink that makes pages pending for consumers.
pub(crate) struct Pending<'a> {
    pub(crate) consumers: &'a [Registered],
    /// Consumer that is left out.
    pub(crate) except: Option<&'a Arc<Consumer>>,
    pub(crate) counters: &'a Counters,
}

impl Pending<'_> {
    fn mark<B: Bits>(&self, range: GpaRange, bits: &B) {
        for one in self.consumers {
            if !self.except.is_some_and(|except| one.is(except)) {
                let tally = one.pending.mark(range, bits);
                self.counters.coarse(tally.coarse);
            }
        }
    }
}

impl Sink for Pending<'_> {
    /// Marking never fails.
    fn make_room(&mut self, _: usize) -> bool {
        true
    }

    fn range(&mut self, part: GpaRange) {
        self.mark(part, &Every);
    }

    fn words(&mut self, base: u64, words: &[u64; PLANE_WORDS], _: u64) {
        let (span, bits) = leaf(base, words);
        self.mark(span, &bits);
    }
}

/// Returns the range of a leaf table and the set of its pages.
fn leaf(base: u64, words: &[u64; PLANE_WORDS]) -> (GpaRange, Bitmap<'_>) {
    let bits = Bitmap {
        first_page: base,
        words,
    };
    (GpaRange::of(base, base + 64 * PLANE_WORDS as u64), bits)
}

/// A sink that moves pages to another pending tree, whose regions include those of the first.
struct Moved<'a> {
    to: &'a Tree<1>,
    /// Number of entries that were marked whole because memory for 4 KiB detail was short.
    coarse: u64,
}

impl<'a> Moved<'a> {
    fn to(to: &'a Tree<1>) -> Self {
        Self { to, coarse: 0 }
    }
}

impl Sink for Moved<'_> {
    /// Marking never fails.
    fn make_room(&mut self, _: usize) -> bool {
        true
    }

    fn range(&mut self, part: GpaRange) {
        self.coarse += self.to.mark(part, &Every).coarse;
    }

    fn words(&mut self, base: u64, words: &[u64; PLANE_WORDS], _: u64) {
        let (span, bits) = leaf(base, words);
        self.coarse += self.to.mark(span, &bits).coarse;
    }
}

impl Tracker {
    /// Makes every page of `range` that is dirty in a shared tree pending for all consumers.
    pub(crate) fn drain(&self, registry: &Registry, range: GpaRange) {
        let mut pending = self.pending(registry);
        self.tree.take(range, u64::MAX, &mut pending);
        self.drain_added(range, u64::MAX, &mut pending);
    }

    /// Makes the dirty pages of `range` that lie in added regions pending. Stops in each region after `limit` pages. Returns
    /// the part of `range` before the first such stop; `None` if it is empty.
    pub(crate) fn drain_added(
        &self,
        range: GpaRange,
        limit: u64,
        pending: &mut Pending<'_>,
    ) -> Option<GpaRange> {
        if self.added.is_unused() {
            return Some(range);
        }
        let mut range = range;
        for one in self.added.iter() {
            if let Taken::Limit(at) | Taken::NoRoom(at) = one.take(range, limit, pending) {
                range = up_to(range, at)?;
            }
        }
        Some(range)
    }

    /// Makes all of `range`, which lies in one region, dirty for every consumer.
    pub(crate) fn mark_for_all(&self, registry: &Registry, range: GpaRange) {
        self.pending(registry).range(range);
    }

    /// Returns a sink that makes pages pending for every consumer.
    pub(crate) fn pending<'a>(&'a self, registry: &'a Registry) -> Pending<'a> {
        Pending {
            consumers: &registry.consumers,
            except: None,
            counters: self.all_counters(),
        }
    }

    /// Makes the pages of a harvest that was rolled back dirty for `consumer` again. `version` is that of the registry
    /// when the pages were taken.
    pub(crate) fn give_back(&self, consumer: &Arc<Consumer>, pieces: &Pieces, version: u64) {
        let registry = self.registry();
        let Some(pending) = registry.pending_of(consumer) else {
            return;
        };
        let mut moved = Moved::to(pending);
        if registry.version == version {
            pieces.send_to(&mut moved);
        } else {
            // Some of the pages may lie in no region now.
            for run in Runs::new(pieces.spans_in(GpaRange::ALL)) {
                for (part, _) in pending.regions().parts(run) {
                    moved.range(part);
                }
            }
        }
        self.all_counters().coarse(moved.coarse);
    }

    /// Makes every page of `range` that lies in a region dirty for `consumer` alone.
    pub(crate) fn mark_for(&self, registry: &Registry, consumer: &Arc<Consumer>, range: GpaRange) {
        if let Some(pending) = registry.pending_of(consumer) {
            let regions = pending.regions();
            let tally = pending.mark(range, &Tracked { range, regions });
            self.all_counters().coarse(tally.coarse);
        }
    }
}

/// Returns the part of `range` before `at`; `None` if it is empty.
pub(crate) fn up_to(range: GpaRange, at: Gpa) -> Option<GpaRange> {
    (range.first_page() < at.page()).then(|| GpaRange::of(range.first_page(), at.page()))
}
