//! Front end of vhost-user: a block device whose queues another process, the back end, serves.
//!
//! ```text
//! vCPU ─ registers ─ MmioTransport ─ VhostUser ─ Link ─ Unix socket ─┐
//!      └ notification ─ eventfd ─────────────────────────────────────┤ back end ─ disk
//! guest ← interrupt line ─ eventfd ──────────────────────────────────┤
//! guest memory ─ memory files ───────────────────────────────────────┘
//! ```
//!
//! The back end gets guest memory, the addresses of the rings, and both eventfds when the driver sets DRIVER_OK. From
//! then on, it works without this process. If a guest with an active driver is restored, the back end gets memory and
//! features before the guest resumes, because it may refuse them. The front end stops the back end before anything else
//! reads the rings: at a reset, and at a pause, which precedes saving.
//!
//! ```text
//! connected ── DRIVER_OK ──→ started ⇄ stopped (pause, resume)
//!     ↑                        │
//!     └──────── reset ─────────┘         lost: DEVICE_NEEDS_RESET, until a reset and a new connection
//! ```
//!
//! If the back end disconnects, misses a time limit or violates the protocol, it is lost: the connection is closed, and
//! the device needs a reset. When a driver sets DRIVER_OK again, the front end reconnects. All waits for the back end
//! are limited ([`spec::REPLY_LIMIT`], [`spec::DRAIN_LIMIT`]).
//!
//! Specification: docs/interop/vhost-user.rst of QEMU.

mod back_end;
mod error;
mod link;
mod memory_table;
mod queue_server;
mod spec;
mod state;
mod watchdog;
mod write_log;

#[cfg(test)]
mod tests;

use std::path::PathBuf;
use std::sync::{Arc, Mutex, OnceLock};

use vhost::vhost_user::VhostUserProtocolFeatures;
use virtio_bindings::virtio_ids::VIRTIO_ID_BLOCK;
use vm_memory::GuestAddressSpace;
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use super::device::Identity;
use super::interrupt::Interrupt;
use super::queue::QueueSnapshot;
use super::queue_server::OnFailure;
use super::state::{DeviceState, DeviceStateError};
use link::{Link, Offer};
use memory_table::MemoryTable;
use spec::{LOG_ALL, OFFERED_TO_DRIVER, QUEUE_SIZE, WRITE_BACK};
use write_log::WriteLog;

pub use error::VhostUserError;
pub use state::VhostUserSnapshot;

type Result<T> = std::result::Result<T, VhostUserError>;

/// Configuration of a vhost-user block device.
pub struct VhostUserOptions<M> {
    /// Path of the socket on which the back end listens.
    pub socket: PathBuf,
    /// Guest memory, all of which must be shared mappings of files.
    pub memory: M,
    /// Interrupt of the device. The back end gets its eventfd.
    pub interrupt: Interrupt,
}

/// Block device that a vhost-user back end serves. Clones are the same device.
pub struct VhostUser<M: GuestAddressSpace>(Arc<Inner<M>>);

impl<M: GuestAddressSpace> Clone for VhostUser<M> {
    fn clone(&self) -> Self {
        Self(Arc::clone(&self.0))
    }
}

/// State that the clones of a [`VhostUser`] share.
struct Inner<M> {
    socket: PathBuf,
    memory: M,
    table: MemoryTable,
    interrupt: Interrupt,
    /// Notifications of the driver, one eventfd for each queue.
    kicks: Vec<EventFd>,
    offer: Offer,
    on_loss: OnceLock<OnFailure>,
    state: Mutex<FrontEndState>,
}

/// State of the front end that changes, behind a lock.
struct FrontEndState {
    /// Connection to the back end. `None` after the back end was lost.
    link: Option<Link>,
    /// Number of the connection. It tells the end of the current connection from that of an earlier one.
    connection: u64,
    /// Queues of a driver that has set DRIVER_OK.
    driver: Option<ReadyDriver>,
    /// The back end serves the queues.
    started: bool,
    paused: bool,
    write_back: u8,
    log: Option<WriteLog>,
    /// Why the device needs a reset.
    failure: Option<String>,
    /// Why the back end was lost.
    lost: Option<String>,
}

/// Features and queues of a driver that has set DRIVER_OK.
struct ReadyDriver {
    features: u64,
    queues: Vec<QueueSnapshot>,
}

impl<M: GuestAddressSpace + Send + Sync + 'static> VhostUser<M> {
    /// Connects to the back end, and reads the properties of its disk. The back end gets no access to the guest before
    /// the driver sets DRIVER_OK.
    ///
    /// # Errors
    /// Returns [`VhostUserError`] if guest memory is not shared, or the back end cannot be reached or cannot serve a
    /// disk.
    pub fn connect(config: VhostUserOptions<M>) -> Result<Self> {
        let table = MemoryTable::new(&*config.memory.memory());
        let table = table.ok_or_else(|| VhostUserError::NotShared {
            socket: config.socket.clone(),
        })?;
        let (link, offer) = Link::connect(&config.socket)?;
        let kick = EventFd::new(EFD_NONBLOCK).map_err(|source| VhostUserError::Host {
            socket: config.socket.clone(),
            what: "cannot create an eventfd",
            source,
        })?;
        config.interrupt.raised_externally();
        let inner = Arc::new(Inner {
            socket: config.socket,
            memory: config.memory,
            table,
            interrupt: config.interrupt,
            kicks: vec![kick],
            offer,
            on_loss: OnceLock::new(),
            state: Mutex::new(FrontEndState {
                link: None,
                connection: 0,
                driver: None,
                started: false,
                paused: false,
                write_back: offer.config[WRITE_BACK],
                log: None,
                failure: None,
                lost: None,
            }),
        });
        inner.set_connection(&mut inner.state(), link);
        Ok(Self(inner))
    }

    /// Registers `tell`, which is called with the reason each time the back end is lost. Any thread may call it. Only
    /// the first registration has an effect.
    pub fn on_loss(&self, tell: impl Fn(&str) + Send + Sync + 'static) {
        self.0.on_loss.get_or_init(|| Box::new(tell));
    }

    /// Returns the size of the disk in sectors of 512 bytes.
    #[must_use]
    pub fn sectors(&self) -> u64 {
        sectors(&self.0.offer)
    }

    /// Returns the feature bits that the device offers to the driver.
    #[must_use]
    pub fn features(&self) -> u64 {
        self.0.offer.features & OFFERED_TO_DRIVER
    }

    /// Checks that the back end is connected.
    ///
    /// # Errors
    /// Returns [`VhostUserError::Gone`] with the reason if the back end was lost.
    pub fn check_connected(&self) -> Result<()> {
        let state = self.0.state();
        match (&state.link, &state.lost) {
            (Some(_), _) => Ok(()),
            (None, why) => Err(VhostUserError::Gone(why.clone().unwrap_or_default())),
        }
    }

    /// Checks that the back end is connected and can log its writes to guest memory. Without a log, live migration
    /// would miss them.
    ///
    /// # Errors
    /// Returns [`VhostUserError`] if the back end was lost or lacks a feature.
    pub fn can_log(&self) -> Result<()> {
        self.check_connected()?;
        let lacks = |what| {
            Err(VhostUserError::Lacks {
                socket: self.0.socket.clone(),
                what,
            })
        };
        let Offer {
            features, protocol, ..
        } = self.0.offer;
        if features & LOG_ALL == 0 {
            return lacks(
                "the feature VHOST_F_LOG_ALL, so its writes to guest memory cannot be tracked",
            );
        }
        if !protocol.contains(VhostUserProtocolFeatures::LOG_SHMFD) {
            return lacks(
                "the protocol feature VHOST_USER_PROTOCOL_F_LOG_SHMFD, so its writes to guest memory cannot be tracked",
            );
        }
        Ok(())
    }

    /// Starts logging the back end's writes to guest memory, with an empty log.
    ///
    /// # Errors
    /// Returns [`VhostUserError`] if the back end was lost, or cannot log.
    pub fn start_log(&self) -> Result<()> {
        self.can_log()?;
        let inner = &*self.0;
        let log = WriteLog::new(inner.table.end()).map_err(|source| VhostUserError::Host {
            socket: inner.socket.clone(),
            what: "cannot create the dirty log",
            source,
        })?;
        let mut state = inner.state();
        state.log = Some(log);
        inner.switch_log(&mut state)
    }

    /// Takes and clears the dirty log. For each run of dirty pages, calls `mark` with the guest-physical address of a
    /// page and a bitmap of the pages from there on. Does nothing if there is no log.
    pub fn take_log(&self, mark: impl FnMut(u64, &[u64])) {
        if let Some(log) = &self.0.state().log {
            log.take(mark);
        }
    }

    /// Stops logging. Idempotent. Succeeds if the back end was lost before.
    ///
    /// # Errors
    /// Returns [`VhostUserError`] if the back end is lost by this call.
    pub fn stop_log(&self) -> Result<()> {
        let mut state = self.0.state();
        match state.log.take() {
            Some(_) if state.link.is_some() => self.0.switch_log(&mut state),
            _ => Ok(()),
        }
    }

    pub(super) fn identity(&self) -> Identity {
        Identity {
            device_type: VIRTIO_ID_BLOCK,
            features: self.features(),
            queue_sizes: vec![QUEUE_SIZE],
            config: Arc::clone(&self.0) as _,
            counters: Arc::new(()),
        }
    }

    /// Loads a saved state. The back end must not have been started.
    pub(super) fn restore(&self, saved: &DeviceState) -> std::result::Result<(), DeviceStateError> {
        const DEVICE: &str = "vhost-user block";
        let saved: VhostUserSnapshot = saved.decode(DEVICE)?;
        if saved.sectors != self.sectors() {
            return Err(DeviceStateError::Mismatch {
                device: DEVICE,
                what: format!(
                    "the saved disk has {} sectors, but the back end here has {}",
                    saved.sectors,
                    self.sectors()
                ),
            });
        }
        self.0.state().write_back = saved.write_back.into();
        Ok(())
    }
}

/// Returns the capacity in the configuration space, in sectors of 512 bytes.
fn sectors(offer: &Offer) -> u64 {
    let [a, b, c, d, e, f, g, h, ..] = offer.config;
    u64::from_le_bytes([a, b, c, d, e, f, g, h])
}
