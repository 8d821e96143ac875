//! The connection to a back end: what is agreed on at its beginning, and the exchanges over it.

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
use super::log::WriteLog;
use super::spec::{
    CONFIG_BYTES, MESSAGE_BYTES_MAX, PROTOCOL, REPLY, REPLY_LIMIT, SET_LOG_BASE, VERSION,
    VERSION_1, VERSION_MASK, WRITE_BACK, wanted_protocol,
};
use super::table::MemoryTable;
use super::watchdog::Watchdog;
use crate::virtio::queue::QueueSnapshot;

type Result<T> = std::result::Result<T, VhostUserError>;

/// What a back end said of itself.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Offer {
    /// Its features.
    pub(super) features: u64,
    /// The protocol features that are in use.
    pub(super) protocol: VhostUserProtocolFeatures,
    /// Its configuration space.
    pub(super) config: [u8; CONFIG_BYTES],
}

/// A connection. Dropped, it is closed.
pub(super) struct Link {
    path: PathBuf,
    frontend: Frontend,
    /// The same socket, for the one message that the crate does not read as back ends write it.
    socket: UnixStream,
    watchdog: Watchdog,
    memory_is_told: bool,
}

/// A queue that is being set up, and how its used ring is logged.
pub(super) struct Vring<'a> {
    pub(super) index: usize,
    pub(super) queue: &'a QueueSnapshot,
    pub(super) kick: &'a EventFd,
    pub(super) call: &'a EventFd,
}

impl Link {
    /// Connects to the back end that listens at `path`, and hears what it is.
    ///
    /// # Errors
    /// Nobody there, somebody else there, a back end that lacks what a disk needs.
    pub(super) fn connect(path: &Path) -> Result<(Self, Offer)> {
        let socket = connected(path).map_err(|source| VhostUserError::Connect {
            socket: path.into(),
            source,
        })?;
        let parts =
            Watchdog::start(&socket).and_then(|watchdog| Ok((watchdog, socket.try_clone()?)));
        let (watchdog, again) = parts.map_err(|source| VhostUserError::Host {
            socket: path.into(),
            what: "a thread that watches over the connection",
            source,
        })?;
        let mut link = Self {
            path: path.into(),
            frontend: Frontend::from_stream(socket, 1),
            socket: again,
            watchdog,
            memory_is_told: false,
        };
        let offer = link.agree()?;
        Ok((link, offer))
    }

    pub(super) fn watchdog(&self) -> &Watchdog {
        &self.watchdog
    }

    fn agree(&mut self) -> Result<Offer> {
        let features = self.exchange("asking for its features", |frontend| {
            frontend.set_owner()?;
            frontend.get_features()
        })?;
        self.needs(features & VERSION_1 != 0, "the feature VIRTIO_F_VERSION_1")?;
        self.needs(
            features & PROTOCOL != 0,
            "the feature VHOST_USER_F_PROTOCOL_FEATURES",
        )?;
        let offered = self.exchange("asking for its protocol features", |frontend| {
            frontend.get_protocol_features()
        })?;
        let protocol = offered & wanted_protocol();
        self.needs(
            protocol.contains(VhostUserProtocolFeatures::CONFIG),
            "the protocol feature VHOST_USER_PROTOCOL_F_CONFIG: it does not say how large the disk is",
        )?;
        self.exchange("choosing protocol features", |frontend| {
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

    fn config(&mut self) -> Result<[u8; CONFIG_BYTES]> {
        const DOING: &str = "asking for its configuration space";
        let (_, found) = self.exchange(DOING, |frontend| {
            let bytes = u32::try_from(CONFIG_BYTES).unwrap_or(u32::MAX);
            let flags = VhostUserConfigFlags::empty();
            frontend.get_config(0, bytes, flags, &[0; CONFIG_BYTES])
        })?;
        let bytes = found.len();
        found
            .try_into()
            .map_err(|_| self.nonsense(DOING, format!("{bytes} bytes instead of {CONFIG_BYTES}")))
    }

    fn needs(&self, has: bool, what: &'static str) -> Result<()> {
        match has {
            true => Ok(()),
            false => Err(VhostUserError::Lacks {
                socket: self.path.clone(),
                what,
            }),
        }
    }

    /// Tells the back end of guest memory, once.
    pub(super) fn tell_memory(&mut self, table: &MemoryTable) -> Result<()> {
        if !self.memory_is_told {
            self.exchange("sharing guest memory", |frontend| {
                frontend.set_mem_table(table.regions())
            })?;
            self.memory_is_told = true;
        }
        Ok(())
    }

    pub(super) fn set_features(&mut self, features: u64) -> Result<()> {
        self.exchange("choosing features", |frontend| {
            frontend.set_features(features)
        })
    }

    /// Returns when the back end has done all that it was told before. One without acknowledgements answers nothing but
    /// questions, in their turn.
    pub(super) fn settle(&mut self) -> Result<()> {
        self.exchange("asking whether it has done what it was told", |frontend| {
            frontend.get_features()
        })?;
        Ok(())
    }

    pub(super) fn set_write_back(&mut self, write_back: u8) -> Result<()> {
        self.exchange("switching its write cache", |frontend| {
            let offset = u32::try_from(WRITE_BACK).unwrap_or(u32::MAX);
            frontend.set_config(offset, VhostUserConfigFlags::empty(), &[write_back])
        })
    }

    /// Says where the rings are, and whether what is written to the used one is logged.
    pub(super) fn set_rings(
        &mut self,
        vring: &Vring<'_>,
        table: &MemoryTable,
        used_log: UsedLog,
    ) -> Result<()> {
        let rings = table
            .rings(vring.queue)
            .map_err(|error| self.nonsense("setting up a queue", error.to_string()))?;
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

    /// Has the back end serve a queue from where it was served last.
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

    /// Has the back end stop a queue; returns the index of the next available entry that it would take.
    pub(super) fn stop(&mut self, index: usize, limit: Duration) -> Result<u16> {
        const DOING: &str = "stopping a queue";
        let base = self.exchange_within(limit, DOING, |frontend| frontend.get_vring_base(index))?;
        let found = u16::try_from(base);
        found.map_err(|_| self.nonsense(DOING, format!("{base} is no index of a split queue")))
    }

    /// VHOST_USER_SET_LOG_BASE. The crate wants a log in the answer; libvhost-user answers with a number, DPDK with
    /// nothing, and the specification leaves it open: here any answer is good.
    pub(super) fn set_log_base(&mut self, log: &WriteLog) -> Result<()> {
        const DOING: &str = "handing over the log";
        let region = log.region();
        let mut message = Vec::with_capacity(28);
        for word in [SET_LOG_BASE, VERSION, 16] {
            message.extend_from_slice(&word.to_ne_bytes());
        }
        for value in [region.mmap_size, region.mmap_offset] {
            message.extend_from_slice(&value.to_ne_bytes());
        }
        let socket = &self.socket;
        let answered = self.watchdog.within(REPLY_LIMIT, || {
            let sent = socket
                .send_with_fd(message.as_slice(), region.mmap_handle)
                .map_err(|error| io::Error::from_raw_os_error(error.errno()))?;
            match sent == message.len() {
                true => read_answer(socket),
                false => Err(io::ErrorKind::WriteZero.into()),
            }
        });
        match answered {
            Ok(None) => Ok(()),
            Ok(Some(what)) => Err(self.nonsense(DOING, what)),
            Err(_) => Err(self.over(DOING, REPLY_LIMIT)),
        }
    }

    fn exchange<T>(
        &mut self,
        doing: &'static str,
        work: impl FnOnce(&mut Frontend) -> vhost::Result<T>,
    ) -> Result<T> {
        self.exchange_within(REPLY_LIMIT, doing, work)
    }

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
            ) => self.over(doing, limit),
            other => self.nonsense(doing, other.to_string()),
        })
    }

    /// The connection ended: by the other side, or because that did not answer in time.
    fn over(&self, doing: &'static str, limit: Duration) -> VhostUserError {
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

    pub(super) fn nonsense(&self, doing: &'static str, what: String) -> VhostUserError {
        VhostUserError::Nonsense {
            socket: self.path.clone(),
            doing,
            what,
        }
    }
}

/// Whether what a back end writes to a used ring is logged.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum UsedLog {
    Off,
    On,
}

impl UsedLog {
    /// VHOST_VRING_F_LOG, or not.
    fn flags(self) -> u32 {
        match self {
            Self::Off => 0,
            Self::On => 1,
        }
    }
}

/// A listener whose queue is full would have the caller wait for as long as it is.
fn connected(path: &Path) -> io::Result<UnixStream> {
    let socket = socket_with(
        AddressFamily::UNIX,
        SocketType::STREAM,
        SocketFlags::CLOEXEC,
        None,
    )?;
    set_socket_timeout(&socket, Timeout::Send, Some(REPLY_LIMIT))?;
    connect(&socket, &SocketAddrUnix::new(path)?)?;
    // From here on the watch sets the limits: the crate would send again after this one.
    set_socket_timeout(&socket, Timeout::Send, None)?;
    Ok(socket.into())
}

/// Reads an answer to [`SET_LOG_BASE`]; what is wrong with it, if anything is.
fn read_answer(mut socket: &UnixStream) -> io::Result<Option<String>> {
    let mut head = [0; 12];
    socket.read_exact(&mut head)?;
    let [request, flags, bytes] = [0, 4, 8]
        .map(|at| u32::from_ne_bytes([head[at], head[at + 1], head[at + 2], head[at + 3]]));
    let is_answer = request == SET_LOG_BASE
        && flags & (VERSION_MASK | REPLY) == VERSION | REPLY
        && bytes <= MESSAGE_BYTES_MAX;
    if !is_answer {
        return Ok(Some(format!(
            "request {request}, flags {flags:#x}, {bytes} bytes"
        )));
    }
    let copied = io::copy(&mut socket.take(bytes.into()), &mut io::sink())?;
    match copied == u64::from(bytes) {
        true => Ok(None),
        false => Err(io::ErrorKind::UnexpectedEof.into()),
    }
}
