//! What a virtio device is to the transport and to its worker.

use std::io;
use std::os::fd::AsRawFd;
use std::sync::Arc;

use event_manager::{EventOps, EventSet, Events};
use vm_memory::GuestAddressSpace;

use super::queue::QueueError;
use super::state::{DeviceState, DeviceStateError};
use super::turn::Turn;

/// Why a device stopped to serve its driver. It needs a reset then (2.1.2).
#[derive(Debug, thiserror::Error)]
pub enum DeviceError {
    /// The driver broke a queue's rules.
    #[error(transparent)]
    Queue(#[from] QueueError),
    /// The host failed in a way that no request can report.
    #[error("{what}: {source}")]
    Host {
        /// What was tried.
        what: &'static str,
        /// What the kernel said.
        source: io::Error,
    },
    /// The driver reset the device meanwhile: no failure.
    #[error("the driver reset the device")]
    Reset,
}

impl DeviceError {
    /// For `map_err`: the host failed at `what`.
    pub(crate) fn host(what: &'static str) -> impl Fn(io::Error) -> Self {
        move |source| Self::Host { what, source }
    }
}

/// What the registers say of a device.
pub struct Identity {
    /// The device type (5).
    pub device_type: u32,
    /// Its own feature bits; those of rings and transport are added.
    pub features: u64,
    /// The most entries of each queue: powers of two, at most 1024.
    pub queue_sizes: Vec<u16>,
    /// Its configuration space, and what it knows of features.
    pub config: Arc<dyn ConfigSpace>,
    /// What it has done.
    pub counters: Arc<dyn Counters>,
}

/// What a device has done since it was made, read by any thread.
pub trait Counters: Send + Sync {
    /// Names and values.
    fn counters(&self) -> Vec<(&'static str, u64)>;
}

/// A device that counts nothing.
impl Counters for () {
    fn counters(&self) -> Vec<(&'static str, u64)> {
        Vec::new()
    }
}

/// A device's configuration space (2.5), read by vCPU threads.
pub trait ConfigSpace: Send + Sync {
    /// Fills `data` with what is at `offset`; zeros beyond the end.
    fn read(&self, offset: u64, data: &mut [u8]);

    /// The driver writes `data` at `offset`. Ignored by devices without a field for it.
    fn write(&self, offset: u64, data: &[u8]) {
        let _ignored = (offset, data);
    }

    /// The driver resets the device. Unlike [`Device::reset`], this is done when the driver goes on.
    fn reset(&self) {}

    /// Whether these features, all of them offered, go together.
    fn accepts(&self, features: u64) -> bool {
        let _any = features;
        true
    }
}

/// Fills `data` with the bytes of `config` at `offset`; zeros beyond its end.
pub fn read_config(config: &[u8], offset: u64, data: &mut [u8]) {
    data.fill(0);
    let rest = usize::try_from(offset)
        .ok()
        .and_then(|offset| config.get(offset..))
        .unwrap_or_default();
    let len = rest.len().min(data.len());
    data[..len].copy_from_slice(&rest[..len]);
}

/// The behaviour of a device. All but [`Self::identity`] is called on its worker thread, or while that
/// stands still.
pub trait Device<M: GuestAddressSpace>: Send {
    /// What the registers say of it.
    fn identity(&self) -> Identity;

    /// Registers the descriptors that it waits for beside its queues.
    ///
    /// # Errors
    /// The kernel's.
    fn watch(&mut self, watch: &mut Watch<'_, '_>) -> io::Result<()> {
        let _none = watch;
        Ok(())
    }

    /// The driver is ready, or the device was resumed.
    ///
    /// # Errors
    /// See [`DeviceError`]; so for the next two.
    fn started(&mut self, turn: Turn<'_, M>, watch: &mut Watch<'_, '_>) -> Result<(), DeviceError> {
        let _nothing_to_do = (turn, watch);
        Ok(())
    }

    /// The driver notified `queue`, or the queue's work of an earlier notification is not done.
    fn notified(
        &mut self,
        queue: usize,
        turn: Turn<'_, M>,
        watch: &mut Watch<'_, '_>,
    ) -> Result<(), DeviceError>;

    /// The descriptor registered with `token` has `events`.
    fn ready(
        &mut self,
        token: Token,
        events: EventSet,
        turn: Turn<'_, M>,
        watch: &mut Watch<'_, '_>,
    ) -> Result<(), DeviceError> {
        let _none = (token, events, turn, watch);
        Ok(())
    }

    /// The driver reset the device: forget what belonged to it.
    fn reset(&mut self, watch: &mut Watch<'_, '_>) {
        let _nothing_to_do = watch;
    }

    /// Its state. Nothing is in flight.
    fn save(&self) -> DeviceState;

    /// Takes over a saved state, before it is started.
    ///
    /// # Errors
    /// A state of another kind of device, or one that cannot be.
    fn restore(&mut self, state: &DeviceState) -> Result<(), DeviceStateError>;
}

/// By which a device knows one of its descriptors.
pub type Token = u32;

/// Above the queues' indices, and the worker's own.
const FIRST_TOKEN: u32 = 0x100;

/// Where a device registers the descriptors that it waits for. A descriptor is removed before it is
/// closed.
pub struct Watch<'a, 'b> {
    pub(super) ops: &'a mut EventOps<'b>,
}

impl Watch<'_, '_> {
    /// Waits for `events` (and errors) of `descriptor`.
    ///
    /// # Errors
    /// The kernel's; a descriptor that is registered already.
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

    /// Changes what is waited for.
    ///
    /// # Errors
    /// The kernel's; a descriptor that is not registered.
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

    /// Waits for `descriptor` no longer.
    ///
    /// # Errors
    /// The kernel's; a descriptor that is not registered.
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

/// What an event of the worker's loop is about.
pub(super) enum Subject {
    /// The driver notified this queue.
    Queue(usize),
    /// The worker's own event.
    Wake,
    /// The device's.
    Device(Token),
}

/// The worker's own event.
pub(super) const WAKE: u32 = FIRST_TOKEN - 1;

/// Who is meant by the data of an event.
pub(super) fn subject(data: u32) -> Subject {
    match data.checked_sub(FIRST_TOKEN) {
        Some(token) => Subject::Device(token),
        None if data == WAKE => Subject::Wake,
        None => Subject::Queue(data as usize),
    }
}
