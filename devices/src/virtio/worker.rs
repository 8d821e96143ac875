//! Worker thread of a device: an event loop over the queues' notifications and the device's own descriptors.
//!
//! A panic in the device model is caught where the thread ends. The device then needs a reset, and
//! [`QueueServer::on_failure`] reports the panic.

use std::io;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::{Builder, JoinHandle};

use event_manager::{
    EventManager, EventOps, EventSet, Events, MutEventSubscriber, SubscriberId, SubscriberOps,
};
use vm_memory::GuestAddressSpace;
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use super::active_queues::ActiveQueues;
use super::device::{Device, DeviceError, DeviceEvent, EventRegistry, WAKE, source};
use super::eventfd::drain;
use super::interrupt::Interrupt;
use super::panic;
use super::queue::{QueueError, QueueSnapshot};
use super::queue_server::{OnFailure, QueueServer};
use super::state::DeviceState;
use super::worker_state::{WorkerShared, WorkerTask};

/// Device model, shared by the worker thread and the handle of the worker.
type DeviceHandle<M> = Arc<Mutex<Box<dyn Device<M>>>>;

/// Handle of a device's worker thread. Dropping it ends the thread and joins it.
pub(super) struct Worker<M: GuestAddressSpace> {
    device: DeviceHandle<M>,
    shared: Arc<WorkerShared<M>>,
    thread: Option<JoinHandle<()>>,
}

impl<M: GuestAddressSpace + Send + Sync + 'static> Worker<M> {
    /// Starts a thread named `name` that waits until a driver sets DRIVER_OK.
    ///
    /// # Errors
    /// Returns the kernel's error if a descriptor or the thread cannot be created.
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
        let shared = Arc::new(WorkerShared::new(interrupt, notifiers, wake, memory));
        let device = Arc::new(Mutex::new(device));
        let mut manager = EventManager::new().map_err(io::Error::other)?;
        let id = manager.add_subscriber(EventDispatcher {
            device: Arc::clone(&device),
            shared: Arc::clone(&shared),
            finished: false,
        });
        let mut ops = manager.event_ops(id).map_err(io::Error::other)?;
        register(shared.wake_event(), WAKE, &mut ops)?;
        for (index, notifier) in (0..).zip(&shared.notifiers) {
            register(notifier, index, &mut ops)?;
        }
        lock(&device).register(&mut EventRegistry { ops: &mut ops })?;
        let thread = {
            let shared = Arc::clone(&shared);
            Builder::new().name(name.into()).spawn(move || {
                let why = match panic::catch(|| run(&mut manager, id)) {
                    Ok(why) => why.to_string(),
                    Err(message) => format!("the device's worker thread panicked: {message}"),
                };
                shared.lose(why);
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
            // The thread panics only if the callback of `on_failure` does, and then the panic hook has reported it.
            let _panicked = thread.join();
        }
    }
}

impl<M: GuestAddressSpace + Send + Sync> QueueServer for Worker<M> {
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

    fn save(&self) -> Result<DeviceState, String> {
        // A device model that panicked in the worker may panic again.
        panic::catch(|| lock(&self.device).save())
    }

    fn fail(&self, error: &QueueError) {
        self.shared.fail(error);
    }

    fn failure(&self) -> Option<String> {
        self.shared.failure()
    }

    fn on_failure(&self, tell: OnFailure) {
        self.shared.on_failure(tell);
    }
}

fn register(event: &EventFd, data: u32, ops: &mut EventOps<'_>) -> io::Result<()> {
    ops.add(Events::with_data(event, data, EventSet::IN))
        .map_err(io::Error::other)
}

/// Runs the event loop until the worker is told to end or epoll fails. Returns why the thread ends.
fn run<M: GuestAddressSpace>(
    manager: &mut EventManager<EventDispatcher<M>>,
    id: SubscriberId,
) -> &'static str {
    while manager.run().is_ok() {
        let finished = manager
            .subscriber_mut(id)
            .map(|dispatcher| dispatcher.finished);
        if finished.unwrap_or(true) {
            return "the device's worker thread was told to end";
        }
    }
    "the device's worker thread ended: epoll failed"
}

fn lock<M: GuestAddressSpace>(device: &DeviceHandle<M>) -> MutexGuard<'_, Box<dyn Device<M>>> {
    device.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Passes each event of the loop to the device model, unless the device is paused or reset.
struct EventDispatcher<M: GuestAddressSpace> {
    device: DeviceHandle<M>,
    shared: Arc<WorkerShared<M>>,
    finished: bool,
}

impl<M: GuestAddressSpace> EventDispatcher<M> {
    /// Calls the method of the device model for an event.
    fn dispatch(
        &self,
        source: &DeviceEvent,
        events: EventSet,
        queues: ActiveQueues<'_, M>,
        registry: &mut EventRegistry<'_, '_>,
    ) -> Result<(), DeviceError> {
        let mut device = lock(&self.device);
        match *source {
            DeviceEvent::Queue(index) if !queues.is_ready(index) => Ok(()),
            DeviceEvent::Queue(index) => device.notified(index, queues, registry),
            DeviceEvent::Wake => device.started(queues, registry),
            DeviceEvent::Device(token) => device.ready(token, events, queues, registry),
        }
    }
}

impl<M: GuestAddressSpace> MutEventSubscriber for EventDispatcher<M> {
    fn process(&mut self, events: Events, ops: &mut EventOps<'_>) {
        let source = source(events.data());
        match source {
            DeviceEvent::Queue(index) => {
                if let Some(notifier) = self.shared.notifiers.get(index) {
                    drain(notifier);
                }
            }
            DeviceEvent::Wake => self.shared.drain_wake(),
            DeviceEvent::Device(_) => {}
        }
        let mut registry = EventRegistry { ops };
        loop {
            match self.shared.next_task() {
                WorkerTask::Finish => {
                    self.finished = true;
                    return;
                }
                WorkerTask::Reset => {
                    lock(&self.device).reset(&mut registry);
                    self.shared.reset_done();
                }
                WorkerTask::Serve(queues) => {
                    let generation = queues.generation();
                    let result = self.dispatch(&source, events.event_set(), queues, &mut registry);
                    self.shared.task_done(generation, result.as_ref().err());
                    return;
                }
            }
        }
    }

    /// Registers nothing: [`Worker::spawn`] has registered all descriptors, because it can return an error.
    fn init(&mut self, _: &mut EventOps<'_>) {}
}
