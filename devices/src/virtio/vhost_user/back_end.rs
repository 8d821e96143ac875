//! The course of a back end: started for a driver, stopped, told to log, lost and found again.

use std::sync::atomic::Ordering;
use std::sync::{Arc, MutexGuard, PoisonError, Weak};
use std::thread;
use std::time::{Duration, Instant};

use vm_memory::{Bytes, GuestAddress, GuestAddressSpace};

use super::error::VhostUserError;
use super::link::{Link, UsedLog, Vring};
use super::log::WriteLog;
use super::spec::{self, CONFIG_WRITE_BACK, DRAIN_LIMIT, LOG_ALL, PROTOCOL, WRITE_BACK};
use super::table::used_ring_bytes;
use super::watchdog::ConnectionEnd;
use super::{FrontEndState, Inner, ReadyDriver, Result, sectors};
use crate::virtio::eventfd::notify;
use crate::virtio::queue::QueueSnapshot;

/// How often a used ring is looked at while its last requests end.
const LOOK_AGAIN: Duration = Duration::from_micros(500);
/// Offset of the index in an available and in a used ring (virtio 1.2, 2.7.6 and 2.7.8).
const RING_INDEX: u64 = 2;

impl<M: GuestAddressSpace + Send + Sync + 'static> Inner<M> {
    /// Takes `link` as the connection to the back end.
    pub(super) fn adopt(self: &Arc<Self>, state: &mut FrontEndState, link: Link) {
        state.connection += 1;
        let (inner, connection): (Weak<Self>, _) = (Arc::downgrade(self), state.connection);
        link.watchdog().on_end(move |end| {
            if let Some(inner) = inner.upgrade() {
                inner.connection_ended(connection, end);
            }
        });
        state.link = Some(link);
        state.lost = None;
    }

    /// Handles the end of a connection, which the watchdog has noticed.
    fn connection_ended(&self, connection: u64, end: ConnectionEnd) {
        let mut state = self.state();
        // An exchange may have noticed it first, and the device may even have a new connection by now.
        if state.connection != connection || state.link.is_none() {
            return;
        }
        let socket = self.socket.clone();
        let error = match end {
            ConnectionEnd::Closed => VhostUserError::Closed {
                socket,
                doing: "no request was pending",
            },
            ConnectionEnd::WatchdogPanicked(message) => {
                VhostUserError::WatchdogPanicked { socket, message }
            }
        };
        self.lose(&mut state, &error);
    }

    /// Lets go of a back end that cannot be used any more.
    pub(super) fn lose(&self, state: &mut FrontEndState, error: &VhostUserError) {
        let was_there = state.link.take().is_some();
        let why = error.to_string();
        state.started = false;
        state.failure = Some(why.clone());
        state.lost = Some(why.clone());
        if state.driver.is_some() {
            self.interrupt.needs_reset();
        }
        if was_there && let Some(tell) = self.on_loss.get() {
            tell(&why);
        }
    }

    /// Has the back end serve the driver, if there is one that is ready.
    pub(super) fn start(self: &Arc<Self>, state: &mut FrontEndState) {
        if state.started || state.paused || state.failure.is_some() || state.driver.is_none() {
            return;
        }
        match self.begin(state) {
            Ok(()) => state.started = true,
            Err(error) => self.lose(state, &error),
        }
    }

    /// Does what can fail of a start while nothing is served yet: for a guest that arrives.
    pub(super) fn prepare(&self, state: &mut FrontEndState) {
        let FrontEndState {
            link: Some(link),
            driver: Some(driver),
            log,
            ..
        } = state
        else {
            return;
        };
        let prepared = self
            .agree(link, driver, log.as_ref())
            .and_then(|()| link.settle());
        if let Err(error) = prepared {
            self.lose(state, &error);
        }
    }

    fn begin(self: &Arc<Self>, state: &mut FrontEndState) -> Result<()> {
        if state.link.is_none() {
            self.reconnect(state)?;
        }
        let FrontEndState {
            link: Some(link),
            driver: Some(driver),
            log,
            write_back,
            ..
        } = state
        else {
            return Ok(());
        };
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
    fn reconnect(self: &Arc<Self>, state: &mut FrontEndState) -> Result<()> {
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

    /// Guest memory if it does not have it yet, and the log; then the features that have both used.
    fn agree(&self, link: &mut Link, driver: &ReadyDriver, log: Option<&WriteLog>) -> Result<()> {
        link.tell_memory(&self.table)?;
        let mut features = driver.features | PROTOCOL;
        if let Some(log) = log {
            link.set_log_base(log)?;
            features |= LOG_ALL;
        }
        link.set_features(features)
    }

    /// Tells a back end that is at work that it is to log, or to log no longer; one that is not hears of it when it is
    /// started.
    pub(super) fn switch_log(&self, state: &mut FrontEndState) -> Result<()> {
        if !state.started {
            return Ok(());
        }
        let switched = self.switch_log_of_started(state);
        if let Err(error) = &switched {
            self.lose(state, error);
        }
        switched
    }

    fn switch_log_of_started(&self, state: &mut FrontEndState) -> Result<()> {
        let FrontEndState {
            link: Some(link),
            driver: Some(driver),
            log,
            ..
        } = state
        else {
            return Ok(());
        };
        self.agree(link, driver, log.as_ref())?;
        for vring in self.vrings(driver) {
            link.set_rings(&vring, &self.table, used_log(log.as_ref()))?;
        }
        // From here on all that it writes is in the log.
        link.settle()
    }

    /// Has the back end serve the driver no longer, when it has done what it was asked for.
    pub(super) fn stop(&self, state: &mut FrontEndState) {
        if !state.started {
            return;
        }
        if let Err(error) = self.end(state) {
            self.lose(state, &error);
        }
        state.started = false;
    }

    /// Requests end first: a back end that has some when it is told to stop may forget them (QEMU 7.2 ends then).
    fn end(&self, state: &mut FrontEndState) -> Result<()> {
        let FrontEndState {
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
            // A vCPU may stand between making a request available and notifying of it.
            self.kicks.get(index).into_iter().for_each(notify);
            self.wait_for_used(link, began, queue, |inner| inner.last_request(queue))?;
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
            if link.watchdog().has_ended() {
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

    /// Where the used ring comes to with the last request. An index that is further ahead than the queue is long is no
    /// request: there is nothing to wait for.
    fn last_request(&self, queue: &QueueSnapshot) -> u16 {
        let used = self.ring_index(queue.used_ring);
        let available = self.ring_index(queue.available_ring);
        match available.wrapping_sub(used) > queue.size {
            true => used,
            false => available,
        }
    }

    /// The index of an available or used ring, which was found to be in guest memory.
    fn ring_index(&self, ring: u64) -> u16 {
        let index = GuestAddress(ring.saturating_add(RING_INDEX));
        let found: std::result::Result<u16, _> =
            self.memory.memory().load(index, Ordering::Acquire);
        found.map_or(0, u16::from_le)
    }

    fn vrings<'a>(&'a self, driver: &'a ReadyDriver) -> impl Iterator<Item = Vring<'a>> {
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
    pub(super) fn state(&self) -> MutexGuard<'_, FrontEndState> {
        // A panic of a thread in between leaves values that are each valid by themselves.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
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
