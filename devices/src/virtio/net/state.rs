//! The state of a network device.

use serde::{Deserialize, Serialize};

/// What a network interface is to its guest.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct NetSnapshot {
    /// Its address.
    pub mac: [u8; 6],
    /// A packet from the host that waits for room in the guest, with its virtio header; empty if none does.
    pub waiting_packet: Vec<u8>,
}
