//! A device and a driver for it that keeps to the rules, step by step, so that an attack can take the place of any step.

use crate::dma::{self, Patience};
use crate::mmio;
use crate::queue::{Part, QUEUE_BYTES, Queue};
use crate::spec::{
    CONFIGURATION_CHANGE, DEVICE_BYTES, FIRST_DEVICE, Kind, MAGIC, VERSION, feature, register,
    status,
};

/// Most queues of a device that are used.
const QUEUES_MOST: usize = 3;
/// Buffers begin here in a device's arena, behind its rings.
const BUFFERS: u64 = 0x1_0000;
pub(crate) const BUFFER_BYTES: u32 = 4096;
/// The first of the buffers in which a device receives, and how many there are.
const RECEIVE_BUFFER: u64 = 4;
pub(crate) const RECEIVE_BUFFERS: u16 = 4;

/// Why a device does not do what it should.
#[derive(Clone, Copy)]
pub(crate) enum Trouble {
    /// It does nothing.
    Silent(&'static str),
    /// It does something else.
    Wrong(&'static str),
}

pub(crate) type Result<T = ()> = core::result::Result<T, Trouble>;

/// `Err` with what is wrong.
pub(crate) fn ensure(is_so: bool, what: &'static str) -> Result {
    if is_so {
        Ok(())
    } else {
        Err(Trouble::Wrong(what))
    }
}

pub(crate) struct Device {
    pub(crate) kind: Kind,
    /// Its registers.
    pub(crate) base: u64,
    arena: u64,
    pub(crate) queues: [Queue; QUEUES_MOST],
    pub(crate) queue_count: usize,
    /// How many real operations were done with it.
    pub(crate) operations: u32,
}

impl Device {
    /// The device in `slot`, if there is one of a known kind.
    pub(crate) fn find(slot: usize) -> Option<Self> {
        let base = FIRST_DEVICE + slot as u64 * DEVICE_BYTES;
        let read = |offset| mmio::read32(base + offset);
        if read(register::MAGIC_VALUE) != MAGIC || read(register::VERSION) != VERSION {
            return None;
        }
        let kind = Kind::of(read(register::DEVICE_ID))?;
        let arena = dma::arena(slot);
        let mut device = Self {
            kind,
            base,
            arena,
            queues: [Queue::default(); QUEUES_MOST],
            queue_count: 0,
            operations: 0,
        };
        for index in 0..kind.queues().len() {
            device.write(register::QUEUE_SEL, index as u32);
            let most = device.read(register::QUEUE_NUM_MAX);
            if most == 0 {
                break;
            }
            device.queues[index] = Queue::new(arena + index as u64 * QUEUE_BYTES, most);
            device.queue_count += 1;
        }
        Some(device)
    }

    pub(crate) fn read(&self, offset: u64) -> u32 {
        mmio::read32(self.base + offset)
    }

    pub(crate) fn write(&self, offset: u64, value: u32) {
        mmio::write32(self.base + offset, value);
    }

    pub(crate) fn config8(&self, offset: u64) -> u8 {
        mmio::read8(self.base + register::CONFIG + offset)
    }

    pub(crate) fn config32(&self, offset: u64) -> u32 {
        self.read(register::CONFIG + offset)
    }

    /// Buffer `number` of 4 KiB.
    pub(crate) fn buffer(&self, number: u64) -> u64 {
        self.arena + BUFFERS + number * u64::from(BUFFER_BYTES)
    }

    pub(crate) fn receive_buffer(&self, number: u16) -> u64 {
        self.buffer(RECEIVE_BUFFER + u64::from(number))
    }

    pub(crate) fn status(&self) -> u32 {
        self.read(register::STATUS)
    }

    /// Whether it asks for a reset, and has said so.
    pub(crate) fn needs_reset(&self) -> Result<bool> {
        if self.status() & status::DEVICE_NEEDS_RESET == 0 {
            return Ok(false);
        }
        let told = self.read(register::INTERRUPT_STATUS) & CONFIGURATION_CHANGE != 0;
        ensure(told, "no interrupt for the reset it needs")?;
        Ok(true)
    }

    /// It runs, and asks for nothing.
    pub(crate) fn runs(&self) -> Result {
        ensure(self.status() == status::RUNNING, "its status changed")
    }

    pub(crate) fn features(&self) -> u64 {
        self.write(register::DEVICE_FEATURES_SEL, 0);
        let low = u64::from(self.read(register::DEVICE_FEATURES));
        self.write(register::DEVICE_FEATURES_SEL, 1);
        low | u64::from(self.read(register::DEVICE_FEATURES)) << 32
    }

    /// What a driver chooses of the features offered.
    pub(crate) fn choice(&self) -> u64 {
        feature::VERSION_1 | self.features() & self.kind.wanted_features()
    }

    pub(crate) fn reset(&mut self) -> Result {
        self.write(register::STATUS, 0);
        ensure(self.status() == 0, "a status behind a reset")?;
        let pending = self.read(register::INTERRUPT_STATUS);
        ensure(pending == 0, "an interrupt behind a reset")?;
        self.queues[..self.queue_count]
            .iter_mut()
            .for_each(Queue::clear);
        Ok(())
    }

    pub(crate) fn choose(&self, features: u64) {
        self.write(register::DRIVER_FEATURES_SEL, 0);
        self.write(register::DRIVER_FEATURES, features as u32);
        self.write(register::DRIVER_FEATURES_SEL, 1);
        self.write(register::DRIVER_FEATURES, (features >> 32) as u32);
    }

    /// As far as FEATURES_OK.
    pub(crate) fn negotiate(&mut self, features: u64) -> Result {
        self.reset()?;
        self.write(register::STATUS, status::ACKNOWLEDGE);
        self.write(register::STATUS, status::ACKNOWLEDGE | status::DRIVER);
        self.choose(features);
        let agreed = status::ACKNOWLEDGE | status::DRIVER | status::FEATURES_OK;
        self.write(register::STATUS, agreed);
        ensure(self.status() == agreed, "features that it offers refused")
    }

    pub(crate) fn set_addresses(&self, addresses: [u64; 3]) {
        for (register, address) in register::QUEUE_ADDRESSES.into_iter().zip(addresses) {
            self.write(register, address as u32);
            self.write(register + 4, (address >> 32) as u32);
        }
    }

    pub(crate) fn set_up_queue(&self, index: usize) {
        let queue = &self.queues[index];
        self.write(register::QUEUE_SEL, index as u32);
        self.write(register::QUEUE_NUM, queue.size.into());
        self.set_addresses(queue.addresses());
        self.write(register::QUEUE_READY, 1);
    }

    /// Sets up all queues but `left_out`.
    pub(crate) fn set_up_queues(&self, left_out: Option<usize>) {
        (0..self.queue_count)
            .filter(|index| Some(*index) != left_out)
            .for_each(|index| self.set_up_queue(index));
    }

    pub(crate) fn set_driver_ok(&self) {
        self.write(register::STATUS, status::RUNNING);
    }

    /// A whole start. Buffers to receive in are given to all queues that have some but `left_empty`.
    pub(crate) fn start(&mut self, left_empty: Option<usize>) -> Result {
        self.start_with(self.choice(), left_empty)
    }

    pub(crate) fn start_with(&mut self, features: u64, left_empty: Option<usize>) -> Result {
        self.negotiate(features)?;
        self.set_up_queues(None);
        self.set_driver_ok();
        self.runs()?;
        if left_empty != Some(0) {
            self.give_receive_buffers();
        }
        Ok(())
    }

    /// To the queue that receives, where there is one.
    pub(crate) fn give_receive_buffers(&mut self) {
        if !self.kind.is_receive(0) {
            return;
        }
        for number in 0..RECEIVE_BUFFERS {
            self.give_receive_buffer(number);
        }
        self.notify(0);
    }

    pub(crate) fn give_receive_buffer(&mut self, number: u16) {
        let part = Part::into(self.receive_buffer(number), BUFFER_BYTES);
        self.queues[0].chain(number, &[part]);
        self.queues[0].publish(number);
    }

    pub(crate) fn notify(&self, queue: usize) {
        self.write(register::QUEUE_NOTIFY, queue as u32);
    }

    /// Waits for the next used chain of `queue`; for its length if it is the one of `head`.
    pub(crate) fn wait_used(&mut self, queue: usize, head: u16) -> Result<u32> {
        let mut patience = Patience::new();
        while patience.look() {
            if let Some((id, written)) = self.queues[queue].take_used() {
                ensure(id == u32::from(head), "another chain came back")?;
                return Ok(written);
            }
            if patience.is_due() && self.needs_reset()? {
                return Err(Trouble::Wrong("it needs a reset"));
            }
        }
        Err(Trouble::Silent("a request is not answered"))
    }

    /// Gives a chain to `queue`, and waits until it comes back.
    pub(crate) fn request(&mut self, queue: usize, parts: &[Part]) -> Result<u32> {
        self.queues[queue].chain(0, parts);
        self.queues[queue].publish(0);
        self.notify(queue);
        self.wait_used(queue, 0)
    }
}
