//! Constants and layouts of the block device (virtio 1.2, 5.2). Section numbers refer to that specification.

use virtio_bindings::virtio_blk;

use super::Access;

/// Size of a sector in bytes, the unit of all positions (5.2.4).
pub(super) const SECTOR_BYTES: u64 = 512;
/// Index of the request queue, which is the only queue (5.2.2), and its number of entries.
pub(super) const REQUESTS: usize = 0;
pub(super) const QUEUE_SIZE: u16 = 256;
/// Maximum number of data descriptors of a request. Header and status take one descriptor each.
pub(super) const SEGMENTS_MAX: u32 = QUEUE_SIZE as u32 - 2;
/// Size of a request's header: type, reserved, sector (5.2.6).
pub(super) const HEADER_BYTES: usize = 16;
/// Size of the device's identification (5.2.6, VIRTIO_BLK_T_GET_ID).
pub(super) const ID_BYTES: usize = virtio_blk::VIRTIO_BLK_ID_BYTES as usize;
/// Size of a range to discard or fill with zeros: sector, sectors, flags (5.2.6).
pub(super) const RANGE_BYTES: usize = 16;
/// Maximum number of ranges of a request, and maximum number of sectors of a range (1 GiB).
pub(super) const RANGES_MAX: u32 = 32;
pub(super) const RANGE_SECTORS_MAX: u32 = 1 << 21;
/// Flag of a range that may be deallocated.
pub(super) const RANGE_UNMAP: u32 = virtio_blk::VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP;

/// VIRTIO_BLK_F_FLUSH: the driver can flush.
pub(super) const FLUSH_FEATURE: u64 = 1 << virtio_blk::VIRTIO_BLK_F_FLUSH;
const READ_ONLY: u64 = 1 << virtio_blk::VIRTIO_BLK_F_RO;
/// Features of every disk.
const ALWAYS: u64 =
    1 << virtio_blk::VIRTIO_BLK_F_SEG_MAX | 1 << virtio_blk::VIRTIO_BLK_F_BLK_SIZE | FLUSH_FEATURE;
/// Features of a writable disk.
const WRITABLE: u64 =
    1 << virtio_blk::VIRTIO_BLK_F_DISCARD | 1 << virtio_blk::VIRTIO_BLK_F_WRITE_ZEROES;

/// Returns the feature bits of a disk (5.2.3).
pub(super) fn features(access: Access) -> u64 {
    match access {
        Access::ReadOnly => ALWAYS | READ_ONLY,
        Access::ReadWrite => ALWAYS | WRITABLE,
    }
}

/// Type of a request (5.2.6).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum RequestType {
    Read,
    Write,
    Flush,
    GetId,
    Discard,
    WriteZeroes,
    Unknown,
}

impl RequestType {
    pub(super) fn of(value: u32) -> Self {
        match value {
            virtio_blk::VIRTIO_BLK_T_IN => Self::Read,
            virtio_blk::VIRTIO_BLK_T_OUT => Self::Write,
            virtio_blk::VIRTIO_BLK_T_FLUSH => Self::Flush,
            virtio_blk::VIRTIO_BLK_T_GET_ID => Self::GetId,
            virtio_blk::VIRTIO_BLK_T_DISCARD => Self::Discard,
            virtio_blk::VIRTIO_BLK_T_WRITE_ZEROES => Self::WriteZeroes,
            _ => Self::Unknown,
        }
    }
}

/// Status byte of a request (5.2.6).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub(super) enum Status {
    Ok = 0,
    IoError = 1,
    Unsupported = 2,
}

/// Value of `blk_size`, the optimal block size (5.2.4).
const BLOCK_BYTES: u32 = 512;
/// Size of the configuration space (5.2.4).
const CONFIG_BYTES: usize = 60;

/// Returns the configuration space of a disk with `sectors` sectors (5.2.4).
pub(super) fn config(sectors: u64, access: Access) -> [u8; CONFIG_BYTES] {
    let mut space = [0; CONFIG_BYTES];
    let mut put = |offset: usize, value: u32| {
        space[offset..offset + 4].copy_from_slice(&value.to_le_bytes());
    };
    put(12, SEGMENTS_MAX);
    put(20, BLOCK_BYTES);
    if access == Access::ReadWrite {
        // Discard: sectors, ranges, alignment in sectors. Write zeroes: sectors, ranges, whether to deallocate.
        put(36, RANGE_SECTORS_MAX);
        put(40, RANGES_MAX);
        put(44, 1);
        put(48, RANGE_SECTORS_MAX);
        put(52, RANGES_MAX);
        put(56, 1);
    }
    space[..8].copy_from_slice(&sectors.to_le_bytes());
    space
}
