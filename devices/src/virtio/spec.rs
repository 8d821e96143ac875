//! Constants of the virtio specification, version 1.2, that all devices share. Section numbers refer to it.
//!
//! Constants of one device type are in `virtio-bindings`, or in the module of the device.

use virtio_bindings::virtio_config::VIRTIO_F_VERSION_1;
use virtio_bindings::virtio_ring::{VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC};

/// Size of a device's MMIO range in bytes: registers and 256 bytes of configuration space, in a page of its own.
pub const MMIO_BYTES: u64 = 0x1000;
/// Offset of `QueueNotify`, to which the monitor attaches an ioeventfd for each queue (4.2.2).
pub const QUEUE_NOTIFY: u64 = 0x050;

/// Register offsets in bytes (4.2.2, table 4.1).
pub(super) mod register {
    pub(crate) use super::QUEUE_NOTIFY;
    pub(crate) const MAGIC_VALUE: u64 = 0x000;
    pub(crate) const VERSION: u64 = 0x004;
    pub(crate) const DEVICE_ID: u64 = 0x008;
    pub(crate) const VENDOR_ID: u64 = 0x00c;
    pub(crate) const DEVICE_FEATURES: u64 = 0x010;
    pub(crate) const DEVICE_FEATURES_SEL: u64 = 0x014;
    pub(crate) const DRIVER_FEATURES: u64 = 0x020;
    pub(crate) const DRIVER_FEATURES_SEL: u64 = 0x024;
    pub(crate) const QUEUE_SEL: u64 = 0x030;
    pub(crate) const QUEUE_NUM_MAX: u64 = 0x034;
    pub(crate) const QUEUE_NUM: u64 = 0x038;
    pub(crate) const QUEUE_READY: u64 = 0x044;
    pub(crate) const INTERRUPT_STATUS: u64 = 0x060;
    pub(crate) const INTERRUPT_ACK: u64 = 0x064;
    pub(crate) const STATUS: u64 = 0x070;
    pub(crate) const QUEUE_DESC_LOW: u64 = 0x080;
    pub(crate) const QUEUE_DESC_HIGH: u64 = 0x084;
    pub(crate) const QUEUE_DRIVER_LOW: u64 = 0x090;
    pub(crate) const QUEUE_DRIVER_HIGH: u64 = 0x094;
    pub(crate) const QUEUE_DEVICE_LOW: u64 = 0x0a0;
    pub(crate) const QUEUE_DEVICE_HIGH: u64 = 0x0a4;
    pub(crate) const SHM_LEN_LOW: u64 = 0x0b0;
    pub(crate) const SHM_BASE_HIGH: u64 = 0x0bc;
    pub(crate) const CONFIG_GENERATION: u64 = 0x0fc;
    pub(crate) const CONFIG: u64 = 0x100;
}

/// Value of `MagicValue`: "virt" (4.2.2).
pub(super) const MAGIC: u32 = 0x7472_6976;
/// Value of `Version` for a device that is not a legacy device (4.2.2).
pub(super) const VERSION: u32 = 2;
/// Value of `VendorID`, which the device may choose: "FRRY".
pub(super) const VENDOR: u32 = u32::from_le_bytes(*b"FRRY");

/// Bits of the device status field (2.1).
pub(super) mod status {
    pub(crate) const ACKNOWLEDGE: u32 = 1;
    pub(crate) const DRIVER: u32 = 2;
    pub(crate) const DRIVER_OK: u32 = 4;
    pub(crate) const FEATURES_OK: u32 = 8;
    pub(crate) const DEVICE_NEEDS_RESET: u32 = 64;
    pub(crate) const FAILED: u32 = 128;
}

/// Bits of `InterruptStatus` (4.2.2).
pub(super) mod interrupt {
    /// The device has used a buffer.
    pub(crate) const USED_BUFFER: u32 = 1;
    /// The configuration space has changed, or the device needs a reset.
    pub(crate) const CONFIGURATION_CHANGE: u32 = 2;
}

/// Feature bits that every device offers (6): no legacy interface, indirect descriptors, event index.
pub(super) const COMMON_FEATURES: u64 =
    (1 << VIRTIO_F_VERSION_1) | (1 << VIRTIO_RING_F_INDIRECT_DESC) | (1 << VIRTIO_RING_F_EVENT_IDX);

/// `VIRTQ_AVAIL_F_NO_INTERRUPT` (2.7.6).
pub(super) const AVAIL_NO_INTERRUPT: u16 = 1;

/// Bytes of the available ring before its entries: flags and index (2.7.6).
pub(super) const AVAIL_HEADER_BYTES: u64 = 4;
/// Bytes of the used ring before its entries: flags and index (2.7.8).
pub(super) const USED_HEADER_BYTES: u64 = 4;
/// Bytes of an entry of the used ring (2.7.8).
pub(super) const USED_BYTES: u64 = 8;

/// Maximum number of descriptors of a chain, direct or indirect. A driver must not create a chain longer than its queue
/// (2.7.5.3.1), and no queue here has more entries than this.
pub(super) const CHAIN_LIMIT: usize = 1024;
