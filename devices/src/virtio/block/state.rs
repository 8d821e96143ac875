//! The state of a block device.

use serde::{Deserialize, Serialize};

/// What a disk is to its guest. Data that was written is in the image, not here.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct BlockSnapshot {
    /// Its size, in sectors of 512 bytes.
    pub sectors: u64,
    /// Its identification, at most 20 bytes.
    pub id: Vec<u8>,
}
