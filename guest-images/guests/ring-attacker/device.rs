//! A virtio-mmio device and a correct driver for it, in separate steps, so that an attack can replace any step.

use crate::dma::{self, Patience};
use crate::mmio;
use crate::queue::{Part, QUEUE_BYTES, Queue};
use crate::spec::{
    CONFIGURATION_CHANGE, DEVICE_BYTES, FIRST_DEVICE, Kind, MAGIC, VERSION, feature, register,
    status,
};

/// Maximum number of queues of a device.
const QUEUES_MOST: usize = 3;
/// Offset of the buffers in the arena of a device. The rings come first.
const BUFFERS: u64 = 0x1_0000;
pub(crate) const BUFFER_BYTES: u32 = 4096;
/// Number of the first receive buffer, and number of receive buffers.
const RECEIVE_BUFFER: u64 = 4;
pub(crate) const RECEIVE_BUFFERS: u16 = 4;

/// Errors of a device.
#[derive(Clone, Copy)]
pub(crate) enum Trouble {
    /// The device does not react in time.
    Silent(&'static str),
    /// The device does something wrong.
    Wrong(&'static str),
}

pub(crate) type Result<T = ()> = core::result::Result<T, Trouble>;

/// Returns [`Trouble::Wrong`] unless a condition holds.
pub(crate) fn ensure(is_so: bool, what: &'static str) -> Result {
    if is_so {
        Ok(())
    } else {
        Err(Trouble::Wrong(what))
    }
}

/// A device and the state of its driver.
pub(crate) struct Device {
    pub(crate) kind: Kind,
    /// Address of the registers.
    pub(crate) base: u64,
    arena: u64,
    pub(crate) queues: [Queue; QUEUES_MOST],
    pub(crate) queue_count: usize,
    /// Number of operations that were started.
    pub(crate) operations: u32,
}

impl Device {
    /// Returns the device in a slot of the bus, if there is one of a known kind.
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

    /// Returns the address of a buffer, which has 4 KiB.
    pub(crate) fn buffer(&self, number: u64) -> u64 {
        self.arena + BUFFERS + number * u64::from(BUFFER_BYTES)
    }

    pub(crate) fn receive_buffer(&self, number: u16) -> u64 {
        self.buffer(RECEIVE_BUFFER + u64::from(number))
    }

    pub(crate) fn status(&self) -> u32 {
        self.read(register::STATUS)
    }

    /// Returns true if the device needs a reset. Fails if it has not sent an interrupt for it.
    pub(crate) fn needs_reset(&self) -> Result<bool> {
        if self.status() & status::DEVICE_NEEDS_RESET == 0 {
            return Ok(false);
        }
        let told = self.read(register::INTERRUPT_STATUS) & CONFIGURATION_CHANGE != 0;
        ensure(told, "no interrupt for the reset it needs")?;
        Ok(true)
    }

    /// Checks that the device runs and needs no reset.
    pub(crate) fn runs(&self) -> Result {
        ensure(self.status() == status::RUNNING, "its status changed")
    }

    pub(crate) fn features(&self) -> u64 {
        self.write(register::DEVICE_FEATURES_SEL, 0);
        let low = u64::from(self.read(register::DEVICE_FEATURES));
        self.write(register::DEVICE_FEATURES_SEL, 1);
        low | u64::from(self.read(register::DEVICE_FEATURES)) << 32
    }

    /// Returns the features that the driver accepts.
    pub(crate) fn choice(&self) -> u64 {
        feature::VERSION_1 | self.features() & self.kind.wanted_features()
    }

    /// Resets the device and clears the queues.
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

    /// Resets the device and initializes it up to FEATURES_OK.
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

    /// Sets up all queues except `left_out`.
    pub(crate) fn set_up_queues(&self, left_out: Option<usize>) {
        (0..self.queue_count)
            .filter(|index| Some(*index) != left_out)
            .for_each(|index| self.set_up_queue(index));
    }

    pub(crate) fn set_driver_ok(&self) {
        self.write(register::STATUS, status::RUNNING);
    }

    /// Initializes the device. Adds receive buffers to the receive queue, unless it is `left_empty`.
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

    /// Adds all receive buffers to the receive queue, if the device has one.
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

    /// Waits for the next used chain of `queue`, which must start at `head`. Returns the number of bytes that the device wrote.
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

    /// Makes a chain available in `queue` and waits until the device has used it.
    pub(crate) fn request(&mut self, queue: usize, parts: &[Part]) -> Result<u32> {
        self.queues[queue].chain(0, parts);
        self.queues[queue].publish(0);
        self.notify(queue);
        self.wait_used(queue, 0)
    }
}
