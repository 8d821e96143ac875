//! A split virtqueue as a device sees it: chains come out of it checked, used buffers go in.
//!
//! The rings themselves are `virtio-queue`'s. What is added here is the refusal of everything that a
//! driver must not do: that crate ends a broken chain early and says nothing.

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

/// What a driver did to a queue that it must not do. The device needs a reset then.
#[derive(Debug, thiserror::Error)]
pub enum QueueError {
    /// The rings: their place, or the index of the available ring.
    #[error("the rings: {0}")]
    Ring(#[source] virtio_queue::Error),
    /// The rings are not all in guest memory.
    #[error("the rings are not in guest memory")]
    RingOutside,
    /// A chain that is a loop, names a descriptor or table that is not there, or has tables in tables.
    #[error("the chain of descriptor {head} does not end after {descriptors} descriptors")]
    Unterminated {
        /// Its first descriptor.
        head: u16,
        /// How many of it could be read.
        descriptors: usize,
    },
    /// A chain longer than any queue.
    #[error("the chain of descriptor {0} has more than {CHAIN_LIMIT} descriptors")]
    TooLong(u16),
    /// A descriptor without memory.
    #[error("the chain of descriptor {0} has an empty descriptor")]
    Empty(u16),
    /// Device-readable memory behind device-writable memory (2.7.4.2).
    #[error("the chain of descriptor {0} has readable memory behind writable memory")]
    Order(u16),
    /// Memory that the guest does not have.
    #[error("{bytes} bytes at {address:#x} are not in guest memory")]
    Outside {
        /// Where it was to be.
        address: u64,
        /// How much.
        bytes: u64,
    },
    /// A request that does not have the parts which its device asks for.
    #[error("the chain of descriptor {head}: {what}")]
    Request {
        /// Its first descriptor.
        head: u16,
        /// What is wrong.
        what: &'static str,
    },
}

/// A chain of descriptors that was checked.
#[derive(Clone, Debug)]
pub struct Chain {
    /// The descriptor it begins with, by which it is given back.
    pub head: u16,
    /// What the driver wrote for the device.
    pub readable: Buffer,
    /// Where the device may write.
    pub writable: Buffer,
}

/// A chain to be given back.
#[derive(Clone, Copy, Debug)]
pub struct Used {
    /// The descriptor it begins with.
    pub head: u16,
    /// Bytes of its writable memory that were written.
    pub written: u32,
}

/// The state of a queue.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Encode, Decode)]
#[cbor(map)]
pub struct QueueSnapshot {
    /// `QueueNumMax`: the most entries.
    #[n(0)]
    pub max_size: u16,
    /// `QueueNum`: entries in use.
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
    /// Index of the next available entry to take.
    #[n(6)]
    pub next_available: u16,
    /// Index of the next used entry to write.
    #[n(7)]
    pub next_used: u16,
}

impl QueueSnapshot {
    pub(super) fn size_is_possible(&self) -> bool {
        self.size.is_power_of_two() && self.size <= self.max_size
    }

    /// A queue after a reset.
    pub(super) fn reset(max_size: u16) -> Self {
        Self {
            max_size,
            size: max_size,
            ..Self::default()
        }
    }
}

/// A queue in use.
pub(super) struct VirtQueue {
    ring: Queue,
    /// The index behind the last used buffer that the driver was asked about.
    told: u16,
}

impl VirtQueue {
    /// The queue that `snapshot` describes.
    pub(super) fn new(snapshot: &QueueSnapshot, event_index: bool) -> Result<Self, QueueError> {
        let ring = Queue::try_from(QueueState {
            max_size: snapshot.max_size,
            next_avail: snapshot.next_available,
            next_used: snapshot.next_used,
            event_idx_enabled: event_index,
            size: snapshot.size,
            ready: snapshot.ready,
            desc_table: snapshot.descriptor_table,
            avail_ring: snapshot.available_ring,
            used_ring: snapshot.used_ring,
        })
        .map_err(QueueError::Ring)?;
        Ok(Self {
            ring,
            told: snapshot.next_used,
        })
    }

    /// Whether the rings of a queue that is ready are in memory.
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

    pub(super) fn stop(&mut self) {
        self.ring.set_ready(false);
    }

    pub(super) fn size(&self) -> u16 {
        self.ring.size()
    }

    /// The next chain that the driver made available.
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

    /// Gives the chain of `head` back, `written` bytes of its writable memory written.
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

    /// Gives several chains back at once: the driver sees all of them or none.
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
                // `id` and `len`, each of 32 bits (2.7.8).
                let element = u64::from(used.head) | u64::from(used.written) << 32;
                memory
                    .write_obj(element.to_le(), GuestAddress(self.ring.used_ring() + place))
                    .map_err(|_| QueueError::RingOutside)?;
                next = next.wrapping_add(1);
            }
            self.ring.set_next_used(next);
        }
        // It publishes the index, and with it those before.
        self.complete(memory, last.head, last.written)
    }

    /// Whether the driver wants to be told of the buffers used since the last call.
    pub(super) fn wants_interrupt<M: GuestAddressSpace>(
        &mut self,
        memory: &M,
    ) -> Result<bool, QueueError> {
        let (told, used) = (self.told, self.ring.next_used());
        self.told = used;
        if told == used {
            return Ok(false);
        }
        // The used index is written before the driver's wish is read, or both sides could wait.
        fence(Ordering::SeqCst);
        if !self.ring.event_idx_enabled() {
            return Ok(self.load(memory, 0)? & AVAIL_NO_INTERRUPT == 0);
        }
        // 2.7.7.2: `used_event`, behind the entries, is the index of the buffer that the driver waits for.
        let event = self.load(memory, AVAIL_HEADER_BYTES + 2 * u64::from(self.ring.size()))?;
        let since_event = used.wrapping_sub(event).wrapping_sub(1);
        Ok(since_event < used.wrapping_sub(told))
    }

    /// A field of the available ring.
    fn load<M: GuestAddressSpace>(&self, memory: &M, offset: u64) -> Result<u16, QueueError> {
        let address = GuestAddress(self.ring.avail_ring() + offset);
        let value = memory.memory().load(address, Ordering::SeqCst);
        value.map(u16::from_le).map_err(|_| QueueError::RingOutside)
    }

    pub(super) fn disable_notification<M: GuestAddressSpace>(
        &mut self,
        memory: &M,
    ) -> Result<(), QueueError> {
        self.ring
            .disable_notification(&*memory.memory())
            .map_err(QueueError::Ring)
    }

    /// Asks for notifications again. True when more chains are there by now.
    pub(super) fn enable_notification<M: GuestAddressSpace>(
        &mut self,
        memory: &M,
    ) -> Result<bool, QueueError> {
        self.ring
            .enable_notification(&*memory.memory())
            .map_err(QueueError::Ring)
    }
}

/// The queues that a driver which is ready made and agreed to use with `features`, their rings all in `memory`.
pub(super) fn in_use<G: GuestMemory>(
    snapshots: &[QueueSnapshot],
    features: u64,
    memory: &G,
) -> Result<Vec<VirtQueue>, QueueError> {
    let event_index = features & (1 << VIRTIO_RING_F_EVENT_IDX) != 0;
    let make = |snapshot| {
        let queue = VirtQueue::new(snapshot, event_index)?;
        queue.check(memory)?;
        Ok(queue)
    };
    snapshots.iter().map(make).collect()
}

/// Reads a chain to its end, and refuses what is not one.
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
