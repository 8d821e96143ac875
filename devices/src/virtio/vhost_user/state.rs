//! Saved state of a vhost-user block device.

use minicbor::{Decode, Encode};

use crate::SavedState;

/// Saved state of a vhost-user block device. The queues are part of the transport's state.
///
/// Field 1 is not used: it tells this state from that of a block device without a back end.
#[derive(Clone, Debug, PartialEq, Eq, Encode, Decode)]
#[cbor(map)]
pub struct VhostUserSnapshot {
    /// Size of the disk in sectors of 512 bytes.
    #[n(0)]
    pub sectors: u64,
    /// Field `writeback` of the configuration space.
    #[n(2)]
    pub write_back: bool,
}

impl SavedState for VhostUserSnapshot {
    const VERSION: u16 = 1;
}
