//! The state of a balloon.

use serde::{Deserialize, Serialize};

/// How large a balloon is. Which pages are in it only the guest knows.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct BalloonSnapshot {
    /// Pages of 4 KiB that it should have.
    pub target_pages: u32,
    /// Pages of 4 KiB that the driver says it has.
    pub actual_pages: u32,
}
