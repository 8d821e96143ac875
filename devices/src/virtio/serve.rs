//! What stands behind the registers of a device: its worker thread here, or another process.

use vmm_sys_util::eventfd::EventFd;

use super::queue::{QueueError, QueueSnapshot};
use super::state::DeviceState;

/// Whoever serves the queues of one device.
pub(super) trait Serve: Send + Sync {
    /// One for each queue, by index: an event on it is the driver's notification.
    fn notifiers(&self) -> &[EventFd];

    /// The driver is ready, and these are its queues.
    ///
    /// # Errors
    /// Queues that cannot be.
    fn activate(&self, queues: &[QueueSnapshot], features: u64) -> Result<(), QueueError>;

    /// The driver takes one queue back.
    fn stop_queue(&self, index: usize);

    /// The driver resets the device: when this returns, nothing of the driver's is touched any more.
    fn reset(&self);

    /// Stops serving; returns when nobody touches the queues. Idempotent.
    fn pause(&self);

    /// Goes on serving, if there is a driver. Idempotent.
    fn resume(&self);

    /// Whether it is paused.
    fn is_paused(&self) -> bool;

    /// The queues in use, or none while the driver is not ready. It is paused.
    fn queues(&self) -> Vec<QueueSnapshot>;

    /// The state of what only this kind of device has.
    fn save(&self) -> DeviceState;

    /// A driver that is ready made queues that cannot be.
    fn fail(&self, error: &QueueError);

    /// Why the device needs a reset, if it does.
    fn failure(&self) -> Option<String>;
}
