//! The state of a network device.

use minicbor::{Decode, Encode};

use crate::SavedState;

/// What a network interface is to its guest.
#[derive(Clone, Debug, PartialEq, Eq, Encode, Decode)]
#[cbor(map)]
pub struct NetSnapshot {
    /// Its address.
    #[n(0)]
    #[cbor(with = "minicbor::bytes")]
    pub mac: [u8; 6],
    /// A packet from the host that waits for room in the guest, with its virtio header; empty if none does.
    #[n(1)]
    #[cbor(with = "minicbor::bytes")]
    pub waiting_packet: Vec<u8>,
}

impl SavedState for NetSnapshot {
    const VERSION: u16 = 1;
}
