//! Transport of a virtio device over MMIO: creation, pause and resume, save and restore. The registers are in
//! [`registers`].

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

/// Reason for which a device could not be created, saved or restored.
#[derive(Debug, thiserror::Error)]
pub enum VirtioError {
    /// The worker thread, or a descriptor that it needs, could not be created.
    #[error("{name}: cannot start the worker thread: {source}")]
    Thread {
        /// Name of the device.
        name: String,
        /// Error of the kernel.
        source: io::Error,
    },
    /// The device model rejected its saved state.
    #[error("{name}: cannot restore: {source}")]
    Device {
        /// Name of the device.
        name: String,
        /// Reason of the device model.
        source: DeviceStateError,
    },
    /// The saved registers are invalid, or do not match the device.
    #[error("{name}: cannot restore: {what}")]
    Transport {
        /// Name of the device.
        name: String,
        /// Description of the value.
        what: String,
    },
    /// The saved queues are invalid.
    #[error("{name}: cannot restore: {source}")]
    Queue {
        /// Name of the device.
        name: String,
        /// Reason for which they are invalid.
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

/// Registers that the driver writes, except those of the queues.
#[derive(Clone, Copy, Debug, Default)]
struct Registers {
    status: u32,
    device_features_select: u32,
    driver_features: u64,
    driver_features_select: u32,
    queue_select: u32,
}

/// virtio device on the MMIO bus: its registers, and the server of its queues.
pub struct MmioTransport {
    name: String,
    identity: Identity,
    registers: Registers,
    /// Queues as the driver has configured them. While they are active, the server has the current state.
    queues: Vec<QueueSnapshot>,
    refused: AtomicU64,
    interrupt: Interrupt,
    server: Box<dyn QueueServer>,
}

impl MmioTransport {
    /// Starts `device` on a worker thread named `name`, for a guest with `memory`. The kernel shows at most 15 bytes of
    /// the name.
    ///
    /// # Errors
    /// Returns [`VirtioError::Thread`] if the thread or a descriptor cannot be created.
    pub fn new<M: GuestAddressSpace + Send + Sync + 'static>(
        name: &str,
        device: Box<dyn Device<M>>,
        memory: M,
        interrupt: Interrupt,
    ) -> Result<Self, VirtioError> {
        let identity = identity(&*device);
        let worker = spawn(name, device, &identity, memory, &interrupt)?;
        Ok(Self::with_reset_state(name, identity, interrupt, worker))
    }

    /// Creates a device whose queues the vhost-user process `back_end` serves. `interrupt` must be the one that
    /// `back_end` was connected with.
    pub fn vhost_user<M: GuestAddressSpace + Send + Sync + 'static>(
        name: &str,
        back_end: &VhostUser<M>,
        interrupt: Interrupt,
    ) -> Self {
        let identity = back_end.identity();
        Self::with_reset_state(name, identity, interrupt, Box::new(back_end.clone()))
    }

    /// Does the same as [`Self::new`], and loads a saved state. The device is paused.
    ///
    /// # Errors
    /// Returns [`VirtioError`] if the thread cannot be created, or the state is invalid or does not match the device.
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

    /// Does the same as [`Self::vhost_user`], and loads a saved state. The device is paused, and the back end has guest
    /// memory but no queue yet.
    ///
    /// # Errors
    /// Returns [`VirtioError`] if the state is invalid or does not match the device.
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

    /// Creates a transport whose registers are in their reset state.
    fn with_reset_state(
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

    /// Creates a transport with saved registers and queues, whose server is paused.
    fn restored(
        name: &str,
        identity: Identity,
        interrupt: Interrupt,
        server: Box<dyn QueueServer>,
        saved: &VirtioSnapshot,
    ) -> Result<Self, VirtioError> {
        server.pause();
        let mut restored = Self::with_reset_state(name, identity, interrupt, server);
        restored
            .load(&saved.transport)
            .map_err(|source| VirtioError::Queue {
                name: name.into(),
                source,
            })?;
        Ok(restored)
    }

    /// Loads the saved registers, and hands the queues to the server if the driver had set DRIVER_OK.
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

    /// Returns the name of the device and of its worker thread.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Returns one eventfd for each queue, by index. The caller has to signal it when the guest writes the index, 32
    /// bits wide, to [`QUEUE_NOTIFY`](super::QUEUE_NOTIFY); with KVM by an ioeventfd.
    #[must_use]
    pub fn notifiers(&self) -> &[EventFd] {
        self.server.notifiers()
    }

    /// Returns the counters of the device, by name.
    #[must_use]
    pub fn counters(&self) -> Vec<(&'static str, u64)> {
        self.identity.counters.counters()
    }

    /// Returns the interrupt of the device.
    #[must_use]
    pub fn interrupt(&self) -> &Interrupt {
        &self.interrupt
    }

    /// Pauses the device. When this returns, nothing accesses the queues any more. Idempotent.
    ///
    /// The caller must have stopped the guest's vCPUs, so that they do not access the registers of a paused device.
    pub fn pause(&self) {
        self.server.pause();
    }

    /// Resumes the device after a pause. Idempotent.
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

    /// Registers `tell`, which is called with the reason if the server of the queues is lost: the worker thread
    /// panicked, or the vhost-user back end disconnected or misbehaved.
    ///
    /// Any thread may call `tell`. A worker thread is lost at most once, and `tell` is called at once if that has
    /// happened already. A back end may be lost again after each reconnection. Mistakes of the driver are not reported.
    /// Only the first registration has an effect, and [`VhostUser::on_loss`] counts as one.
    pub fn on_failure(&self, tell: impl Fn(&str) + Send + Sync + 'static) {
        self.server.on_failure(Box::new(tell));
    }

    /// Returns why the device needs a reset, if it does. A restored device does not know why its predecessor did.
    #[must_use]
    pub fn failure(&self) -> Option<String> {
        self.server.failure()
    }

    /// Returns the number of register accesses that had no effect, because of their width, offset, or the state of the
    /// driver.
    #[must_use]
    pub fn refused(&self) -> u64 {
        self.refused.load(Ordering::Relaxed)
    }
}

/// Returns the identity of a device that a worker thread serves, which includes the feature bits of every such device.
fn identity<M: GuestAddressSpace>(device: &dyn Device<M>) -> Identity {
    let mut identity = device.identity();
    identity.features |= COMMON_FEATURES;
    identity
}

/// Starts the worker thread of `device`.
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

/// Returns the state of the queues after a reset.
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

/// Checks that the saved registers are valid and match the device. Returns a description of the first that does not.
fn fits(identity: &Identity, saved: &TransportSnapshot) -> Result<(), String> {
    if saved.device_type != identity.device_type {
        return Err(format!(
            "device_type is {}, but this device is of type {}",
            saved.device_type, identity.device_type
        ));
    }
    let unknown = saved.status & !KNOWN_STATUS;
    if unknown != 0 {
        return Err(format!("status has the unknown bits {unknown:#x}"));
    }
    // Before FEATURES_OK, the driver may have written any feature bits.
    let agreed = saved.status & status::FEATURES_OK != 0;
    let missing = saved.driver_features & !identity.features;
    if agreed && missing != 0 {
        return Err(format!(
            "the guest uses features {missing:#x}, which this device does not offer"
        ));
    }
    let sizes: Vec<u16> = saved.queues.iter().map(|queue| queue.max_size).collect();
    if sizes != identity.queue_sizes {
        return Err(format!(
            "the maximum sizes of the queues are {sizes:?}, but those of this device are {:?}",
            identity.queue_sizes
        ));
    }
    // The addresses of the rings are checked when the driver sets DRIVER_OK. Before that, they may have any value.
    match saved.queues.iter().find(|queue| !queue.size_is_possible()) {
        Some(queue) => Err(format!(
            "a queue has the invalid size of {} entries",
            queue.size
        )),
        None => Ok(()),
    }
}
