//! The ways in which KVM's dirty bitmap can be used (S22).

use std::fmt;
use std::str::FromStr;

/// A way to use KVM's dirty bitmap.
///
/// ```text
/// Get            GET reads and clears in one call; KVM write-protects all dirty pages again at each GET
/// GetClear       GET only reads; CLEAR write-protects just the pages named, in chunks
/// InitiallySet   as GetClear, and the bitmap starts all ones: nothing is write-protected when logging starts; a page
///                is protected when it is cleared for the first time, right before it is sent
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DirtyLogMode {
    /// KVM_GET_DIRTY_LOG alone.
    Get,
    /// KVM_GET_DIRTY_LOG and KVM_CLEAR_DIRTY_LOG.
    GetClear,
    /// As `GetClear`, and the bitmap starts with every page dirty (KVM_DIRTY_LOG_INITIALLY_SET).
    InitiallySet,
}

impl DirtyLogMode {
    /// All modes in order of preference, the best first.
    pub const BEST_FIRST: [Self; 3] = [Self::InitiallySet, Self::GetClear, Self::Get];

    /// Returns true if the bitmap starts with every page dirty. A page that was never cleared stays dirty in it.
    #[must_use]
    pub fn starts_all_dirty(self) -> bool {
        matches!(self, Self::InitiallySet)
    }

    /// Returns true if pages stay dirty and writable after a GET until a CLEAR names them.
    #[must_use]
    pub fn needs_clear(self) -> bool {
        !matches!(self, Self::Get)
    }

    /// Returns the name of the mode on the command line.
    fn name(self) -> &'static str {
        match self {
            Self::Get => "get",
            Self::GetClear => "get-clear",
            Self::InitiallySet => "initially-set",
        }
    }
}

impl fmt::Display for DirtyLogMode {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

impl FromStr for DirtyLogMode {
    type Err = String;

    fn from_str(name: &str) -> Result<Self, Self::Err> {
        Self::BEST_FIRST
            .into_iter()
            .find(|mode| mode.name() == name)
            .ok_or_else(|| {
                format!(
                    "there is no dirty log mode {name:?}: choose get, get-clear or initially-set"
                )
            })
    }
}
