//! virtio devices over MMIO (virtio 1.2): one transport for all devices, and a model for each kind of device.
//!
//! A device model implements [`Device`] and handles descriptor chains on a worker thread of its own.
//! [`MmioTransport`] is the guest's side of it: it implements the registers, and pauses, saves and restores any model.
//!
//! ```text
//! vCPU ─ MmioBus ─ MmioTransport ─┐ queues, once the driver has set DRIVER_OK
//!           ioeventfd per queue ──┤
//!                                 ├─ ActiveQueues ─ Device ─ files, taps, sockets      (worker thread)
//! guest memory ─ VirtQueue ───────┘
//! ```
//!
//! [`VhostUser`] replaces the worker thread by another process that serves the queues.
//!
//! If the driver breaks a rule, the device sets DEVICE_NEEDS_RESET and stops until the driver resets it; nothing else
//! is affected. A chain is checked as a whole before a device model sees it, and one wake-up of the worker does a
//! bounded amount of work. If a device model panics, the device also needs a reset, and
//! [`on_failure`](MmioTransport::on_failure) reports it.

mod active_queues;
mod balloon;
mod block;
mod buffer;
mod console;
mod device;
mod eventfd;
mod interrupt;
mod net;
mod panic;
mod queue;
mod queue_server;
mod rng;
mod spec;
mod state;
mod transport;
mod vhost_user;
mod vsock;
mod worker;
mod worker_state;

#[cfg(test)]
mod testing;
#[cfg(test)]
mod tests;

pub use active_queues::{ActiveQueues, Completion};
pub use balloon::{Balloon, BalloonControl, BalloonOptions, BalloonSnapshot, Discard};
pub use block::{Access, Block, BlockOptions, BlockSnapshot};
pub use buffer::Buffer;
pub use console::{Console, ConsoleInput, ConsoleOutput, ConsoleSnapshot};
pub use device::{
    ConfigSpace, Counters, Device, DeviceError, EventRegistry, Identity, Token, read_config,
};
pub use interrupt::Interrupt;
pub use net::{Net, NetOptions, NetSnapshot, Offloads, Tap};
pub use queue::{Chain, QueueError, QueueSnapshot, Used};
pub use rng::{Rng, RngSnapshot};
pub use spec::{MMIO_BYTES, QUEUE_NOTIFY};
pub use state::{DeviceState, DeviceStateError, TransportSnapshot, VirtioSnapshot};
pub use transport::{MmioTransport, VirtioError};
pub use vhost_user::{VhostUser, VhostUserError, VhostUserOptions, VhostUserSnapshot};
pub use vsock::{Vsock, VsockError, VsockOptions, VsockSnapshot};
