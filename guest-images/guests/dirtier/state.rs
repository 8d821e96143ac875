//! What the vCPUs know of each other.

use core::cell::UnsafeCell;
use core::mem::MaybeUninit;
use core::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use crate::dirtier::{Config, Layout, Position, Totals};
use crate::interface::MAX_CPUS;
use crate::memory::Runs;

/// What vCPU 0 works out once, for all.
pub(crate) struct Setup {
    pub(crate) config: Config,
    pub(crate) layout: Layout,
    pub(crate) area: Runs,
}

struct Published {
    setup: UnsafeCell<MaybeUninit<Setup>>,
    ready: AtomicBool,
}

// SAFETY: written once by vCPU 0 before `ready`, only read after it.
unsafe impl Sync for Published {}

static SETUP: Published = Published {
    setup: UnsafeCell::new(MaybeUninit::uninit()),
    ready: AtomicBool::new(false),
};

/// Lets the other vCPUs begin. Called once, by vCPU 0.
pub(crate) fn publish(setup: Setup) {
    // SAFETY: nobody reads before `ready`, and nobody else writes.
    unsafe { (*SETUP.setup.get()).write(setup) };
    SETUP.ready.store(true, Ordering::Release);
}

/// The setup, once it is there; vCPUs start in any order.
pub(crate) fn wait_for_setup() -> &'static Setup {
    while !SETUP.ready.load(Ordering::Acquire) {
        core::hint::spin_loop();
    }
    // SAFETY: written before `ready`, and not again.
    unsafe { (*SETUP.setup.get()).assume_init_ref() }
}

static STOP: AtomicBool = AtomicBool::new(false);

/// Asks every vCPU to stop where it is.
pub(crate) fn stop() {
    STOP.store(true, Ordering::Relaxed);
}

/// Whether the vCPU is to stop.
#[inline]
pub(crate) fn stopping() -> bool {
    STOP.load(Ordering::Relaxed)
}

/// One vCPU's progress, for the others to see, and for itself to compare with: its own copy is in
/// registers and on its stack, this one in another page, and if they differ one of them was lost.
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

/// The progress of all vCPUs at work.
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

    pub(crate) fn start(&self, at: Position) {
        self.record(at, 0);
        self.started.store(true, Ordering::Release);
    }

    pub(crate) fn started(&self) -> bool {
        self.started.load(Ordering::Acquire)
    }

    /// Records where the vCPU is, at the end of each chunk.
    pub(crate) fn record(&self, at: Position, pages: u64) {
        let words = [at.pass, at.leg, at.position, pages];
        for (cell, word) in self.cells().into_iter().zip(words) {
            cell.store(word, Ordering::Relaxed);
        }
        self.check.store(mixed(words), Ordering::Relaxed);
    }

    /// Whether the record is still that one.
    pub(crate) fn is(&self, at: Position, pages: u64) -> bool {
        let words = [at.pass, at.leg, at.position, pages];
        self.cells().map(|cell| cell.load(Ordering::Relaxed)) == words
            && self.check.load(Ordering::Relaxed) == mixed(words)
    }

    fn cells(&self) -> [&AtomicU64; 4] {
        [&self.pass, &self.leg, &self.position, &self.pages]
    }

    /// The pass under way, 0 before the start.
    pub(crate) fn pass(&self) -> u64 {
        self.pass.load(Ordering::Relaxed)
    }

    /// Hands in the result of the audit.
    pub(crate) fn finish(&self, lost: u64, torn: u64) {
        self.lost.store(lost, Ordering::Relaxed);
        self.torn.store(torn, Ordering::Relaxed);
        self.audited.store(true, Ordering::Release);
    }

    pub(crate) fn audited(&self) -> bool {
        self.audited.load(Ordering::Acquire)
    }
}

/// Shifts, so that words which change places do not cancel out.
fn mixed(words: [u64; 4]) -> u64 {
    words
        .into_iter()
        .fold(0x5eed, |sum: u64, word| sum.rotate_left(17) ^ word)
}

/// The sums over all vCPUs.
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
