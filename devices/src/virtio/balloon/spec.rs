//! Constants and layouts of the memory balloon (virtio 1.2, 5.5).

/// The queues (5.5.2). A queue whose feature is not offered takes no number, as drivers have it.
pub(super) const INFLATE: usize = 0;
pub(super) const DEFLATE: usize = 1;
pub(super) const REPORT: usize = 2;
pub(super) const QUEUE_SIZE: u16 = 128;

/// The balloon's pages are this large, whatever the guest's are (5.5.6).
pub(super) const PAGE_BYTES: u64 = 4096;
/// Bytes of a page's number in a request (5.5.6).
pub(super) const PAGE_NUMBER_BYTES: usize = 4;
/// The most pages that one request may name. Linux names 256.
pub(super) const PAGES_MAX: u64 = 16_384;

/// VIRTIO_BALLOON_F_DEFLATE_ON_OOM (5.5.3).
pub(super) const DEFLATE_ON_OOM: u64 = 1 << 2;
/// VIRTIO_BALLOON_F_PAGE_REPORTING (5.5.3).
pub(super) const REPORTING: u64 = 1 << 5;

/// Where the driver says how large the balloon is (5.5.4).
pub(super) const ACTUAL_OFFSET: u64 = 4;

/// The configuration space (5.5.4): pages wanted, and pages in the balloon.
pub(super) fn config(target: u32, actual: u32) -> [u8; 8] {
    let mut space = [0; 8];
    space[..4].copy_from_slice(&target.to_le_bytes());
    space[4..].copy_from_slice(&actual.to_le_bytes());
    space
}
