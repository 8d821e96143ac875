//! Entropy device (virtio 1.2, 5.4), which fills the driver's buffers with random bytes of the host.

use std::io;
use std::sync::Arc;

use minicbor::{Decode, Encode};
use rustix::rand::{GetRandomFlags, getrandom};
use virtio_bindings::virtio_ids::VIRTIO_ID_RNG;
use vm_memory::GuestAddressSpace;

use super::active_queues::{ActiveQueues, Completion};
use super::device::{Device, DeviceError, EventRegistry, Identity};
use super::queue::{Chain, QueueError};
use super::state::{DeviceState, DeviceStateError};
use crate::SavedState;

const REQUESTS: usize = 0;
const QUEUE_SIZE: u16 = 64;
/// Maximum number of bytes for one request. A driver that wants more sends another request.
const REQUEST_LIMIT: usize = 4096;

/// Saved state of an entropy device. It has no fields.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Encode, Decode)]
#[cbor(map)]
pub struct RngSnapshot {}

impl SavedState for RngSnapshot {
    const VERSION: u16 = 1;
}

/// Entropy device.
#[derive(Debug, Default)]
pub struct Rng;

impl Rng {
    /// Creates an entropy device that reads from getrandom(2).
    #[must_use]
    pub fn new() -> Self {
        Self
    }
}

impl<M: GuestAddressSpace> Device<M> for Rng {
    fn identity(&self) -> Identity {
        Identity {
            device_type: VIRTIO_ID_RNG,
            features: 0,
            queue_sizes: vec![QUEUE_SIZE],
            config: Arc::new(()),
            counters: Arc::new(()),
        }
    }

    fn notified(
        &mut self,
        _: usize,
        mut queues: ActiveQueues<'_, M>,
        _: &mut EventRegistry<'_, '_>,
    ) -> Result<(), DeviceError> {
        queues.drain(REQUESTS, fill)
    }

    fn save(&self) -> DeviceState {
        DeviceState::new(&RngSnapshot {})
    }

    fn restore(&mut self, state: &DeviceState) -> Result<(), DeviceStateError> {
        let RngSnapshot {} = state.decode("entropy")?;
        Ok(())
    }
}

/// Fills a request, which is writable memory only, with at least one random byte (virtio 1.2, 5.4.6).
fn fill<M: GuestAddressSpace>(
    queues: &mut ActiveQueues<'_, M>,
    mut chain: Chain,
) -> Result<Completion, DeviceError> {
    if !chain.readable.is_empty() || chain.writable.is_empty() {
        return Err(QueueError::Request {
            head: chain.head,
            what: "a request for entropy must have writable memory only",
        }
        .into());
    }
    let mut bytes = [0; REQUEST_LIMIT];
    let wanted = usize::try_from(chain.writable.len())
        .unwrap_or(REQUEST_LIMIT)
        .min(REQUEST_LIMIT);
    let got = random(&mut bytes[..wanted]).map_err(DeviceError::host("getrandom"))?;
    let written = queues.write(&mut chain.writable, &bytes[..got])?;
    Ok(Completion::used(written))
}

/// Fills `bytes` from getrandom(2), and returns the number of bytes written.
fn random(bytes: &mut [u8]) -> io::Result<usize> {
    loop {
        match getrandom(&mut *bytes, GetRandomFlags::empty()) {
            Err(rustix::io::Errno::INTR) => {}
            result => return Ok(result?),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::testing::{DATA, Driver, HIGH, LOW_END, Part};
    use super::*;
    use vm_memory::bitmap::Bitmap;
    use vm_memory::{GuestAddress, GuestMemoryBackend, GuestMemoryRegion};

    fn driver() -> Driver {
        let mut driver = Driver::new(|_| Box::new(Rng::new()));
        driver.start(0);
        driver
    }

    #[test]
    fn a_request_is_filled_with_bytes_that_differ() {
        let mut driver = driver();
        assert_eq!(driver.get(8), 4);
        let mut seen = Vec::new();
        for _ in 0..20 {
            let written = driver.request(0, &[Part::In(DATA, 20), Part::In(DATA + 0x1000, 12)]);
            assert_eq!(written, 32);
            let mut bytes = driver.read_memory(DATA, 20);
            bytes.extend(driver.read_memory(DATA + 0x1000, 12));
            assert!(!seen.contains(&bytes));
            seen.push(bytes);
        }
        assert_eq!(driver.read_memory(DATA + 20, 8), [0; 8]);
    }

    #[test]
    fn a_large_request_gets_a_part_and_its_pages_are_marked() {
        let mut driver = driver();
        let region = driver.memory.find_region(GuestAddress(0)).unwrap();
        std::ops::Deref::deref(region).bitmap().reset();
        assert_eq!(driver.request(0, &[Part::In(DATA + 0x800, 1 << 20)]), 4096);
        let region = driver.memory.find_region(GuestAddress(0)).unwrap();
        let ring = usize::try_from(driver.rings[0].used()).unwrap();
        let data = usize::try_from(DATA).unwrap();
        let dirty = [data, data + 0x1000, ring].map(|at| region.bitmap().dirty_at(at));
        assert_eq!(dirty, [true; 3]);
        assert!(!region.bitmap().dirty_at(data + 0x2000));
    }

    #[test]
    fn memory_that_spans_two_regions_is_refused_unless_they_touch() {
        let mut driver = driver();
        assert_eq!(driver.request(0, &[Part::In(HIGH, 8)]), 8);
        driver.add(0, &[Part::In(LOW_END - 4, 8)]);
        driver.notify(0);
        driver.wait_needs_reset();
        assert_eq!(driver.read_memory(LOW_END - 4, 4), [0; 4]);
    }

    #[test]
    fn readable_memory_needs_a_reset() {
        let mut driver = driver();
        driver.add(0, &[Part::Out(DATA, 8), Part::In(DATA, 8)]);
        driver.notify(0);
        driver.wait_needs_reset();
        driver.start(0);
        assert_eq!(driver.request(0, &[Part::In(DATA, 8)]), 8);
    }
}
