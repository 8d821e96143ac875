//! The state of a block device.

use minicbor::{Decode, Encode};

use crate::SavedState;

/// What a disk is to its guest. Data that was written is in the image, not here.
#[derive(Clone, Debug, PartialEq, Eq, Encode, Decode)]
#[cbor(map)]
pub struct BlockSnapshot {
    /// Its size, in sectors of 512 bytes.
    #[n(0)]
    pub sectors: u64,
    /// Its identification, at most 20 bytes.
    #[n(1)]
    #[cbor(with = "minicbor::bytes")]
    pub id: Vec<u8>,
}

impl SavedState for BlockSnapshot {
    const VERSION: u16 = 1;
}
