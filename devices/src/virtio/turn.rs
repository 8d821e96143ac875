//! A worker's turn at its device: the queues, held against a reset by the driver as long as it lasts.

use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};

use vm_memory::bitmap::BS;
use vm_memory::{GuestAddress, GuestAddressSpace, GuestMemory, Permissions, VolatileSlice};
use vmm_sys_util::eventfd::EventFd;

use super::buffer::Buffer;
use super::device::DeviceError;
use super::interrupt::Interrupt;
use super::queue::{Chain, QueueError, QueueSnapshot, Used, VirtQueue, in_use};

/// The most chains that one wake-up works on; what is left gets another wake-up, so that nobody who wants
/// the worker waits for a driver that never stops.
const CHAINS_A_TURN: u32 = 256;

/// What a device did with a chain.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// It is done; so many bytes of its writable memory were written.
    Done(u32),
    /// It is done, and was given back already.
    Completed,
    /// It cannot be begun now: it goes back, and so do those behind it.
    Later,
}

impl Outcome {
    /// Done, with `written` bytes, which the length of a chain bounds.
    pub(crate) fn done(written: usize) -> Self {
        Self::Done(u32::try_from(written).unwrap_or(u32::MAX))
    }
}

/// What the registers and the worker of a device share.
pub(super) struct Shared<M> {
    pub(super) interrupt: Interrupt,
    /// One for each queue: the driver has notified it.
    pub(super) notifiers: Vec<EventFd>,
    memory: M,
    queues: Mutex<Queues>,
    /// The worker's state changed, or what it waits for did.
    changed: Condvar,
    /// Has the worker look at what changed.
    wake: EventFd,
}

struct Queues {
    queues: Vec<VirtQueue>,
    features: u64,
    /// The driver is ready and the device is not broken.
    active: bool,
    /// How often the driver reset the device.
    generation: u64,
    reset_pending: bool,
    paused: bool,
    finished: bool,
    /// The worker is in a turn.
    busy: bool,
    failure: Option<String>,
}

/// What a worker may do now.
pub(super) enum Pass<'a, M: GuestAddressSpace> {
    /// Serve the driver.
    Serve(Turn<'a, M>),
    /// Let the device forget its driver, then call [`Shared::reset_done`].
    Reset,
    /// End.
    Finish,
}

impl<M: GuestAddressSpace> Shared<M> {
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
            queues: Mutex::new(Queues {
                queues: Vec::new(),
                features: 0,
                active: false,
                generation: 0,
                reset_pending: false,
                paused: false,
                finished: false,
                busy: false,
                failure: None,
            }),
            changed: Condvar::new(),
            wake,
        }
    }

    /// Waits until there is something to do.
    pub(super) fn enter(&self) -> Pass<'_, M> {
        let mut queues = self.lock();
        loop {
            if queues.finished {
                return Pass::Finish;
            }
            if queues.reset_pending {
                return Pass::Reset;
            }
            if queues.active && !queues.paused {
                queues.busy = true;
                return Pass::Serve(Turn {
                    shared: self,
                    queues,
                });
            }
            queues = self.wait(queues);
        }
    }

    /// The worker's turn is over; it failed if there is an `error`.
    pub(super) fn leave(&self, generation: u64, error: Option<&DeviceError>) {
        let mut queues = self.lock();
        queues.busy = false;
        if let Some(error) = error
            && !matches!(error, DeviceError::Reset)
            && queues.generation == generation
        {
            queues.active = false;
            queues.failure = Some(error.to_string());
            self.interrupt.needs_reset();
        }
        self.changed.notify_all();
    }

    pub(super) fn reset_done(&self) {
        self.lock().reset_pending = false;
        self.changed.notify_all();
    }

    /// Gives the worker the queues of a driver that is ready.
    ///
    /// # Errors
    /// Queues that cannot be.
    pub(super) fn activate(
        &self,
        snapshots: &[QueueSnapshot],
        features: u64,
    ) -> Result<(), QueueError> {
        let memory = self.memory.memory();
        let made = in_use(snapshots, features, &*memory)?;
        let mut queues = self.lock();
        if queues.finished {
            queues.failure = Some("the device's thread ended".into());
            self.interrupt.needs_reset();
        }
        queues.queues = made;
        queues.features = features;
        queues.active = true;
        drop(queues);
        self.wake_all();
        Ok(())
    }

    /// A driver that is ready made queues that cannot be.
    pub(super) fn fail(&self, error: &QueueError) {
        self.lock().failure = Some(error.to_string());
        self.interrupt.needs_reset();
    }

    /// The driver resets the device: from now on its worker touches none of the driver's memory.
    pub(super) fn reset(&self) {
        let mut queues = self.lock();
        queues.queues.clear();
        queues.active = false;
        queues.generation += 1;
        queues.reset_pending = true;
        queues.failure = None;
        self.interrupt.reset();
        drop(queues);
        self.wake();
    }

    /// The driver takes one queue back.
    pub(super) fn stop_queue(&self, index: usize) {
        if let Some(queue) = self.lock().queues.get_mut(index) {
            queue.stop();
        }
    }

    /// Stops the worker between two requests, and waits until it stands.
    pub(super) fn pause(&self) {
        let mut queues = self.lock();
        queues.paused = true;
        while (queues.busy || queues.reset_pending) && !queues.finished {
            queues = self.wait(queues);
        }
    }

    pub(super) fn resume(&self) {
        self.lock().paused = false;
        self.interrupt.raise_pending();
        self.wake_all();
    }

    pub(super) fn is_paused(&self) -> bool {
        self.lock().paused
    }

    pub(super) fn finish(&self) {
        self.lock().finished = true;
        self.wake();
    }

    /// The worker ended and will not come back.
    pub(super) fn gone(&self) {
        let mut queues = self.lock();
        if !queues.finished {
            queues.failure = Some("the device's thread ended".into());
            self.interrupt.needs_reset();
        }
        queues.finished = true;
        queues.busy = false;
        queues.active = false;
        self.changed.notify_all();
    }

    /// The queues in use, or none while the driver is not ready.
    pub(super) fn save_queues(&self) -> Vec<QueueSnapshot> {
        self.lock().queues.iter().map(VirtQueue::save).collect()
    }

    pub(super) fn failure(&self) -> Option<String> {
        self.lock().failure.clone()
    }

    /// What [`Self::drain_wake`] drains; it lives as long as this does.
    pub(super) fn wake_event(&self) -> &EventFd {
        &self.wake
    }

    pub(super) fn drain_wake(&self) {
        drain(&self.wake);
    }

    fn wake(&self) {
        self.changed.notify_all();
        notify(&self.wake);
    }

    /// Whatever is waiting in the queues is looked at again.
    fn wake_all(&self) {
        self.wake();
        self.notifiers.iter().for_each(notify);
    }

    fn lock(&self) -> MutexGuard<'_, Queues> {
        self.queues.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn wait<'a>(&self, queues: MutexGuard<'a, Queues>) -> MutexGuard<'a, Queues> {
        self.changed
            .wait(queues)
            .unwrap_or_else(PoisonError::into_inner)
    }
}

/// Writing to an event fails only when its counter is full: then it is notified already.
pub(super) fn notify(event: &EventFd) {
    let _full = event.write(1);
}

/// Reading from a non-blocking event fails only when it was not notified.
pub(super) fn drain(event: &EventFd) {
    let _empty = event.read();
}

/// The queues of a device whose driver is ready.
///
/// As long as it lives the driver's reset waits, so that after a reset nothing of the driver's is touched.
pub struct Turn<'a, M: GuestAddressSpace> {
    shared: &'a Shared<M>,
    queues: MutexGuard<'a, Queues>,
}

impl<'a, M: GuestAddressSpace> Turn<'a, M> {
    pub(super) fn generation(&self) -> u64 {
        self.queues.generation
    }

    /// The feature bits that were agreed on.
    #[must_use]
    pub fn features(&self) -> u64 {
        self.queues.features
    }

    /// Whether the driver set up `queue`.
    #[must_use]
    pub fn is_ready(&self, queue: usize) -> bool {
        self.queues
            .queues
            .get(queue)
            .is_some_and(VirtQueue::is_ready)
    }

    /// Entries of `queue`; 0 if there is no such queue.
    #[must_use]
    pub fn queue_size(&self, queue: usize) -> u16 {
        self.queues.queues.get(queue).map_or(0, VirtQueue::size)
    }

    /// The next chain of `queue`.
    ///
    /// # Errors
    /// What the driver must not do; so for the calls below.
    pub fn pop(&mut self, queue: usize) -> Result<Option<Chain>, QueueError> {
        let memory = &self.shared.memory;
        match self.queues.queues.get_mut(queue) {
            Some(queue) => queue.pop(memory),
            None => Ok(None),
        }
    }

    /// Undoes the last [`Self::pop`].
    pub fn put_back(&mut self, queue: usize) {
        if let Some(queue) = self.queues.queues.get_mut(queue) {
            queue.put_back();
        }
    }

    /// Gives the chain of `head` back, `written` bytes of its writable memory written.
    pub fn complete(&mut self, queue: usize, head: u16, written: u32) -> Result<(), QueueError> {
        let memory = &self.shared.memory;
        match self.queues.queues.get_mut(queue) {
            Some(queue) if queue.is_ready() => queue.complete(memory, head, written),
            _ => Ok(()),
        }
    }

    /// Gives chains back that belong together: the driver sees all of them or none.
    pub fn complete_together(&mut self, queue: usize, used: &[Used]) -> Result<(), QueueError> {
        let memory = &self.shared.memory;
        match self.queues.queues.get_mut(queue) {
            Some(queue) if queue.is_ready() => queue.complete_together(memory, used),
            _ => Ok(()),
        }
    }

    /// Raises the interrupt if the driver wants to know of the buffers used since the last call.
    pub fn signal(&mut self, queue: usize) -> Result<(), QueueError> {
        let memory = &self.shared.memory;
        if let Some(queue) = self.queues.queues.get_mut(queue)
            && queue.is_ready()
            && queue.wants_interrupt(memory)?
        {
            self.shared.interrupt.used_buffer();
        }
        Ok(())
    }

    /// Asks the driver to notify `queue` when it makes more available. True when there is more by now.
    pub fn enable_notification(&mut self, queue: usize) -> Result<bool, QueueError> {
        let memory = &self.shared.memory;
        match self.queues.queues.get_mut(queue) {
            Some(queue) if queue.is_ready() => queue.enable_notification(memory),
            _ => Ok(false),
        }
    }

    /// Has `queue` notified again, as if the driver did.
    pub fn notify_again(&self, queue: usize) {
        if let Some(notifier) = self.shared.notifiers.get(queue) {
            notify(notifier);
        }
    }

    /// Works on the chains of `queue` in order, until there are none, one has to wait, or the turn is
    /// over; then the queue is notified again. The driver is told at the end.
    pub fn drain(
        &mut self,
        queue: usize,
        mut serve: impl FnMut(&mut Self, Chain) -> Result<Outcome, DeviceError>,
    ) -> Result<(), DeviceError> {
        let mut left = CHAINS_A_TURN;
        if let Some(ring) = self.queues.queues.get_mut(queue).filter(|q| q.is_ready()) {
            ring.disable_notification(&self.shared.memory)?;
        }
        loop {
            while let Some(chain) = self.pop(queue)? {
                if left == 0 {
                    self.put_back(queue);
                    self.notify_again(queue);
                    return Ok(self.signal(queue)?);
                }
                left -= 1;
                let head = chain.head;
                match serve(self, chain)? {
                    Outcome::Done(written) => self.complete(queue, head, written)?,
                    Outcome::Completed => {}
                    Outcome::Later => {
                        self.put_back(queue);
                        return Ok(self.signal(queue)?);
                    }
                }
            }
            if !self.enable_notification(queue)? {
                return Ok(self.signal(queue)?);
            }
        }
    }

    /// Whether `bytes` bytes at the guest-physical `address` are memory of the guest.
    #[must_use]
    pub fn has_memory(&self, address: u64, bytes: u64) -> bool {
        let memory = self.shared.memory.memory();
        usize::try_from(bytes)
            .is_ok_and(|bytes| memory.check_range(GuestAddress(address), bytes, Permissions::No))
    }

    /// Reads from the start of `buffer`.
    pub fn read(&self, buffer: &mut Buffer, data: &mut [u8]) -> Result<usize, QueueError> {
        buffer.read(&*self.shared.memory.memory(), data)
    }

    /// Writes to the start of `buffer`.
    pub fn write(&self, buffer: &mut Buffer, data: &[u8]) -> Result<usize, QueueError> {
        buffer.write(&*self.shared.memory.memory(), data)
    }

    /// Calls `each` with the host's view of every piece of `buffer`, until it returns false.
    pub fn each_slice(
        &self,
        buffer: &Buffer,
        access: Permissions,
        each: impl FnMut(VolatileSlice<'_, BS<'_, <M::M as GuestMemory>::Bitmap>>) -> bool,
    ) -> Result<(), QueueError> {
        buffer.each_slice(&*self.shared.memory.memory(), access, each)
    }

    /// Does something that may have to wait for a vCPU, which in turn may be about to reset this device. `work` gets a
    /// way to ask whether that has come about.
    ///
    /// # Errors
    /// [`DeviceError::Reset`] when it did: chains that were taken belong to nobody now.
    pub fn unlocked<T>(
        self,
        work: impl FnOnce(&dyn Fn() -> bool) -> T,
    ) -> Result<(Self, T), DeviceError> {
        let Self { shared, queues } = self;
        let generation = queues.generation;
        drop(queues);
        let result = work(&|| shared.lock().generation != generation);
        let queues = shared.lock();
        if queues.generation != generation || !queues.active {
            return Err(DeviceError::Reset);
        }
        Ok((Self { shared, queues }, result))
    }
}
