//! Thread that supervises a vhost-user connection: it ends waits that take too long, and reports when the connection
//! ends.
//!
//! The `vhost` crate waits for replies without a limit. The only way to end such a wait is to shut down the socket, so
//! the watchdog does that when a deadline passes. The connection could not be used after a missed reply anyway: nobody
//! could tell which reply belongs to which request.

use std::io;
use std::net::Shutdown;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use rustix::event::{EventfdFlags, PollFd, PollFlags, Timespec, eventfd, poll};

use crate::virtio::panic;

/// How a supervised connection ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum ConnectionEnd {
    /// The back end closed it, or the watchdog did because a deadline passed.
    Closed,
    /// The watchdog thread panicked with this message, and the connection was shut down.
    WatchdogPanicked(String),
}

/// Callback for the end of the connection.
type OnEnd = Box<dyn FnOnce(ConnectionEnd) + Send>;

/// Supervised connection. Dropping it shuts down the socket and ends the thread.
pub(super) struct Watchdog {
    shared: Arc<WatchdogShared>,
}

/// State that the owner of the connection and the watchdog thread share.
struct WatchdogShared {
    socket: UnixStream,
    wake: OwnedFd,
    /// The watchdog has been dropped.
    finished: AtomicBool,
    /// The connection has ended.
    ended: AtomicBool,
    /// The watchdog has shut down the connection because a deadline passed.
    overdue: AtomicBool,
    state: Mutex<WatchdogState>,
    /// Signalled when `on_end` is set, or `finished`.
    listener: Condvar,
}

#[derive(Default)]
struct WatchdogState {
    /// End of the current wait for the back end.
    deadline: Option<Instant>,
    on_end: Option<OnEnd>,
}

impl Watchdog {
    /// Starts a thread that supervises `socket`.
    ///
    /// # Errors
    /// Returns the kernel's error if a descriptor or the thread cannot be created.
    pub(super) fn start(socket: &UnixStream) -> io::Result<Self> {
        Self::spawn(socket, WatchdogShared::supervise)
    }

    /// Starts a thread that runs `supervise` until the connection ends.
    fn spawn(
        socket: &UnixStream,
        supervise: impl FnOnce(&WatchdogShared) + Send + 'static,
    ) -> io::Result<Self> {
        let shared = Arc::new(WatchdogShared {
            socket: socket.try_clone()?,
            wake: eventfd(0, EventfdFlags::NONBLOCK | EventfdFlags::CLOEXEC)?,
            finished: AtomicBool::new(false),
            ended: AtomicBool::new(false),
            overdue: AtomicBool::new(false),
            state: Mutex::default(),
            listener: Condvar::new(),
        });
        let watched = Arc::clone(&shared);
        thread::Builder::new()
            .name("_vhost-user".into())
            .spawn(move || {
                let end = match panic::catch(|| supervise(&watched)) {
                    Ok(()) => ConnectionEnd::Closed,
                    Err(message) => {
                        // Without a watchdog no wait would end.
                        watched.close();
                        ConnectionEnd::WatchdogPanicked(message)
                    }
                };
                watched.ended.store(true, Ordering::SeqCst);
                // A panic of the callback has been reported by the panic hook, and nobody waits for this thread.
                let _panicked = panic::catch(|| watched.tell(end));
            })?;
        Ok(Self { shared })
    }

    /// Registers the callback for the end of the connection. It is called at once if the connection has ended already,
    /// in both cases on the watchdog thread.
    pub(super) fn on_end(&self, tell: impl FnOnce(ConnectionEnd) + Send + 'static) {
        self.shared.state().on_end = Some(Box::new(tell));
        self.shared.listener.notify_all();
    }

    /// Returns whether the connection has ended.
    pub(super) fn has_ended(&self) -> bool {
        self.shared.ended.load(Ordering::SeqCst)
    }

    /// Returns whether the connection was shut down because a deadline passed.
    pub(super) fn was_overdue(&self) -> bool {
        self.shared.overdue.load(Ordering::SeqCst)
    }

    /// Runs `work`, which may wait for the back end, and shuts the connection down if that takes longer than `limit`.
    pub(super) fn within<T>(&self, limit: Duration, work: impl FnOnce() -> T) -> T {
        self.shared.state().deadline = Some(Instant::now() + limit);
        self.shared.wake();
        let done = work();
        self.shared.state().deadline = None;
        done
    }
}

impl Drop for Watchdog {
    fn drop(&mut self) {
        // The lock prevents that a thread checks `finished` before and waits for `listener` after this.
        let state = self.shared.state();
        self.shared.finished.store(true, Ordering::SeqCst);
        drop(state);
        self.shared.listener.notify_all();
        self.shared.close();
        self.shared.wake();
    }
}

impl WatchdogShared {
    /// Enforces deadlines until the connection ends or the watchdog is dropped.
    fn supervise(&self) {
        while !self.finished.load(Ordering::SeqCst) && self.wait() {
            // The read fails only if the event is not signalled.
            let _empty = rustix::io::read(&self.wake, &mut [0; 8]);
            if self.state().deadline.is_some_and(|at| at <= Instant::now()) {
                self.overdue.store(true, Ordering::SeqCst);
                self.close();
            }
        }
    }

    /// Waits for the deadline, a new deadline, or the end of the connection. Returns false if the connection has ended.
    fn wait(&self) -> bool {
        const OVER: PollFlags = PollFlags::RDHUP
            .union(PollFlags::HUP)
            .union(PollFlags::ERR)
            .union(PollFlags::NVAL);
        let deadline = self.state().deadline;
        let left = deadline.map(|at| at.saturating_duration_since(Instant::now()));
        let mut watched = [
            PollFd::new(&self.socket, PollFlags::RDHUP),
            PollFd::new(&self.wake, PollFlags::IN),
        ];
        let limit = left.and_then(|left| Timespec::try_from(left).ok());
        // A signal may interrupt the wait. That does not end the connection, and the caller waits again.
        let _interrupted = poll(&mut watched, limit.as_ref());
        !watched[0].revents().intersects(OVER)
    }

    /// Shuts down the connection, which fails every wait for the back end.
    fn close(&self) {
        // The call fails only if the connection has ended already.
        let _over = self.socket.shutdown(Shutdown::Both);
    }

    /// Wakes the watchdog thread, so that it looks at the deadline.
    fn wake(&self) {
        // The write fails only if the counter is full, and then the thread wakes up anyway.
        let _woken = rustix::io::write(&self.wake, &1_u64.to_ne_bytes());
    }

    /// Calls the callback with `end`, as soon as one is registered. Returns without one if the watchdog is dropped.
    fn tell(&self, end: ConnectionEnd) {
        let mut state = self.state();
        while state.on_end.is_none() && !self.finished.load(Ordering::SeqCst) {
            let woken = self.listener.wait(state);
            state = woken.unwrap_or_else(PoisonError::into_inner);
        }
        let tell = state.on_end.take();
        drop(state);
        if let Some(tell) = tell {
            tell(end);
        }
    }

    fn state(&self) -> MutexGuard<'_, WatchdogState> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use std::io::Read;
    use std::sync::mpsc;

    use super::*;

    const PATIENCE: Duration = Duration::from_secs(20);

    #[test]
    fn a_panic_of_the_thread_ends_the_connection_and_is_reported() {
        let (near, mut far) = UnixStream::pair().unwrap();
        let watchdog = Watchdog::spawn(&near, |_| panic!("injected")).unwrap();
        let (sender, ends) = mpsc::channel();
        watchdog.on_end(move |end| sender.send(end).unwrap());
        let end = ends.recv_timeout(PATIENCE).unwrap();
        assert_eq!(end, ConnectionEnd::WatchdogPanicked("injected".into()));
        assert!(watchdog.has_ended() && !watchdog.was_overdue());
        // Neither side waits for the other any more.
        assert_eq!(far.read(&mut [0]).unwrap(), 0);
        let read = watchdog.within(PATIENCE, || (&near).read(&mut [0]).unwrap());
        assert_eq!(read, 0);
    }

    #[test]
    fn a_late_listener_is_told_and_a_drop_ends_the_thread_without_one() {
        let (near, far) = UnixStream::pair().unwrap();
        let watchdog = Watchdog::start(&near).unwrap();
        drop(far);
        while !watchdog.has_ended() {
            thread::yield_now();
        }
        let (sender, ends) = mpsc::channel();
        watchdog.on_end(move |end| sender.send(end).unwrap());
        assert_eq!(ends.recv_timeout(PATIENCE), Ok(ConnectionEnd::Closed));
        let (near, mut far) = UnixStream::pair().unwrap();
        drop(Watchdog::start(&near).unwrap());
        assert_eq!(far.read(&mut [0]).unwrap(), 0);
    }

    #[test]
    fn a_wait_that_is_overdue_is_ended() {
        let (near, _far) = UnixStream::pair().unwrap();
        let watchdog = Watchdog::start(&near).unwrap();
        let limit = Duration::from_millis(50);
        let read = watchdog.within(limit, || (&near).read(&mut [0]).unwrap());
        assert_eq!(read, 0);
        assert!(watchdog.was_overdue());
    }
}
