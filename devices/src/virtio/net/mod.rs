//! Network device (virtio 1.2, 5.1) over a tap interface: one pair of queues, checksum and TCP segmentation offloads,
//! mergeable receive buffers, and a rate limit for each direction.
//!
//! Each packet is one read or write of the tap, and is copied once. The guest's buffers are in several pieces; a
//! vectored read or write into guest memory would need raw pointers, which this crate does not use.

mod receive;
mod spec;
mod state;
mod tap;
#[cfg(test)]
mod tests;

use std::io;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use event_manager::EventSet;
use virtio_bindings::virtio_ids::VIRTIO_ID_NET;
use vm_memory::GuestAddressSpace;

use super::active_queues::{ActiveQueues, Completion};
use super::device::{
    ConfigSpace, Counters, Device, DeviceError, EventRegistry, Identity, Token, read_config,
};
use super::queue::{Chain, QueueError};
use super::state::{DeviceState, DeviceStateError};
use crate::rate_limit::{RateLimit, RateLimiter};
use receive::PendingPacket;
use spec::{
    ETHERNET_BYTES, FEATURES, GUEST_CSUM, GUEST_TSO4, GUEST_TSO6, HEADER_BYTES, MTU, PACKET_MAX,
    QUEUE_SIZE, RECEIVE, TRANSMIT,
};
use tap::retried;

pub use state::NetSnapshot;
pub use tap::{Offloads, Tap};

/// Token of the tap.
const TAP: Token = 0;
const RECEIVE_TIMER: Token = 1;
const TRANSMIT_TIMER: Token = 2;

/// Configuration of a network device.
pub struct NetOptions {
    /// Tap interface on the host.
    pub tap: Box<dyn Tap>,
    /// MAC address of the guest.
    pub mac: [u8; 6],
    /// MTU in bytes that the guest is told to use. `None` does not offer one.
    pub mtu: Option<u16>,
    /// Limit on packets to the guest.
    pub receive_limit: RateLimit,
    /// Limit on packets from the guest.
    pub transmit_limit: RateLimit,
}

/// Counters of a network device.
#[derive(Default)]
struct NetCounters {
    received_bytes: AtomicU64,
    received_packets: AtomicU64,
    received_dropped: AtomicU64,
    sent_bytes: AtomicU64,
    sent_packets: AtomicU64,
    sent_dropped: AtomicU64,
}

impl Counters for NetCounters {
    /// The names are those of Cloud Hypervisor where it has the same counter.
    fn counters(&self) -> Vec<(&'static str, u64)> {
        let value = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        vec![
            ("rx_bytes", value(&self.received_bytes)),
            ("rx_frames", value(&self.received_packets)),
            ("rx_dropped", value(&self.received_dropped)),
            ("tx_bytes", value(&self.sent_bytes)),
            ("tx_frames", value(&self.sent_packets)),
            ("tx_dropped", value(&self.sent_dropped)),
        ]
    }
}

fn count(counter: &AtomicU64, more: usize) {
    counter.fetch_add(more as u64, Ordering::Relaxed);
}

/// Configuration space.
struct Config {
    mac: Mutex<[u8; 6]>,
    mtu: u16,
}

impl Config {
    fn mac(&self) -> MutexGuard<'_, [u8; 6]> {
        self.mac.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl ConfigSpace for Config {
    fn read(&self, offset: u64, data: &mut [u8]) {
        read_config(&spec::config(*self.mac(), self.mtu), offset, data);
    }

    fn accepts(&self, features: u64) -> bool {
        spec::accepts(features)
    }
}

/// Network device.
pub struct Net {
    tap: Box<dyn Tap>,
    config: Arc<Config>,
    has_mtu: bool,
    receive_limiter: RateLimiter,
    transmit_limiter: RateLimiter,
    /// Packet from the host that the guest has not received yet.
    waiting: PendingPacket,
    /// Buffer for a packet from the guest.
    outgoing: Vec<u8>,
    /// The tap had no room for the last packet, which is still in the available ring.
    blocked: bool,
    /// Offloads that the tap was set to.
    offloads: Option<Offloads>,
    /// The guest was restored here, and the network has to learn its new location.
    announce: bool,
    counters: Arc<NetCounters>,
}

impl Net {
    /// Creates the network device that `config` describes.
    ///
    /// # Errors
    /// Returns the kernel's error if a timer cannot be created.
    pub fn new(config: NetOptions) -> io::Result<Self> {
        Ok(Self {
            tap: config.tap,
            config: Arc::new(Config {
                mac: Mutex::new(config.mac),
                mtu: config.mtu.unwrap_or_default(),
            }),
            has_mtu: config.mtu.is_some(),
            receive_limiter: RateLimiter::new(config.receive_limit)?,
            transmit_limiter: RateLimiter::new(config.transmit_limit)?,
            waiting: PendingPacket::new(),
            outgoing: vec![0; PACKET_MAX],
            blocked: false,
            offloads: None,
            announce: false,
            counters: Arc::default(),
        })
    }

    /// Sends available packets to the tap until it has no room or the rate limit is reached.
    fn transmit<M: GuestAddressSpace>(
        &mut self,
        queues: &mut ActiveQueues<'_, M>,
    ) -> Result<(), DeviceError> {
        queues.drain(TRANSMIT, |queues, chain| self.send(queues, chain))
    }

    /// Sends one packet to the tap.
    fn send<M: GuestAddressSpace>(
        &mut self,
        queues: &ActiveQueues<'_, M>,
        mut chain: Chain,
    ) -> Result<Completion, DeviceError> {
        let len = usize::try_from(chain.readable.len()).unwrap_or(usize::MAX);
        if !chain.writable.is_empty() || len < HEADER_BYTES {
            return Err(QueueError::Request {
                head: chain.head,
                what: "a packet to send must be in readable memory only, and have a header",
            }
            .into());
        }
        if !(HEADER_BYTES + ETHERNET_BYTES..=PACKET_MAX).contains(&len) {
            count(&self.counters.sent_dropped, 1);
            return Ok(Completion::Used(0));
        }
        let bytes = len - HEADER_BYTES;
        let admitted = self.transmit_limiter.admit(bytes as u64);
        if !admitted.map_err(DeviceError::host("cannot use the timer of the rate limit"))? {
            return Ok(Completion::Deferred);
        }
        let packet = &mut self.outgoing[..len];
        queues.read(&mut chain.readable, packet)?;
        match retried(|| self.tap.send(packet)) {
            Ok(()) => {
                count(&self.counters.sent_bytes, bytes);
                count(&self.counters.sent_packets, 1);
            }
            // The tap becomes writable when it has room.
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                self.blocked = true;
                return Ok(Completion::Deferred);
            }
            // The kernel rejected the packet's header, or the interface is down.
            Err(_) => count(&self.counters.sent_dropped, 1),
        }
        Ok(Completion::Used(0))
    }

    /// Sets the tap's offloads to those that the guest accepts.
    fn agree(&mut self, features: u64) -> Result<(), DeviceError> {
        let offloads = Offloads {
            checksum: features & GUEST_CSUM != 0,
            tso4: features & GUEST_TSO4 != 0,
            tso6: features & GUEST_TSO6 != 0,
        };
        if self.offloads != Some(offloads) {
            self.tap
                .set_offloads(offloads)
                .map_err(DeviceError::host("TUNSETOFFLOAD"))?;
            self.offloads = Some(offloads);
        }
        Ok(())
    }

    /// Announces the guest's location to the switches after a migration, by a reverse ARP request for its own address
    /// (RFC 903). Like any packet, it may be lost.
    fn announce(&mut self) {
        if std::mem::take(&mut self.announce)
            && retried(|| self.tap.send(&announcement(*self.config.mac()))).is_err()
        {
            count(&self.counters.sent_dropped, 1);
        }
    }
}

/// Returns the reverse ARP request of a guest, with a virtio header.
fn announcement(mac: [u8; 6]) -> [u8; HEADER_BYTES + 60] {
    let mut packet = [0; HEADER_BYTES + 60];
    let frame = &mut packet[HEADER_BYTES..];
    frame[..6].fill(0xff);
    frame[6..12].copy_from_slice(&mac);
    // EtherType for reverse ARP, then: Ethernet, IPv4, address lengths of 6 and 4 bytes, "request reverse".
    frame[12..22].copy_from_slice(&[0x80, 0x35, 0, 1, 8, 0, 6, 4, 0, 3]);
    frame[22..28].copy_from_slice(&mac);
    frame[32..38].copy_from_slice(&mac);
    packet
}

impl<M: GuestAddressSpace> Device<M> for Net {
    fn identity(&self) -> Identity {
        Identity {
            device_type: VIRTIO_ID_NET,
            features: FEATURES | if self.has_mtu { MTU } else { 0 },
            queue_sizes: vec![QUEUE_SIZE; 2],
            config: Arc::clone(&self.config) as _,
            counters: Arc::clone(&self.counters) as _,
        }
    }

    fn register(&mut self, registry: &mut EventRegistry<'_, '_>) -> io::Result<()> {
        // Edge-triggered: a packet for which the guest has no room must not wake the worker again and again.
        let both = EventSet::IN | EventSet::OUT | EventSet::EDGE_TRIGGERED;
        registry.add(&self.tap.as_raw_fd(), TAP, both)?;
        registry.add(self.receive_limiter.timer(), RECEIVE_TIMER, EventSet::IN)?;
        registry.add(self.transmit_limiter.timer(), TRANSMIT_TIMER, EventSet::IN)
    }

    fn started(
        &mut self,
        mut queues: ActiveQueues<'_, M>,
        _: &mut EventRegistry<'_, '_>,
    ) -> Result<(), DeviceError> {
        self.agree(queues.features())?;
        self.announce();
        self.receive(&mut queues)
    }

    fn notified(
        &mut self,
        queue: usize,
        mut queues: ActiveQueues<'_, M>,
        _: &mut EventRegistry<'_, '_>,
    ) -> Result<(), DeviceError> {
        match queue {
            RECEIVE => self.receive(&mut queues),
            _ => self.transmit(&mut queues),
        }
    }

    fn ready(
        &mut self,
        token: Token,
        events: EventSet,
        mut queues: ActiveQueues<'_, M>,
        _: &mut EventRegistry<'_, '_>,
    ) -> Result<(), DeviceError> {
        let failed = DeviceError::host("cannot use the timer of the rate limit");
        match token {
            RECEIVE_TIMER => self.receive_limiter.timer_ran_out().map_err(failed)?,
            TRANSMIT_TIMER => self.transmit_limiter.timer_ran_out().map_err(failed)?,
            _ => {}
        }
        let unblocked = events.contains(EventSet::OUT) && std::mem::take(&mut self.blocked);
        if token == TRANSMIT_TIMER || unblocked {
            self.transmit(&mut queues)?;
        }
        if token != TRANSMIT_TIMER {
            self.receive(&mut queues)?;
        }
        Ok(())
    }

    fn reset(&mut self, _: &mut EventRegistry<'_, '_>) {
        self.waiting.clear();
    }

    fn save(&self) -> DeviceState {
        DeviceState::new(&NetSnapshot {
            mac: *self.config.mac(),
            waiting_packet: self.waiting.packet().to_vec(),
        })
    }

    fn restore(&mut self, state: &DeviceState) -> Result<(), DeviceStateError> {
        let state: NetSnapshot = state.decode("net")?;
        if !self.waiting.set(&state.waiting_packet) {
            return Err(DeviceStateError::Mismatch {
                device: "net",
                what: format!(
                    "the waiting packet has {} bytes, but must have {HEADER_BYTES} to {PACKET_MAX}",
                    state.waiting_packet.len()
                ),
            });
        }
        *self.config.mac() = state.mac;
        self.announce = true;
        Ok(())
    }
}
