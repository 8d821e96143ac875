//! Constants of vhost-user (QEMU's docs/interop/vhost-user.rst), and of the block device behind it (virtio 1.2, 5.2).

use std::time::Duration;

use vhost::vhost_user::{VhostUserProtocolFeatures, VhostUserVirtioFeatures};
use virtio_bindings::{virtio_blk, virtio_config, virtio_ring};

/// How long the back end may take for one exchange, or one step of several.
pub(super) const REPLY_LIMIT: Duration = Duration::from_secs(5);
/// How long the requests that it has may take to end when it is stopped.
pub(super) const DRAIN_LIMIT: Duration = Duration::from_secs(10);

/// Its entries, of the one queue.
pub(super) const QUEUE_SIZE: u16 = 256;
/// Bytes of the configuration space that are asked for: up to `write_zeroes_may_unmap` and its padding (5.2.4).
pub(super) const CONFIG_BYTES: usize = 60;
/// Offset of `writeback` in it.
pub(super) const WRITE_BACK: usize = 32;

/// VHOST_F_LOG_ALL: everything that the back end writes is logged.
pub(super) const LOG_ALL: u64 = VhostUserVirtioFeatures::LOG_ALL.bits();
/// VHOST_USER_F_PROTOCOL_FEATURES, without which there is no configuration space.
pub(super) const PROTOCOL: u64 = VhostUserVirtioFeatures::PROTOCOL_FEATURES.bits();
/// VIRTIO_F_VERSION_1, which the driver is asked for.
pub(super) const VERSION_1: u64 = 1 << virtio_config::VIRTIO_F_VERSION_1;
/// VIRTIO_BLK_F_CONFIG_WCE: the driver may write `writeback`.
pub(super) const CONFIG_WRITE_BACK: u64 = 1 << virtio_blk::VIRTIO_BLK_F_CONFIG_WCE;

/// The protocol features that are used where they are offered.
pub(super) fn wanted_protocol() -> VhostUserProtocolFeatures {
    VhostUserProtocolFeatures::CONFIG
        | VhostUserProtocolFeatures::REPLY_ACK
        | VhostUserProtocolFeatures::LOG_SHMFD
}

/// The features that the driver is offered if the back end has them: those whose fields are among
/// [`CONFIG_BYTES`] and which need one queue (5.2.3), and of the ring what the notifications' way has (6).
pub(super) const PASSED_ON: u64 = VERSION_1
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

/// VHOST_USER_SET_LOG_BASE, and the flags of a message: version 1, and the mark of a reply.
pub(super) const SET_LOG_BASE: u32 = 6;
pub(super) const VERSION: u32 = 1;
pub(super) const VERSION_MASK: u32 = 3;
pub(super) const REPLY: u32 = 4;
/// The longest message (the value of QEMU's and of DPDK's buffers).
pub(super) const MESSAGE_BYTES_MAX: u32 = 4096;
