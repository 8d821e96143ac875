//! Interface that a device model implements for the transport and for its worker thread.

use std::io;
use std::os::fd::AsRawFd;
use std::sync::Arc;

use event_manager::{EventOps, EventSet, Events};
use vm_memory::GuestAddressSpace;

use super::active_queues::ActiveQueues;
use super::queue::QueueError;
use super::state::{DeviceState, DeviceStateError};

/// Reason for which a device stopped serving its driver.
///
/// Except after [`DeviceError::Reset`], the device sets DEVICE_NEEDS_RESET (virtio 1.2, 2.1.2).
#[derive(Debug, thiserror::Error)]
pub enum DeviceError {
    /// The driver broke a rule of a queue.
    #[error(transparent)]
    Queue(#[from] QueueError),
    /// The host failed, and no request's status can report it.
    #[error("{what}: {source}")]
    Host {
        /// Operation that failed.
        what: &'static str,
        /// Error of the kernel.
        source: io::Error,
    },
    /// The driver reset the device while a request was handled. This is not a failure.
    #[error("the driver reset the device")]
    Reset,
}

impl DeviceError {
    /// Returns a function for `map_err` that reports a failure of the host in the operation `what`.
    pub(crate) fn host(what: &'static str) -> impl Fn(io::Error) -> Self {
        move |source| Self::Host { what, source }
    }
}

/// Fixed properties of a device, from which the transport derives its registers.
pub struct Identity {
    /// Device type (virtio 1.2, 5).
    pub device_type: u32,
    /// Feature bits of the device type. The transport adds those of rings and transport.
    pub features: u64,
    /// Maximum number of entries of each queue: powers of two, at most 1024.
    pub queue_sizes: Vec<u16>,
    /// Configuration space, which also knows which features depend on each other.
    pub config: Arc<dyn ConfigSpace>,
    /// Counters of the device.
    pub counters: Arc<dyn Counters>,
}

/// Counters of a device since its creation. Any thread may read them.
pub trait Counters: Send + Sync {
    /// Returns the names and values of all counters.
    fn counters(&self) -> Vec<(&'static str, u64)>;
}

/// Counters of a device that counts nothing.
impl Counters for () {
    fn counters(&self) -> Vec<(&'static str, u64)> {
        Vec::new()
    }
}

/// Configuration space of a device (virtio 1.2, 2.5). vCPU threads access it.
pub trait ConfigSpace: Send + Sync {
    /// Fills `data` from the bytes at `offset`. Bytes beyond the end of the space are zero.
    fn read(&self, offset: u64, data: &mut [u8]);

    /// Handles a write by the driver of `data` at `offset`. The default ignores it, for a space without writable
    /// fields.
    fn write(&self, offset: u64, data: &[u8]) {
        let _ignored = (offset, data);
    }

    /// Resets the fields that a reset of the device changes. Runs on the vCPU thread, before the driver's write to
    /// `Status` returns; [`Device::reset`] may run later.
    fn reset(&self) {}

    /// Returns whether the driver may accept exactly `features`, all of which the device offers.
    fn accepts(&self, features: u64) -> bool {
        let _any = features;
        true
    }
}

/// Configuration space of a device without one.
impl ConfigSpace for () {
    fn read(&self, _: u64, data: &mut [u8]) {
        data.fill(0);
    }
}

/// Fills `data` from the bytes of `config` at `offset`. Bytes beyond the end of `config` are zero.
pub fn read_config(config: &[u8], offset: u64, data: &mut [u8]) {
    data.fill(0);
    let rest = usize::try_from(offset)
        .ok()
        .and_then(|offset| config.get(offset..))
        .unwrap_or_default();
    let len = rest.len().min(data.len());
    data[..len].copy_from_slice(&rest[..len]);
}

/// Device model: handles the descriptor chains of one device.
///
/// [`Self::identity`] and [`Self::register`] are called when the device is created. All other methods are called on its
/// worker thread, or while the worker is paused.
///
/// If a method panics on the worker thread, the thread ends and the device needs a reset, which cannot succeed any
/// more.
pub trait Device<M: GuestAddressSpace>: Send {
    /// Returns the fixed properties of the device.
    fn identity(&self) -> Identity;

    /// Registers the descriptors that the device waits for besides its queues.
    ///
    /// # Errors
    /// Returns the kernel's error if a descriptor cannot be registered.
    fn register(&mut self, registry: &mut EventRegistry<'_, '_>) -> io::Result<()> {
        let _none = registry;
        Ok(())
    }

    /// Handles the start of the queues: the driver has set DRIVER_OK, or the device was resumed.
    ///
    /// # Errors
    /// Returns [`DeviceError`] if the device cannot go on. The device then needs a reset. This holds for
    /// [`Self::notified`] and [`Self::ready`], too.
    fn started(
        &mut self,
        queues: ActiveQueues<'_, M>,
        registry: &mut EventRegistry<'_, '_>,
    ) -> Result<(), DeviceError> {
        let _nothing_to_do = (queues, registry);
        Ok(())
    }

    /// Handles the chains of `queue`: the driver notified it, or an earlier call left chains and notified it again.
    fn notified(
        &mut self,
        queue: usize,
        queues: ActiveQueues<'_, M>,
        registry: &mut EventRegistry<'_, '_>,
    ) -> Result<(), DeviceError>;

    /// Handles `events` of the descriptor that was registered with `token`.
    fn ready(
        &mut self,
        token: Token,
        events: EventSet,
        queues: ActiveQueues<'_, M>,
        registry: &mut EventRegistry<'_, '_>,
    ) -> Result<(), DeviceError> {
        let _none = (token, events, queues, registry);
        Ok(())
    }

    /// Discards what belongs to the driver, because the driver reset the device.
    fn reset(&mut self, registry: &mut EventRegistry<'_, '_>) {
        let _nothing_to_do = registry;
    }

    /// Returns the state of the device model. No request is in flight.
    fn save(&self) -> DeviceState;

    /// Loads a saved state. Called at most once, before [`Self::register`].
    ///
    /// # Errors
    /// Returns [`DeviceStateError`] if the state belongs to another device model, is invalid, or does not match the
    /// host's side of this device.
    fn restore(&mut self, state: &DeviceState) -> Result<(), DeviceStateError>;
}

/// Number by which a device model identifies one of its registered descriptors.
pub type Token = u32;

/// Event data of the device's token 0. Smaller values are queue indices, and [`WAKE`].
const FIRST_TOKEN: u32 = 0x100;

/// Registry of the descriptors that a device model waits for, on its worker's event loop.
///
/// A descriptor must be removed before it is closed.
pub struct EventRegistry<'a, 'b> {
    pub(super) ops: &'a mut EventOps<'b>,
}

impl EventRegistry<'_, '_> {
    /// Waits for `events` and errors of `descriptor`, and passes them to [`Device::ready`] with `token`.
    ///
    /// # Errors
    /// Returns the kernel's error, for example if the descriptor is registered already.
    pub fn add(
        &mut self,
        descriptor: &impl AsRawFd,
        token: Token,
        events: EventSet,
    ) -> io::Result<()> {
        self.ops
            .add(registration(descriptor, token, events))
            .map_err(io::Error::other)
    }

    /// Changes the events of `descriptor` that the device waits for, and its token.
    ///
    /// # Errors
    /// Returns the kernel's error, for example if the descriptor is not registered.
    pub fn modify(
        &mut self,
        descriptor: &impl AsRawFd,
        token: Token,
        events: EventSet,
    ) -> io::Result<()> {
        self.ops
            .modify(registration(descriptor, token, events))
            .map_err(io::Error::other)
    }

    /// Stops waiting for `descriptor`.
    ///
    /// # Errors
    /// Returns the kernel's error, for example if the descriptor is not registered.
    pub fn remove(&mut self, descriptor: &impl AsRawFd) -> io::Result<()> {
        self.ops
            .remove(registration(descriptor, 0, EventSet::empty()))
            .map_err(io::Error::other)
    }
}

fn registration(descriptor: &impl AsRawFd, token: Token, events: EventSet) -> Events {
    let data = token.saturating_add(FIRST_TOKEN);
    Events::with_data_raw(descriptor.as_raw_fd(), data, events)
}

/// Source of an event in the worker's loop.
pub(super) enum DeviceEvent {
    /// Notification of the queue with this index.
    Queue(usize),
    /// The worker's own wake-up event.
    Wake,
    /// Descriptor that the device registered with this token.
    Device(Token),
}

/// Event data of the worker's own wake-up event.
pub(super) const WAKE: u32 = FIRST_TOKEN - 1;

/// Returns the source of the event with this `data`.
pub(super) fn source(data: u32) -> DeviceEvent {
    match data.checked_sub(FIRST_TOKEN) {
        Some(token) => DeviceEvent::Device(token),
        None if data == WAKE => DeviceEvent::Wake,
        None => DeviceEvent::Queue(data as usize),
    }
}
