//! State shared by a device's transport, which runs on vCPU threads, and its worker thread.

use std::sync::{Condvar, Mutex, MutexGuard, OnceLock, PoisonError};

use vm_memory::GuestAddressSpace;
use vmm_sys_util::eventfd::EventFd;

use super::active_queues::ActiveQueues;
use super::device::DeviceError;
use super::eventfd::{drain, notify};
use super::interrupt::Interrupt;
use super::queue::{QueueError, QueueSnapshot, VirtQueue, in_use};
use super::queue_server::OnFailure;

/// State shared by the transport and the worker thread of one device.
pub(super) struct WorkerShared<M> {
    pub(super) interrupt: Interrupt,
    /// Notifications of the driver, one eventfd for each queue.
    pub(super) notifiers: Vec<EventFd>,
    pub(super) memory: M,
    state: Mutex<WorkerState>,
    /// Signalled when `state` changes.
    changed: Condvar,
    /// Wakes the worker's event loop so that it looks at `state`.
    wake: EventFd,
    on_failure: OnceLock<OnFailure>,
}

/// State of the worker that changes, behind a lock.
pub(super) struct WorkerState {
    pub(super) queues: Vec<VirtQueue>,
    /// Feature bits that the driver accepted.
    pub(super) features: u64,
    /// The driver has set DRIVER_OK, and the device has not failed since.
    pub(super) active: bool,
    /// Number of resets by the driver.
    pub(super) generation: u64,
    /// The driver has reset the device, and the device model does not know yet.
    reset_pending: bool,
    paused: bool,
    /// The worker thread ends or has ended.
    finished: bool,
    /// The worker is handling an event.
    busy: bool,
    /// Why the device needs a reset.
    failure: Option<String>,
    /// Why the worker thread ended, unless the transport ended it.
    lost: Option<String>,
    /// `on_failure` has been called.
    told: bool,
}

/// What the worker thread does next.
pub(super) enum WorkerTask<'a, M: GuestAddressSpace> {
    /// Handle the event, with access to the queues.
    Serve(ActiveQueues<'a, M>),
    /// Reset the device model, then call [`WorkerShared::reset_done`].
    Reset,
    /// End the thread.
    Finish,
}

impl<M: GuestAddressSpace> WorkerShared<M> {
    pub(super) fn new(
        interrupt: Interrupt,
        notifiers: Vec<EventFd>,
        wake: EventFd,
        memory: M,
    ) -> Self {
        Self {
            interrupt,
            notifiers,
            memory,
            state: Mutex::new(WorkerState {
                queues: Vec::new(),
                features: 0,
                active: false,
                generation: 0,
                reset_pending: false,
                paused: false,
                finished: false,
                busy: false,
                failure: None,
                lost: None,
                told: false,
            }),
            changed: Condvar::new(),
            wake,
            on_failure: OnceLock::new(),
        }
    }

    /// Blocks the worker until it has something to do.
    pub(super) fn next_task(&self) -> WorkerTask<'_, M> {
        let mut state = self.lock();
        loop {
            if state.finished {
                return WorkerTask::Finish;
            }
            if state.reset_pending {
                return WorkerTask::Reset;
            }
            if state.active && !state.paused {
                state.busy = true;
                return WorkerTask::Serve(ActiveQueues::new(self, state));
            }
            state = self.wait(state);
        }
    }

    /// Ends the handling of an event. If it failed with `error` and the driver has not reset the device since
    /// `generation`, the device needs a reset.
    pub(super) fn task_done(&self, generation: u64, error: Option<&DeviceError>) {
        let mut state = self.lock();
        state.busy = false;
        if let Some(error) = error
            && !matches!(error, DeviceError::Reset)
            && state.generation == generation
        {
            state.active = false;
            state.failure = Some(error.to_string());
            self.interrupt.needs_reset();
        }
        self.changed.notify_all();
    }

    /// Reports that the device model has been reset.
    pub(super) fn reset_done(&self) {
        self.lock().reset_pending = false;
        self.changed.notify_all();
    }

    /// Hands the queues of a driver that has set DRIVER_OK to the worker.
    ///
    /// # Errors
    /// Returns [`QueueError`] if a queue is misaligned or not in guest memory.
    pub(super) fn activate(
        &self,
        snapshots: &[QueueSnapshot],
        features: u64,
    ) -> Result<(), QueueError> {
        let memory = self.memory.memory();
        let queues = in_use(snapshots, features, &*memory)?;
        let mut state = self.lock();
        state.queues = queues;
        state.features = features;
        state.active = !state.finished;
        if state.finished {
            state.failure = state.lost.clone();
            self.interrupt.needs_reset();
        }
        drop(state);
        self.wake_all();
        Ok(())
    }

    /// Sets DEVICE_NEEDS_RESET because the driver set DRIVER_OK with invalid queues.
    pub(super) fn fail(&self, error: &QueueError) {
        self.lock().failure = Some(error.to_string());
        self.interrupt.needs_reset();
    }

    /// Resets the device. When this returns, the worker does not access the driver's memory any more.
    pub(super) fn reset(&self) {
        let mut state = self.lock();
        state.queues.clear();
        state.active = false;
        state.generation += 1;
        state.reset_pending = true;
        state.failure = None;
        self.interrupt.reset();
        drop(state);
        self.wake();
    }

    /// Stops one queue because the driver wrote 0 to its `QueueReady`.
    pub(super) fn stop_queue(&self, index: usize) {
        if let Some(queue) = self.lock().queues.get_mut(index) {
            queue.stop();
        }
    }

    /// Stops the worker between two events, and waits until it has stopped.
    pub(super) fn pause(&self) {
        let mut state = self.lock();
        state.paused = true;
        while (state.busy || state.reset_pending) && !state.finished {
            state = self.wait(state);
        }
    }

    /// Lets the worker handle events again, and raises the interrupt for causes that the driver has not acknowledged.
    pub(super) fn resume(&self) {
        self.lock().paused = false;
        self.interrupt.raise_pending();
        self.wake_all();
    }

    pub(super) fn is_paused(&self) -> bool {
        self.lock().paused
    }

    /// Asks the worker thread to end.
    pub(super) fn finish(&self) {
        self.lock().finished = true;
        self.wake();
    }

    /// Records that the worker thread ended by itself, for the reason `why`: the device needs a reset, and the callback
    /// is told. Has no effect if the transport asked the thread to end.
    pub(super) fn lose(&self, why: String) {
        let mut state = self.lock();
        if state.finished {
            return;
        }
        state.finished = true;
        state.busy = false;
        state.active = false;
        state.failure = Some(why.clone());
        state.lost = Some(why);
        self.interrupt.needs_reset();
        self.changed.notify_all();
        self.tell(state);
    }

    /// Registers the callback for the loss of the worker thread, and calls it if the thread is lost already. Only the
    /// first call registers.
    pub(super) fn on_failure(&self, tell: OnFailure) {
        self.on_failure.get_or_init(|| tell);
        self.tell(self.lock());
    }

    /// Calls the callback if there is one, the worker thread is lost, and this was not told before.
    fn tell(&self, mut state: MutexGuard<'_, WorkerState>) {
        let (Some(tell), Some(why), false) =
            (self.on_failure.get(), state.lost.clone(), state.told)
        else {
            return;
        };
        state.told = true;
        // The callback may use the device.
        drop(state);
        tell(&why);
    }

    /// Returns the state of the queues, or nothing before DRIVER_OK.
    pub(super) fn save_queues(&self) -> Vec<QueueSnapshot> {
        self.lock().queues.iter().map(VirtQueue::save).collect()
    }

    pub(super) fn failure(&self) -> Option<String> {
        self.lock().failure.clone()
    }

    /// Returns the event that wakes the worker, for registration in its event loop.
    pub(super) fn wake_event(&self) -> &EventFd {
        &self.wake
    }

    /// Clears the event that wakes the worker.
    pub(super) fn drain_wake(&self) {
        drain(&self.wake);
    }

    fn wake(&self) {
        self.changed.notify_all();
        notify(&self.wake);
    }

    /// Wakes the worker, and has it look at every queue: the driver may have made chains available while nobody served
    /// them.
    fn wake_all(&self) {
        self.wake();
        self.notifiers.iter().for_each(notify);
    }

    pub(super) fn lock(&self) -> MutexGuard<'_, WorkerState> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn wait<'a>(&self, state: MutexGuard<'a, WorkerState>) -> MutexGuard<'a, WorkerState> {
        self.changed
            .wait(state)
            .unwrap_or_else(PoisonError::into_inner)
    }
}
