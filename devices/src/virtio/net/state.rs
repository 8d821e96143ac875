//! Saved state of a network device.

use minicbor::{Decode, Encode};

use crate::SavedState;

/// Saved state of a network device.
#[derive(Clone, Debug, PartialEq, Eq, Encode, Decode)]
#[cbor(map)]
pub struct NetSnapshot {
    /// MAC address of the guest.
    #[n(0)]
    #[cbor(with = "minicbor::bytes")]
    pub mac: [u8; 6],
    /// Packet from the host that waits for buffers of the guest, with its virtio header. Empty if there is none.
    #[n(1)]
    #[cbor(with = "minicbor::bytes")]
    pub waiting_packet: Vec<u8>,
}

impl SavedState for NetSnapshot {
    const VERSION: u16 = 1;
}
