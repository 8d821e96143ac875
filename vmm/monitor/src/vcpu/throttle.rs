//! Throttles a guest: all vCPUs are held for a share of each period.

use std::io;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::{Builder, JoinHandle};
use std::time::Duration;

use super::gate::Gate;

/// Duration of one period, in which the vCPUs are first held and then run. Short enough for network connections of the
/// guest, and long compared to a kick.
const PERIOD: Duration = Duration::from_millis(20);

/// State that the throttle shares with its thread.
struct ThrottleState {
    percent: u32,
    stop: bool,
}

/// State with the condition variable that wakes the thread when the throttle is dropped.
type SharedThrottle = Arc<(Mutex<ThrottleState>, Condvar)>;

/// Holds vCPUs for a share of the time until it is dropped.
pub struct Throttle {
    shared: SharedThrottle,
    thread: Option<JoinHandle<()>>,
}

impl Throttle {
    /// Starts to hold the vCPUs behind `gates` for `percent` of the time. `percent` is clamped to 1 to 99.
    ///
    /// # Errors
    /// Returns the error of the system if the thread cannot be started.
    pub fn start(gates: Vec<Arc<Gate>>, percent: u32) -> io::Result<Self> {
        let state = ThrottleState {
            percent: percent.clamp(1, 99),
            stop: false,
        };
        let shared: SharedThrottle = Arc::new((Mutex::new(state), Condvar::new()));
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

    /// Changes the share to `percent`, clamped to 1 to 99, from the next period on.
    pub fn set(&self, percent: u32) {
        lock(&self.shared).percent = percent.clamp(1, 99);
    }
}

impl Drop for Throttle {
    fn drop(&mut self) {
        lock(&self.shared).stop = true;
        self.shared.1.notify_all();
        if let Some(thread) = self.thread.take() {
            // The panic of a thread was already printed on standard error.
            let _panicked = thread.join();
        }
    }
}

/// Loop of the throttle thread.
fn run(shared: &SharedThrottle, gates: &[Arc<Gate>]) {
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

/// Returns the time for which vCPUs are held in the next period, or `None` if the throttle was dropped.
fn next_hold(shared: &SharedThrottle) -> Option<Duration> {
    let state = lock(shared);
    (!state.stop).then(|| PERIOD * state.percent / 100)
}

/// Waits for `time`, or until the throttle is dropped.
fn wait(shared: &SharedThrottle, time: Duration) {
    let (_state, _timeout) = shared
        .1
        .wait_timeout_while(lock(shared), time, |state| !state.stop)
        .unwrap_or_else(PoisonError::into_inner);
}

fn lock(shared: &SharedThrottle) -> MutexGuard<'_, ThrottleState> {
    shared.0.lock().unwrap_or_else(PoisonError::into_inner)
}
