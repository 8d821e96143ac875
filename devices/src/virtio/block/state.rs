//! Saved state of a block device.

use minicbor::{Decode, Encode};

use crate::SavedState;

/// Saved state of a block device. The data is in the image.
#[derive(Clone, Debug, PartialEq, Eq, Encode, Decode)]
#[cbor(map)]
pub struct BlockSnapshot {
    /// Size of the disk in sectors of 512 bytes.
    #[n(0)]
    pub sectors: u64,
    /// Identification, at most 20 bytes.
    #[n(1)]
    #[cbor(with = "minicbor::bytes")]
    pub id: Vec<u8>,
}

impl SavedState for BlockSnapshot {
    const VERSION: u16 = 1;
}
