//! Gate of a vCPU: holds the vCPU out of the guest during a pause and while a notifier range is open.
//!
//! Each reason to stop the vCPU is a *hold*: a pause is one hold, and every open notifier range is another. The vCPU
//! runs only while there are no holds. A vCPU is stopped in two steps (S12), so that the kicks of all vCPUs overlap:
//! [`Gate::hold`] tells it to stop, and [`Gate::wait_parked`] waits until it has left the guest.
//!
//! A kick cannot be lost. Under one lock, `hold` counts the hold, sets `immediate_exit` in the kvm_run page of the vCPU
//! and signals its thread. The thread clears `immediate_exit` only under the same lock, and only if there are no holds.
//! A kick before KVM_RUN therefore makes KVM_RUN return at once (Linux Documentation/virt/kvm/api.rst,
//! kvm_run.immediate_exit), and a kick during KVM_RUN interrupts it.
//!
//! This file has `unsafe` code because `immediate_exit` is a byte in memory that is shared with the kernel, and because
//! a signal is sent to a thread by its pthread ID.
#![allow(unsafe_code)]

use std::os::unix::thread::JoinHandleExt;
use std::sync::atomic::{AtomicU8, Ordering};
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use ept::{GpaRange, Subscriber, Unresponsive};
use kvm_ioctls::VcpuFd;

/// Maximum time for a vCPU to leave the guest. Then it is reported as unresponsive.
const PARK_TIMEOUT: Duration = Duration::from_secs(2);
/// Time after which a kick is repeated.
const KICK_AGAIN: Duration = Duration::from_millis(20);

/// A vCPU did not leave the guest in time.
#[derive(Debug, thiserror::Error)]
#[error("vcpu{index} did not stop within {} ms; it was kicked {kicks} times", PARK_TIMEOUT.as_millis())]
pub struct KickError {
    /// Index of the vCPU.
    pub index: u32,
    /// Number of kicks that were sent.
    pub kicks: u32,
}

/// Statistics of the stops of one vCPU.
#[derive(Clone, Copy, Debug, Default)]
pub struct VcpuStats {
    /// Total time in which the vCPU could not run because it was held.
    pub stall: Duration,
    /// Number of stops.
    pub stops: u64,
}

/// State of a gate, under its lock.
#[derive(Debug, Default)]
struct GateState {
    /// Number of holds.
    holds: u32,
    /// Whether the vCPU is out of the guest: its thread waits at the gate, or has ended.
    parked: bool,
    /// Whether the vCPU must not enter the guest again.
    finished: bool,
    /// Thread of the vCPU, while it is alive.
    thread: Option<libc::pthread_t>,
    stats: VcpuStats,
}

/// Gate of one vCPU.
#[derive(Debug)]
pub struct Gate {
    index: u32,
    immediate_exit: ImmediateExit,
    state: Mutex<GateState>,
    changed: Condvar,
    /// vCPU, which owns the kvm_run page that `immediate_exit` points to. Its thread holds the lock while it is in the
    /// guest.
    fd: Mutex<VcpuFd>,
}

/// Answer to a vCPU thread that asks to enter the guest.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum GateAnswer {
    /// The thread may enter the guest.
    Enter,
    /// The guest has ended, and the thread must end too.
    Finished,
}

impl Gate {
    /// Creates the gate of vCPU `index`. It starts with one hold, so that the thread waits.
    pub fn new(index: u32, mut vcpu: VcpuFd) -> Self {
        Self {
            index,
            immediate_exit: ImmediateExit::of(&mut vcpu),
            fd: Mutex::new(vcpu),
            state: Mutex::new(GateState {
                holds: 1,
                parked: true,
                ..GateState::default()
            }),
            changed: Condvar::new(),
        }
    }

    /// Locks the vCPU. Blocks while the vCPU is in the guest: call [`Self::hold`] and [`Self::wait_parked`] first.
    pub fn fd(&self) -> MutexGuard<'_, VcpuFd> {
        self.fd.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Adds a hold and kicks the vCPU. Does not wait until the vCPU has left the guest.
    pub fn hold(&self) {
        let mut state = self.lock();
        state.holds += 1;
        self.kick(&state);
    }

    /// Waits until the vCPU has left the guest. Must be called after [`Self::hold`].
    ///
    /// # Errors
    /// Returns [`KickError`] if the vCPU does not leave the guest within two seconds despite repeated kicks. The hold
    /// remains.
    pub fn wait_parked(&self) -> Result<(), KickError> {
        let deadline = Instant::now() + PARK_TIMEOUT;
        let mut kicks = 1;
        let mut state = self.lock();
        while !state.parked {
            if Instant::now() >= deadline {
                return Err(KickError {
                    index: self.index,
                    kicks,
                });
            }
            let (next, timeout) = self
                .changed
                .wait_timeout(state, KICK_AGAIN)
                .unwrap_or_else(PoisonError::into_inner);
            state = next;
            if timeout.timed_out() && !state.parked {
                self.kick(&state);
                kicks += 1;
            }
        }
        Ok(())
    }

    /// Removes one hold. The vCPU runs when no hold is left.
    pub fn release(&self) {
        let mut state = self.lock();
        state.holds = state.holds.saturating_sub(1);
        if state.holds == 0 {
            self.changed.notify_all();
        }
    }

    /// Makes the vCPU leave the guest for good, regardless of holds. Its thread then ends.
    pub fn finish(&self) {
        let mut state = self.lock();
        state.finished = true;
        self.kick(&state);
        self.changed.notify_all();
    }

    /// Returns the statistics of this vCPU.
    pub fn stats(&self) -> VcpuStats {
        self.lock().stats
    }

    /// Sets the thread that kicks are sent to. Must be called before the first hold is released.
    pub(super) fn attach(&self, thread: &JoinHandle<()>) {
        self.lock().thread = Some(thread.as_pthread_t());
    }

    /// Waits until there are no holds or the guest has ended. Called by the vCPU thread while it is out of the guest.
    pub(super) fn ask_to_enter(&self) -> GateAnswer {
        let mut state = self.lock();
        if state.holds > 0 && !state.finished {
            let since = Instant::now();
            state.parked = true;
            state.stats.stops += 1;
            self.changed.notify_all();
            while state.holds > 0 && !state.finished {
                state = self
                    .changed
                    .wait(state)
                    .unwrap_or_else(PoisonError::into_inner);
            }
            state.stats.stall += since.elapsed();
        }
        state.parked = state.finished;
        if state.finished {
            self.changed.notify_all();
            return GateAnswer::Finished;
        }
        self.immediate_exit.set(0);
        GateAnswer::Enter
    }

    /// Marks the vCPU as finished and out of the guest. Called by the vCPU thread when it ends.
    pub(super) fn leave(&self) {
        let mut state = self.lock();
        state.finished = true;
        state.parked = true;
        state.thread = None;
        self.changed.notify_all();
    }

    /// Makes the vCPU leave the guest.
    fn kick(&self, state: &GateState) {
        self.immediate_exit.set(1);
        if let (Some(thread), false) = (state.thread, state.parked) {
            // SAFETY: the ID is that of a live thread. The thread clears `state.thread` under the lock before it ends,
            // and its handle is joined only after that.
            let result = unsafe { libc::pthread_kill(thread, super::thread::kick_signal()) };
            debug_assert_eq!(result, 0, "a valid signal to a live thread");
        }
    }

    fn lock(&self) -> MutexGuard<'_, GateState> {
        // A panic leaves the state valid, because each field is valid by itself.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Every notifier range holds the vCPU, whatever memory it covers: a vCPU that is out of the guest uses no translation.
impl Subscriber for Gate {
    fn start(&self, _range: GpaRange) {
        self.hold();
    }

    fn wait(&self, _range: GpaRange) -> Result<(), Unresponsive> {
        self.wait_parked()
            .map_err(|_| Unresponsive::new(format!("vcpu{}", self.index)))
    }

    fn stopped(&self, _range: GpaRange) -> bool {
        self.lock().parked
    }

    fn end(&self, _range: GpaRange) {
        self.release();
    }
}

/// Pointer to the byte `immediate_exit` in a kvm_run page.
#[derive(Debug)]
struct ImmediateExit(*mut u8);

// SAFETY: the byte is only accessed atomically, and its page outlives the pointer: the `Gate` that contains the pointer
// also owns the `VcpuFd` that owns the page.
unsafe impl Send for ImmediateExit {}
// SAFETY: as for `Send`; all access is atomic.
unsafe impl Sync for ImmediateExit {}

impl ImmediateExit {
    /// Returns a pointer into the kvm_run page of `vcpu`.
    fn of(vcpu: &mut VcpuFd) -> Self {
        Self(&raw mut vcpu.get_kvm_run().immediate_exit)
    }

    /// Writes the byte.
    fn set(&self, value: u8) {
        // SAFETY: the pointer is valid (see `Send`), and a byte is always aligned. The kernel reads the byte at the
        // start of KVM_RUN; kvm-ioctls does not access it.
        unsafe { AtomicU8::from_ptr(self.0) }.store(value, Ordering::SeqCst);
    }
}
