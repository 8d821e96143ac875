//! Constants and layouts of the block device (virtio 1.2, 5.2).

use virtio_bindings::virtio_blk;

/// A sector, in which the device counts (5.2.4).
pub(super) const SECTOR_BYTES: u64 = 512;
/// The one request queue (5.2.2), and its entries.
pub(super) const REQUESTS: usize = 0;
pub(super) const QUEUE_SIZE: u16 = 256;
/// Data descriptors of a request: all but its header's and its status's.
pub(super) const SEGMENTS_MAX: u32 = QUEUE_SIZE as u32 - 2;
/// Bytes of a request's header: type, reserved, sector (5.2.6).
pub(super) const HEADER_BYTES: usize = 16;
/// Bytes of the device's identification (5.2.6, VIRTIO_BLK_T_GET_ID).
pub(super) const ID_BYTES: usize = virtio_blk::VIRTIO_BLK_ID_BYTES as usize;
/// Bytes of a range to discard or write zeroes to: sector, sectors, flags (5.2.6).
pub(super) const RANGE_BYTES: usize = 16;
/// The most ranges of a request, and the most sectors of a range: 1 GiB.
pub(super) const RANGES_MAX: u32 = 32;
pub(super) const RANGE_SECTORS_MAX: u32 = 1 << 21;
/// The flag of a range that may be deallocated.
pub(super) const RANGE_UNMAP: u32 = virtio_blk::VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP;

pub(super) const FLUSH_FEATURE: u64 = 1 << virtio_blk::VIRTIO_BLK_F_FLUSH;
const READ_ONLY: u64 = 1 << virtio_blk::VIRTIO_BLK_F_RO;
const ALWAYS: u64 =
    1 << virtio_blk::VIRTIO_BLK_F_SEG_MAX | 1 << virtio_blk::VIRTIO_BLK_F_BLK_SIZE | FLUSH_FEATURE;
const WRITABLE: u64 =
    1 << virtio_blk::VIRTIO_BLK_F_DISCARD | 1 << virtio_blk::VIRTIO_BLK_F_WRITE_ZEROES;

/// The feature bits of a disk (5.2.3).
pub(super) fn features(read_only: bool) -> u64 {
    ALWAYS | if read_only { READ_ONLY } else { WRITABLE }
}

/// What a request asks for (5.2.6).
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

/// The last byte of a request (5.2.6).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub(super) enum Status {
    Ok = 0,
    IoError = 1,
    Unsupported = 2,
}

/// Bytes of the configuration space (5.2.4).
const CONFIG_BYTES: usize = 60;

/// The configuration space of a disk of `sectors` (5.2.4).
pub(super) fn config(sectors: u64, block_bytes: u32, read_only: bool) -> [u8; CONFIG_BYTES] {
    let mut space = [0; CONFIG_BYTES];
    let mut put = |offset: usize, value: u32| {
        space[offset..offset + 4].copy_from_slice(&value.to_le_bytes());
    };
    put(12, SEGMENTS_MAX);
    put(20, block_bytes);
    if !read_only {
        // Discard: sectors, ranges, alignment in sectors; write zeroes: sectors, ranges, may deallocate.
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
