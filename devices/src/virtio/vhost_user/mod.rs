//! A block device whose queues another process serves: the front end of vhost-user.
//!
//! ```text
//! vCPU ─ registers ─ VirtioMmio ─ VhostUser ─ Link ─ Unix socket ─┐
//!      └ notification ─ eventfd ──────────────────────────────────┤ back end ─ disk
//! guest ← interrupt line ─ eventfd ───────────────────────────────┤
//! guest memory ─ memory files ────────────────────────────────────┘
//! ```
//!
//! The back end gets guest memory, the queues' places and both events when the driver is ready, and works by itself
//! from then on: no thread of this process stands between it and the guest. It is stopped before anybody but the guest
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

mod error;
mod link;
mod log;
mod spec;
mod state;
mod table;
mod watch;

#[cfg(test)]
mod tests;

use std::path::PathBuf;
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError, Weak};
use std::thread;
use std::time::{Duration, Instant};

use vhost::vhost_user::VhostUserProtocolFeatures;
use virtio_bindings::virtio_ids::VIRTIO_ID_BLOCK;
use vm_memory::{Bytes, GuestAddress, GuestAddressSpace};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use super::device::{ConfigSpace, DeviceStateError, Identity, read_config};
use super::interrupt::Interrupt;
use super::queue::{QueueError, QueueSnapshot, in_use};
use super::serve::Serve;
use super::state::DeviceSnapshot;
use super::turn::notify;
use link::{Link, Offer, UsedLog, Vring};
use log::WriteLog;
use spec::{CONFIG_WRITE_BACK, DRAIN_LIMIT, LOG_ALL, PASSED_ON, PROTOCOL, QUEUE_SIZE, WRITE_BACK};
use table::{MemoryTable, used_ring_bytes};

pub use error::VhostUserError;
pub use state::VhostUserSnapshot;

type Result<T> = std::result::Result<T, VhostUserError>;

/// How often a used ring is looked at while its last requests end.
const LOOK_AGAIN: Duration = Duration::from_micros(500);
/// Offset of the index in an available and in a used ring (virtio 1.2, 2.7.6 and 2.7.8).
const RING_INDEX: u64 = 2;

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

/// Told why the back end was lost.
type OnLoss = Box<dyn Fn(&str) + Send + Sync>;

struct Inner<M> {
    socket: PathBuf,
    memory: M,
    table: MemoryTable,
    interrupt: Interrupt,
    /// For each queue: the driver has notified it.
    kicks: Vec<EventFd>,
    offer: Offer,
    on_loss: OnceLock<OnLoss>,
    state: Mutex<State>,
}

struct State {
    /// None when the back end is lost.
    link: Option<Link>,
    /// Which connection it is: the end of an older one is no matter.
    connection: u64,
    /// The queues of a driver that is ready.
    driver: Option<Driver>,
    /// The back end serves the queues.
    started: bool,
    paused: bool,
    write_back: u8,
    log: Option<WriteLog>,
    failure: Option<String>,
}

struct Driver {
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
        config.interrupt.raised_elsewhere();
        let inner = Arc::new(Inner {
            socket: config.socket,
            memory: config.memory,
            table,
            interrupt: config.interrupt,
            kicks: vec![kick],
            offer,
            on_loss: OnceLock::new(),
            state: Mutex::new(State {
                link: None,
                connection: 0,
                driver: None,
                started: false,
                paused: false,
                write_back: offer.config[WRITE_BACK],
                log: None,
                failure: None,
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
        match (&state.link, &state.failure) {
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
    pub(super) fn restore(
        &self,
        saved: &DeviceSnapshot,
    ) -> std::result::Result<(), DeviceStateError> {
        const DEVICE: &str = "vhost-user block";
        let DeviceSnapshot::VhostUserBlock(saved) = saved else {
            return Err(DeviceStateError::other(DEVICE, saved));
        };
        if saved.sectors != self.sectors() {
            return Err(DeviceStateError {
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

impl<M: GuestAddressSpace + Send + Sync + 'static> Inner<M> {
    /// Takes `link` as the connection to the back end.
    fn adopt(self: &Arc<Self>, state: &mut State, link: Link) {
        state.connection += 1;
        let (inner, connection): (Weak<Self>, _) = (Arc::downgrade(self), state.connection);
        link.watch().on_gone(move || {
            if let Some(inner) = inner.upgrade() {
                inner.gone(connection);
            }
        });
        state.link = Some(link);
    }

    /// The other end of a connection went away while nobody waited for it.
    fn gone(&self, connection: u64) {
        let mut state = self.state();
        if state.connection == connection && state.link.is_some() {
            let error = VhostUserError::Closed {
                socket: self.socket.clone(),
                doing: "nothing was asked of it",
            };
            self.lose(&mut state, &error);
        }
    }

    /// Lets go of a back end that cannot be used any more.
    fn lose(&self, state: &mut State, error: &VhostUserError) {
        let was_there = state.link.take().is_some();
        let why = error.to_string();
        state.started = false;
        state.failure = Some(why.clone());
        if state.driver.is_some() {
            self.interrupt.needs_reset();
        }
        if was_there && let Some(tell) = self.on_loss.get() {
            tell(&why);
        }
    }

    /// Has the back end serve the driver, if there is one that is ready.
    fn start(self: &Arc<Self>, state: &mut State) {
        if state.started || state.paused || state.failure.is_some() || state.driver.is_none() {
            return;
        }
        match self.begin(state) {
            Ok(()) => state.started = true,
            Err(error) => self.lose(state, &error),
        }
    }

    fn begin(self: &Arc<Self>, state: &mut State) -> Result<()> {
        if state.link.is_none() {
            self.reconnect(state)?;
        }
        let State {
            link: Some(link),
            driver: Some(driver),
            log,
            write_back,
            ..
        } = state
        else {
            return Ok(());
        };
        link.tell_memory(&self.table)?;
        self.agree(link, driver, log.as_ref())?;
        if driver.features & CONFIG_WRITE_BACK != 0 {
            link.set_write_back(*write_back)?;
        }
        for vring in self.vrings(driver) {
            link.start(&vring, &self.table, used_log(log.as_ref()))?;
            // What the driver notified while nobody served it.
            notify(vring.kick);
        }
        Ok(())
    }

    /// The back end that listens there now, if it is one like the first.
    fn reconnect(self: &Arc<Self>, state: &mut State) -> Result<()> {
        let (link, offer) = Link::connect(&self.socket)?;
        let mut expected = self.offer;
        // That is as the last driver left it.
        expected.config[WRITE_BACK] = offer.config[WRITE_BACK];
        if offer != expected {
            return Err(VhostUserError::Changed {
                socket: self.socket.clone(),
                what: format!(
                    "{} sectors and features {:#x}, the guest began with {} sectors and {:#x}",
                    sectors(&offer),
                    offer.features,
                    sectors(&expected),
                    expected.features
                ),
            });
        }
        self.adopt(state, link);
        Ok(())
    }

    /// The log, then the features that have it used.
    fn agree(&self, link: &mut Link, driver: &Driver, log: Option<&WriteLog>) -> Result<()> {
        let mut features = driver.features | PROTOCOL;
        if let Some(log) = log {
            link.set_log_base(log)?;
            features |= LOG_ALL;
        }
        link.set_features(features)
    }

    /// Tells a back end that is at work that it is to log, or to log no longer; one that is not hears of it when it is
    /// started.
    fn switch_log(&self, state: &mut State) -> Result<()> {
        if !state.started {
            return Ok(());
        }
        let switched = self.switch_log_of_started(state);
        if let Err(error) = &switched {
            self.lose(state, error);
        }
        switched
    }

    fn switch_log_of_started(&self, state: &mut State) -> Result<()> {
        let State {
            link: Some(link),
            driver: Some(driver),
            log,
            ..
        } = state
        else {
            return Ok(());
        };
        self.agree(link, driver, log.as_ref())?;
        self.vrings(driver)
            .try_for_each(|vring| link.set_rings(&vring, &self.table, used_log(log.as_ref())))
    }

    /// Has the back end serve the driver no longer, when it has done what it was asked for.
    fn stop(&self, state: &mut State) {
        if !state.started {
            return;
        }
        if let Err(error) = self.end(state) {
            self.lose(state, &error);
        }
        state.started = false;
    }

    /// Requests end first: a back end that has some when it is told to stop may forget them (QEMU 7.2 ends then).
    fn end(&self, state: &mut State) -> Result<()> {
        let State {
            link: Some(link),
            driver: Some(driver),
            log,
            ..
        } = state
        else {
            return Ok(());
        };
        let began = Instant::now();
        for (index, queue) in ready(&mut driver.queues) {
            self.wait_for_used(link, began, queue, |inner| {
                inner.ring_index(queue.available_ring)
            })?;
            let left = DRAIN_LIMIT.saturating_sub(began.elapsed());
            let base = link.stop(index, left.max(spec::REPLY_LIMIT))?;
            let in_flight = base.wrapping_sub(self.ring_index(queue.used_ring));
            if in_flight > queue.size {
                let what = format!(
                    "it would go on at {base}, {in_flight} entries from the last one that it used"
                );
                return Err(link.nonsense("stopping a queue", what));
            }
            self.wait_for_used(link, began, queue, |_| base)?;
            (queue.next_available, queue.next_used) = (base, base);
            // The back end may log its last write to the ring after it has answered.
            if let Some(log) = log {
                log.mark(queue.used_ring, used_ring_bytes(queue));
            }
        }
        Ok(())
    }

    /// Waits until the used ring has come to where `end` is.
    fn wait_for_used(
        &self,
        link: &Link,
        began: Instant,
        queue: &QueueSnapshot,
        end: impl Fn(&Self) -> u16,
    ) -> Result<()> {
        while self.ring_index(queue.used_ring) != end(self) {
            let socket = || self.socket.clone();
            if link.watch().is_gone() {
                return Err(VhostUserError::Closed {
                    socket: socket(),
                    doing: "waiting for its last requests",
                });
            }
            if began.elapsed() >= DRAIN_LIMIT {
                return Err(VhostUserError::Busy {
                    socket: socket(),
                    limit: DRAIN_LIMIT,
                });
            }
            thread::sleep(LOOK_AGAIN);
        }
        Ok(())
    }

    /// The index of an available or used ring, which was found to be in guest memory.
    fn ring_index(&self, ring: u64) -> u16 {
        let index = GuestAddress(ring.saturating_add(RING_INDEX));
        let found: std::result::Result<u16, _> =
            self.memory.memory().load(index, Ordering::Acquire);
        found.map_or(0, u16::from_le)
    }

    fn vrings<'a>(&'a self, driver: &'a Driver) -> impl Iterator<Item = Vring<'a>> {
        let each = driver.queues.iter().zip(&self.kicks).enumerate();
        each.filter(|(_, (queue, _))| queue.ready)
            .map(|(index, (queue, kick))| Vring {
                index,
                queue,
                kick,
                call: self.interrupt.line(),
            })
    }
}

impl<M> Inner<M> {
    fn state(&self) -> MutexGuard<'_, State> {
        // A panic of a thread in between leaves values that are each valid by themselves.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn sectors(offer: &Offer) -> u64 {
    let [a, b, c, d, e, f, g, h, ..] = offer.config;
    u64::from_le_bytes([a, b, c, d, e, f, g, h])
}

fn used_log(log: Option<&WriteLog>) -> UsedLog {
    match log {
        Some(_) => UsedLog::On,
        None => UsedLog::Off,
    }
}

fn ready(queues: &mut [QueueSnapshot]) -> impl Iterator<Item = (usize, &mut QueueSnapshot)> {
    queues
        .iter_mut()
        .enumerate()
        .filter(|(_, queue)| queue.ready)
}

impl<M: GuestAddressSpace + Send + Sync + 'static> Serve for VhostUser<M> {
    fn notifiers(&self) -> &[EventFd] {
        &self.0.kicks
    }

    fn activate(
        &self,
        queues: &[QueueSnapshot],
        features: u64,
    ) -> std::result::Result<(), QueueError> {
        let inner = &self.0;
        in_use(queues, features, &*inner.memory.memory())?;
        for queue in queues.iter().filter(|queue| queue.ready) {
            inner.table.rings(queue)?;
        }
        let mut state = inner.state();
        // A back end that was lost before this driver was ready is looked for again.
        state.failure = None;
        state.driver = Some(Driver {
            features,
            queues: queues.to_vec(),
        });
        inner.start(&mut state);
        Ok(())
    }

    fn stop_queue(&self, index: usize) {
        let mut state = self.0.state();
        // There is one queue: without it there is nothing to serve.
        self.0.stop(&mut state);
        let queues = state.driver.as_mut().map(|driver| &mut driver.queues);
        if let Some(queue) = queues.and_then(|queues| queues.get_mut(index)) {
            queue.ready = false;
        }
    }

    fn reset(&self) {
        let mut state = self.0.state();
        self.0.stop(&mut state);
        state.driver = None;
        state.failure = None;
        state.write_back = self.0.offer.config[WRITE_BACK];
        self.0.interrupt.reset();
    }

    fn pause(&self) {
        let mut state = self.0.state();
        state.paused = true;
        self.0.stop(&mut state);
    }

    fn resume(&self) {
        let mut state = self.0.state();
        state.paused = false;
        self.0.start(&mut state);
        drop(state);
        self.0.interrupt.raise_pending();
    }

    fn is_paused(&self) -> bool {
        self.0.state().paused
    }

    fn queues(&self) -> Vec<QueueSnapshot> {
        let state = self.0.state();
        let driver = state.driver.as_ref();
        driver
            .map(|driver| driver.queues.clone())
            .unwrap_or_default()
    }

    fn save(&self) -> DeviceSnapshot {
        DeviceSnapshot::VhostUserBlock(VhostUserSnapshot {
            sectors: self.sectors(),
            write_back: self.0.state().write_back != 0,
        })
    }

    fn fail(&self, error: &QueueError) {
        self.0.state().failure = Some(error.to_string());
        self.0.interrupt.needs_reset();
    }

    fn failure(&self) -> Option<String> {
        self.0.state().failure.clone()
    }
}

impl<M: GuestAddressSpace + Send + Sync + 'static> ConfigSpace for Inner<M> {
    fn read(&self, offset: u64, data: &mut [u8]) {
        let mut config = self.offer.config;
        config[WRITE_BACK] = self.state().write_back;
        read_config(&config, offset, data);
    }

    /// Of all fields the driver writes `writeback` alone, 0 or 1 (virtio 1.2, 5.2.5.1).
    fn write(&self, offset: u64, data: &[u8]) {
        let [value @ (0 | 1)] = *data else {
            return;
        };
        if offset != WRITE_BACK as u64 || self.offer.features & CONFIG_WRITE_BACK == 0 {
            return;
        }
        let mut state = self.state();
        state.write_back = value;
        // One that is not started hears of it when it is.
        let started = state.started;
        let switched = match &mut state.link {
            Some(link) if started => link.set_write_back(value),
            _ => Ok(()),
        };
        if let Err(error) = switched {
            self.lose(&mut state, &error);
        }
    }
}
