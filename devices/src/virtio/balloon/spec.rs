//! Constants and layouts of the memory balloon (virtio 1.2, 5.5). Section numbers refer to that specification.

/// Queue indices (5.5.2). As drivers expect, a queue whose feature is not offered does not take an index.
pub(super) const INFLATE: usize = 0;
pub(super) const DEFLATE: usize = 1;
pub(super) const REPORT: usize = 2;
pub(super) const QUEUE_SIZE: u16 = 128;

/// Page size of the balloon, which does not depend on that of the guest (5.5.6).
pub(super) const PAGE_BYTES: u64 = 4096;
/// Size of a page number in a request (5.5.6).
pub(super) const PAGE_NUMBER_BYTES: usize = 4;
/// Maximum number of pages in one request. Linux sends 256.
pub(super) const PAGES_MAX: u64 = 16_384;

/// VIRTIO_BALLOON_F_DEFLATE_ON_OOM (5.5.3).
pub(super) const DEFLATE_ON_OOM: u64 = 1 << 2;
/// VIRTIO_BALLOON_F_PAGE_REPORTING (5.5.3).
pub(super) const REPORTING: u64 = 1 << 5;

/// Offset of `actual`, the size of the balloon that the driver reports (5.5.4).
pub(super) const ACTUAL_OFFSET: u64 = 4;

/// Returns the configuration space (5.5.4): target and actual number of pages.
pub(super) fn config(target: u32, actual: u32) -> [u8; 8] {
    let mut space = [0; 8];
    space[..4].copy_from_slice(&target.to_le_bytes());
    space[4..].copy_from_slice(&actual.to_le_bytes());
    space
}
