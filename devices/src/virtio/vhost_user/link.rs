//! Connection to a back end: the negotiation at its start, and the exchanges of messages.

use std::io::{self, Read};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::Duration;

use rustix::net::sockopt::{Timeout, set_socket_timeout};
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType, connect, socket_with};
use vhost::vhost_user::message::{VhostUserConfigFlags, VhostUserHeaderFlag};
use vhost::vhost_user::{
    Error as ProtocolError, Frontend, VhostUserFrontend, VhostUserProtocolFeatures,
};
use vhost::{VhostBackend, VringConfigData};
use vmm_sys_util::eventfd::EventFd;
use vmm_sys_util::sock_ctrl_msg::ScmSocket;

use super::error::VhostUserError;
use super::memory_table::MemoryTable;
use super::spec::{
    CONFIG_BYTES, MESSAGE_BYTES_MAX, PROTOCOL, REPLY, REPLY_LIMIT, SET_LOG_BASE, VERSION,
    VERSION_1, VERSION_MASK, WRITE_BACK, wanted_protocol,
};
use super::watchdog::Watchdog;
use super::write_log::WriteLog;
use crate::virtio::queue::QueueSnapshot;

type Result<T> = std::result::Result<T, VhostUserError>;

/// Features and configuration that a back end offers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Offer {
    /// virtio feature bits that the back end offers, and those of vhost-user.
    pub(super) features: u64,
    /// Negotiated protocol features.
    pub(super) protocol: VhostUserProtocolFeatures,
    /// Configuration space of the block device.
    pub(super) config: [u8; CONFIG_BYTES],
}

/// Connection to a back end. Dropping it closes the connection.
pub(super) struct Link {
    path: PathBuf,
    frontend: Frontend,
    /// Duplicate of the frontend's socket, for SET_LOG_BASE: the `vhost` crate does not accept the replies of all back
    /// ends.
    socket: UnixStream,
    watchdog: Watchdog,
    memory_table_sent: bool,
}

/// Queue that is being set up, and its eventfds.
pub(super) struct Vring<'a> {
    pub(super) index: usize,
    pub(super) queue: &'a QueueSnapshot,
    pub(super) kick: &'a EventFd,
    pub(super) call: &'a EventFd,
}

impl Link {
    /// Connects to the back end that listens on `path`, and negotiates features.
    ///
    /// # Errors
    /// Returns [`VhostUserError`] if the connection fails, or the back end violates the protocol or lacks a feature
    /// that a disk needs.
    pub(super) fn connect(path: &Path) -> Result<(Self, Offer)> {
        let socket = connected(path).map_err(|source| VhostUserError::Connect {
            socket: path.into(),
            source,
        })?;
        let parts =
            Watchdog::start(&socket).and_then(|watchdog| Ok((watchdog, socket.try_clone()?)));
        let (watchdog, again) = parts.map_err(|source| VhostUserError::Host {
            socket: path.into(),
            what: "cannot supervise the connection",
            source,
        })?;
        let mut link = Self {
            path: path.into(),
            frontend: Frontend::from_stream(socket, 1),
            socket: again,
            watchdog,
            memory_table_sent: false,
        };
        let offer = link.negotiate()?;
        Ok((link, offer))
    }

    pub(super) fn watchdog(&self) -> &Watchdog {
        &self.watchdog
    }

    /// Negotiates protocol features, and reads the configuration space.
    fn negotiate(&mut self) -> Result<Offer> {
        let features = self.exchange("reading features", |frontend| {
            frontend.set_owner()?;
            frontend.get_features()
        })?;
        if features & VERSION_1 == 0 {
            return Err(self.lacks("the feature VIRTIO_F_VERSION_1"));
        }
        if features & PROTOCOL == 0 {
            return Err(self.lacks("the feature VHOST_USER_F_PROTOCOL_FEATURES"));
        }
        let offered = self.exchange("reading protocol features", |frontend| {
            frontend.get_protocol_features()
        })?;
        let protocol = offered & wanted_protocol();
        if !protocol.contains(VhostUserProtocolFeatures::CONFIG) {
            return Err(self.lacks(
                "the protocol feature VHOST_USER_PROTOCOL_F_CONFIG, so the size of the disk is unknown",
            ));
        }
        self.exchange("setting protocol features", |frontend| {
            frontend.set_protocol_features(protocol)
        })?;
        if protocol.contains(VhostUserProtocolFeatures::REPLY_ACK) {
            self.frontend.set_hdr_flags(VhostUserHeaderFlag::NEED_REPLY);
        }
        let config = self.config()?;
        Ok(Offer {
            features,
            protocol,
            config,
        })
    }

    /// Reads the configuration space.
    fn config(&mut self) -> Result<[u8; CONFIG_BYTES]> {
        const DOING: &str = "reading the configuration space";
        let (_, found) = self.exchange(DOING, |frontend| {
            let bytes = u32::try_from(CONFIG_BYTES).unwrap_or(u32::MAX);
            let flags = VhostUserConfigFlags::empty();
            frontend.get_config(0, bytes, flags, &[0; CONFIG_BYTES])
        })?;
        let bytes = found.len();
        found.try_into().map_err(|_| {
            self.violation(
                DOING,
                format!("it has {bytes} bytes instead of {CONFIG_BYTES}"),
            )
        })
    }

    fn lacks(&self, what: &'static str) -> VhostUserError {
        VhostUserError::Lacks {
            socket: self.path.clone(),
            what,
        }
    }

    /// Sends the memory table, unless it was sent before.
    pub(super) fn send_memory_table(&mut self, table: &MemoryTable) -> Result<()> {
        if !self.memory_table_sent {
            self.exchange("sharing guest memory", |frontend| {
                frontend.set_mem_table(table.regions())
            })?;
            self.memory_table_sent = true;
        }
        Ok(())
    }

    pub(super) fn set_features(&mut self, features: u64) -> Result<()> {
        self.exchange("setting features", |frontend| {
            frontend.set_features(features)
        })
    }

    /// Waits until the back end has handled all earlier messages. A back end without REPLY_ACK replies only to queries,
    /// but handles messages in order, so a query works for both.
    pub(super) fn wait_until_handled(&mut self) -> Result<()> {
        self.exchange("waiting for earlier messages", |frontend| {
            frontend.get_features()
        })?;
        Ok(())
    }

    pub(super) fn set_write_back(&mut self, write_back: u8) -> Result<()> {
        self.exchange("setting the write cache mode", |frontend| {
            let offset = u32::try_from(WRITE_BACK).unwrap_or(u32::MAX);
            frontend.set_config(offset, VhostUserConfigFlags::empty(), &[write_back])
        })
    }

    /// Sends the addresses of the rings, and whether writes to the used ring are logged.
    pub(super) fn set_rings(
        &mut self,
        vring: &Vring<'_>,
        table: &MemoryTable,
        used_log: UsedLog,
    ) -> Result<()> {
        let rings = table
            .rings(vring.queue)
            .map_err(|error| self.violation("setting up a queue", error.to_string()))?;
        let config = VringConfigData {
            queue_max_size: vring.queue.max_size,
            queue_size: vring.queue.size,
            flags: used_log.flags(),
            desc_table_addr: rings.descriptor_table,
            used_ring_addr: rings.used,
            avail_ring_addr: rings.available,
            log_addr: Some(vring.queue.used_ring),
        };
        self.exchange("setting up a queue", |frontend| {
            frontend.set_vring_addr(vring.index, &config)
        })
    }

    /// Starts a queue at the position at which it was stopped.
    pub(super) fn start(
        &mut self,
        vring: &Vring<'_>,
        table: &MemoryTable,
        used_log: UsedLog,
    ) -> Result<()> {
        self.exchange("setting up a queue", |frontend| {
            frontend.set_vring_num(vring.index, vring.queue.size)?;
            frontend.set_vring_base(vring.index, vring.queue.next_available)
        })?;
        self.set_rings(vring, table, used_log)?;
        self.exchange("starting a queue", |frontend| {
            frontend.set_vring_call(vring.index, vring.call)?;
            frontend.set_vring_kick(vring.index, vring.kick)?;
            frontend.set_vring_enable(vring.index, true)
        })
    }

    /// Stops a queue. Returns the index of the next available entry, at which the queue has to be started again.
    pub(super) fn stop(&mut self, index: usize, limit: Duration) -> Result<u16> {
        const DOING: &str = "stopping a queue";
        let base = self.exchange_within(limit, DOING, |frontend| frontend.get_vring_base(index))?;
        let found = u16::try_from(base);
        found.map_err(|_| self.violation(DOING, format!("{base} is not an index of a split queue")))
    }

    /// Sends VHOST_USER_SET_LOG_BASE, and accepts any reply to it.
    ///
    /// The specification does not define the reply's payload. The `vhost` crate requires a log description in it, but
    /// libvhost-user sends a number, and DPDK sends nothing.
    pub(super) fn set_log_base(&mut self, log: &WriteLog) -> Result<()> {
        const DOING: &str = "sharing the dirty log";
        let region = log.region();
        let mut message = Vec::with_capacity(28);
        for word in [SET_LOG_BASE, VERSION, 16] {
            message.extend_from_slice(&word.to_ne_bytes());
        }
        for value in [region.mmap_size, region.mmap_offset] {
            message.extend_from_slice(&value.to_ne_bytes());
        }
        let socket = &self.socket;
        let replied = self.watchdog.within(REPLY_LIMIT, || {
            let sent = socket
                .send_with_fd(message.as_slice(), region.mmap_handle)
                .map_err(|error| io::Error::from_raw_os_error(error.errno()))?;
            match sent == message.len() {
                true => read_reply(socket),
                false => Err(io::ErrorKind::WriteZero.into()),
            }
        });
        match replied {
            Ok(None) => Ok(()),
            Ok(Some(what)) => Err(self.violation(DOING, what)),
            Err(_) => Err(self.ended(DOING, REPLY_LIMIT)),
        }
    }

    /// Runs `work`, which sends a message and may wait for the reply, within the usual time limit.
    fn exchange<T>(
        &mut self,
        doing: &'static str,
        work: impl FnOnce(&mut Frontend) -> vhost::Result<T>,
    ) -> Result<T> {
        self.exchange_within(REPLY_LIMIT, doing, work)
    }

    /// Runs `work`, which sends a message and may wait for the reply, within `limit`.
    fn exchange_within<T>(
        &mut self,
        limit: Duration,
        doing: &'static str,
        work: impl FnOnce(&mut Frontend) -> vhost::Result<T>,
    ) -> Result<T> {
        let frontend = &mut self.frontend;
        let done = self.watchdog.within(limit, || work(frontend));
        done.map_err(|error| match error {
            vhost::Error::VhostUserProtocol(ProtocolError::BackendInternalError) => {
                VhostUserError::Refused {
                    socket: self.path.clone(),
                    doing,
                }
            }
            vhost::Error::VhostUserProtocol(
                ProtocolError::PartialMessage
                | ProtocolError::Disconnected
                | ProtocolError::SocketBroken(_)
                | ProtocolError::SocketError(_),
            ) => self.ended(doing, limit),
            other => self.violation(doing, other.to_string()),
        })
    }

    /// Returns the error for a connection that ended: a missed deadline, or an end by the back end.
    fn ended(&self, doing: &'static str, limit: Duration) -> VhostUserError {
        let socket = self.path.clone();
        match self.watchdog.was_overdue() {
            true => VhostUserError::Silent {
                socket,
                doing,
                limit,
            },
            false => VhostUserError::Closed { socket, doing },
        }
    }

    pub(super) fn violation(&self, doing: &'static str, what: String) -> VhostUserError {
        VhostUserError::ProtocolViolation {
            socket: self.path.clone(),
            doing,
            what,
        }
    }
}

/// Whether the back end logs its writes to the used ring.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum UsedLog {
    Off,
    On,
}

impl UsedLog {
    /// Returns the flags for SET_VRING_ADDR: VHOST_VRING_F_LOG, or none.
    fn flags(self) -> u32 {
        match self {
            Self::Off => 0,
            Self::On => 1,
        }
    }
}

/// Connects to `path`, with a time limit: connect(2) blocks as long as the listener's backlog is full.
fn connected(path: &Path) -> io::Result<UnixStream> {
    let socket = socket_with(
        AddressFamily::UNIX,
        SocketType::STREAM,
        SocketFlags::CLOEXEC,
        None,
    )?;
    set_socket_timeout(&socket, Timeout::Send, Some(REPLY_LIMIT))?;
    connect(&socket, &SocketAddrUnix::new(path)?)?;
    // From here on, the watchdog enforces time limits. With this one, the `vhost` crate would repeat the send.
    set_socket_timeout(&socket, Timeout::Send, None)?;
    Ok(socket.into())
}

/// Reads the reply to [`SET_LOG_BASE`]. Returns a description of what is wrong with it, if anything is.
fn read_reply(mut socket: &UnixStream) -> io::Result<Option<String>> {
    let mut head = [0; 12];
    socket.read_exact(&mut head)?;
    let [request, flags, bytes] = [0, 4, 8]
        .map(|at| u32::from_ne_bytes([head[at], head[at + 1], head[at + 2], head[at + 3]]));
    let is_reply = request == SET_LOG_BASE
        && flags & (VERSION_MASK | REPLY) == VERSION | REPLY
        && bytes <= MESSAGE_BYTES_MAX;
    if !is_reply {
        return Ok(Some(format!(
            "it is for request {request}, with flags {flags:#x} and {bytes} bytes"
        )));
    }
    let copied = io::copy(&mut socket.take(bytes.into()), &mut io::sink())?;
    match copied == u64::from(bytes) {
        true => Ok(None),
        false => Err(io::ErrorKind::UnexpectedEof.into()),
    }
}
