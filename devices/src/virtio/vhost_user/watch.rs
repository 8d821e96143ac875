//! The thread that watches over a connection: it ends waits that last too long, and tells when the other end is gone.
//!
//! The crate that speaks the protocol waits for answers without a limit. What ends such a wait is the end of the
//! connection, so that is what a wait that is overdue comes to: after it nobody could tell which answer belongs to
//! which request.

use std::io;
use std::net::Shutdown;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use rustix::event::{EventfdFlags, PollFd, PollFlags, Timespec, eventfd, poll};

/// Told once that the other end is gone.
type OnGone = Box<dyn FnOnce() + Send>;

/// A watched connection. Dropped, it is closed for both ends, and the thread ends.
pub(super) struct Watch {
    shared: Arc<Shared>,
}

struct Shared {
    socket: UnixStream,
    wake: OwnedFd,
    finished: AtomicBool,
    gone: AtomicBool,
    overdue: AtomicBool,
    state: Mutex<State>,
    /// There is somebody to tell, or nobody will be.
    listener: Condvar,
}

#[derive(Default)]
struct State {
    deadline: Option<Instant>,
    on_gone: Option<OnGone>,
}

impl Watch {
    /// Watches over `socket`.
    ///
    /// # Errors
    /// The kernel's: descriptors and threads that cannot be had.
    pub(super) fn start(socket: &UnixStream) -> io::Result<Self> {
        let shared = Arc::new(Shared {
            socket: socket.try_clone()?,
            wake: eventfd(0, EventfdFlags::NONBLOCK | EventfdFlags::CLOEXEC)?,
            finished: AtomicBool::new(false),
            gone: AtomicBool::new(false),
            overdue: AtomicBool::new(false),
            state: Mutex::default(),
            listener: Condvar::new(),
        });
        let watched = Arc::clone(&shared);
        thread::Builder::new()
            .name("_vhost-user".into())
            .spawn(move || watched.run())?;
        Ok(Self { shared })
    }

    /// Has the watching thread call `tell` when the other end is gone, also if it is already.
    pub(super) fn on_gone(&self, tell: impl FnOnce() + Send + 'static) {
        self.shared.state().on_gone = Some(Box::new(tell));
        self.shared.listener.notify_all();
    }

    /// Whether the connection is over.
    pub(super) fn is_gone(&self) -> bool {
        self.shared.gone.load(Ordering::SeqCst)
    }

    /// Whether it was ended because a wait was overdue.
    pub(super) fn was_overdue(&self) -> bool {
        self.shared.overdue.load(Ordering::SeqCst)
    }

    /// Does what may wait for the other end, for `limit` at most.
    pub(super) fn within<T>(&self, limit: Duration, work: impl FnOnce() -> T) -> T {
        self.shared.state().deadline = Some(Instant::now() + limit);
        self.shared.wake();
        let done = work();
        self.shared.state().deadline = None;
        done
    }
}

impl Drop for Watch {
    fn drop(&mut self) {
        // Under the lock: whoever waits for a listener does not miss it.
        let state = self.shared.state();
        self.shared.finished.store(true, Ordering::SeqCst);
        drop(state);
        self.shared.listener.notify_all();
        self.shared.close();
        self.shared.wake();
    }
}

impl Shared {
    fn run(&self) {
        while !self.finished.load(Ordering::SeqCst) {
            if !self.wait() {
                self.gone.store(true, Ordering::SeqCst);
                return self.tell();
            }
            // Reading a non-blocking event fails only when nobody wrote to it.
            let _nobody = rustix::io::read(&self.wake, &mut [0; 8]);
            if self.state().deadline.is_some_and(|at| at <= Instant::now()) {
                self.overdue.store(true, Ordering::SeqCst);
                self.close();
            }
        }
    }

    /// Waits for the deadline or a change. False when the connection is over.
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
        // An interrupted wait is no end of the connection.
        let _interrupted = poll(&mut watched, limit.as_ref());
        !watched[0].revents().intersects(OVER)
    }

    /// Whoever waits for the other end goes on, with an error.
    fn close(&self) {
        // It fails only where the connection is over already.
        let _over = self.socket.shutdown(Shutdown::Both);
    }

    fn wake(&self) {
        // It fails only where the counter is full: then the thread is woken already.
        let _woken = rustix::io::write(&self.wake, &1_u64.to_ne_bytes());
    }

    fn tell(&self) {
        let mut state = self.state();
        while state.on_gone.is_none() && !self.finished.load(Ordering::SeqCst) {
            let woken = self.listener.wait(state);
            state = woken.unwrap_or_else(PoisonError::into_inner);
        }
        let tell = state.on_gone.take();
        drop(state);
        if let Some(tell) = tell {
            tell();
        }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
