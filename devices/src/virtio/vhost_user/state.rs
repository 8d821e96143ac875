//! The state of a disk behind a vhost-user back end.

use serde::{Deserialize, Serialize};

/// What a vhost-user disk is to its guest. Queues are the transport's, data is the back end's.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct VhostUserSnapshot {
    /// Its size, in sectors of 512 bytes.
    pub sectors: u64,
    /// The field `writeback` of its configuration space.
    pub write_back: bool,
}
