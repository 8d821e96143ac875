//! Receive path of the network device: packets from the tap to the guest.

use std::sync::atomic::Ordering;

use vm_memory::GuestAddressSpace;

use super::super::active_queues::ActiveQueues;
use super::super::device::DeviceError;
use super::super::queue::{Chain, QueueError, Used};
use super::spec::{ETHERNET_BYTES, HEADER_BYTES, MERGEABLE, NUM_BUFFERS, PACKET_MAX, RECEIVE};
use super::tap::{is_idle, retried};
use super::{Net, Tap, count};

/// Maximum number of packets that one wake-up of the worker delivers, before it looks at its other events.
const PACKETS_PER_WAKEUP: u32 = 256;

/// Packet that was read from the tap, and waits for buffers of the guest or for the rate limit.
pub(super) struct PendingPacket {
    buffer: Vec<u8>,
    /// Length of the packet in the buffer. 0 means that there is no packet.
    len: usize,
    admitted: bool,
}

impl PendingPacket {
    pub(super) fn new() -> Self {
        Self {
            buffer: vec![0; PACKET_MAX],
            len: 0,
            admitted: false,
        }
    }

    pub(super) fn packet(&self) -> &[u8] {
        &self.buffer[..self.len]
    }

    /// Loads a saved packet. Returns false if its length is invalid.
    pub(super) fn set(&mut self, packet: &[u8]) -> bool {
        if !packet.is_empty() && !(HEADER_BYTES..=PACKET_MAX).contains(&packet.len()) {
            return false;
        }
        self.buffer[..packet.len()].copy_from_slice(packet);
        self.len = packet.len();
        self.admitted = false;
        true
    }

    pub(super) fn clear(&mut self) {
        self.len = 0;
        self.admitted = false;
    }

    /// Reads the next packet from the tap. Returns false if there is none.
    fn fill(&mut self, tap: &dyn Tap) -> Result<bool, DeviceError> {
        match retried(|| tap.receive(&mut self.buffer)) {
            Ok(len) => {
                self.len = len;
                self.admitted = false;
                Ok(true)
            }
            Err(error) if is_idle(&error) => Ok(false),
            Err(error) => Err(DeviceError::host("cannot read from the tap")(error)),
        }
    }
}

/// Result of an attempt to deliver a packet.
enum Delivery {
    Done,
    /// The guest has too few buffers, and will notify the device when it adds some.
    NoRoom,
    /// The guest had too few buffers, but has added some in the meantime.
    Again,
    /// The packet does not fit, even if the guest fills the queue.
    Impossible,
}

impl Net {
    /// Delivers packets to the guest until there are none, the guest has too few buffers, or the rate limit is reached.
    pub(super) fn receive<M: GuestAddressSpace>(
        &mut self,
        queues: &mut ActiveQueues<'_, M>,
    ) -> Result<(), DeviceError> {
        if !queues.is_ready(RECEIVE) {
            return Ok(());
        }
        for _ in 0..PACKETS_PER_WAKEUP {
            if self.waiting.len == 0 && !self.waiting.fill(self.tap.as_ref())? {
                return Ok(queues.signal(RECEIVE)?);
            }
            if self.waiting.len < HEADER_BYTES + ETHERNET_BYTES {
                self.drop_waiting();
                continue;
            }
            if !self.admit()? {
                return Ok(queues.signal(RECEIVE)?);
            }
            match self.deliver(queues)? {
                Delivery::Done => {
                    count(&self.counters.received_packets, 1);
                    count(
                        &self.counters.received_bytes,
                        self.waiting.len - HEADER_BYTES,
                    );
                    self.waiting.clear();
                }
                Delivery::Impossible => self.drop_waiting(),
                Delivery::NoRoom => return Ok(queues.signal(RECEIVE)?),
                Delivery::Again => {}
            }
        }
        queues.notify_again(RECEIVE);
        Ok(queues.signal(RECEIVE)?)
    }

    /// Drops the pending packet, and counts it.
    fn drop_waiting(&mut self) {
        self.counters
            .received_dropped
            .fetch_add(1, Ordering::Relaxed);
        self.waiting.clear();
    }

    /// Returns whether the rate limit admits the pending packet now. Each packet is charged once.
    fn admit(&mut self) -> Result<bool, DeviceError> {
        if !self.waiting.admitted {
            let bytes = self.waiting.len - HEADER_BYTES;
            self.waiting.admitted = self
                .receive_limiter
                .admit(bytes as u64)
                .map_err(DeviceError::host("cannot use the timer of the rate limit"))?;
        }
        Ok(self.waiting.admitted)
    }

    /// Writes the waiting packet to as many buffers as it needs, or to one if the driver has not accepted mergeable
    /// buffers (virtio 1.2, 5.1.6.4).
    fn deliver<M: GuestAddressSpace>(
        &mut self,
        queues: &mut ActiveQueues<'_, M>,
    ) -> Result<Delivery, DeviceError> {
        let mergeable = queues.features() & MERGEABLE != 0;
        let most = if mergeable {
            queues.queue_size(RECEIVE)
        } else {
            1
        };
        let (chains, room) = self.collect(queues, most)?;
        if room < self.waiting.len as u64 {
            let all = chains.len() == usize::from(most);
            // This is called before the chains are put back, so that the driver notifies the device about any further
            // chain.
            let more = !all && queues.enable_notification(RECEIVE)?;
            for _ in &chains {
                queues.put_back(RECEIVE);
            }
            return Ok(match (all, more) {
                (true, _) => Delivery::Impossible,
                (false, true) => Delivery::Again,
                (false, false) => Delivery::NoRoom,
            });
        }
        let number = u16::try_from(chains.len()).unwrap_or(u16::MAX);
        self.waiting.buffer[NUM_BUFFERS].copy_from_slice(&number.to_le_bytes());
        let mut rest = self.waiting.packet();
        let mut used = Vec::new();
        for Chain {
            head, mut writable, ..
        } in chains
        {
            let written = queues.write(&mut writable, rest)?;
            rest = &rest[written..];
            let written = u32::try_from(written).unwrap_or(u32::MAX);
            used.push(Used { head, written });
        }
        // Linux drops a packet if it sees its first buffer used but not its last, so all become visible at once.
        queues.complete_together(RECEIVE, &used)?;
        Ok(Delivery::Done)
    }

    /// Pops chains until the packet fits, at most `most`.
    fn collect<M: GuestAddressSpace>(
        &self,
        queues: &mut ActiveQueues<'_, M>,
        most: u16,
    ) -> Result<(Vec<Chain>, u64), DeviceError> {
        let mut chains = Vec::new();
        let mut room = 0;
        while room < self.waiting.len as u64 && chains.len() < usize::from(most) {
            let Some(chain) = queues.pop(RECEIVE)? else {
                break;
            };
            if !chain.readable.is_empty() {
                return Err(QueueError::Request {
                    head: chain.head,
                    what: "a buffer for packets must be writable memory only",
                }
                .into());
            }
            room += chain.writable.len();
            chains.push(chain);
        }
        Ok((chains, room))
    }
}
