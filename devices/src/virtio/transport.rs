//! virtio over MMIO, version 2 (virtio 1.2, 4.2): the register file and its status machine.
//!
//! ```text
//! 0 ── ACKNOWLEDGE ── DRIVER ── FEATURES_OK ── DRIVER_OK     a driver's way, bit after bit
//!                       │            │             │
//!                    features      queues     the worker has the queues
//! ```
//!
//! Registers can be written only in the state in which the driver has to write them; all other writes,
//! and accesses of a wrong width, do nothing and are counted. Writing 0 to `Status` resets the device:
//! when the write is over, the device touches nothing of the driver's any more.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use virtio_bindings::virtio_config::VIRTIO_F_VERSION_1;
use virtio_bindings::virtio_ring::VIRTIO_RING_F_EVENT_IDX;
use vm_memory::GuestAddressSpace;
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use super::device::{Device, DeviceStateError, Identity};
use super::interrupt::Interrupt;
use super::queue::{QueueError, QueueSnapshot};
use super::session::{Shared, notify};
use super::spec::{COMMON_FEATURES, MAGIC, VENDOR, VERSION, register, status};
use super::state::{TransportSnapshot, VirtioSnapshot};
use super::worker::{SharedDevice, Worker, lock};
use crate::MmioDevice;

/// Why a device could not be made or restored.
#[derive(Debug, thiserror::Error)]
pub enum VirtioError {
    /// Its thread, or what that needs.
    #[error("{name}: {source}")]
    Thread {
        /// The device's name.
        name: String,
        /// What the kernel said.
        source: io::Error,
    },
    /// A saved state of the device that does not fit it.
    #[error("{name}: {source}")]
    Device {
        /// The device's name.
        name: String,
        /// What does not fit.
        source: DeviceStateError,
    },
    /// A saved state of the registers that does not fit the device.
    #[error("{name}: state: {what}")]
    Transport {
        /// The device's name.
        name: String,
        /// What does not fit.
        what: String,
    },
    /// A saved state with queues that cannot be.
    #[error("{name}: state: {source}")]
    Queue {
        /// The device's name.
        name: String,
        /// What cannot be.
        source: QueueError,
    },
}

/// The steps of a driver's start (3.1.1).
const STATUS_ORDER: [u32; 4] = [
    status::ACKNOWLEDGE,
    status::DRIVER,
    status::FEATURES_OK,
    status::DRIVER_OK,
];
/// What a driver can write to `Status`, beside DEVICE_NEEDS_RESET as it read it.
const KNOWN_STATUS: u32 =
    status::ACKNOWLEDGE | status::DRIVER | status::FEATURES_OK | status::DRIVER_OK | status::FAILED;

/// The registers that a driver sets.
#[derive(Clone, Copy, Debug, Default)]
struct Registers {
    status: u32,
    device_features_select: u32,
    driver_features: u64,
    driver_features_select: u32,
    queue_select: u32,
}

/// A virtio device on the MMIO bus, with its worker thread.
pub struct VirtioMmio<M: GuestAddressSpace> {
    name: String,
    identity: Identity,
    registers: Registers,
    /// As the driver set them up. While they are in use, the worker's know more.
    queues: Vec<QueueSnapshot>,
    refused: AtomicU64,
    device: SharedDevice<M>,
    shared: Arc<Shared<M>>,
    /// Ends first.
    _worker: Worker<M>,
}

impl<M: GuestAddressSpace + Send + Sync + 'static> VirtioMmio<M> {
    /// Starts `device` on a thread of this `name` (at most 15 bytes of it are seen), for a guest that has
    /// `memory`.
    ///
    /// # Errors
    /// Threads and descriptors that cannot be had.
    pub fn new(
        name: &str,
        device: Box<dyn Device<M>>,
        memory: M,
        interrupt: Interrupt,
    ) -> Result<Self, VirtioError> {
        Self::spawn(name, device, memory, interrupt, |_| {}).map_err(|source| VirtioError::Thread {
            name: name.into(),
            source,
        })
    }

    /// As [`Self::new`], with the state of a device that was saved; it is paused.
    ///
    /// # Errors
    /// Also a state that does not fit the device, or that no device can have been in.
    pub fn restore(
        name: &str,
        mut device: Box<dyn Device<M>>,
        memory: M,
        interrupt: Interrupt,
        saved: &VirtioSnapshot,
    ) -> Result<Self, VirtioError> {
        let identity = device.identity();
        check(&identity, &saved.transport).map_err(|what| VirtioError::Transport {
            name: name.into(),
            what,
        })?;
        device
            .restore(&saved.device)
            .map_err(|source| VirtioError::Device {
                name: name.into(),
                source,
            })?;
        let mut restored = Self::spawn(name, device, memory, interrupt, Shared::start_paused)
            .map_err(|source| VirtioError::Thread {
                name: name.into(),
                source,
            })?;
        restored
            .load(&saved.transport)
            .map_err(|source| VirtioError::Queue {
                name: name.into(),
                source,
            })?;
        Ok(restored)
    }

    fn spawn(
        name: &str,
        device: Box<dyn Device<M>>,
        memory: M,
        interrupt: Interrupt,
        prepare: impl FnOnce(&Shared<M>),
    ) -> io::Result<Self> {
        let identity = device.identity();
        let notifiers = identity
            .queue_sizes
            .iter()
            .map(|_| EventFd::new(EFD_NONBLOCK))
            .collect::<io::Result<_>>()?;
        let wake = EventFd::new(EFD_NONBLOCK)?;
        let shared = Arc::new(Shared::new(interrupt, notifiers, wake, memory));
        prepare(&shared);
        let device = Arc::new(std::sync::Mutex::new(device));
        let worker = Worker::spawn(name, Arc::clone(&device), Arc::clone(&shared))?;
        Ok(Self {
            name: name.into(),
            queues: fresh_queues(&identity),
            identity,
            registers: Registers::default(),
            refused: AtomicU64::new(0),
            device,
            shared,
            _worker: worker,
        })
    }

    fn load(&mut self, saved: &TransportSnapshot) -> Result<(), QueueError> {
        self.registers = Registers {
            status: saved.status,
            device_features_select: saved.device_features_select,
            driver_features: saved.driver_features,
            driver_features_select: saved.driver_features_select,
            queue_select: saved.queue_select,
        };
        self.queues.clone_from(&saved.queues);
        self.shared.interrupt.restore(
            saved.interrupt_status,
            saved.config_generation,
            saved.needs_reset,
        );
        if self.has(status::DRIVER_OK) {
            self.shared.interrupt.driver_is_ready();
            if !saved.needs_reset {
                self.activate()?;
            }
        }
        Ok(())
    }
}

impl<M: GuestAddressSpace> VirtioMmio<M> {
    /// The name of the device and its thread.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.name
    }

    /// One for each queue, by index: an event on it is the driver's notification. The monitor wires them to
    /// writes of the index to [`QUEUE_NOTIFY`](super::QUEUE_NOTIFY), 32 bits wide (with KVM: ioeventfds).
    #[must_use]
    pub fn notifiers(&self) -> &[EventFd] {
        &self.shared.notifiers
    }

    /// What the device has done since it was made.
    #[must_use]
    pub fn counters(&self) -> Vec<(&'static str, u64)> {
        self.identity.counters.counters()
    }

    /// Its interrupt.
    #[must_use]
    pub fn interrupt(&self) -> &Interrupt {
        &self.shared.interrupt
    }

    /// Stops the worker between two requests; returns when it stands. Idempotent. The guest's vCPUs are
    /// stopped before, so that nothing is asked of the device meanwhile.
    pub fn pause(&self) {
        self.shared.pause();
    }

    /// Lets the worker go on. Idempotent.
    pub fn resume(&self) {
        self.shared.resume();
    }

    /// The state of the device, which is paused; none if it is not.
    #[must_use]
    pub fn save(&self) -> Option<VirtioSnapshot> {
        if !self.shared.is_paused() {
            return None;
        }
        let in_use = self.shared.save_queues();
        let queues = if in_use.is_empty() {
            self.queues.clone()
        } else {
            in_use
        };
        let interrupt = &self.shared.interrupt;
        let transport = TransportSnapshot {
            device_type: self.identity.device_type,
            status: self.registers.status,
            needs_reset: interrupt.is_reset_needed(),
            device_features: offered(&self.identity),
            device_features_select: self.registers.device_features_select,
            driver_features: self.registers.driver_features,
            driver_features_select: self.registers.driver_features_select,
            queue_select: self.registers.queue_select,
            interrupt_status: interrupt.status(),
            config_generation: interrupt.generation(),
            queues,
        };
        let device = lock(&self.device).save();
        Some(VirtioSnapshot { transport, device })
    }

    /// Why the device needs a reset, if it does and is not a restored one.
    #[must_use]
    pub fn failure(&self) -> Option<String> {
        self.shared.failure()
    }

    /// Register accesses so far that did nothing, because of their width, place or time.
    #[must_use]
    pub fn refused(&self) -> u64 {
        self.refused.load(Ordering::Relaxed)
    }

    fn has(&self, bits: u32) -> bool {
        self.registers.status & bits == bits
    }

    fn read_register(&self, offset: u64) -> u32 {
        let interrupt = &self.shared.interrupt;
        match offset {
            register::MAGIC_VALUE => MAGIC,
            register::VERSION => VERSION,
            register::DEVICE_ID => self.identity.device_type,
            register::VENDOR_ID => VENDOR,
            register::DEVICE_FEATURES => half(
                offered(&self.identity),
                self.registers.device_features_select,
            ),
            register::QUEUE_NUM_MAX => self.queue().map_or(0, |queue| queue.max_size.into()),
            register::QUEUE_READY => self.queue().map_or(0, |queue| queue.ready.into()),
            register::INTERRUPT_STATUS => interrupt.status(),
            register::STATUS => self.status(),
            register::CONFIG_GENERATION => interrupt.generation(),
            // No shared memory region: a length and base of all ones (4.2.2).
            register::SHM_LEN_LOW..=register::SHM_BASE_HIGH => u32::MAX,
            _ => {
                self.refuse();
                0
            }
        }
    }

    fn write_register(&mut self, offset: u64, value: u32) {
        match offset {
            register::DEVICE_FEATURES_SEL => self.registers.device_features_select = value,
            register::DRIVER_FEATURES => self.write_driver_features(value),
            register::DRIVER_FEATURES_SEL => self.registers.driver_features_select = value,
            register::QUEUE_SEL => self.registers.queue_select = value,
            register::QUEUE_READY => self.write_queue_ready(value),
            register::QUEUE_NUM
            | register::QUEUE_DESC_LOW
            | register::QUEUE_DESC_HIGH
            | register::QUEUE_DRIVER_LOW
            | register::QUEUE_DRIVER_HIGH
            | register::QUEUE_DEVICE_LOW
            | register::QUEUE_DEVICE_HIGH => self.write_queue(offset, value),
            register::QUEUE_NOTIFY => self.notify(value),
            register::INTERRUPT_ACK => self.shared.interrupt.acknowledge(value),
            register::STATUS => self.write_status(value),
            _ => self.refuse(),
        }
    }

    fn status(&self) -> u32 {
        let needs_reset = if self.shared.interrupt.is_reset_needed() {
            status::DEVICE_NEEDS_RESET
        } else {
            0
        };
        self.registers.status | needs_reset
    }

    /// 3.1.1: each step needs the one before; bits are only added (2.1.1), but for the reset.
    fn write_status(&mut self, value: u32) {
        if value == 0 {
            return self.reset();
        }
        let value = value & !status::DEVICE_NEEDS_RESET;
        let old = self.registers.status;
        // Of the steps, those that are there without the one before.
        let skips = STATUS_ORDER
            .windows(2)
            .any(|pair| value & pair[1] != 0 && value & pair[0] == 0);
        if value & !KNOWN_STATUS != 0 || old & !value != 0 || skips {
            return self.refuse();
        }
        let new = value & !old;
        if new & status::FEATURES_OK != 0 && !self.features_fit() {
            // The driver reads the status back, and gives up (3.1.1, steps 5 and 6).
            self.registers.status = value & !(status::FEATURES_OK | status::DRIVER_OK);
            return;
        }
        self.registers.status = value;
        if new & status::DRIVER_OK != 0 {
            self.shared.interrupt.driver_is_ready();
            if let Err(error) = self.activate() {
                self.shared.fail(&error);
            }
        }
    }

    fn features_fit(&self) -> bool {
        let chosen = self.registers.driver_features;
        chosen & !offered(&self.identity) == 0
            && chosen & (1 << VIRTIO_F_VERSION_1) != 0
            && self.identity.config.accepts(chosen)
    }

    fn activate(&self) -> Result<(), QueueError> {
        let features = self.registers.driver_features;
        let event_index = features & (1 << VIRTIO_RING_F_EVENT_IDX) != 0;
        self.shared.activate(&self.queues, features, event_index)
    }

    fn reset(&mut self) {
        self.shared.reset();
        self.identity.config.reset();
        self.registers = Registers::default();
        self.queues = fresh_queues(&self.identity);
    }

    fn write_driver_features(&mut self, value: u32) {
        if !self.has(status::DRIVER) || self.has(status::FEATURES_OK) {
            return self.refuse();
        }
        let features = &mut self.registers.driver_features;
        match self.registers.driver_features_select {
            0 => set_low(features, value),
            1 => set_high(features, value),
            // There are no more than 64 feature bits yet: a driver that knows more chooses none of them.
            _ if value == 0 => {}
            _ => self.refuse(),
        }
    }

    /// Queues are set up between FEATURES_OK and DRIVER_OK, each before it is ready.
    fn can_set_up_queues(&self) -> bool {
        self.has(status::FEATURES_OK)
            && self.registers.status & (status::DRIVER_OK | status::FAILED) == 0
    }

    fn write_queue(&mut self, offset: u64, value: u32) {
        let allowed = self.can_set_up_queues();
        let Some(queue) = self.queue_mut().filter(|queue| allowed && !queue.ready) else {
            return self.refuse();
        };
        match offset {
            register::QUEUE_NUM => match u16::try_from(value) {
                Ok(size) if (QueueSnapshot { size, ..*queue }).size_is_possible() => {
                    queue.size = size;
                }
                _ => self.refuse(),
            },
            register::QUEUE_DESC_LOW => set_low(&mut queue.descriptor_table, value),
            register::QUEUE_DESC_HIGH => set_high(&mut queue.descriptor_table, value),
            register::QUEUE_DRIVER_LOW => set_low(&mut queue.available_ring, value),
            register::QUEUE_DRIVER_HIGH => set_high(&mut queue.available_ring, value),
            register::QUEUE_DEVICE_LOW => set_low(&mut queue.used_ring, value),
            _ => set_high(&mut queue.used_ring, value),
        }
    }

    fn write_queue_ready(&mut self, value: u32) {
        let can_set_up = self.can_set_up_queues();
        let index = self.queue_index();
        let Some(queue) = self.queue_mut() else {
            return self.refuse();
        };
        match value {
            // A driver may take a queue back at any time; it comes into use again only by a reset.
            0 => {
                queue.ready = false;
                self.shared.stop_queue(index);
            }
            1 if can_set_up => queue.ready = true,
            _ => self.refuse(),
        }
    }

    /// The way of notifications for which there is no ioeventfd.
    fn notify(&self, value: u32) {
        let queue = usize::try_from(value)
            .ok()
            .and_then(|index| self.shared.notifiers.get(index));
        match queue {
            Some(notifier) if self.has(status::DRIVER_OK) => notify(notifier),
            _ => self.refuse(),
        }
    }

    fn queue_index(&self) -> usize {
        usize::try_from(self.registers.queue_select).unwrap_or(usize::MAX)
    }

    fn queue(&self) -> Option<&QueueSnapshot> {
        self.queues.get(self.queue_index())
    }

    fn queue_mut(&mut self) -> Option<&mut QueueSnapshot> {
        let index = self.queue_index();
        self.queues.get_mut(index)
    }

    fn refuse(&self) {
        self.refused.fetch_add(1, Ordering::Relaxed);
    }
}

impl<M: GuestAddressSpace + Send + Sync> MmioDevice for VirtioMmio<M> {
    fn read(&mut self, offset: u64, data: &mut [u8]) {
        match offset.checked_sub(register::CONFIG) {
            Some(offset) => self.identity.config.read(offset, data),
            None => match <&mut [u8; 4]>::try_from(&mut *data) {
                Ok(data) if offset.is_multiple_of(4) => {
                    *data = self.read_register(offset).to_le_bytes()
                }
                _ => {
                    data.fill(0);
                    self.refuse();
                }
            },
        }
    }

    fn write(&mut self, offset: u64, data: &[u8]) {
        match offset.checked_sub(register::CONFIG) {
            Some(offset) if self.has(status::DRIVER) => self.identity.config.write(offset, data),
            Some(_) => self.refuse(),
            None => match <[u8; 4]>::try_from(data) {
                Ok(data) if offset.is_multiple_of(4) => {
                    self.write_register(offset, u32::from_le_bytes(data));
                }
                _ => self.refuse(),
            },
        }
    }
}

fn offered(identity: &Identity) -> u64 {
    identity.features | COMMON_FEATURES
}

fn fresh_queues(identity: &Identity) -> Vec<QueueSnapshot> {
    identity
        .queue_sizes
        .iter()
        .map(|size| QueueSnapshot::reset(*size))
        .collect()
}

fn check(identity: &Identity, saved: &TransportSnapshot) -> Result<(), String> {
    if saved.device_type != identity.device_type {
        return Err(format!(
            "it is of a device of type {}, this one is {}",
            saved.device_type, identity.device_type
        ));
    }
    let unknown = saved.status & !KNOWN_STATUS;
    if unknown != 0 {
        return Err(format!("status bits {unknown:#x}"));
    }
    // Before FEATURES_OK the driver may have chosen anything.
    let agreed = saved.status & status::FEATURES_OK != 0;
    let missing = saved.driver_features & !offered(identity);
    if agreed && missing != 0 {
        return Err(format!(
            "the guest uses features {missing:#x}, which this device does not have"
        ));
    }
    let sizes: Vec<u16> = saved.queues.iter().map(|queue| queue.max_size).collect();
    if sizes != identity.queue_sizes {
        return Err(format!(
            "queues of {sizes:?} entries, this device has {:?}",
            identity.queue_sizes
        ));
    }
    // Addresses may be anything as long as the driver is not ready.
    match saved.queues.iter().find(|queue| !queue.size_is_possible()) {
        Some(queue) => Err(format!("a queue of {} entries", queue.size)),
        None => Ok(()),
    }
}

fn half(value: u64, select: u32) -> u32 {
    let [a, b, c, d, e, f, g, h] = value.to_le_bytes();
    match select {
        0 => u32::from_le_bytes([a, b, c, d]),
        1 => u32::from_le_bytes([e, f, g, h]),
        _ => 0,
    }
}

fn set_low(value: &mut u64, low: u32) {
    *value = (*value >> 32 << 32) | u64::from(low);
}

fn set_high(value: &mut u64, high: u32) {
    *value = (u64::from(high) << 32) | (*value & u64::from(u32::MAX));
}
