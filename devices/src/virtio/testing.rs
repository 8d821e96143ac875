//! Driver for the unit tests. It uses registers and rings as a guest's driver does, and shares no code with the device
//! except the bus interface.
#![allow(clippy::cast_possible_truncation)]

use std::os::fd::AsRawFd;
use std::sync::Arc;
use std::sync::atomic::{Ordering, fence};
use std::time::{Duration, Instant};

use vm_memory::bitmap::AtomicBitmap;
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};
use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use super::{Device, Interrupt, MmioTransport, VirtioSnapshot};
use crate::BusDevice;

pub(crate) type Memory = Arc<GuestMemoryMmap<AtomicBitmap>>;

/// Time limit for everything that the tests wait for.
const PATIENCE: Duration = Duration::from_secs(20);
/// VIRTIO_F_VERSION_1.
pub(crate) const VERSION_1: u64 = 1 << 32;
/// VIRTIO_F_INDIRECT_DESC.
pub(crate) const INDIRECT: u64 = 1 << 28;
/// VIRTIO_F_EVENT_IDX.
pub(crate) const EVENT_INDEX: u64 = 1 << 29;
/// Descriptor flags: VIRTQ_DESC_F_NEXT, _WRITE and _INDIRECT.
pub(crate) const NEXT: u16 = 1;
pub(crate) const WRITE: u16 = 2;
pub(crate) const TABLE: u16 = 4;
/// End of the first piece of guest memory. The second piece starts at [`HIGH`].
pub(crate) const LOW_END: u64 = 8 << 20;
/// Start of the second piece of guest memory, which is as long as the first.
pub(crate) const HIGH: u64 = 16 << 20;
/// Start of memory that tests can use for buffers.
pub(crate) const DATA: u64 = 4 << 20;
/// Value of `Status` with all bits up to DRIVER_OK.
pub(crate) const RUNNING: u32 = 15;
pub(crate) const NEEDS_RESET: u32 = 64;

pub(crate) fn memory() -> Memory {
    let bytes = 8 << 20;
    Arc::new(
        GuestMemoryMmap::from_ranges(&[(GuestAddress(0), bytes), (GuestAddress(HIGH), bytes)])
            .unwrap(),
    )
}

/// Descriptor with arbitrary fields.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Raw {
    pub(crate) address: u64,
    pub(crate) bytes: u32,
    pub(crate) flags: u16,
    pub(crate) next: u16,
}

/// Buffer of a valid chain.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Part {
    /// Device-readable buffer: address and length in bytes.
    Out(u64, u32),
    /// Device-writable buffer: address and length in bytes.
    In(u64, u32),
}

/// Rings of one queue, as the driver keeps track of them.
#[derive(Clone, Debug)]
pub(crate) struct Ring {
    pub(crate) base: u64,
    size: u16,
    next_descriptor: u16,
    next_available: u16,
    seen_used: u16,
}

impl Ring {
    fn new(index: usize, size: u16) -> Self {
        Self {
            base: 0x10_0000 + 0x1_0000 * index as u64,
            size,
            next_descriptor: 0,
            next_available: 0,
            seen_used: 0,
        }
    }
    fn available(&self) -> u64 {
        self.base + 0x4000
    }
    pub(crate) fn used(&self) -> u64 {
        self.base + 0x8000
    }
}

/// Driver of one device.
pub(crate) struct Driver {
    pub(crate) device: MmioTransport,
    pub(crate) memory: Memory,
    pub(crate) rings: Vec<Ring>,
    line: EventFd,
    line_epoll: Epoll,
}

/// Returns an interrupt, and the eventfd that it signals.
pub(crate) fn interrupt() -> (Interrupt, EventFd) {
    let line = EventFd::new(EFD_NONBLOCK).unwrap();
    (Interrupt::new(line.try_clone().unwrap()), line)
}

fn readable(line: &EventFd) -> Epoll {
    let epoll = Epoll::new().unwrap();
    let event = EpollEvent::new(EventSet::IN, 0);
    epoll
        .ctl(ControlOperation::Add, line.as_raw_fd(), event)
        .unwrap();
    epoll
}

impl Driver {
    pub(crate) fn new(make: impl FnOnce(Interrupt) -> Box<dyn Device<Memory>>) -> Self {
        let memory = memory();
        let (interrupt, line) = interrupt();
        let model = make(interrupt.clone());
        let device = MmioTransport::new("_test", model, Arc::clone(&memory), interrupt).unwrap();
        Self::over(device, memory, line)
    }

    /// Creates a driver for `device`, whose interrupt signals `line`.
    pub(crate) fn over(device: MmioTransport, memory: Memory, line: EventFd) -> Self {
        Self {
            device,
            memory,
            rings: Vec::new(),
            line_epoll: readable(&line),
            line,
        }
    }

    /// Replaces the device, and keeps the guest's memory and rings.
    pub(crate) fn with(self, device: MmioTransport, line: EventFd) -> Self {
        Self {
            rings: self.rings,
            ..Self::over(device, self.memory, line)
        }
    }

    /// Replaces the device by one that is restored from `saved`, and keeps the guest's memory and rings. The device is
    /// paused.
    pub(crate) fn moved(
        self,
        saved: &VirtioSnapshot,
        make: impl FnOnce(Interrupt) -> Box<dyn Device<Memory>>,
    ) -> Self {
        let (interrupt, line) = interrupt();
        let model = make(interrupt.clone());
        let memory = Arc::clone(&self.memory);
        let device = MmioTransport::restore("_test", model, memory, interrupt, saved).unwrap();
        self.with(device, line)
    }

    /// Reads a register.
    pub(crate) fn get(&mut self, offset: u64) -> u32 {
        let mut data = [0; 4];
        self.device.read(offset, &mut data);
        u32::from_le_bytes(data)
    }

    /// Writes a register.
    pub(crate) fn set(&mut self, offset: u64, value: u32) {
        self.device.write(offset, &value.to_le_bytes());
    }

    pub(crate) fn device_write(&mut self, offset: u64, data: &[u8]) {
        self.device.write(offset, data);
    }

    /// Reads from the configuration space.
    pub(crate) fn config<const N: usize>(&mut self, offset: u64) -> [u8; N] {
        let mut data = [0; N];
        self.device.read(0x100 + offset, &mut data);
        data
    }

    /// Reads the feature bits that the device offers.
    pub(crate) fn offered(&mut self) -> u64 {
        self.set(0x14, 0);
        let low = self.get(0x10);
        self.set(0x14, 1);
        u64::from(low) | u64::from(self.get(0x10)) << 32
    }

    /// Resets the device and accepts `features`. Returns whether the device agrees.
    pub(crate) fn negotiate(&mut self, features: u64) -> bool {
        for status in [0, 1, 3] {
            self.set(0x70, status);
        }
        let [low, high] = [features & 0xffff_ffff, features >> 32].map(|half| half as u32);
        for (select, half) in [(0, low), (1, high)] {
            self.set(0x24, select);
            self.set(0x20, half);
        }
        self.set(0x70, 11);
        self.get(0x70) == 11
    }

    /// Sets up a queue with empty rings.
    pub(crate) fn set_up_queue(&mut self, index: usize, size: u16) {
        let ring = Ring::new(index, size);
        // The driver initializes rings with zeros.
        self.memory
            .write_slice(&[0; 0x1_0000], GuestAddress(ring.base))
            .unwrap();
        self.set(0x30, index as u32);
        self.set(0x38, size.into());
        let areas = [
            (0x80, ring.base),
            (0x90, ring.available()),
            (0xa0, ring.used()),
        ];
        for (register, address) in areas {
            self.set(register, address as u32);
            self.set(register + 4, (address >> 32) as u32);
        }
        self.set(0x44, 1);
        self.rings
            .resize(self.rings.len().max(index + 1), ring.clone());
        self.rings[index] = ring;
    }

    /// Takes the driver to DRIVER_OK, with queues of 16 entries.
    pub(crate) fn start(&mut self, features: u64) {
        assert!(
            self.negotiate(features | VERSION_1),
            "the device did not accept the features"
        );
        self.rings.clear();
        for index in 0..self.device.notifiers().len() {
            self.set_up_queue(index, 16);
        }
        self.set(0x70, RUNNING);
        assert_eq!(self.get(0x70), RUNNING);
    }

    pub(crate) fn write_memory(&self, address: u64, data: &[u8]) {
        self.memory
            .write_slice(data, GuestAddress(address))
            .unwrap();
    }

    pub(crate) fn read_memory(&self, address: u64, len: usize) -> Vec<u8> {
        let mut data = vec![0; len];
        self.memory
            .read_slice(&mut data, GuestAddress(address))
            .unwrap();
        data
    }

    pub(crate) fn write_descriptor(&self, table: u64, index: u16, raw: Raw) {
        let at = table + 16 * u64::from(index);
        let mut bytes = raw.address.to_le_bytes().to_vec();
        bytes.extend(raw.bytes.to_le_bytes());
        bytes.extend(raw.flags.to_le_bytes());
        bytes.extend(raw.next.to_le_bytes());
        self.write_memory(at, &bytes);
    }

    /// Makes the chain of descriptor `head` available, without a notification.
    pub(crate) fn make_available(&mut self, queue: usize, head: u16) {
        let ring = &mut self.rings[queue];
        let slot = ring.available() + 4 + 2 * u64::from(ring.next_available % ring.size);
        ring.next_available = ring.next_available.wrapping_add(1);
        let (index_at, index) = (ring.available() + 2, ring.next_available);
        self.write_memory(slot, &head.to_le_bytes());
        self.memory
            .store(index, GuestAddress(index_at), Ordering::Release)
            .unwrap();
        fence(Ordering::SeqCst);
    }

    /// Writes a chain of `parts` and makes it available. Returns its head.
    pub(crate) fn add(&mut self, queue: usize, parts: &[Part]) -> u16 {
        let size = self.rings[queue].size;
        let table = self.rings[queue].base;
        let head = self.rings[queue].next_descriptor;
        for (number, part) in (1..).zip(parts) {
            let (address, bytes, write) = match *part {
                Part::Out(address, bytes) => (address, bytes, 0),
                Part::In(address, bytes) => (address, bytes, WRITE),
            };
            let index = self.rings[queue].next_descriptor;
            let next = (index + 1) % size;
            self.rings[queue].next_descriptor = next;
            let more = if number == parts.len() { 0 } else { NEXT };
            let raw = Raw {
                address,
                bytes,
                flags: write | more,
                next,
            };
            self.write_descriptor(table, index, raw);
        }
        self.make_available(queue, head);
        head
    }

    /// Writes `descriptors` to the table from index 0 on, and makes the chain of descriptor `head` available.
    pub(crate) fn add_raw(&mut self, queue: usize, descriptors: &[Raw], head: u16) {
        for (index, raw) in (0..).zip(descriptors) {
            self.write_descriptor(self.rings[queue].base, index, *raw);
        }
        self.make_available(queue, head);
    }

    pub(crate) fn notify(&mut self, queue: usize) {
        self.set(0x50, queue as u32);
    }

    fn used_index(&self, queue: usize) -> u16 {
        self.used_index_of(queue)()
    }

    /// Returns a function that reads the used index, for another thread.
    pub(crate) fn used_index_of(&self, queue: usize) -> impl Fn() -> u16 + Send + 'static {
        let memory = self.memory.clone();
        let place = GuestAddress(self.rings[queue].used() + 2);
        move || memory.load(place, Ordering::Acquire).unwrap()
    }

    /// Returns the head and the written bytes of the next used chain, if there is one.
    pub(crate) fn used(&mut self, queue: usize) -> Option<(u16, u32)> {
        if self.used_index(queue) == self.rings[queue].seen_used {
            return None;
        }
        let ring = &mut self.rings[queue];
        let at = ring.used() + 4 + 8 * u64::from(ring.seen_used % ring.size);
        ring.seen_used = ring.seen_used.wrapping_add(1);
        // Sets `used_event`, to request an interrupt for the next used chain.
        let event_at = ring.available() + 4 + 2 * u64::from(ring.size);
        let seen = ring.seen_used;
        self.write_memory(event_at, &seen.to_le_bytes());
        fence(Ordering::SeqCst);
        let entry = self.read_memory(at, 8);
        let word = |at: usize| u32::from_le_bytes(entry[at..at + 4].try_into().unwrap());
        Some((u16::try_from(word(0)).unwrap(), word(4)))
    }

    /// Waits for the interrupt until there is a used chain, and returns its head and the written bytes.
    pub(crate) fn wait_used(&mut self, queue: usize) -> (u16, u32) {
        let deadline = Instant::now() + PATIENCE;
        loop {
            if let Some(used) = self.used(queue) {
                return used;
            }
            self.wait_line(deadline);
            let causes = self.get(0x60);
            self.set(0x64, causes);
        }
    }

    /// Writes `index` to the available ring, whatever the number of available chains is.
    pub(crate) fn set_available_index(&self, queue: usize, index: u16) {
        self.write_memory(self.rings[queue].available() + 2, &index.to_le_bytes());
    }

    /// Adds a chain, notifies the device, and waits until the chain is used. Returns the written bytes.
    pub(crate) fn request(&mut self, queue: usize, parts: &[Part]) -> u32 {
        let head = self.add(queue, parts);
        self.notify(queue);
        let (used, written) = self.wait_used(queue);
        assert_eq!(used, head);
        written
    }

    /// Waits until the device sets DEVICE_NEEDS_RESET and raises a configuration change interrupt.
    pub(crate) fn wait_needs_reset(&mut self) {
        let deadline = Instant::now() + PATIENCE;
        while self.get(0x70) & NEEDS_RESET == 0 || self.get(0x60) & 2 == 0 {
            self.wait_line(deadline);
        }
        let why = self
            .device
            .failure()
            .expect("the device does not say why it needs a reset");
        assert!(!why.is_empty());
    }

    /// Polls until `condition` holds.
    pub(crate) fn wait_until(&mut self, what: &str, mut condition: impl FnMut(&mut Self) -> bool) {
        let deadline = Instant::now() + PATIENCE;
        while !condition(self) {
            assert!(Instant::now() < deadline, "{what} did not happen in time");
            std::thread::sleep(Duration::from_millis(1));
        }
    }

    /// Returns whether the interrupt was raised since the last call.
    pub(crate) fn was_interrupted(&self) -> bool {
        self.line.read().is_ok()
    }

    fn wait_line(&self, deadline: Instant) {
        let failure = self.device.failure();
        assert!(
            Instant::now() < deadline,
            "no interrupt; failure: {failure:?}"
        );
        let mut events = [EpollEvent::default()];
        self.line_epoll.wait(1000, &mut events).unwrap();
        let _taken = self.line.read();
    }
}
