//! Socket device (virtio 1.2, 5.10) whose host side are Unix sockets. It supports stream connections in both
//! directions, separate shutdown of each half, and credit-based flow control.

mod connection;
mod host;
mod hub;
mod spec;
mod state;
#[cfg(test)]
mod tests;

use std::fs::Metadata;
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileTypeExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use event_manager::EventSet;
use virtio_bindings::virtio_ids::VIRTIO_ID_VSOCK;
use vm_memory::GuestAddressSpace;

use super::active_queues::{ActiveQueues, Completion};
use super::device::{
    ConfigSpace, Counters, Device, DeviceError, EventRegistry, Identity, Token, read_config,
};
use super::queue::{Chain, QueueError};
use super::state::{DeviceState, DeviceStateError};
use host::HostSocket;
use hub::Hub;
use spec::{
    EVENTS, GUEST_CID_MIN, HEADER_BYTES, Header, QUEUE_SIZE, RECEIVE, TRANSMIT, TRANSPORT_RESET,
};

pub use state::VsockSnapshot;

/// Maximum length of a socket path: `sun_path` without its terminating zero (unix(7)).
const SOCKET_PATH_MAX: usize = 107;
/// Token of the listening socket.
const LISTENER: Token = 0;
/// Maximum number of packets to the guest that one wake-up of the worker delivers, before it looks at its other events.
const PACKETS_PER_WAKEUP: u32 = 256;

/// Configuration of a socket device.
#[derive(Clone, Debug)]
pub struct VsockOptions {
    /// Address (CID) of the guest: from 3 to 2^32 - 2.
    pub guest_cid: u64,
    /// Path of the socket on which the host requests connections to the guest. For connections from the guest to port
    /// N, a process listens on this path with `_N` appended.
    pub path: PathBuf,
}

/// Reason for which a socket device could not be created.
#[derive(Debug, thiserror::Error)]
pub enum VsockError {
    /// The address of the guest is reserved.
    #[error(
        "the vsock address {0} is reserved: that of a guest is from {GUEST_CID_MIN} to 4294967294"
    )]
    Cid(u64),
    /// The listening socket could not be created.
    #[error("{}: {source}{}", .path.display(), socket_hint(.path, .source))]
    Socket {
        /// Path of the socket.
        path: PathBuf,
        /// Error of the kernel.
        source: io::Error,
    },
}

/// Returns what the user can do about `error`, for the end of its message.
fn socket_hint(path: &Path, error: &io::Error) -> String {
    let bytes = path.as_os_str().len();
    if bytes > SOCKET_PATH_MAX {
        return format!(
            "; the path of a socket has at most {SOCKET_PATH_MAX} bytes, but this one has {bytes}"
        );
    }
    if error.kind() != io::ErrorKind::AddrInUse {
        return String::new();
    }
    let is_socket = |metadata: Metadata| metadata.file_type().is_socket();
    match std::fs::symlink_metadata(path).map(is_socket) {
        Ok(false) => "; something else exists at this path: choose another path, or remove it",
        _ => "; another guest uses the socket, or a guest that was killed has left it behind: then remove it",
    }
    .into()
}

/// Configuration space, which consists of the guest's address (virtio 1.2, 5.10.4).
struct Config(AtomicU64);

impl ConfigSpace for Config {
    fn read(&self, offset: u64, data: &mut [u8]) {
        let cid = self.0.load(Ordering::SeqCst).to_le_bytes();
        read_config(&cid, offset, data);
    }
}

/// Counters of a socket device.
#[derive(Default)]
struct VsockCounters {
    connections: AtomicU64,
    received: AtomicU64,
    sent: AtomicU64,
    errors: AtomicU64,
}

impl Counters for VsockCounters {
    fn counters(&self) -> Vec<(&'static str, u64)> {
        let value = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        vec![
            ("connections", value(&self.connections)),
            ("rx_bytes", value(&self.received)),
            ("tx_bytes", value(&self.sent)),
            ("errors", value(&self.errors)),
        ]
    }
}

/// Socket device.
pub struct Vsock {
    hub: Hub,
    config: Arc<Config>,
    counters: Arc<VsockCounters>,
    /// The guest was restored here, and does not know yet that its connections are closed.
    announce_reset: bool,
    /// No packet is taken from the guest until it has received packets that wait for it.
    held: bool,
}

impl Vsock {
    /// Creates the socket device that `config` describes, and its listening socket. Dropping the device removes the
    /// socket's file.
    ///
    /// # Errors
    /// Returns [`VsockError`] if the guest's address is reserved, or the socket cannot be created.
    pub fn new(config: VsockOptions) -> Result<Self, VsockError> {
        let cid = config.guest_cid;
        if !is_guest_cid(cid) {
            return Err(VsockError::Cid(cid));
        }
        let socket = HostSocket::bind(&config.path).map_err(|source| VsockError::Socket {
            path: config.path,
            source,
        })?;
        Ok(Self {
            hub: Hub::new(socket, cid),
            config: Arc::new(Config(AtomicU64::new(cid))),
            counters: Arc::default(),
            announce_reset: false,
            held: false,
        })
    }

    /// Handles packets from the guest, until too many packets wait for the guest.
    fn transmit<M: GuestAddressSpace>(
        &mut self,
        queues: &mut ActiveQueues<'_, M>,
        registry: &mut EventRegistry<'_, '_>,
    ) -> Result<(), DeviceError> {
        queues.drain(TRANSMIT, |queues, chain| {
            if self.hub.is_full() {
                self.held = true;
                return Ok(Completion::Deferred);
            }
            let (header, data) = packet(queues, chain)?;
            self.counters.sent.fetch_add(data.len(), Ordering::Relaxed);
            self.hub.packet(queues, &header, data, registry)?;
            Ok(Completion::Used(0))
        })
    }

    /// Delivers packets to the guest.
    fn receive<M: GuestAddressSpace>(
        &mut self,
        queues: &mut ActiveQueues<'_, M>,
        registry: &mut EventRegistry<'_, '_>,
    ) -> Result<(), DeviceError> {
        for _ in 0..PACKETS_PER_WAKEUP {
            if !self.hub.has_work() {
                return self.received(queues);
            }
            let Some(mut chain) = queues.pop(RECEIVE)? else {
                if queues.enable_notification(RECEIVE)? {
                    continue;
                }
                return self.received(queues);
            };
            let mut head = chain.writable.take(HEADER_BYTES as u64);
            if !chain.readable.is_empty() || head.len() < HEADER_BYTES as u64 {
                return Err(QueueError::Request {
                    head: chain.head,
                    what: "a buffer for packets must be writable memory only, with room for a header",
                }
                .into());
            }
            let Some(header) = self.hub.next(queues, &mut chain.writable, registry)? else {
                queues.put_back(RECEIVE);
                return self.received(queues);
            };
            queues.write(&mut head, &header.encode())?;
            let bytes = u64::from(header.len);
            self.counters.received.fetch_add(bytes, Ordering::Relaxed);
            let written = header.len.saturating_add(44);
            queues.complete(RECEIVE, chain.head, written)?;
        }
        queues.notify_again(RECEIVE);
        self.received(queues)
    }

    /// Ends the delivery of packets to the guest: raises the interrupt, and takes packets from the guest again if it
    /// was stopped.
    fn received<M: GuestAddressSpace>(
        &mut self,
        queues: &mut ActiveQueues<'_, M>,
    ) -> Result<(), DeviceError> {
        if self.held && !self.hub.is_full() {
            self.held = false;
            queues.notify_again(TRANSMIT);
        }
        let connections = self.hub.connections() as u64;
        self.counters
            .connections
            .store(connections, Ordering::Relaxed);
        Ok(queues.signal(RECEIVE)?)
    }

    /// Tells the guest that all connections are closed (virtio 1.2, 5.10.6.7), if it has a buffer for events.
    fn announce_reset<M: GuestAddressSpace>(
        &mut self,
        queues: &mut ActiveQueues<'_, M>,
    ) -> Result<(), DeviceError> {
        queues.drain(EVENTS, |queues, mut chain| {
            if !self.announce_reset {
                return Ok(Completion::Deferred);
            }
            if chain.writable.len() < TRANSPORT_RESET.len() as u64 {
                return Err(QueueError::Request {
                    head: chain.head,
                    what: "a buffer for events must have 4 bytes of writable memory",
                }
                .into());
            }
            self.announce_reset = false;
            let written = queues.write(&mut chain.writable, &TRANSPORT_RESET)?;
            Ok(Completion::used(written))
        })
    }
}

/// Returns whether `cid` can be the address of a guest.
fn is_guest_cid(cid: u64) -> bool {
    (GUEST_CID_MIN..u64::from(u32::MAX)).contains(&cid)
}

/// Returns the header of a packet from the guest, and its data.
fn packet<M: GuestAddressSpace>(
    queues: &ActiveQueues<'_, M>,
    mut chain: Chain,
) -> Result<(Header, super::Buffer), QueueError> {
    let malformed = |what| QueueError::Request {
        head: chain.head,
        what,
    };
    let mut bytes = [0; HEADER_BYTES];
    let read = queues.read(&mut chain.readable, &mut bytes)?;
    if read < HEADER_BYTES || !chain.writable.is_empty() {
        return Err(malformed(
            "a packet to send must be in readable memory only, and have a header",
        ));
    }
    let header = Header::decode(&bytes);
    let data = chain.readable.take(header.len.into());
    if data.len() < u64::from(header.len) {
        return Err(malformed("the packet is shorter than its header says"));
    }
    Ok((header, data))
}

impl<M: GuestAddressSpace> Device<M> for Vsock {
    fn identity(&self) -> Identity {
        Identity {
            device_type: VIRTIO_ID_VSOCK,
            features: 0,
            queue_sizes: vec![QUEUE_SIZE; 3],
            config: Arc::clone(&self.config) as _,
            counters: Arc::clone(&self.counters) as _,
        }
    }

    fn register(&mut self, registry: &mut EventRegistry<'_, '_>) -> io::Result<()> {
        // Edge-triggered: a connection that cannot be accepted must not wake the worker again and again.
        let events = EventSet::IN | EventSet::EDGE_TRIGGERED;
        registry.add(&self.hub.socket.listener.as_raw_fd(), LISTENER, events)
    }

    fn started(
        &mut self,
        mut queues: ActiveQueues<'_, M>,
        registry: &mut EventRegistry<'_, '_>,
    ) -> Result<(), DeviceError> {
        self.announce_reset(&mut queues)?;
        self.receive(&mut queues, registry)
    }

    fn notified(
        &mut self,
        queue: usize,
        mut queues: ActiveQueues<'_, M>,
        registry: &mut EventRegistry<'_, '_>,
    ) -> Result<(), DeviceError> {
        match queue {
            TRANSMIT => self.transmit(&mut queues, registry)?,
            EVENTS => self.announce_reset(&mut queues)?,
            _ => {}
        }
        self.receive(&mut queues, registry)
    }

    fn ready(
        &mut self,
        token: Token,
        events: EventSet,
        mut queues: ActiveQueues<'_, M>,
        registry: &mut EventRegistry<'_, '_>,
    ) -> Result<(), DeviceError> {
        if token == LISTENER {
            if self.hub.accept(registry).is_err() {
                self.counters.errors.fetch_add(1, Ordering::Relaxed);
            }
        } else {
            self.hub.stream_event(token, events, registry);
        }
        self.receive(&mut queues, registry)
    }

    fn reset(&mut self, registry: &mut EventRegistry<'_, '_>) {
        self.hub.clear(registry);
        self.announce_reset = false;
        self.held = false;
    }

    fn save(&self) -> DeviceState {
        DeviceState::new(&VsockSnapshot {
            guest_cid: self.hub.guest_cid,
        })
    }

    fn restore(&mut self, state: &DeviceState) -> Result<(), DeviceStateError> {
        let state: VsockSnapshot = state.decode("vsock")?;
        if !is_guest_cid(state.guest_cid) {
            return Err(DeviceStateError::Mismatch {
                device: "vsock",
                what: format!(
                    "guest_cid is {}, which cannot be the address of a guest",
                    state.guest_cid
                ),
            });
        }
        self.hub.guest_cid = state.guest_cid;
        self.config.0.store(state.guest_cid, Ordering::SeqCst);
        self.announce_reset = true;
        Ok(())
    }
}
