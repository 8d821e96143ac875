//! State that the vCPUs share: the setup, the request to stop, and the progress of each vCPU.

use core::cell::UnsafeCell;
use core::mem::MaybeUninit;
use core::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use crate::dirtier::{Config, Layout, Position, Totals};
use crate::interface::MAX_CPUS;
use crate::memory::Runs;

/// Setup that vCPU 0 computes once for all vCPUs.
pub(crate) struct Setup {
    pub(crate) config: Config,
    pub(crate) layout: Layout,
    pub(crate) area: Runs,
}

/// The setup and whether it is complete.
struct Published {
    setup: UnsafeCell<MaybeUninit<Setup>>,
    ready: AtomicBool,
}

// SAFETY: vCPU 0 writes it once before it sets `ready`. Afterwards it is only read.
unsafe impl Sync for Published {}

static SETUP: Published = Published {
    setup: UnsafeCell::new(MaybeUninit::uninit()),
    ready: AtomicBool::new(false),
};

/// Publishes the setup, so that the other vCPUs begin. vCPU 0 calls it once.
pub(crate) fn publish(setup: Setup) {
    // SAFETY: no vCPU reads it before `ready` is set, and no other vCPU writes it.
    unsafe { (*SETUP.setup.get()).write(setup) };
    SETUP.ready.store(true, Ordering::Release);
}

/// Waits for the setup and returns it. vCPUs start in any order.
pub(crate) fn wait_for_setup() -> &'static Setup {
    while !SETUP.ready.load(Ordering::Acquire) {
        core::hint::spin_loop();
    }
    // SAFETY: it was written before `ready` was set and is not written again.
    unsafe { (*SETUP.setup.get()).assume_init_ref() }
}

static STOP: AtomicBool = AtomicBool::new(false);

/// Asks every vCPU to stop where it is.
pub(crate) fn stop() {
    STOP.store(true, Ordering::Relaxed);
}

/// Returns true if the vCPUs must stop.
#[inline]
pub(crate) fn stopping() -> bool {
    STOP.load(Ordering::Relaxed)
}

/// Progress of one vCPU. Other vCPUs read it, and the vCPU itself compares it with its own copy in
/// registers and on its stack, which is in another page. If they differ, a write was lost.
#[repr(align(128))]
pub(crate) struct Progress {
    started: AtomicBool,
    audited: AtomicBool,
    pass: AtomicU64,
    leg: AtomicU64,
    position: AtomicU64,
    pages: AtomicU64,
    check: AtomicU64,
    lost: AtomicU64,
    torn: AtomicU64,
}

static PROGRESS: [Progress; MAX_CPUS as usize] = [const { Progress::new() }; MAX_CPUS as usize];

/// Returns the progress of the vCPUs that work.
pub(crate) fn progress(cpus: u32) -> &'static [Progress] {
    &PROGRESS[..cpus as usize]
}

impl Progress {
    const fn new() -> Self {
        Self {
            started: AtomicBool::new(false),
            audited: AtomicBool::new(false),
            pass: AtomicU64::new(0),
            leg: AtomicU64::new(0),
            position: AtomicU64::new(0),
            pages: AtomicU64::new(0),
            check: AtomicU64::new(0),
            lost: AtomicU64::new(0),
            torn: AtomicU64::new(0),
        }
    }

    /// Records that the vCPU has started.
    pub(crate) fn start(&self, at: Position) {
        self.record(at, 0);
        self.started.store(true, Ordering::Release);
    }

    /// Returns true if the vCPU has started.
    pub(crate) fn started(&self) -> bool {
        self.started.load(Ordering::Acquire)
    }

    /// Records the position of the vCPU and the number of pages that it has written, after each chunk.
    pub(crate) fn record(&self, at: Position, pages: u64) {
        let words = [at.pass, at.leg, at.position, pages];
        for (cell, word) in self.cells().into_iter().zip(words) {
            cell.store(word, Ordering::Relaxed);
        }
        self.check.store(mixed(words), Ordering::Relaxed);
    }

    /// Returns true if the record still has these values.
    pub(crate) fn is(&self, at: Position, pages: u64) -> bool {
        let words = [at.pass, at.leg, at.position, pages];
        self.cells().map(|cell| cell.load(Ordering::Relaxed)) == words
            && self.check.load(Ordering::Relaxed) == mixed(words)
    }

    fn cells(&self) -> [&AtomicU64; 4] {
        [&self.pass, &self.leg, &self.position, &self.pages]
    }

    /// Returns the current pass, or 0 before the start.
    pub(crate) fn pass(&self) -> u64 {
        self.pass.load(Ordering::Relaxed)
    }

    /// Records the result of the audit.
    pub(crate) fn finish(&self, lost: u64, torn: u64) {
        self.lost.store(lost, Ordering::Relaxed);
        self.torn.store(torn, Ordering::Relaxed);
        self.audited.store(true, Ordering::Release);
    }

    /// Returns true if the vCPU has completed its audit.
    pub(crate) fn audited(&self) -> bool {
        self.audited.load(Ordering::Acquire)
    }
}

/// Returns a check value of the words. It rotates the sum, so that swapped words change the value.
fn mixed(words: [u64; 4]) -> u64 {
    words
        .into_iter()
        .fold(0x5eed, |sum: u64, word| sum.rotate_left(17) ^ word)
}

/// Returns the totals over all vCPUs.
pub(crate) fn totals(cpus: u32) -> Totals {
    let sum = |field: fn(&Progress) -> &AtomicU64| {
        progress(cpus)
            .iter()
            .map(|one| field(one).load(Ordering::Relaxed))
            .sum()
    };
    let least = progress(cpus).iter().map(Progress::pass).min().unwrap_or(0);
    Totals {
        passes: least.saturating_sub(1),
        pages: sum(|one| &one.pages),
        lost: sum(|one| &one.lost),
        torn: sum(|one| &one.torn),
    }
}
