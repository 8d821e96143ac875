//! Slowing a guest down: for a share of the time all its vCPUs are held.

use std::io;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::{Builder, JoinHandle};
use std::time::Duration;

use super::gate::Gate;

/// Hold and run take this long together: short enough for a guest's network, long against a kick.
const PERIOD: Duration = Duration::from_millis(20);

struct State {
    percent: u32,
    stop: bool,
}

type Shared = Arc<(Mutex<State>, Condvar)>;

/// Holds vCPUs for a share of the time, until it is dropped.
pub struct Throttle {
    shared: Shared,
    thread: Option<JoinHandle<()>>,
}

impl Throttle {
    /// Begins to hold the vCPUs behind `gates` for `percent` of the time, 1 to 99.
    ///
    /// # Errors
    /// A thread that cannot be had.
    pub fn start(gates: Vec<Arc<Gate>>, percent: u32) -> io::Result<Self> {
        let state = State {
            percent: percent.clamp(1, 99),
            stop: false,
        };
        let shared: Shared = Arc::new((Mutex::new(state), Condvar::new()));
        let thread = {
            let shared = Arc::clone(&shared);
            Builder::new()
                .name("_throttle".into())
                .spawn(move || run(&shared, &gates))?
        };
        Ok(Self {
            shared,
            thread: Some(thread),
        })
    }

    /// Holds them for `percent` of the time from the next period on.
    pub fn set(&self, percent: u32) {
        lock(&self.shared).percent = percent.clamp(1, 99);
    }
}

impl Drop for Throttle {
    fn drop(&mut self) {
        lock(&self.shared).stop = true;
        self.shared.1.notify_all();
        if let Some(thread) = self.thread.take() {
            // A thread that panicked has said so on standard error.
            let _panicked = thread.join();
        }
    }
}

fn run(shared: &Shared, gates: &[Arc<Gate>]) {
    loop {
        let Some(held_for) = next_hold(shared) else {
            return;
        };
        gates.iter().for_each(|gate| gate.hold());
        wait(shared, held_for);
        gates.iter().for_each(|gate| gate.release());
        wait(shared, PERIOD - held_for);
    }
}

/// How long to hold in the period that begins; none once it is over.
fn next_hold(shared: &Shared) -> Option<Duration> {
    let state = lock(shared);
    (!state.stop).then(|| PERIOD * state.percent / 100)
}

/// Waits for `time`, or until it is over.
fn wait(shared: &Shared, time: Duration) {
    let (_state, _timeout) = shared
        .1
        .wait_timeout_while(lock(shared), time, |state| !state.stop)
        .unwrap_or_else(PoisonError::into_inner);
}

fn lock(shared: &Shared) -> MutexGuard<'_, State> {
    shared.0.lock().unwrap_or_else(PoisonError::into_inner)
}
