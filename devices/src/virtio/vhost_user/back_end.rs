//! Life cycle of a back end: start and stop of the queues, switching the dirty log, loss and reconnection.

use std::sync::atomic::Ordering;
use std::sync::{Arc, MutexGuard, PoisonError, Weak};
use std::thread;
use std::time::{Duration, Instant};

use vm_memory::{Bytes, GuestAddress, GuestAddressSpace};

use super::error::VhostUserError;
use super::link::{Link, UsedLog, Vring};
use super::memory_table::used_ring_bytes;
use super::spec::{self, CONFIG_WRITE_BACK, DRAIN_LIMIT, LOG_ALL, PROTOCOL, WRITE_BACK};
use super::watchdog::ConnectionEnd;
use super::write_log::WriteLog;
use super::{FrontEndState, Inner, ReadyDriver, Result, sectors};
use crate::virtio::eventfd::notify;
use crate::virtio::queue::QueueSnapshot;

/// Interval at which a used ring is polled until the last requests are done.
const POLL_INTERVAL: Duration = Duration::from_micros(500);
/// Offset of the index in an available ring and in a used ring (virtio 1.2, 2.7.6 and 2.7.8).
const RING_INDEX: u64 = 2;

impl<M: GuestAddressSpace + Send + Sync + 'static> Inner<M> {
    /// Stores `link` as the connection to the back end.
    pub(super) fn set_connection(self: &Arc<Self>, state: &mut FrontEndState, link: Link) {
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

    /// Handles the end of a connection that the watchdog has noticed.
    fn connection_ended(&self, connection: u64, end: ConnectionEnd) {
        let mut state = self.state();
        // An exchange may have noticed the end before, and the device may even have a new connection by now.
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

    /// Drops the connection to a back end that cannot be used any more, and reports the loss.
    pub(super) fn lose(&self, state: &mut FrontEndState, error: &VhostUserError) {
        let was_connected = state.link.take().is_some();
        let why = error.to_string();
        state.started = false;
        state.failure = Some(why.clone());
        state.lost = Some(why.clone());
        if state.driver.is_some() {
            self.interrupt.needs_reset();
        }
        if was_connected && let Some(tell) = self.on_loss.get() {
            tell(&why);
        }
    }

    /// Starts the queues if the driver has set DRIVER_OK, and the device is neither paused nor in need of a reset.
    pub(super) fn start(self: &Arc<Self>, state: &mut FrontEndState) {
        if state.started || state.paused || state.failure.is_some() || state.driver.is_none() {
            return;
        }
        match self.start_queues(state) {
            Ok(()) => state.started = true,
            Err(error) => self.lose(state, &error),
        }
    }

    /// Sends guest memory and features, but starts no queue. A restored device does this while it is paused, because
    /// the back end may refuse them.
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
            .set_up(link, driver, log.as_ref())
            .and_then(|()| link.wait_until_handled());
        if let Err(error) = prepared {
            self.lose(state, &error);
        }
    }

    /// Connects if necessary, and starts all queues.
    fn start_queues(self: &Arc<Self>, state: &mut FrontEndState) -> Result<()> {
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
        self.set_up(link, driver, log.as_ref())?;
        if driver.features & CONFIG_WRITE_BACK != 0 {
            link.set_write_back(*write_back)?;
        }
        for vring in self.vrings(driver) {
            link.start(&vring, &self.table, used_log(log.as_ref()))?;
            // The driver may have notified the queue while nobody served it.
            notify(vring.kick);
        }
        Ok(())
    }

    /// Connects to the back end that listens on the socket now. It must offer the same as the first one.
    fn reconnect(self: &Arc<Self>, state: &mut FrontEndState) -> Result<()> {
        let (link, offer) = Link::connect(&self.socket)?;
        let mut expected = self.offer;
        // The last driver may have changed this field.
        expected.config[WRITE_BACK] = offer.config[WRITE_BACK];
        if offer != expected {
            return Err(VhostUserError::Changed {
                socket: self.socket.clone(),
                what: format!(
                    "it has {} sectors and features {:#x}, but the guest was started with {} sectors and {:#x}",
                    sectors(&offer),
                    offer.features,
                    sectors(&expected),
                    expected.features
                ),
            });
        }
        self.set_connection(state, link);
        Ok(())
    }

    /// Sends guest memory if the back end does not have it yet, the dirty log if there is one, and the features for
    /// both.
    fn set_up(&self, link: &mut Link, driver: &ReadyDriver, log: Option<&WriteLog>) -> Result<()> {
        link.send_memory_table(&self.table)?;
        let mut features = driver.features | PROTOCOL;
        if let Some(log) = log {
            link.set_log_base(log)?;
            features |= LOG_ALL;
        }
        link.set_features(features)
    }

    /// Enables or disables the dirty log of a running back end. A back end that is not running gets the setting at its
    /// start.
    pub(super) fn switch_log(&self, state: &mut FrontEndState) -> Result<()> {
        if !state.started {
            return Ok(());
        }
        let switched = self.switch_log_of_running(state);
        if let Err(error) = &switched {
            self.lose(state, error);
        }
        switched
    }

    fn switch_log_of_running(&self, state: &mut FrontEndState) -> Result<()> {
        let FrontEndState {
            link: Some(link),
            driver: Some(driver),
            log,
            ..
        } = state
        else {
            return Ok(());
        };
        self.set_up(link, driver, log.as_ref())?;
        for vring in self.vrings(driver) {
            link.set_rings(&vring, &self.table, used_log(log.as_ref()))?;
        }
        // When this returns, every write of the back end is logged.
        link.wait_until_handled()
    }

    /// Stops the queues after all requests are done.
    pub(super) fn stop(&self, state: &mut FrontEndState) {
        if !state.started {
            return;
        }
        if let Err(error) = self.stop_queues(state) {
            self.lose(state, &error);
        }
        state.started = false;
    }

    /// Waits for the requests before it stops the queues, because a back end may forget requests in flight (QEMU 7.2
    /// does).
    fn stop_queues(&self, state: &mut FrontEndState) -> Result<()> {
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
            // A vCPU may have been stopped after it made a request available and before it notified the queue.
            self.kicks.get(index).into_iter().for_each(notify);
            self.wait_for_used(link, began, queue, |inner| inner.last_request(queue))?;
            let left = DRAIN_LIMIT.saturating_sub(began.elapsed());
            let base = link.stop(index, left.max(spec::REPLY_LIMIT))?;
            let in_flight = base.wrapping_sub(self.ring_index(queue.used_ring));
            if in_flight > queue.size {
                let what = format!(
                    "the available index {base} is {in_flight} entries ahead of the used index"
                );
                return Err(link.violation("stopping a queue", what));
            }
            self.wait_for_used(link, began, queue, |_| base)?;
            (queue.next_available, queue.next_used) = (base, base);
            // The back end may log its last write to the used ring only after it has replied.
            if let Some(log) = log {
                log.mark(queue.used_ring, used_ring_bytes(queue));
            }
        }
        Ok(())
    }

    /// Waits until the used index is equal to the result of `end`.
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
                    doing: "waiting for requests in flight",
                });
            }
            if began.elapsed() >= DRAIN_LIMIT {
                return Err(VhostUserError::Busy {
                    socket: socket(),
                    limit: DRAIN_LIMIT,
                });
            }
            thread::sleep(POLL_INTERVAL);
        }
        Ok(())
    }

    /// Returns the used index after the last available request. If the available index is ahead by more than the size
    /// of the queue, it is invalid, and there is no request to wait for.
    fn last_request(&self, queue: &QueueSnapshot) -> u16 {
        let used = self.ring_index(queue.used_ring);
        let available = self.ring_index(queue.available_ring);
        match available.wrapping_sub(used) > queue.size {
            true => used,
            false => available,
        }
    }

    /// Returns the index of an available or used ring. The ring has been checked to be in guest memory.
    fn ring_index(&self, ring: u64) -> u16 {
        let index = GuestAddress(ring.saturating_add(RING_INDEX));
        let found: std::result::Result<u16, _> =
            self.memory.memory().load(index, Ordering::Acquire);
        found.map_or(0, u16::from_le)
    }

    /// Returns the queues that the driver has set up, with their eventfds.
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
        // After a panic of another thread that held the lock, each value is still valid by itself.
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
