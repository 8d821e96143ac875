//! A virtio device on the MMIO bus: how it is made, stopped, saved and restored.

mod registers;

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use vm_memory::GuestAddressSpace;
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use super::device::{Device, DeviceStateError, Identity};
use super::interrupt::Interrupt;
use super::queue::{QueueError, QueueSnapshot};
use super::spec::{COMMON_FEATURES, status};
use super::state::{TransportSnapshot, VirtioSnapshot};
use super::turn::Shared;
use super::worker::{SharedDevice, Worker, lock};
use registers::KNOWN_STATUS;

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
