//! The gate that a vCPU thread passes before it enters the guest, and by which others hold it out.
//!
//! Whoever wants the vCPU stopped *holds* its gate: a pause is one hold, every open notifier range is
//! another, and the vCPU runs only while there is none. Holding is in two passes (S12), so that the
//! kicks of all vCPUs overlap: [`Gate::hold`] tells it to stop, [`Gate::wait_parked`] waits until it has.
//!
//! A kick cannot be lost. Under one lock the holder counts its hold, sets `immediate_exit` in the
//! vCPU's kvm_run page and signals the thread; and only under that lock, with no hold left, does the
//! thread clear `immediate_exit` again. So a kick before KVM_RUN makes it return at once (Linux
//! Documentation/virt/kvm/api.rst, kvm_run.immediate_exit), and a kick inside it interrupts it.
//!
//! This file has `unsafe` for two things that only the kernel's interface offers: `immediate_exit` is a
//! byte in memory that the kernel shares with this process, and a signal is sent to a thread by its
//! pthread id.
#![allow(unsafe_code)]

use std::os::unix::thread::JoinHandleExt;
use std::sync::atomic::{AtomicU8, Ordering};
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use ept::{GpaRange, Subscriber, Unresponsive};
use kvm_ioctls::VcpuFd;

/// How long a holder waits for a vCPU before it names it as unresponsive.
const PARK_TIMEOUT: Duration = Duration::from_secs(2);
/// After this long without an answer the kick is sent again.
const KICK_AGAIN: Duration = Duration::from_millis(20);

/// A vCPU that did not leave the guest in time.
#[derive(Debug, thiserror::Error)]
#[error("vcpu{index} did not stop within {} ms; it was kicked {kicks} times", PARK_TIMEOUT.as_millis())]
pub struct KickError {
    /// Which one.
    pub index: u32,
    /// How often it was kicked.
    pub kicks: u32,
}

/// What a gate has seen so far.
#[derive(Clone, Copy, Debug, Default)]
pub struct VcpuStats {
    /// Time in which the vCPU could not run because it was held.
    pub stall: Duration,
    /// How often it was stopped.
    pub stops: u64,
}

#[derive(Debug, Default)]
struct State {
    holds: u32,
    /// The thread waits at the gate, or will never run again: either way it is not in the guest.
    parked: bool,
    finished: bool,
    thread: Option<libc::pthread_t>,
    stats: VcpuStats,
}

/// The gate of one vCPU.
#[derive(Debug)]
pub struct Gate {
    index: u32,
    immediate_exit: ImmediateExit,
    state: Mutex<State>,
    changed: Condvar,
    /// Owns the kvm_run page that `immediate_exit` is in. Locked by the thread while it is in the guest.
    fd: Mutex<VcpuFd>,
}

/// Whether a vCPU thread may go on.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum GateAnswer {
    /// Into the guest.
    Enter,
    /// No more: the guest is over.
    Finished,
}

impl Gate {
    /// A gate for vCPU `index`, whose thread starts parked behind one hold.
    pub fn new(index: u32, mut vcpu: VcpuFd) -> Self {
        Self {
            index,
            immediate_exit: ImmediateExit::of(&mut vcpu),
            fd: Mutex::new(vcpu),
            state: Mutex::new(State {
                holds: 1,
                parked: true,
                ..State::default()
            }),
            changed: Condvar::new(),
        }
    }

    /// The vCPU itself. Blocks while it is in the guest: hold it and wait until it is parked first.
    pub fn fd(&self) -> MutexGuard<'_, VcpuFd> {
        self.fd.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// First pass: from now on the vCPU leaves the guest and stays out. Does not wait.
    pub fn hold(&self) {
        let mut state = self.lock();
        state.holds += 1;
        self.kick(&state);
    }

    /// Second pass: waits until the vCPU is out of the guest.
    ///
    /// # Errors
    /// It did not answer to repeated kicks within two seconds. The hold stays.
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

    /// Takes one hold back; with the last one gone the vCPU runs again.
    pub fn release(&self) {
        let mut state = self.lock();
        state.holds = state.holds.saturating_sub(1);
        if state.holds == 0 {
            self.changed.notify_all();
        }
    }

    /// The guest is over: the vCPU leaves it for good, whatever holds there are.
    pub fn finish(&self) {
        let mut state = self.lock();
        state.finished = true;
        self.kick(&state);
        self.changed.notify_all();
    }

    /// What happened at this gate so far.
    pub fn stats(&self) -> VcpuStats {
        self.lock().stats
    }

    /// Called with the vCPU's thread before it is let through the first time.
    pub(super) fn attach(&self, thread: &JoinHandle<()>) {
        self.lock().thread = Some(thread.as_pthread_t());
    }

    /// Called by the vCPU thread, outside of the guest: waits while there are holds.
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

    /// Called by the vCPU thread when it ends: nobody need wait for it any more.
    pub(super) fn leave(&self) {
        let mut state = self.lock();
        state.finished = true;
        state.parked = true;
        state.thread = None;
        self.changed.notify_all();
    }

    fn kick(&self, state: &State) {
        self.immediate_exit.set(1);
        if let (Some(thread), false) = (state.thread, state.parked) {
            // SAFETY: the thread takes its id out of `state` under the lock before it ends, and its
            // handle is joined later still: the id is that of a live thread.
            let result = unsafe { libc::pthread_kill(thread, super::thread::kick_signal()) };
            debug_assert_eq!(result, 0, "a valid signal to a live thread");
        }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        // The state is plain values, each valid by itself.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Notifier ranges hold the vCPU whatever part of memory they cover: a vCPU that is out of the guest
/// uses no translation at all.
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

/// The byte `immediate_exit` of a kvm_run page.
#[derive(Debug)]
struct ImmediateExit(*mut u8);

// SAFETY: it is only used as an atomic byte, and the page it is in outlives it: the `Gate` that has it
// also has the `VcpuFd` that owns the page.
unsafe impl Send for ImmediateExit {}
// SAFETY: as above; all access is atomic.
unsafe impl Sync for ImmediateExit {}

impl ImmediateExit {
    fn of(vcpu: &mut VcpuFd) -> Self {
        Self(&raw mut vcpu.get_kvm_run().immediate_exit)
    }

    fn set(&self, value: u8) {
        // SAFETY: the pointer is to a live byte (see `Send`), aligned as every byte is. The kernel
        // reads it once when KVM_RUN begins; kvm-ioctls never touches it.
        unsafe { AtomicU8::from_ptr(self.0) }.store(value, Ordering::SeqCst);
    }
}
