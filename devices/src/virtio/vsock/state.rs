//! The state of a socket device.

use serde::{Deserialize, Serialize};

/// What a socket device is to its guest. Connections end where the guest leaves: they are between it and a
/// process of that host. The guest is told by a transport reset.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct VsockSnapshot {
    /// The guest's address.
    pub guest_cid: u64,
}
