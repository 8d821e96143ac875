//! A block device whose queues another process serves: the front end of vhost-user.
//!
//! ```text
//! vCPU ─ registers ─ MmioTransport ─ VhostUser ─ Link ─ Unix socket ─┐
//!      └ notification ─ eventfd ──────────────────────────────────┤ back end ─ disk
//! guest ← interrupt line ─ eventfd ───────────────────────────────┤
//! guest memory ─ memory files ────────────────────────────────────┘
//! ```
//!
//! The back end gets guest memory, the queues' places and both events when the driver is ready (memory and features
//! already when a guest with such a driver arrives: they may be refused), and works by itself from then on: no thread of this process stands between it and the guest. It is stopped before anybody but the guest
//! looks at the queues: at a reset, at a pause, and with it before a guest leaves.
//!
//! ```text
//! connected ── DRIVER_OK ──→ started ⇄ stopped (pause, resume)
//!     ↑                        │
//!     └──────── reset ─────────┘         lost: DEVICE_NEEDS_RESET, until a reset and a new connection
//! ```
//!
//! A back end that is lost, that does not answer in time or answers nonsense is let go of: the device needs a reset
//! then, and the next driver that is ready has it connected anew. Every wait for a back end ends
//! ([`spec::REPLY_LIMIT`], [`spec::DRAIN_LIMIT`]).
//!
//! Specification: docs/interop/vhost-user.rst of QEMU.

mod back_end;
mod error;
mod link;
mod log;
mod queue_server;
mod spec;
mod state;
mod table;
mod watchdog;

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
use log::WriteLog;
use spec::{LOG_ALL, PASSED_ON, QUEUE_SIZE, WRITE_BACK};
use table::MemoryTable;

pub use error::VhostUserError;
pub use state::VhostUserSnapshot;

type Result<T> = std::result::Result<T, VhostUserError>;

/// A disk behind a vhost-user back end.
pub struct VhostUserConfig<M> {
    /// Where the back end listens.
    pub socket: PathBuf,
    /// Guest memory, all of it of files.
    pub memory: M,
    /// The device's interrupt: its line goes to the back end.
    pub interrupt: Interrupt,
}

/// A block device served by a vhost-user back end. Clones are the same device.
pub struct VhostUser<M: GuestAddressSpace>(Arc<Inner<M>>);

impl<M: GuestAddressSpace> Clone for VhostUser<M> {
    fn clone(&self) -> Self {
        Self(Arc::clone(&self.0))
    }
}

struct Inner<M> {
    socket: PathBuf,
    memory: M,
    table: MemoryTable,
    interrupt: Interrupt,
    /// For each queue: the driver has notified it.
    kicks: Vec<EventFd>,
    offer: Offer,
    on_loss: OnceLock<OnFailure>,
    state: Mutex<FrontEndState>,
}

struct FrontEndState {
    /// None when the back end is lost.
    link: Option<Link>,
    /// Which connection it is: the end of an older one is no matter.
    connection: u64,
    /// The queues of a driver that is ready.
    driver: Option<ReadyDriver>,
    /// The back end serves the queues.
    started: bool,
    paused: bool,
    write_back: u8,
    log: Option<WriteLog>,
    /// Why the device needs a reset, if it does.
    failure: Option<String>,
    /// Why there is no link.
    lost: Option<String>,
}

struct ReadyDriver {
    features: u64,
    queues: Vec<QueueSnapshot>,
}

impl<M: GuestAddressSpace + Send + Sync + 'static> VhostUser<M> {
    /// Connects to the back end, and hears what disk it has. Nothing of the guest's is given to it before its driver
    /// is ready.
    ///
    /// # Errors
    /// Memory that cannot be shared; nobody there, or no back end for a disk.
    pub fn connect(config: VhostUserConfig<M>) -> Result<Self> {
        let table = MemoryTable::new(&*config.memory.memory());
        let table = table.ok_or_else(|| VhostUserError::NotShared {
            socket: config.socket.clone(),
        })?;
        let (link, offer) = Link::connect(&config.socket)?;
        let kick = EventFd::new(EFD_NONBLOCK).map_err(|source| VhostUserError::Host {
            socket: config.socket.clone(),
            what: "an event",
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
        inner.adopt(&mut inner.state(), link);
        Ok(Self(inner))
    }

    /// Has `tell` called with the reason each time that a back end is lost, by any thread. The first is heard.
    pub fn on_loss(&self, tell: impl Fn(&str) + Send + Sync + 'static) {
        self.0.on_loss.get_or_init(|| Box::new(tell));
    }

    /// Its size, in sectors of 512 bytes.
    #[must_use]
    pub fn sectors(&self) -> u64 {
        sectors(&self.0.offer)
    }

    /// The features that it offers to the driver.
    #[must_use]
    pub fn features(&self) -> u64 {
        self.0.offer.features & PASSED_ON
    }

    /// Whether the back end is there, and is as it was at the beginning.
    ///
    /// # Errors
    /// Why it was lost.
    pub fn is_there(&self) -> Result<()> {
        let state = self.0.state();
        match (&state.link, &state.lost) {
            (Some(_), _) => Ok(()),
            (None, why) => Err(VhostUserError::Gone(why.clone().unwrap_or_default())),
        }
    }

    /// Whether the back end can log what it writes: without that, nobody knows which memory it changed.
    ///
    /// # Errors
    /// What it lacks, or that it is lost.
    pub fn can_log(&self) -> Result<()> {
        self.is_there()?;
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
                "the feature VHOST_F_LOG_ALL: what it writes to guest memory is not known",
            );
        }
        if !protocol.contains(VhostUserProtocolFeatures::LOG_SHMFD) {
            return lacks(
                "the protocol feature VHOST_USER_PROTOCOL_F_LOG_SHMFD: what it writes to guest memory is not known",
            );
        }
        Ok(())
    }

    /// From now on the back end logs what it writes to guest memory, in an empty log.
    ///
    /// # Errors
    /// A back end that cannot, or is lost.
    pub fn start_log(&self) -> Result<()> {
        self.can_log()?;
        let inner = &*self.0;
        let log = WriteLog::new(inner.table.end()).map_err(|source| VhostUserError::Host {
            socket: inner.socket.clone(),
            what: "a log",
            source,
        })?;
        let mut state = inner.state();
        state.log = Some(log);
        inner.switch_log(&mut state)
    }

    /// Takes all that was logged since the last time: `mark` gets the guest-physical address of a page and a bitmap of
    /// the pages from it on, as often as there are some. Without a log there is nothing.
    pub fn take_log(&self, mark: impl FnMut(u64, &[u64])) {
        if let Some(log) = &self.0.state().log {
            log.take(mark);
        }
    }

    /// Ends the log. Idempotent, and no failure where the back end is lost.
    ///
    /// # Errors
    /// A back end that is lost by this.
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

    /// Takes over a saved state, before the back end is started.
    pub(super) fn restore(&self, saved: &DeviceState) -> std::result::Result<(), DeviceStateError> {
        const DEVICE: &str = "vhost-user block";
        let saved: VhostUserSnapshot = saved.decode(DEVICE)?;
        if saved.sectors != self.sectors() {
            return Err(DeviceStateError::Mismatch {
                device: DEVICE,
                what: format!(
                    "a disk of {} sectors, the back end here has {}",
                    saved.sectors,
                    self.sectors()
                ),
            });
        }
        self.0.state().write_back = saved.write_back.into();
        Ok(())
    }
}

fn sectors(offer: &Offer) -> u64 {
    let [a, b, c, d, e, f, g, h, ..] = offer.config;
    u64::from_le_bytes([a, b, c, d, e, f, g, h])
}
