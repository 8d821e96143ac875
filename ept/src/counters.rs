//! Figures that a tracker keeps.

use alloc::sync::Arc;
use alloc::vec::Vec;

use crate::sync::SpinLock;
use crate::sync::atomic::{AtomicU64, Ordering};

/// Who wrote to a page.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Source {
    /// A vCPU, as KVM's log tells.
    Vcpu = 0,
    /// The monitor itself.
    Monitor = 1,
    /// A device model's DMA.
    Device = 2,
    /// A vhost-user back end, as its log tells.
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

/// Figures since the tracker was made.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct CountersSnapshot {
    newly: [u64; Source::ALL.len()],
    /// Marked pages that lie in no region.
    pub outside: u64,
    /// Entries marked whole because memory for 4 KiB detail was short.
    pub coarse: u64,
    /// The longest time for which a harvest held the lock of the consumers, in nanoseconds: others that harvest wait for
    /// it, markers do not. 0 without a clock ([`Tracker::with_clock`](crate::Tracker::with_clock)).
    pub longest_harvest_ns: u64,
}

impl CountersSnapshot {
    /// Pages that `source` dirtied and that were clean before.
    pub fn dirtied_by(&self, source: Source) -> u64 {
        self.newly[source as usize]
    }

    /// Pages that anyone dirtied and that were clean before.
    pub fn dirtied(&self) -> u64 {
        self.newly.iter().sum()
    }

    /// What has come to the sums since `earlier`, a snapshot of the same tracker. Divided by the time between the two,
    /// [`CountersSnapshot::dirtied`] is the re-dirty rate: a page counts again each time it was harvested and is
    /// written anew. The longest time is not a sum, and stays.
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

/// One figure, on a cache line of its own: vCPUs and devices count side by side.
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

/// The figure of one marker, which is the only one to write it: no locked operation.
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

    /// Adds `pages`. For the marker that it belongs to, which is borrowed mutably meanwhile.
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
    /// By source, of all but the markers that are there.
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

    /// A figure for a new marker; `None` where there is no memory to note it.
    pub(crate) fn enter(&self, source: Source) -> Option<Arc<Tally>> {
        let newly = AtomicU64::new(0);
        let tally = Arc::new(Tally { source, newly });
        let mut markers = self.markers.lock();
        markers.try_reserve(1).ok()?;
        markers.push(tally.clone());
        Some(tally)
    }

    /// Takes the figure of a marker that goes to those of all others.
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

    /// By source. The lock keeps a marker that goes from being counted twice, or not at all.
    fn newly(&self) -> [u64; Source::ALL.len()] {
        let markers = self.markers.lock();
        let mut newly = core::array::from_fn(|source| self.newly[source].get());
        for tally in markers.iter() {
            newly[tally.source as usize] += tally.get();
        }
        newly
    }
}
