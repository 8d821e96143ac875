//! Saved state of a socket device.

use minicbor::{Decode, Encode};

use crate::SavedState;

/// Saved state of a socket device. Connections are not saved, because their other ends are processes of the host. After
/// a restore, the guest is told by a transport reset.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Encode, Decode)]
#[cbor(map)]
pub struct VsockSnapshot {
    /// Address (CID) of the guest.
    #[n(0)]
    pub guest_cid: u64,
}

impl SavedState for VsockSnapshot {
    const VERSION: u16 = 1;
}
