//! Interface between the transport and what serves the queues: a worker thread, or a vhost-user back end.

use vmm_sys_util::eventfd::EventFd;

use super::queue::{QueueError, QueueSnapshot};
use super::state::DeviceState;

/// Callback that is told why the queues of a device are no longer served.
pub(super) type OnFailure = Box<dyn Fn(&str) + Send + Sync>;

/// Server of the queues of one device.
pub(super) trait QueueServer: Send + Sync {
    /// Returns one eventfd for each queue, by index. The driver's notifications arrive on them.
    fn notifiers(&self) -> &[EventFd];

    /// Starts to serve `queues` for a driver that has set DRIVER_OK.
    ///
    /// # Errors
    /// Returns [`QueueError`] if a queue is misaligned or not in guest memory.
    fn activate(&self, queues: &[QueueSnapshot], features: u64) -> Result<(), QueueError>;

    /// Stops serving one queue because the driver wrote 0 to its `QueueReady`.
    fn stop_queue(&self, index: usize);

    /// Resets the device. When this returns, nothing accesses the driver's queues and buffers any more.
    fn reset(&self);

    /// Stops serving, and returns when nothing accesses the queues any more. Idempotent.
    fn pause(&self);

    /// Serves the queues again if there is a driver. Idempotent.
    fn resume(&self);

    /// Returns whether the server is paused.
    fn is_paused(&self) -> bool;

    /// Returns the state of the queues, or nothing before DRIVER_OK. The server must be paused.
    fn queues(&self) -> Vec<QueueSnapshot>;

    /// Returns the state of the device model.
    ///
    /// # Errors
    /// Returns the panic message if the device model panics.
    fn save(&self) -> Result<DeviceState, String>;

    /// Sets DEVICE_NEEDS_RESET because the driver set DRIVER_OK with invalid queues.
    fn fail(&self, error: &QueueError);

    /// Returns why the device needs a reset, if it does.
    fn failure(&self) -> Option<String>;

    /// Registers the callback for the loss of the worker thread or back end. Only the first call has an effect.
    fn on_failure(&self, tell: OnFailure);
}
