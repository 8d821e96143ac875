//! The state of a balloon.

use minicbor::{Decode, Encode};

use crate::SavedState;

/// How large a balloon is. Which pages are in it only the guest knows.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Encode, Decode)]
#[cbor(map)]
pub struct BalloonSnapshot {
    /// Pages of 4 KiB that it should have.
    #[n(0)]
    pub target_pages: u32,
    /// Pages of 4 KiB that the driver says it has.
    #[n(1)]
    pub actual_pages: u32,
}

impl SavedState for BalloonSnapshot {
    const VERSION: u16 = 1;
}
