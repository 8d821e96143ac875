//! Counters of a tracker.

use alloc::sync::Arc;
use alloc::vec::Vec;

use crate::sync::SpinLock;
use crate::sync::atomic::{AtomicU64, Ordering};

/// Writer of a page.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Source {
    /// A vCPU, as reported by KVM's dirty log or ring.
    Vcpu = 0,
    /// The monitor itself.
    Monitor = 1,
    /// A device model's DMA.
    Device = 2,
    /// A vhost-user back end, as reported by its log.
    VhostUser = 3,
    /// A write fault on a protected page.
    Fault = 4,
}

impl Source {
    /// Every source, in the order of its number.
    pub const ALL: [Self; 5] = [
        Self::Vcpu,
        Self::Monitor,
        Self::Device,
        Self::VhostUser,
        Self::Fault,
    ];
}

/// Counters since the tracker was created.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct CountersSnapshot {
    newly: [u64; Source::ALL.len()],
    /// Number of marked pages that lay in no region.
    pub outside: u64,
    /// Number of entries that were marked whole because memory for 4 KiB detail was short.
    pub coarse: u64,
    /// Longest time for which a harvest held the tracker's lock, in nanoseconds. Other harvests wait for this lock, marks do
    /// not. 0 without a clock ([`Tracker::with_clock`](crate::Tracker::with_clock)).
    pub longest_harvest_ns: u64,
}

impl CountersSnapshot {
    /// Returns the number of pages that `source` marked and that were clean before.
    pub fn dirtied_by(&self, source: Source) -> u64 {
        self.newly[source as usize]
    }

    /// Returns the number of pages that any source marked and that were clean before.
    pub fn dirtied(&self) -> u64 {
        self.newly.iter().sum()
    }

    /// Returns the difference to `earlier`, a snapshot of the same tracker. [`CountersSnapshot::dirtied`] of the difference,
    /// divided by the time between the two, is the re-dirty rate: a page counts each time that it is written after a
    /// harvest. [`CountersSnapshot::longest_harvest_ns`] is not a sum, and is that of `self`.
    #[must_use]
    pub fn since(&self, earlier: &Self) -> Self {
        let more = |now: u64, then: u64| now.saturating_sub(then);
        Self {
            newly: core::array::from_fn(|source| more(self.newly[source], earlier.newly[source])),
            outside: more(self.outside, earlier.outside),
            coarse: more(self.coarse, earlier.coarse),
            longest_harvest_ns: self.longest_harvest_ns,
        }
    }
}

/// A counter on its own cache line, because vCPUs and devices count at the same time.
#[repr(align(64))]
#[derive(Debug, Default)]
struct Padded(AtomicU64);

impl Padded {
    #[inline]
    fn add(&self, more: u64) {
        if more != 0 {
            self.0.fetch_add(more, Ordering::Relaxed);
        }
    }

    fn get(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }
}

/// The counter of one marker. Only this marker writes it, so it needs no locked operation.
#[repr(align(64))]
#[derive(Debug)]
pub(crate) struct Tally {
    source: Source,
    newly: AtomicU64,
}

impl Tally {
    pub(crate) fn source(&self) -> Source {
        self.source
    }

    /// Adds `pages`. Only the marker that owns the counter may call this; it is borrowed mutably meanwhile.
    #[inline]
    pub(crate) fn add(&self, pages: u64) {
        let before = self.newly.load(Ordering::Relaxed);
        self.newly.store(before + pages, Ordering::Relaxed);
    }

    fn get(&self) -> u64 {
        self.newly.load(Ordering::Relaxed)
    }
}

pub(crate) struct Counters {
    /// Counts by source, without those of markers that exist.
    newly: [Padded; Source::ALL.len()],
    markers: SpinLock<Vec<Arc<Tally>>>,
    outside: Padded,
    coarse: Padded,
    longest_harvest_ns: Padded,
}

impl Counters {
    pub(crate) fn new() -> Self {
        Self {
            newly: Default::default(),
            markers: SpinLock::new(Vec::new()),
            outside: Padded::default(),
            coarse: Padded::default(),
            longest_harvest_ns: Padded::default(),
        }
    }

    #[inline]
    pub(crate) fn dirtied(&self, source: Source, pages: u64) {
        self.newly[source as usize].add(pages);
    }

    /// Creates the counter of a new marker; `None` if there is no memory.
    pub(crate) fn enter(&self, source: Source) -> Option<Arc<Tally>> {
        let newly = AtomicU64::new(0);
        let tally = Arc::new(Tally { source, newly });
        let mut markers = self.markers.lock();
        markers.try_reserve(1).ok()?;
        markers.push(tally.clone());
        Some(tally)
    }

    /// Adds the count of a marker that is dropped to the shared counter of its source.
    pub(crate) fn leave(&self, tally: &Arc<Tally>) {
        let mut markers = self.markers.lock();
        markers.retain(|other| !Arc::ptr_eq(other, tally));
        self.dirtied(tally.source, tally.get());
    }

    pub(crate) fn outside(&self, pages: u64) {
        self.outside.add(pages);
    }

    #[inline]
    pub(crate) fn coarse(&self, entries: u64) {
        self.coarse.add(entries);
    }

    pub(crate) fn harvest_took(&self, time_ns: u64) {
        self.longest_harvest_ns
            .0
            .fetch_max(time_ns, Ordering::Relaxed);
    }

    pub(crate) fn snapshot(&self) -> CountersSnapshot {
        CountersSnapshot {
            newly: self.newly(),
            outside: self.outside.get(),
            coarse: self.coarse.get(),
            longest_harvest_ns: self.longest_harvest_ns.get(),
        }
    }

    /// Returns the counts by source. The lock prevents that a marker which is dropped meanwhile is counted twice or not at
    /// all.
    fn newly(&self) -> [u64; Source::ALL.len()] {
        let markers = self.markers.lock();
        let mut newly = core::array::from_fn(|source| self.newly[source].get());
        for tally in markers.iter() {
            newly[tally.source as usize] += tally.get();
        }
        newly
    }
}
