//! Access of a device model to its queues while the driver cannot reset the device.

use std::sync::MutexGuard;

use vm_memory::bitmap::BS;
use vm_memory::{GuestAddress, GuestAddressSpace, GuestMemory, Permissions, VolatileSlice};

use super::buffer::Buffer;
use super::device::DeviceError;
use super::eventfd::notify;
use super::queue::{Chain, QueueError, Used, VirtQueue};
use super::worker_state::{WorkerShared, WorkerState};

/// Maximum number of chains that one wake-up of the worker handles. The worker then looks at its other events, so that
/// a driver that never stops cannot delay a pause or a reset.
const CHAINS_PER_WAKEUP: u32 = 256;

/// How a device returns a chain to the driver.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Completion {
    /// The chain goes to the used ring, with this number of bytes written to its writable memory.
    Used(u32),
    /// The device has put the chain into the used ring already.
    AlreadyUsed,
    /// The device cannot handle the chain now. This chain and those behind it stay in the available ring.
    Deferred,
}

impl Completion {
    /// Returns [`Self::Used`] for a chain of which the device wrote `written` bytes. A chain is shorter than 4 GiB.
    pub(crate) fn used(written: usize) -> Self {
        Self::Used(u32::try_from(written).unwrap_or(u32::MAX))
    }
}

/// Exclusive access to the queues of a device whose driver has set DRIVER_OK.
///
/// A reset by the driver blocks until this value is dropped, so that the device does not access the driver's memory
/// after the reset.
pub struct ActiveQueues<'a, M: GuestAddressSpace> {
    shared: &'a WorkerShared<M>,
    state: MutexGuard<'a, WorkerState>,
}

impl<'a, M: GuestAddressSpace> ActiveQueues<'a, M> {
    pub(super) fn new(shared: &'a WorkerShared<M>, state: MutexGuard<'a, WorkerState>) -> Self {
        Self { shared, state }
    }

    pub(super) fn generation(&self) -> u64 {
        self.state.generation
    }

    /// Returns the feature bits that the driver accepted.
    #[must_use]
    pub fn features(&self) -> u64 {
        self.state.features
    }

    /// Returns whether the driver has set up `queue`.
    #[must_use]
    pub fn is_ready(&self, queue: usize) -> bool {
        self.state
            .queues
            .get(queue)
            .is_some_and(VirtQueue::is_ready)
    }

    /// Returns the number of entries of `queue`, or 0 if there is no such queue.
    #[must_use]
    pub fn queue_size(&self, queue: usize) -> u16 {
        self.state.queues.get(queue).map_or(0, VirtQueue::size)
    }

    /// Takes the next chain from the available ring of `queue`.
    ///
    /// # Errors
    /// Returns [`QueueError`] if the driver broke a rule of the queue. This holds for all methods below.
    pub fn pop(&mut self, queue: usize) -> Result<Option<Chain>, QueueError> {
        let memory = &self.shared.memory;
        match self.state.queues.get_mut(queue) {
            Some(queue) => queue.pop(memory),
            None => Ok(None),
        }
    }

    /// Undoes the last [`Self::pop`].
    pub fn put_back(&mut self, queue: usize) {
        if let Some(queue) = self.state.queues.get_mut(queue) {
            queue.put_back();
        }
    }

    /// Puts the chain of descriptor `head` into the used ring, with `written` bytes written to its writable memory.
    pub fn complete(&mut self, queue: usize, head: u16, written: u32) -> Result<(), QueueError> {
        let memory = &self.shared.memory;
        match self.state.queues.get_mut(queue) {
            Some(queue) if queue.is_ready() => queue.complete(memory, head, written),
            _ => Ok(()),
        }
    }

    /// Puts several chains into the used ring at once. The driver sees all of them or none.
    pub fn complete_together(&mut self, queue: usize, used: &[Used]) -> Result<(), QueueError> {
        let memory = &self.shared.memory;
        match self.state.queues.get_mut(queue) {
            Some(queue) if queue.is_ready() => queue.complete_together(memory, used),
            _ => Ok(()),
        }
    }

    /// Raises the interrupt if the driver wants one for the chains that were used since the last call.
    pub fn signal(&mut self, queue: usize) -> Result<(), QueueError> {
        let memory = &self.shared.memory;
        if let Some(queue) = self.state.queues.get_mut(queue)
            && queue.is_ready()
            && queue.wants_interrupt(memory)?
        {
            self.shared.interrupt.used_buffer();
        }
        Ok(())
    }

    /// Asks the driver to notify `queue` when it makes chains available. Returns true if there are new chains already.
    pub fn enable_notification(&mut self, queue: usize) -> Result<bool, QueueError> {
        let memory = &self.shared.memory;
        match self.state.queues.get_mut(queue) {
            Some(queue) if queue.is_ready() => queue.enable_notification(memory),
            _ => Ok(false),
        }
    }

    /// Signals the notification of `queue` again, so that the worker comes back to it after its other events.
    pub fn notify_again(&self, queue: usize) {
        if let Some(notifier) = self.shared.notifiers.get(queue) {
            notify(notifier);
        }
    }

    /// Calls `serve` for each available chain of `queue`, in order, until the queue is empty, `serve` defers a chain,
    /// or the limit for one wake-up is reached; in the last case the queue is notified again. Raises the interrupt at
    /// the end if the driver wants one.
    pub fn drain(
        &mut self,
        queue: usize,
        mut serve: impl FnMut(&mut Self, Chain) -> Result<Completion, DeviceError>,
    ) -> Result<(), DeviceError> {
        let mut left = CHAINS_PER_WAKEUP;
        if let Some(ring) = self.state.queues.get_mut(queue).filter(|q| q.is_ready()) {
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
                    Completion::Used(written) => self.complete(queue, head, written)?,
                    Completion::AlreadyUsed => {}
                    Completion::Deferred => {
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

    /// Returns whether `bytes` bytes at the guest-physical `address` are guest memory.
    #[must_use]
    pub fn has_memory(&self, address: u64, bytes: u64) -> bool {
        let memory = self.shared.memory.memory();
        usize::try_from(bytes)
            .is_ok_and(|bytes| memory.check_range(GuestAddress(address), bytes, Permissions::No))
    }

    /// Reads from the start of `buffer`. See [`Buffer::read`].
    pub fn read(&self, buffer: &mut Buffer, data: &mut [u8]) -> Result<usize, QueueError> {
        buffer.read(&*self.shared.memory.memory(), data)
    }

    /// Writes to the start of `buffer`. See [`Buffer::write`].
    pub fn write(&self, buffer: &mut Buffer, data: &[u8]) -> Result<usize, QueueError> {
        buffer.write(&*self.shared.memory.memory(), data)
    }

    /// Calls `each` with the host mapping of every piece of `buffer`, until it returns false. See
    /// [`Buffer::each_slice`].
    pub fn each_slice(
        &self,
        buffer: &Buffer,
        access: Permissions,
        each: impl FnMut(VolatileSlice<'_, BS<'_, <M::M as GuestMemory>::Bitmap>>) -> bool,
    ) -> Result<(), QueueError> {
        buffer.each_slice(&*self.shared.memory.memory(), access, each)
    }

    /// Calls `work` without holding the queues, and takes them again afterwards.
    ///
    /// For work that may wait for a vCPU thread: the vCPU may be about to reset this device, and its reset would wait
    /// for the queues. `work` gets a function that returns whether the driver has reset the device in the meantime.
    ///
    /// # Errors
    /// Returns [`DeviceError::Reset`] if the driver reset the device. Chains that were popped before are then invalid.
    pub fn unlocked<T>(
        self,
        work: impl FnOnce(&dyn Fn() -> bool) -> T,
    ) -> Result<(Self, T), DeviceError> {
        let Self { shared, state } = self;
        let generation = state.generation;
        drop(state);
        let result = work(&|| shared.lock().generation != generation);
        let state = shared.lock();
        if state.generation != generation || !state.active {
            return Err(DeviceError::Reset);
        }
        Ok((Self { shared, state }, result))
    }
}
