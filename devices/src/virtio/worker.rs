//! The thread of a device: an event loop that serves the queues and whatever else the device waits for.

use std::io;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::{Builder, JoinHandle};

use event_manager::{
    EventManager, EventOps, EventSet, Events, MutEventSubscriber, SubscriberId, SubscriberOps,
};
use vm_memory::GuestAddressSpace;
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use super::device::{Device, DeviceError, Subject, WAKE, Watch, subject};
use super::interrupt::Interrupt;
use super::queue::{QueueError, QueueSnapshot};
use super::serve::Serve;
use super::state::DeviceState;
use super::turn::{Pass, Shared, Turn, drain};

type SharedDevice<M> = Arc<Mutex<Box<dyn Device<M>>>>;

/// A device's thread. Dropped, it ends, and is waited for.
pub(super) struct Worker<M: GuestAddressSpace> {
    device: SharedDevice<M>,
    shared: Arc<Shared<M>>,
    thread: Option<JoinHandle<()>>,
}

impl<M: GuestAddressSpace + Send + Sync + 'static> Worker<M> {
    /// Starts the thread `name`, which waits until a driver is ready.
    ///
    /// # Errors
    /// The kernel's: threads and descriptors that cannot be had.
    pub(super) fn spawn(
        name: &str,
        device: Box<dyn Device<M>>,
        queues: usize,
        memory: M,
        interrupt: Interrupt,
    ) -> io::Result<Self> {
        let notifiers = (0..queues)
            .map(|_| EventFd::new(EFD_NONBLOCK))
            .collect::<io::Result<_>>()?;
        let wake = EventFd::new(EFD_NONBLOCK)?;
        let shared = Arc::new(Shared::new(interrupt, notifiers, wake, memory));
        let device = Arc::new(Mutex::new(device));
        let mut manager = EventManager::new().map_err(io::Error::other)?;
        let id = manager.add_subscriber(Turns {
            device: Arc::clone(&device),
            shared: Arc::clone(&shared),
            finished: false,
        });
        let mut ops = manager.event_ops(id).map_err(io::Error::other)?;
        register(shared.wake_event(), WAKE, &mut ops)?;
        for (index, notifier) in (0..).zip(&shared.notifiers) {
            register(notifier, index, &mut ops)?;
        }
        lock(&device).watch(&mut Watch { ops: &mut ops })?;
        let thread = {
            let shared = Arc::clone(&shared);
            Builder::new().name(name.into()).spawn(move || {
                let _gone = Gone(shared);
                run(&mut manager, id);
            })?
        };
        Ok(Self {
            device,
            shared,
            thread: Some(thread),
        })
    }
}

impl<M: GuestAddressSpace> Drop for Worker<M> {
    fn drop(&mut self) {
        self.shared.finish();
        if let Some(thread) = self.thread.take() {
            // A thread that panicked has said so on standard error; there is nobody else to tell.
            let _panicked = thread.join();
        }
    }
}

impl<M: GuestAddressSpace + Send + Sync> Serve for Worker<M> {
    fn notifiers(&self) -> &[EventFd] {
        &self.shared.notifiers
    }

    fn activate(&self, queues: &[QueueSnapshot], features: u64) -> Result<(), QueueError> {
        self.shared.activate(queues, features)
    }

    fn stop_queue(&self, index: usize) {
        self.shared.stop_queue(index);
    }

    fn reset(&self) {
        self.shared.reset();
    }

    fn pause(&self) {
        self.shared.pause();
    }

    fn resume(&self) {
        self.shared.resume();
    }

    fn is_paused(&self) -> bool {
        self.shared.is_paused()
    }

    fn queues(&self) -> Vec<QueueSnapshot> {
        self.shared.save_queues()
    }

    fn save(&self) -> DeviceState {
        lock(&self.device).save()
    }

    fn fail(&self, error: &QueueError) {
        self.shared.fail(error);
    }

    fn failure(&self) -> Option<String> {
        self.shared.failure()
    }
}

/// Nobody waits for a thread that is over, however it ended.
struct Gone<M: GuestAddressSpace>(Arc<Shared<M>>);

impl<M: GuestAddressSpace> Drop for Gone<M> {
    fn drop(&mut self) {
        self.0.gone();
    }
}

fn register(event: &EventFd, data: u32, ops: &mut EventOps<'_>) -> io::Result<()> {
    ops.add(Events::with_data(event, data, EventSet::IN))
        .map_err(io::Error::other)
}

fn run<M: GuestAddressSpace>(manager: &mut EventManager<Turns<M>>, id: SubscriberId) {
    // The loop fails only when epoll itself does, and the subscriber is never removed.
    while manager.run().is_ok()
        && manager
            .subscriber_mut(id)
            .is_ok_and(|turns| !turns.finished)
    {}
}

/// A device whose worker panicked is asked for nothing any more.
fn lock<M: GuestAddressSpace>(device: &SharedDevice<M>) -> MutexGuard<'_, Box<dyn Device<M>>> {
    device.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Takes a turn for each event.
struct Turns<M: GuestAddressSpace> {
    device: SharedDevice<M>,
    shared: Arc<Shared<M>>,
    finished: bool,
}

impl<M: GuestAddressSpace> Turns<M> {
    fn turn(
        &self,
        subject: &Subject,
        events: EventSet,
        turn: Turn<'_, M>,
        watch: &mut Watch<'_, '_>,
    ) -> Result<(), DeviceError> {
        let mut device = lock(&self.device);
        match *subject {
            Subject::Queue(index) if !turn.is_ready(index) => Ok(()),
            Subject::Queue(index) => device.notified(index, turn, watch),
            Subject::Wake => device.started(turn, watch),
            Subject::Device(token) => device.ready(token, events, turn, watch),
        }
    }
}

impl<M: GuestAddressSpace> MutEventSubscriber for Turns<M> {
    fn process(&mut self, events: Events, ops: &mut EventOps<'_>) {
        let subject = subject(events.data());
        match subject {
            Subject::Queue(index) => {
                if let Some(notifier) = self.shared.notifiers.get(index) {
                    drain(notifier);
                }
            }
            Subject::Wake => self.shared.drain_wake(),
            Subject::Device(_) => {}
        }
        let mut watch = Watch { ops };
        loop {
            match self.shared.enter() {
                Pass::Finish => {
                    self.finished = true;
                    return;
                }
                Pass::Reset => {
                    lock(&self.device).reset(&mut watch);
                    self.shared.reset_done();
                }
                Pass::Serve(turn) => {
                    let generation = turn.generation();
                    let result = self.turn(&subject, events.event_set(), turn, &mut watch);
                    self.shared.leave(generation, result.as_ref().err());
                    return;
                }
            }
        }
    }

    /// What is waited for is registered by [`Worker::spawn`], which can say what failed.
    fn init(&mut self, _: &mut EventOps<'_>) {}
}
