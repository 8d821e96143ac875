//! Split virtqueue, seen from the device: chains that are popped from it have been checked, and used chains are pushed
//! to it.
//!
//! The ring format itself is implemented by the `virtio-queue` crate. This module adds the checks: `virtio-queue`
//! silently ends a malformed chain early, while [`VirtQueue`] returns an error for everything that a driver must not
//! do.

use std::sync::atomic::{Ordering, fence};

use minicbor::{Decode, Encode};
use virtio_bindings::virtio_ring::VIRTIO_RING_F_EVENT_IDX;
use virtio_queue::desc::split::Descriptor;
use virtio_queue::{DescriptorChain, Queue, QueueOwnedT, QueueState, QueueT};
use vm_memory::{Bytes, GuestAddress, GuestAddressSpace, GuestMemory, Permissions};

use super::buffer::Buffer;
use super::spec::{
    AVAIL_HEADER_BYTES, AVAIL_NO_INTERRUPT, CHAIN_LIMIT, USED_BYTES, USED_HEADER_BYTES,
};

/// Violation of a queue's rules by the driver. The device needs a reset.
#[derive(Debug, thiserror::Error)]
pub enum QueueError {
    /// A ring is misaligned, or the available ring has an invalid index.
    #[error("invalid ring: {0}")]
    Ring(#[source] virtio_queue::Error),
    /// A ring is not wholly in guest memory.
    #[error("a ring is not in guest memory")]
    RingOutside,
    /// The chain loops, names a descriptor or table that does not exist, or has an indirect table within an indirect
    /// table.
    #[error("the chain that starts at descriptor {head} is broken after {descriptors} descriptors")]
    Unterminated {
        /// First descriptor of the chain.
        head: u16,
        /// Number of descriptors that could be read.
        descriptors: usize,
    },
    /// The chain has more descriptors than any queue has entries.
    #[error("the chain that starts at descriptor {0} has more than {CHAIN_LIMIT} descriptors")]
    TooLong(u16),
    /// A descriptor has a length of 0.
    #[error("the chain that starts at descriptor {0} has an empty descriptor")]
    Empty(u16),
    /// A device-readable descriptor follows a device-writable one (virtio 1.2, 2.7.4.2).
    #[error(
        "the chain that starts at descriptor {0} has a readable descriptor behind a writable one"
    )]
    Order(u16),
    /// A buffer is not in guest memory.
    #[error("{bytes} bytes at {address:#x} are not in guest memory")]
    Outside {
        /// Guest-physical address of the buffer.
        address: u64,
        /// Length of the buffer in bytes.
        bytes: u64,
    },
    /// The request lacks a part that the device requires.
    #[error("the chain that starts at descriptor {head}: {what}")]
    Request {
        /// First descriptor of the chain.
        head: u16,
        /// Description of the mistake.
        what: &'static str,
    },
}

/// Chain of descriptors that has been checked.
#[derive(Clone, Debug)]
pub struct Chain {
    /// First descriptor of the chain. It identifies the chain in the used ring.
    pub head: u16,
    /// Device-readable memory: data from the driver.
    pub readable: Buffer,
    /// Device-writable memory: room for data from the device.
    pub writable: Buffer,
}

/// Entry of the used ring.
#[derive(Clone, Copy, Debug)]
pub struct Used {
    /// First descriptor of the chain.
    pub head: u16,
    /// Number of bytes that the device wrote to the chain's writable memory.
    pub written: u32,
}

/// Saved state of a queue.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Encode, Decode)]
#[cbor(map)]
pub struct QueueSnapshot {
    /// `QueueNumMax`: maximum number of entries.
    #[n(0)]
    pub max_size: u16,
    /// `QueueNum`: number of entries in use.
    #[n(1)]
    pub size: u16,
    /// `QueueReady`.
    #[n(2)]
    pub ready: bool,
    /// Guest-physical address of the descriptor table.
    #[n(3)]
    pub descriptor_table: u64,
    /// Guest-physical address of the available ring (driver area).
    #[n(4)]
    pub available_ring: u64,
    /// Guest-physical address of the used ring (device area).
    #[n(5)]
    pub used_ring: u64,
    /// Index of the next entry to take from the available ring.
    #[n(6)]
    pub next_available: u16,
    /// Index of the next entry to write to the used ring.
    #[n(7)]
    pub next_used: u16,
}

impl QueueSnapshot {
    /// Returns whether the size is a power of two and at most the maximum.
    pub(super) fn size_is_possible(&self) -> bool {
        self.size.is_power_of_two() && self.size <= self.max_size
    }

    /// Returns the state of a queue after a reset.
    pub(super) fn reset(max_size: u16) -> Self {
        Self {
            max_size,
            size: max_size,
            ..Self::default()
        }
    }
}

/// Queue that the driver has set up.
pub(super) struct VirtQueue {
    ring: Queue,
    /// Used index at the last call of [`Self::wants_interrupt`].
    signalled_to: u16,
}

impl VirtQueue {
    /// Creates the queue that `snapshot` describes.
    pub(super) fn new(snapshot: &QueueSnapshot, features: u64) -> Result<Self, QueueError> {
        let ring = Queue::try_from(QueueState {
            max_size: snapshot.max_size,
            next_avail: snapshot.next_available,
            next_used: snapshot.next_used,
            event_idx_enabled: features & (1 << VIRTIO_RING_F_EVENT_IDX) != 0,
            size: snapshot.size,
            ready: snapshot.ready,
            desc_table: snapshot.descriptor_table,
            avail_ring: snapshot.available_ring,
            used_ring: snapshot.used_ring,
        })
        .map_err(QueueError::Ring)?;
        Ok(Self {
            ring,
            signalled_to: snapshot.next_used,
        })
    }

    /// Checks that the rings of the queue are in guest memory, if the queue is ready.
    pub(super) fn check<G: GuestMemory>(&self, memory: &G) -> Result<(), QueueError> {
        if self.ring.ready() && !self.ring.is_valid(memory) {
            return Err(QueueError::RingOutside);
        }
        Ok(())
    }

    pub(super) fn save(&self) -> QueueSnapshot {
        let state = self.ring.state();
        QueueSnapshot {
            max_size: state.max_size,
            size: state.size,
            ready: state.ready,
            descriptor_table: state.desc_table,
            available_ring: state.avail_ring,
            used_ring: state.used_ring,
            next_available: state.next_avail,
            next_used: state.next_used,
        }
    }

    pub(super) fn is_ready(&self) -> bool {
        self.ring.ready()
    }

    /// Stops the queue until the driver resets the device.
    pub(super) fn stop(&mut self) {
        self.ring.set_ready(false);
    }

    pub(super) fn size(&self) -> u16 {
        self.ring.size()
    }

    /// Pops the next chain from the available ring, and checks it.
    pub(super) fn pop<M: GuestAddressSpace>(
        &mut self,
        memory: &M,
    ) -> Result<Option<Chain>, QueueError> {
        if !self.ring.ready() {
            return Ok(None);
        }
        let memory = memory.memory();
        let next = {
            let mut available = self.ring.iter(memory.clone()).map_err(QueueError::Ring)?;
            available.next()
        };
        next.map(|chain| checked(chain, &*memory)).transpose()
    }

    /// Undoes the last [`Self::pop`].
    pub(super) fn put_back(&mut self) {
        self.ring.go_to_previous_position();
    }

    /// Pushes the chain of descriptor `head` to the used ring, with `written` bytes written to its writable memory.
    pub(super) fn complete<M: GuestAddressSpace>(
        &mut self,
        memory: &M,
        head: u16,
        written: u32,
    ) -> Result<(), QueueError> {
        self.ring
            .add_used(&*memory.memory(), head, written)
            .map_err(QueueError::Ring)
    }

    /// Pushes several chains to the used ring at once. The driver sees all of them or none.
    pub(super) fn complete_together<M: GuestAddressSpace>(
        &mut self,
        memory: &M,
        used: &[Used],
    ) -> Result<(), QueueError> {
        let Some((last, before)) = used.split_last() else {
            return Ok(());
        };
        {
            let memory = memory.memory();
            let mut next = self.ring.next_used();
            for used in before {
                let place = USED_HEADER_BYTES + USED_BYTES * u64::from(next % self.ring.size());
                // The entry is `id` and `len`, of 32 bits each (virtio 1.2, 2.7.8).
                let element = u64::from(used.head) | u64::from(used.written) << 32;
                memory
                    .write_obj(element.to_le(), GuestAddress(self.ring.used_ring() + place))
                    .map_err(|_| QueueError::RingOutside)?;
                next = next.wrapping_add(1);
            }
            self.ring.set_next_used(next);
        }
        // This call publishes the used index, and with it all entries.
        self.complete(memory, last.head, last.written)
    }

    /// Returns whether the driver wants an interrupt for the chains that were used since the last call.
    pub(super) fn wants_interrupt<M: GuestAddressSpace>(
        &mut self,
        memory: &M,
    ) -> Result<bool, QueueError> {
        let (signalled_to, used) = (self.signalled_to, self.ring.next_used());
        self.signalled_to = used;
        if signalled_to == used {
            return Ok(false);
        }
        // The used index must be visible before the driver's suppression flag is read. Otherwise the driver could
        // suppress the interrupt after it looked at an old index, and both sides would wait for each other.
        fence(Ordering::SeqCst);
        if !self.ring.event_idx_enabled() {
            return Ok(self.load_available(memory, 0)? & AVAIL_NO_INTERRUPT == 0);
        }
        // `used_event` follows the entries of the available ring. It is the index of the used buffer for which the
        // driver wants an interrupt (virtio 1.2, 2.7.7.2).
        let event =
            self.load_available(memory, AVAIL_HEADER_BYTES + 2 * u64::from(self.ring.size()))?;
        let since_event = used.wrapping_sub(event).wrapping_sub(1);
        Ok(since_event < used.wrapping_sub(signalled_to))
    }

    /// Loads the 16-bit field of the available ring at `offset` bytes.
    fn load_available<M: GuestAddressSpace>(
        &self,
        memory: &M,
        offset: u64,
    ) -> Result<u16, QueueError> {
        let address = GuestAddress(self.ring.avail_ring() + offset);
        let value = memory.memory().load(address, Ordering::SeqCst);
        value.map(u16::from_le).map_err(|_| QueueError::RingOutside)
    }

    /// Tells the driver that it need not notify this queue for now.
    pub(super) fn disable_notification<M: GuestAddressSpace>(
        &mut self,
        memory: &M,
    ) -> Result<(), QueueError> {
        self.ring
            .disable_notification(&*memory.memory())
            .map_err(QueueError::Ring)
    }

    /// Asks the driver for notifications again. Returns true if there are new chains already.
    pub(super) fn enable_notification<M: GuestAddressSpace>(
        &mut self,
        memory: &M,
    ) -> Result<bool, QueueError> {
        self.ring
            .enable_notification(&*memory.memory())
            .map_err(QueueError::Ring)
    }
}

/// Creates the queues of a driver that has set DRIVER_OK with `features`.
///
/// # Errors
/// Returns [`QueueError`] if a ring is misaligned or not in `memory`.
pub(super) fn in_use<G: GuestMemory>(
    snapshots: &[QueueSnapshot],
    features: u64,
    memory: &G,
) -> Result<Vec<VirtQueue>, QueueError> {
    let make = |snapshot| {
        let queue = VirtQueue::new(snapshot, features)?;
        queue.check(memory)?;
        Ok(queue)
    };
    snapshots.iter().map(make).collect()
}

/// Reads a chain to its end, and checks it.
fn checked<T, G>(mut chain: DescriptorChain<T>, memory: &G) -> Result<Chain, QueueError>
where
    T: std::ops::Deref<Target = G>,
    G: GuestMemory,
{
    let mut found = Chain {
        head: chain.head_index(),
        readable: Buffer::default(),
        writable: Buffer::default(),
    };
    let mut descriptors = 0;
    let mut ended = false;
    for descriptor in chain.by_ref().take(CHAIN_LIMIT + 1) {
        descriptors += 1;
        ended = !descriptor.has_next();
        add(&mut found, descriptor, memory)?;
    }
    if descriptors > CHAIN_LIMIT {
        return Err(QueueError::TooLong(found.head));
    }
    if !ended {
        return Err(QueueError::Unterminated {
            head: found.head,
            descriptors,
        });
    }
    Ok(found)
}

/// Adds a descriptor to `chain`, and checks it.
fn add<G: GuestMemory>(
    chain: &mut Chain,
    descriptor: Descriptor,
    memory: &G,
) -> Result<(), QueueError> {
    let (address, bytes) = (descriptor.addr(), descriptor.len());
    if bytes == 0 {
        return Err(QueueError::Empty(chain.head));
    }
    let access = if descriptor.is_write_only() {
        Permissions::Write
    } else {
        Permissions::Read
    };
    let inside =
        usize::try_from(bytes).is_ok_and(|bytes| memory.check_range(address, bytes, access));
    if !inside {
        return Err(QueueError::Outside {
            address: address.0,
            bytes: bytes.into(),
        });
    }
    if descriptor.is_write_only() {
        chain.writable.push(address.0, bytes.into());
    } else if chain.writable.is_empty() {
        chain.readable.push(address.0, bytes.into());
    } else {
        return Err(QueueError::Order(chain.head));
    }
    Ok(())
}
