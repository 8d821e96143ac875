//! virtio devices on MMIO (virtio 1.2): one transport for all, and a model for each kind.
//!
//! A device is a [`Device`]: it serves chains of descriptors on a worker thread of its own. Between it and
//! the guest stands [`VirtioMmio`], which has the registers, and stops, saves and restores any device.
//!
//! ```text
//! vCPU ─ MmioBus ─ VirtioMmio ─┐ queues, when the driver is ready
//!              eventfd a queue │
//!                              ├─ Turn ─ Device ─ files, taps, sockets      (worker thread)
//! guest memory ─ VirtQueue ────┘
//! ```
//!
//! Instead of a worker, another process can serve the queues: [`VhostUser`].
//!
//! What a driver does wrong ends the device until it is reset (DEVICE_NEEDS_RESET) and nothing else: chains
//! are checked whole before a device sees them, and one wake-up of the worker does bounded work.

mod balloon;
mod block;
mod buffer;
mod console;
mod device;
mod interrupt;
mod net;
mod queue;
mod rng;
mod serve;
mod spec;
mod state;
mod transport;
mod turn;
mod vhost_user;
mod vsock;
mod worker;

#[cfg(test)]
mod testing;
#[cfg(test)]
mod tests;

pub use balloon::{Balloon, BalloonConfig, BalloonControl, BalloonSnapshot, Discard};
pub use block::{Access, Block, BlockConfig, BlockSnapshot};
pub use buffer::Buffer;
pub use console::{Console, ConsoleInput, ConsoleOutput, ConsoleSnapshot};
pub use device::{ConfigSpace, Counters, Device, DeviceError, Identity, Token, Watch, read_config};
pub use interrupt::Interrupt;
pub use net::{Net, NetConfig, NetSnapshot, Offloads, Tap};
pub use queue::{Chain, QueueError, QueueSnapshot};
pub use rng::{Rng, RngSnapshot};
pub use spec::{MMIO_BYTES, QUEUE_NOTIFY};
pub use state::{DeviceState, DeviceStateError, TransportSnapshot, VirtioSnapshot};
pub use transport::{VirtioError, VirtioMmio};
pub use turn::{Outcome, Turn};
pub use vhost_user::{VhostUser, VhostUserConfig, VhostUserError, VhostUserSnapshot};
pub use vsock::{Vsock, VsockConfig, VsockError, VsockSnapshot};
