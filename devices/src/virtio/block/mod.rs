//! The block device (virtio 1.2, 5.2) over a raw file.
//!
//! One worker serves requests in the order in which they were made available, each to its end; the driver
//! is told after each. What the host refuses (a full file system, a file that became too short) is an I/O
//! error of that request, and the disk lives on.

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

const TIMER: Token = 0;

/// Whether a guest may write to its disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Access {
    /// It may not.
    ReadOnly,
    /// It may.
    ReadWrite,
}

/// A disk.
pub struct BlockConfig {
    /// The raw image: a file or block device, open for what `access` says. Its position belongs to the
    /// device: the descriptor is not a duplicate of another that is in use.
    pub file: File,
    /// What the guest may do.
    pub access: Access,
    /// The identification that the guest reads (a serial number); what is beyond 20 bytes is cut off.
    pub id: String,
    /// How much it may move.
    pub rate_limit: RateLimit,
}

/// What a disk has done.
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

struct Config([u8; 60]);

impl ConfigSpace for Config {
    fn read(&self, offset: u64, data: &mut [u8]) {
        read_config(&self.0, offset, data);
    }
}

/// A block device.
pub struct Block {
    image: Image,
    access: Access,
    id: Vec<u8>,
    limiter: RateLimiter,
    counters: Arc<BlockCounters>,
}

impl Block {
    /// The disk that `config` describes.
    ///
    /// # Errors
    /// A file whose size cannot be told, and descriptors that cannot be had.
    pub fn new(config: BlockConfig) -> io::Result<Self> {
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

    /// Its size, in sectors of 512 bytes. A last part of the file that is no whole sector is not seen by
    /// the guest.
    #[must_use]
    pub fn sectors(&self) -> u64 {
        self.image.sectors()
    }

    fn serve<M: GuestAddressSpace>(
        &mut self,
        queues: &mut ActiveQueues<'_, M>,
    ) -> Result<(), DeviceError> {
        queues.drain(REQUESTS, |queues, chain| {
            let bytes = chain.readable.len() + chain.writable.len();
            let admitted = self.limiter.admit(bytes);
            if !admitted.map_err(DeviceError::host("the timer of the rate limit"))? {
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
        let read_only = self.access == Access::ReadOnly;
        Identity {
            device_type: VIRTIO_ID_BLOCK,
            features: spec::features(read_only),
            queue_sizes: vec![QUEUE_SIZE],
            config: Arc::new(Config(spec::config(self.image.sectors(), 512, read_only))),
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
            .map_err(DeviceError::host("the timer of the rate limit"))?;
        self.serve(&mut queues)
    }

    fn save(&self) -> DeviceState {
        DeviceState::new(&BlockSnapshot {
            sectors: self.image.sectors(),
            id: self.id.clone(),
        })
    }

    /// The identification goes with the guest; the image has to be the same size here.
    fn restore(&mut self, state: &DeviceState) -> Result<(), DeviceStateError> {
        let error = |what| DeviceStateError::Mismatch {
            device: "block",
            what,
        };
        let state: BlockSnapshot = state.decode("block")?;
        if state.sectors != self.image.sectors() {
            return Err(error(format!(
                "a disk of {} sectors, the image here has {}",
                state.sectors,
                self.image.sectors()
            )));
        }
        if state.id.len() > ID_BYTES {
            return Err(error(format!(
                "an identification of {} bytes, at most {ID_BYTES} are possible",
                state.id.len()
            )));
        }
        self.id = state.id;
        Ok(())
    }
}
