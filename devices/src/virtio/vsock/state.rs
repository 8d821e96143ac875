//! The state of a socket device.

use minicbor::{Decode, Encode};

use crate::SavedState;

/// What a socket device is to its guest. Connections end where the guest leaves: they are between it and a
/// process of that host. The guest is told by a transport reset.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Encode, Decode)]
#[cbor(map)]
pub struct VsockSnapshot {
    /// The guest's address.
    #[n(0)]
    pub guest_cid: u64,
}

impl SavedState for VsockSnapshot {
    const VERSION: u16 = 1;
}
