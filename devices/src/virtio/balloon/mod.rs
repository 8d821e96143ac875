//! Memory balloon (virtio 1.2, 5.5). Inflating gives guest pages to the host, and the guest gets a page back by
//! touching it. With free page reporting, the guest also reports pages that it does not use.
//!
//! The monitor implements [`Discard`], which frees the pages. That may have to stop vCPUs, and a vCPU may be about to
//! reset this device, so the worker does not hold the queues while it discards.

mod spec;
mod state;
#[cfg(test)]
mod tests;

use std::io;
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};

use virtio_bindings::virtio_ids::VIRTIO_ID_BALLOON;
use vm_memory::GuestAddressSpace;

use super::active_queues::{ActiveQueues, Completion};
use super::device::{
    ConfigSpace, Counters, Device, DeviceError, EventRegistry, Identity, read_config,
};
use super::interrupt::Interrupt;
use super::queue::{Chain, QueueError};
use super::state::{DeviceState, DeviceStateError};
use spec::{
    ACTUAL_OFFSET, DEFLATE, DEFLATE_ON_OOM, INFLATE, PAGE_BYTES, PAGE_NUMBER_BYTES, PAGES_MAX,
    QUEUE_SIZE, REPORT, REPORTING,
};

pub use state::BalloonSnapshot;

/// Maximum number of requests that one wake-up of the worker handles, before it looks at its other events.
const REQUESTS_PER_WAKEUP: u32 = 64;

/// Frees guest pages on the host.
pub trait Discard: Send {
    /// Frees the memory in `ranges`, which are guest-physical addresses. The memory then reads as zeros.
    ///
    /// The ranges are whole pages of 4 KiB in guest memory, in ascending order, and not adjacent. The implementation
    /// must mark the pages as dirty, because their content changes.
    ///
    /// The guest may take its pages back by a reset during the call. The implementation must call `taken_back` when no
    /// vCPU can reset the device any more and before it frees the memory, and must free nothing if that returns true.
    ///
    /// # Errors
    /// Returns the kernel's error if the memory could not be freed. Its content must be unchanged then.
    fn discard(&mut self, ranges: &[Range<u64>], taken_back: &dyn Fn() -> bool) -> io::Result<()>;
}

/// Configuration of a memory balloon.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct BalloonOptions {
    /// Initial target: number of 4 KiB pages that the guest should give to the balloon.
    pub target_pages: u32,
    /// Allows the guest to take pages back before its OOM killer runs.
    pub deflate_on_oom: bool,
    /// Offers free page reporting to the guest.
    pub free_page_reporting: bool,
}

/// Configuration space, which the control of the balloon shares.
struct Config {
    target: AtomicU32,
    actual: AtomicU32,
}

impl ConfigSpace for Config {
    fn read(&self, offset: u64, data: &mut [u8]) {
        let [target, actual] = [&self.target, &self.actual].map(|v| v.load(Ordering::SeqCst));
        read_config(&spec::config(target, actual), offset, data);
    }

    /// The driver may write `actual` at any time (virtio 1.2, 5.5.4).
    fn write(&self, offset: u64, data: &[u8]) {
        if let (ACTUAL_OFFSET, Ok(value)) = (offset, data.try_into()) {
            let value = u32::from_le_bytes(value);
            self.actual.store(value, Ordering::SeqCst);
        }
    }

    /// After a reset, the guest owns all of its pages (virtio 1.2, 5.5.5).
    fn reset(&self) {
        self.actual.store(0, Ordering::SeqCst);
    }
}

/// Counters of a memory balloon.
#[derive(Default)]
struct BalloonCounters {
    inflated: AtomicU64,
    deflated: AtomicU64,
    reported: AtomicU64,
    errors: AtomicU64,
}

impl Counters for BalloonCounters {
    fn counters(&self) -> Vec<(&'static str, u64)> {
        let value = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        vec![
            ("inflated_pages", value(&self.inflated)),
            ("deflated_pages", value(&self.deflated)),
            ("reported_pages", value(&self.reported)),
            ("errors", value(&self.errors)),
        ]
    }
}

/// Controls the size of a balloon. Clones control the same balloon.
#[derive(Clone)]
pub struct BalloonControl {
    config: Arc<Config>,
    interrupt: Interrupt,
}

impl BalloonControl {
    /// Sets the target to `pages` of 4 KiB. The guest follows when and if it can.
    pub fn set_target(&self, pages: u32) {
        self.config.target.store(pages, Ordering::SeqCst);
        self.interrupt.config_changed();
    }

    /// Returns the target in pages of 4 KiB.
    #[must_use]
    pub fn target(&self) -> u32 {
        self.config.target.load(Ordering::SeqCst)
    }

    /// Returns the number of 4 KiB pages in the balloon, as the guest reports it.
    #[must_use]
    pub fn actual(&self) -> u32 {
        self.config.actual.load(Ordering::SeqCst)
    }
}

/// Memory balloon.
pub struct Balloon {
    features: u64,
    config: Arc<Config>,
    discard: Box<dyn Discard>,
    counters: Arc<BalloonCounters>,
}

/// Request to free pages.
struct Request {
    head: u16,
    ranges: Vec<Range<u64>>,
}

impl Balloon {
    /// Creates the balloon that `config` describes, and the control of its size. `interrupt` must be the device's own.
    #[must_use]
    pub fn new(
        config: BalloonOptions,
        discard: Box<dyn Discard>,
        interrupt: Interrupt,
    ) -> (Self, BalloonControl) {
        let mut features = 0;
        if config.deflate_on_oom {
            features |= DEFLATE_ON_OOM;
        }
        if config.free_page_reporting {
            features |= REPORTING;
        }
        let space = Arc::new(Config {
            target: AtomicU32::new(config.target_pages),
            actual: AtomicU32::new(0),
        });
        let control = BalloonControl {
            config: Arc::clone(&space),
            interrupt,
        };
        let balloon = Self {
            features,
            config: space,
            discard,
            counters: Arc::default(),
        };
        (balloon, control)
    }

    /// Handles the requests of a queue with which the guest gives pages away.
    fn take_pages<'a, M: GuestAddressSpace>(
        &mut self,
        queue: usize,
        mut queues: ActiveQueues<'a, M>,
    ) -> Result<(), DeviceError> {
        for _ in 0..REQUESTS_PER_WAKEUP {
            let Some(chain) = queues.pop(queue)? else {
                if queues.enable_notification(queue)? {
                    continue;
                }
                return Ok(());
            };
            let request = match queue {
                INFLATE => inflated(&queues, chain)?,
                _ => reported(chain)?,
            };
            let (back, result) =
                queues.unlocked(|taken_back| self.discard.discard(&request.ranges, taken_back))?;
            queues = back;
            self.count(queue, &request, &result);
            queues.complete(queue, request.head, 0)?;
            queues.signal(queue)?;
        }
        queues.notify_again(queue);
        Ok(())
    }

    /// Counts the pages of a request, or its failure.
    fn count(&self, queue: usize, request: &Request, result: &io::Result<()>) {
        let pages = |range: &Range<u64>| (range.end - range.start) / PAGE_BYTES;
        let (counter, more) = match (result, queue) {
            (Err(_), _) => (&self.counters.errors, 1),
            (Ok(()), INFLATE) => (
                &self.counters.inflated,
                request.ranges.iter().map(pages).sum(),
            ),
            (Ok(()), _) => (
                &self.counters.reported,
                request.ranges.iter().map(pages).sum(),
            ),
        };
        counter.fetch_add(more, Ordering::Relaxed);
    }

    /// Handles requests to deflate. They need no work, because the guest gets a page back by touching it.
    fn deflate<M: GuestAddressSpace>(
        &self,
        queues: &mut ActiveQueues<'_, M>,
    ) -> Result<(), DeviceError> {
        queues.drain(DEFLATE, |queues, chain| {
            let pages = page_numbers(queues, chain)?.len();
            self.counters
                .deflated
                .fetch_add(pages as u64, Ordering::Relaxed);
            Ok(Completion::Used(0))
        })
    }
}

/// Returns the pages that a request to inflate names, as ranges.
fn inflated<M: GuestAddressSpace>(
    queues: &ActiveQueues<'_, M>,
    chain: Chain,
) -> Result<Request, QueueError> {
    let head = chain.head;
    let mut pages = page_numbers(queues, chain)?;
    pages.sort_unstable();
    let mut ranges: Vec<Range<u64>> = Vec::new();
    for page in pages {
        let start = u64::from(page) * PAGE_BYTES;
        let end = start + PAGE_BYTES;
        if !queues.has_memory(start, PAGE_BYTES) {
            return Err(QueueError::Request {
                head,
                what: "a page for the balloon is not guest memory",
            });
        }
        match ranges.last_mut() {
            Some(last) if start <= last.end => last.end = end,
            _ => ranges.push(start..end),
        }
    }
    Ok(Request { head, ranges })
}

/// Reads the page numbers in a request to inflate or deflate.
fn page_numbers<M: GuestAddressSpace>(
    queues: &ActiveQueues<'_, M>,
    mut chain: Chain,
) -> Result<Vec<u32>, QueueError> {
    let malformed = |what| QueueError::Request {
        head: chain.head,
        what,
    };
    let bytes = chain.readable.len();
    if !chain.writable.is_empty() {
        return Err(malformed("page numbers must be in readable memory only"));
    }
    let entry = PAGE_NUMBER_BYTES as u64;
    if !bytes.is_multiple_of(entry) || bytes / entry > PAGES_MAX {
        return Err(malformed(
            "page numbers must be 4 bytes each, and at most 16384",
        ));
    }
    let mut numbers = vec![0; usize::try_from(bytes).unwrap_or_default()];
    queues.read(&mut chain.readable, &mut numbers)?;
    Ok(numbers
        .as_chunks::<PAGE_NUMBER_BYTES>()
        .0
        .iter()
        .map(|number| u32::from_le_bytes(*number))
        .collect())
}

/// Returns the memory that a report names (virtio 1.2, 5.5.6.7), rounded inwards to whole pages.
fn reported(chain: Chain) -> Result<Request, QueueError> {
    if !chain.readable.is_empty() {
        return Err(QueueError::Request {
            head: chain.head,
            what: "free pages must be writable memory only",
        });
    }
    let mut ranges: Vec<Range<u64>> = chain
        .writable
        .pieces()
        .map(|(start, bytes)| {
            start.next_multiple_of(PAGE_BYTES)..(start + bytes) / PAGE_BYTES * PAGE_BYTES
        })
        .filter(|range| !range.is_empty())
        .collect();
    ranges.sort_unstable_by_key(|range| range.start);
    ranges.dedup_by(|later, earlier| {
        let touches = later.start <= earlier.end;
        if touches {
            earlier.end = earlier.end.max(later.end);
        }
        touches
    });
    Ok(Request {
        head: chain.head,
        ranges,
    })
}

impl<M: GuestAddressSpace> Device<M> for Balloon {
    fn identity(&self) -> Identity {
        let queues = if self.features & REPORTING == 0 { 2 } else { 3 };
        Identity {
            device_type: VIRTIO_ID_BALLOON,
            features: self.features,
            queue_sizes: vec![QUEUE_SIZE; queues],
            config: Arc::clone(&self.config) as _,
            counters: Arc::clone(&self.counters) as _,
        }
    }

    fn notified(
        &mut self,
        queue: usize,
        mut queues: ActiveQueues<'_, M>,
        _: &mut EventRegistry<'_, '_>,
    ) -> Result<(), DeviceError> {
        match queue {
            DEFLATE => self.deflate(&mut queues),
            INFLATE | REPORT => self.take_pages(queue, queues),
            _ => Ok(()),
        }
    }

    fn save(&self) -> DeviceState {
        DeviceState::new(&BalloonSnapshot {
            target_pages: self.config.target.load(Ordering::SeqCst),
            actual_pages: self.config.actual.load(Ordering::SeqCst),
        })
    }

    fn restore(&mut self, state: &DeviceState) -> Result<(), DeviceStateError> {
        let state: BalloonSnapshot = state.decode("balloon")?;
        self.config
            .target
            .store(state.target_pages, Ordering::SeqCst);
        self.config
            .actual
            .store(state.actual_pages, Ordering::SeqCst);
        Ok(())
    }
}
