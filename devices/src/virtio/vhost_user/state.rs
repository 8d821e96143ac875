//! The state of a disk behind a vhost-user back end.

use minicbor::{Decode, Encode};

use crate::SavedState;

/// What a vhost-user disk is to its guest. Queues are the transport's, data is the back end's.
#[derive(Clone, Debug, PartialEq, Eq, Encode, Decode)]
#[cbor(map)]
pub struct VhostUserSnapshot {
    /// Its size, in sectors of 512 bytes.
    #[n(0)]
    pub sectors: u64,
    /// The field `writeback` of its configuration space.
    #[n(2)]
    pub write_back: bool,
}

impl SavedState for VhostUserSnapshot {
    const VERSION: u16 = 1;
}
