//! Block device (virtio 1.2, 5.2) over a raw image.
//!
//! The worker handles one request at a time, in the order of the available ring, and signals the driver after each. If
//! the host refuses an operation, for example because the file system is full or the file has become shorter, the
//! request fails with an I/O error, and the device goes on.

mod image;
mod request;
mod spec;
mod state;
#[cfg(test)]
mod tests;

use std::fs::File;
use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use event_manager::EventSet;
use virtio_bindings::virtio_ids::VIRTIO_ID_BLOCK;
use vm_memory::GuestAddressSpace;

use super::active_queues::{ActiveQueues, Completion};
use super::device::{
    ConfigSpace, Counters, Device, DeviceError, EventRegistry, Identity, Token, read_config,
};
use super::state::{DeviceState, DeviceStateError};
use crate::rate_limit::{RateLimit, RateLimiter};
use image::Image;
use spec::{ID_BYTES, QUEUE_SIZE, REQUESTS};

pub use state::BlockSnapshot;

/// Token of the rate limit's timer.
const TIMER: Token = 0;

/// Whether the guest may write to its disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Access {
    /// The guest may only read.
    ReadOnly,
    /// The guest may read and write.
    ReadWrite,
}

/// Configuration of a block device.
pub struct BlockOptions {
    /// Raw image: a file or block device, opened for `access`. The device uses the file position, so the descriptor
    /// must not be a duplicate of one that is used elsewhere.
    pub file: File,
    /// Whether the guest may write.
    pub access: Access,
    /// Identification that the guest can read, for example a serial number. Only the first 20 bytes are used.
    pub id: String,
    /// Limit on bytes and requests.
    pub rate_limit: RateLimit,
}

/// Counters of a block device.
#[derive(Debug, Default)]
struct BlockCounters {
    read_bytes: AtomicU64,
    read_ops: AtomicU64,
    write_bytes: AtomicU64,
    write_ops: AtomicU64,
    errors: AtomicU64,
}

impl Counters for BlockCounters {
    fn counters(&self) -> Vec<(&'static str, u64)> {
        let value = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        vec![
            ("read_bytes", value(&self.read_bytes)),
            ("read_ops", value(&self.read_ops)),
            ("write_bytes", value(&self.write_bytes)),
            ("write_ops", value(&self.write_ops)),
            ("errors", value(&self.errors)),
        ]
    }
}

/// Configuration space.
struct Config([u8; 60]);

impl ConfigSpace for Config {
    fn read(&self, offset: u64, data: &mut [u8]) {
        read_config(&self.0, offset, data);
    }
}

/// Block device.
pub struct Block {
    image: Image,
    access: Access,
    id: Vec<u8>,
    limiter: RateLimiter,
    counters: Arc<BlockCounters>,
}

impl Block {
    /// Creates the block device that `config` describes.
    ///
    /// # Errors
    /// Returns the kernel's error if the size of the file cannot be determined, or a timer cannot be created.
    pub fn new(config: BlockOptions) -> io::Result<Self> {
        let mut id = config.id.into_bytes();
        id.truncate(ID_BYTES);
        Ok(Self {
            image: Image::new(config.file)?,
            access: config.access,
            id,
            limiter: RateLimiter::new(config.rate_limit)?,
            counters: Arc::default(),
        })
    }

    /// Returns the size of the disk in sectors of 512 bytes. Bytes behind the last whole sector are not visible to the
    /// guest.
    #[must_use]
    pub fn sectors(&self) -> u64 {
        self.image.sectors()
    }

    /// Handles available requests until the rate limit is reached.
    fn serve<M: GuestAddressSpace>(
        &mut self,
        queues: &mut ActiveQueues<'_, M>,
    ) -> Result<(), DeviceError> {
        queues.drain(REQUESTS, |queues, chain| {
            let bytes = chain.readable.len() + chain.writable.len();
            let admitted = self.limiter.admit(bytes);
            if !admitted.map_err(DeviceError::host("cannot use the timer of the rate limit"))? {
                return Ok(Completion::Deferred);
            }
            let head = chain.head;
            let written = self.execute(queues, chain)?;
            queues.complete(REQUESTS, head, written)?;
            queues.signal(REQUESTS)?;
            Ok(Completion::AlreadyUsed)
        })
    }
}

impl<M: GuestAddressSpace> Device<M> for Block {
    fn identity(&self) -> Identity {
        Identity {
            device_type: VIRTIO_ID_BLOCK,
            features: spec::features(self.access),
            queue_sizes: vec![QUEUE_SIZE],
            config: Arc::new(Config(spec::config(self.image.sectors(), self.access))),
            counters: Arc::clone(&self.counters) as _,
        }
    }

    fn register(&mut self, registry: &mut EventRegistry<'_, '_>) -> io::Result<()> {
        registry.add(self.limiter.timer(), TIMER, EventSet::IN)
    }

    fn notified(
        &mut self,
        _: usize,
        mut queues: ActiveQueues<'_, M>,
        _: &mut EventRegistry<'_, '_>,
    ) -> Result<(), DeviceError> {
        self.serve(&mut queues)
    }

    fn ready(
        &mut self,
        _: Token,
        _: EventSet,
        mut queues: ActiveQueues<'_, M>,
        _: &mut EventRegistry<'_, '_>,
    ) -> Result<(), DeviceError> {
        self.limiter
            .timer_ran_out()
            .map_err(DeviceError::host("cannot use the timer of the rate limit"))?;
        self.serve(&mut queues)
    }

    fn save(&self) -> DeviceState {
        DeviceState::new(&BlockSnapshot {
            sectors: self.image.sectors(),
            id: self.id.clone(),
        })
    }

    /// Loads the identification, and checks that the image has the same size as that of the saved disk.
    fn restore(&mut self, state: &DeviceState) -> Result<(), DeviceStateError> {
        let error = |what| DeviceStateError::Mismatch {
            device: "block",
            what,
        };
        let state: BlockSnapshot = state.decode("block")?;
        if state.sectors != self.image.sectors() {
            return Err(error(format!(
                "the saved disk has {} sectors, but the image here has {}",
                state.sectors,
                self.image.sectors()
            )));
        }
        if state.id.len() > ID_BYTES {
            return Err(error(format!(
                "id has {} bytes, but the maximum is {ID_BYTES}",
                state.id.len()
            )));
        }
        self.id = state.id;
        Ok(())
    }
}
