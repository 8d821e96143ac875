//! The state of virtio devices, as it is saved and travels.

use serde::{Deserialize, Serialize};

use super::balloon::BalloonSnapshot;
use super::block::BlockSnapshot;
use super::console::ConsoleSnapshot;
use super::net::NetSnapshot;
use super::queue::QueueSnapshot;
use super::vhost_user::VhostUserSnapshot;
use super::vsock::VsockSnapshot;

/// The state of a device: its registers, its queues, and what only its kind has.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct VirtioSnapshot {
    /// Registers and queues.
    pub transport: TransportSnapshot,
    /// The device behind them.
    pub device: DeviceSnapshot,
}

/// The registers of virtio-mmio (4.2.2) and the queues.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct TransportSnapshot {
    /// `DeviceID`, so that a state is not given to another kind of device.
    pub device_type: u32,
    /// `Status`, without DEVICE_NEEDS_RESET.
    pub status: u32,
    /// DEVICE_NEEDS_RESET.
    pub needs_reset: bool,
    /// The feature bits that the device offered.
    pub device_features: u64,
    /// `DeviceFeaturesSel`.
    pub device_features_select: u32,
    /// The feature bits that the driver chose.
    pub driver_features: u64,
    /// `DriverFeaturesSel`.
    pub driver_features_select: u32,
    /// `QueueSel`.
    pub queue_select: u32,
    /// `InterruptStatus`.
    pub interrupt_status: u32,
    /// `ConfigGeneration`.
    pub config_generation: u32,
    /// The queues, in order.
    pub queues: Vec<QueueSnapshot>,
}

/// What only one kind of device has.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum DeviceSnapshot {
    /// A balloon.
    Balloon(BalloonSnapshot),
    /// A block device.
    Block(BlockSnapshot),
    /// A console.
    Console(ConsoleSnapshot),
    /// A network device.
    Net(NetSnapshot),
    /// An entropy device: it remembers nothing.
    Entropy,
    /// A socket device.
    Vsock(VsockSnapshot),
    /// A block device whose queues a vhost-user back end serves.
    VhostUserBlock(VhostUserSnapshot),
    /// A device of the unit tests.
    #[cfg(test)]
    Test(u32),
}
