//! A virtio device on the MMIO bus: how it is made, stopped, saved and restored.

mod registers;

use std::io;
use std::sync::atomic::{AtomicU64, Ordering};

use vm_memory::GuestAddressSpace;
use vmm_sys_util::eventfd::EventFd;

use super::device::{Device, Identity};
use super::interrupt::Interrupt;
use super::queue::{QueueError, QueueSnapshot};
use super::queue_server::QueueServer;
use super::spec::{COMMON_FEATURES, status};
use super::state::{DeviceStateError, TransportSnapshot, VirtioSnapshot};
use super::vhost_user::VhostUser;
use super::worker::Worker;
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
    /// [`MmioTransport::save`] was called while the device was not paused.
    #[error("{0}: cannot save: the device is not paused")]
    NotPaused(String),
    /// The device model panicked while it saved its state.
    #[error("{name}: cannot save: the device model panicked: {message}")]
    SavePanicked {
        /// Name of the device.
        name: String,
        /// Panic message.
        message: String,
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

/// A virtio device on the MMIO bus, with what serves its queues.
pub struct MmioTransport {
    name: String,
    identity: Identity,
    registers: Registers,
    /// As the driver set them up. While they are in use, whoever serves them knows more.
    queues: Vec<QueueSnapshot>,
    refused: AtomicU64,
    interrupt: Interrupt,
    server: Box<dyn QueueServer>,
}

impl MmioTransport {
    /// Starts `device` on a thread of this `name` (at most 15 bytes of it are seen), for a guest that has
    /// `memory`.
    ///
    /// # Errors
    /// Threads and descriptors that cannot be had.
    pub fn new<M: GuestAddressSpace + Send + Sync + 'static>(
        name: &str,
        device: Box<dyn Device<M>>,
        memory: M,
        interrupt: Interrupt,
    ) -> Result<Self, VirtioError> {
        let identity = identity(&*device);
        let worker = spawn(name, device, &identity, memory, &interrupt)?;
        Ok(Self::before(name, identity, interrupt, worker))
    }

    /// A device whose queues `back_end` serves, a process of its own. `interrupt` is the one that it was connected
    /// with.
    pub fn vhost_user<M: GuestAddressSpace + Send + Sync + 'static>(
        name: &str,
        back_end: &VhostUser<M>,
        interrupt: Interrupt,
    ) -> Self {
        let identity = back_end.identity();
        Self::before(name, identity, interrupt, Box::new(back_end.clone()))
    }

    /// As [`Self::new`], with the state of a device that was saved; it is paused.
    ///
    /// # Errors
    /// Also a state that does not fit the device, or that no device can have been in.
    pub fn restore<M: GuestAddressSpace + Send + Sync + 'static>(
        name: &str,
        mut device: Box<dyn Device<M>>,
        memory: M,
        interrupt: Interrupt,
        saved: &VirtioSnapshot,
    ) -> Result<Self, VirtioError> {
        let identity = identity(&*device);
        check(name, &identity, &saved.transport)?;
        device.restore(&saved.device).map_err(state_error(name))?;
        let worker = spawn(name, device, &identity, memory, &interrupt)?;
        Self::restored(name, identity, interrupt, worker, saved)
    }

    /// As [`Self::vhost_user`], with the state of a device that was saved; it is paused, and its back end has not been
    /// told of the guest's queues.
    ///
    /// # Errors
    /// A state that does not fit the device, or that no device can have been in.
    pub fn restore_vhost_user<M: GuestAddressSpace + Send + Sync + 'static>(
        name: &str,
        back_end: &VhostUser<M>,
        interrupt: Interrupt,
        saved: &VirtioSnapshot,
    ) -> Result<Self, VirtioError> {
        let identity = back_end.identity();
        check(name, &identity, &saved.transport)?;
        back_end.restore(&saved.device).map_err(state_error(name))?;
        Self::restored(name, identity, interrupt, Box::new(back_end.clone()), saved)
    }

    fn before(
        name: &str,
        identity: Identity,
        interrupt: Interrupt,
        server: Box<dyn QueueServer>,
    ) -> Self {
        Self {
            name: name.into(),
            queues: fresh_queues(&identity),
            identity,
            registers: Registers::default(),
            refused: AtomicU64::new(0),
            interrupt,
            server,
        }
    }

    fn restored(
        name: &str,
        identity: Identity,
        interrupt: Interrupt,
        server: Box<dyn QueueServer>,
        saved: &VirtioSnapshot,
    ) -> Result<Self, VirtioError> {
        server.pause();
        let mut restored = Self::before(name, identity, interrupt, server);
        restored
            .load(&saved.transport)
            .map_err(|source| VirtioError::Queue {
                name: name.into(),
                source,
            })?;
        Ok(restored)
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
        self.interrupt.restore(
            saved.interrupt_status,
            saved.config_generation,
            saved.needs_reset,
        );
        if self.has(status::DRIVER_OK) {
            self.interrupt.driver_is_ready();
            if !saved.needs_reset {
                self.activate()?;
            }
        }
        Ok(())
    }

    /// The name of the device and its thread.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.name
    }

    /// One for each queue, by index: an event on it is the driver's notification. The monitor wires them to
    /// writes of the index to [`QUEUE_NOTIFY`](super::QUEUE_NOTIFY), 32 bits wide (with KVM: ioeventfds).
    #[must_use]
    pub fn notifiers(&self) -> &[EventFd] {
        self.server.notifiers()
    }

    /// What the device has done since it was made.
    #[must_use]
    pub fn counters(&self) -> Vec<(&'static str, u64)> {
        self.identity.counters.counters()
    }

    /// Its interrupt.
    #[must_use]
    pub fn interrupt(&self) -> &Interrupt {
        &self.interrupt
    }

    /// Has the queues served no longer; returns when nobody touches them. Idempotent. The guest's vCPUs are
    /// stopped before, so that nothing is asked of the device meanwhile.
    pub fn pause(&self) {
        self.server.pause();
    }

    /// Has the queues served again. Idempotent.
    pub fn resume(&self) {
        self.server.resume();
    }

    /// Returns the state of the device, which must be paused.
    ///
    /// # Errors
    /// Returns [`VirtioError::NotPaused`] if the device is not paused, and [`VirtioError::SavePanicked`] if the device
    /// model panics.
    pub fn save(&self) -> Result<VirtioSnapshot, VirtioError> {
        if !self.server.is_paused() {
            return Err(VirtioError::NotPaused(self.name.clone()));
        }
        let in_use = self.server.queues();
        let queues = if in_use.is_empty() {
            self.queues.clone()
        } else {
            in_use
        };
        let interrupt = &self.interrupt;
        let transport = TransportSnapshot {
            device_type: self.identity.device_type,
            status: self.registers.status,
            needs_reset: interrupt.is_reset_needed(),
            device_features: self.identity.features,
            device_features_select: self.registers.device_features_select,
            driver_features: self.registers.driver_features,
            driver_features_select: self.registers.driver_features_select,
            queue_select: self.registers.queue_select,
            interrupt_status: interrupt.status(),
            config_generation: interrupt.generation(),
            queues,
        };
        let device = self
            .server
            .save()
            .map_err(|message| VirtioError::SavePanicked {
                name: self.name.clone(),
                message,
            })?;
        Ok(VirtioSnapshot { transport, device })
    }

    /// Registers `tell`, which is called with the reason when the server of the queues is lost: the worker thread
    /// panicked, or the vhost-user back end disconnected or misbehaved.
    ///
    /// Any thread may call `tell`. A worker thread is lost at most once, and `tell` is called at once if that has
    /// happened already; a back end may be lost again after each reconnection. A mistake of the driver is not reported
    /// here. Only the first registration has an effect, and [`VhostUser::on_loss`] counts as one.
    pub fn on_failure(&self, tell: impl Fn(&str) + Send + Sync + 'static) {
        self.server.on_failure(Box::new(tell));
    }

    /// Why the device needs a reset, if it does and is not a restored one.
    #[must_use]
    pub fn failure(&self) -> Option<String> {
        self.server.failure()
    }

    /// Register accesses so far that did nothing, because of their width, place or time.
    #[must_use]
    pub fn refused(&self) -> u64 {
        self.refused.load(Ordering::Relaxed)
    }
}

/// What the registers say of a device whose queues are served here.
fn identity<M: GuestAddressSpace>(device: &dyn Device<M>) -> Identity {
    let mut identity = device.identity();
    identity.features |= COMMON_FEATURES;
    identity
}

fn spawn<M: GuestAddressSpace + Send + Sync + 'static>(
    name: &str,
    device: Box<dyn Device<M>>,
    identity: &Identity,
    memory: M,
    interrupt: &Interrupt,
) -> Result<Box<dyn QueueServer>, VirtioError> {
    let queues = identity.queue_sizes.len();
    let worker = Worker::spawn(name, device, queues, memory, interrupt.clone());
    Ok(Box::new(worker.map_err(|source| VirtioError::Thread {
        name: name.into(),
        source,
    })?))
}

fn state_error(name: &str) -> impl Fn(DeviceStateError) -> VirtioError {
    move |source| VirtioError::Device {
        name: name.into(),
        source,
    }
}

fn fresh_queues(identity: &Identity) -> Vec<QueueSnapshot> {
    identity
        .queue_sizes
        .iter()
        .map(|size| QueueSnapshot::reset(*size))
        .collect()
}

fn check(name: &str, identity: &Identity, saved: &TransportSnapshot) -> Result<(), VirtioError> {
    fits(identity, saved).map_err(|what| VirtioError::Transport {
        name: name.into(),
        what,
    })
}

fn fits(identity: &Identity, saved: &TransportSnapshot) -> Result<(), String> {
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
    let missing = saved.driver_features & !identity.features;
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
