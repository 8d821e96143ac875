//! Constants of vhost-user (docs/interop/vhost-user.rst of QEMU), and of the block device that the back end offers
//! (virtio 1.2, 5.2).

use std::time::Duration;

use vhost::vhost_user::{VhostUserProtocolFeatures, VhostUserVirtioFeatures};
use virtio_bindings::{virtio_blk, virtio_config, virtio_ring};

/// Time limit for each exchange with the back end.
pub(super) const REPLY_LIMIT: Duration = Duration::from_secs(5);
/// Time limit for the requests in flight when the back end is stopped.
pub(super) const DRAIN_LIMIT: Duration = Duration::from_secs(10);

/// Number of entries of the only queue.
pub(super) const QUEUE_SIZE: u16 = 256;
/// Size of the part of the configuration space that is read: up to `write_zeroes_may_unmap` and its padding (virtio
/// 1.2, 5.2.4).
pub(super) const CONFIG_BYTES: usize = 60;
/// Offset of `writeback` in the configuration space.
pub(super) const WRITE_BACK: usize = 32;

/// VHOST_F_LOG_ALL: the back end logs all of its writes.
pub(super) const LOG_ALL: u64 = VhostUserVirtioFeatures::LOG_ALL.bits();
/// VHOST_USER_F_PROTOCOL_FEATURES. The back end's configuration space depends on it.
pub(super) const PROTOCOL: u64 = VhostUserVirtioFeatures::PROTOCOL_FEATURES.bits();
/// VIRTIO_F_VERSION_1, which the driver has to accept.
pub(super) const VERSION_1: u64 = 1 << virtio_config::VIRTIO_F_VERSION_1;
/// VIRTIO_BLK_F_CONFIG_WCE: the driver may write `writeback`.
pub(super) const CONFIG_WRITE_BACK: u64 = 1 << virtio_blk::VIRTIO_BLK_F_CONFIG_WCE;

/// Returns the protocol features that the front end uses if the back end offers them.
pub(super) fn wanted_protocol() -> VhostUserProtocolFeatures {
    VhostUserProtocolFeatures::CONFIG
        | VhostUserProtocolFeatures::REPLY_ACK
        | VhostUserProtocolFeatures::LOG_SHMFD
}

/// Features that are offered to the driver if the back end offers them: those of the block device whose fields are
/// within [`CONFIG_BYTES`] and that need only one queue (virtio 1.2, 5.2.3), and those of the ring that notification by
/// eventfd supports (6).
pub(super) const OFFERED_TO_DRIVER: u64 = VERSION_1
    | 1 << virtio_ring::VIRTIO_RING_F_INDIRECT_DESC
    | 1 << virtio_ring::VIRTIO_RING_F_EVENT_IDX
    | 1 << virtio_blk::VIRTIO_BLK_F_SIZE_MAX
    | 1 << virtio_blk::VIRTIO_BLK_F_SEG_MAX
    | 1 << virtio_blk::VIRTIO_BLK_F_GEOMETRY
    | 1 << virtio_blk::VIRTIO_BLK_F_RO
    | 1 << virtio_blk::VIRTIO_BLK_F_BLK_SIZE
    | 1 << virtio_blk::VIRTIO_BLK_F_FLUSH
    | 1 << virtio_blk::VIRTIO_BLK_F_TOPOLOGY
    | CONFIG_WRITE_BACK
    | 1 << virtio_blk::VIRTIO_BLK_F_DISCARD
    | 1 << virtio_blk::VIRTIO_BLK_F_WRITE_ZEROES;

/// VHOST_USER_SET_LOG_BASE, and flags of a message: the protocol version, its mask, and the mark of a reply.
pub(super) const SET_LOG_BASE: u32 = 6;
pub(super) const VERSION: u32 = 1;
pub(super) const VERSION_MASK: u32 = 3;
pub(super) const REPLY: u32 = 4;
/// Maximum size of a message, which is the size of the buffers of QEMU and DPDK.
pub(super) const MESSAGE_BYTES_MAX: u32 = 4096;
