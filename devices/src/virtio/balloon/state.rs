//! Saved state of a memory balloon.

use minicbor::{Decode, Encode};

use crate::SavedState;

/// Saved state of a memory balloon. Only the guest knows which pages are in it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Encode, Decode)]
#[cbor(map)]
pub struct BalloonSnapshot {
    /// Target in pages of 4 KiB.
    #[n(0)]
    pub target_pages: u32,
    /// Number of 4 KiB pages in the balloon, as the driver reported it.
    #[n(1)]
    pub actual_pages: u32,
}

impl SavedState for BalloonSnapshot {
    const VERSION: u16 = 1;
}
