//! Sizes of memory, as written on the command line: `64M`, `4K`, `8192`.

use core::fmt;
use core::str::FromStr;

use crate::interface::PAGE_SIZE;

/// Suffixes and their powers of two, largest first.
const UNITS: [(u32, &str); 4] = [(40, "T"), (30, "G"), (20, "M"), (10, "K")];

/// Size of memory, a whole number of pages.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub struct Size {
    pages: u64,
}

impl Size {
    /// Creates a size of `pages` pages of 4 KiB. Returns `None` if the number of bytes exceeds 64 bits.
    #[must_use]
    pub const fn from_pages(pages: u64) -> Option<Self> {
        if pages <= u64::MAX / PAGE_SIZE {
            Some(Self { pages })
        } else {
            None
        }
    }

    /// Creates a size of `mebibytes` MiB.
    #[must_use]
    pub const fn from_mib(mebibytes: u32) -> Self {
        #[allow(clippy::cast_lossless, reason = "`u64::from` is not const")]
        let pages = (mebibytes as u64) << 8;
        Self { pages }
    }

    /// Returns the size in pages.
    #[must_use]
    pub const fn pages(self) -> u64 {
        self.pages
    }

    /// Returns the size in bytes.
    #[must_use]
    pub const fn bytes(self) -> u64 {
        self.pages * PAGE_SIZE
    }
}

impl fmt::Display for Size {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        let bytes = self.bytes();
        for (shift, letter) in UNITS {
            if bytes != 0 && bytes.trailing_zeros() >= shift {
                return write!(out, "{}{letter}", bytes >> shift);
            }
        }
        write!(out, "{bytes}")
    }
}

/// Error of a text that is not a whole number of pages with an optional suffix.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct NotASize;

impl FromStr for Size {
    type Err = NotASize;

    fn from_str(text: &str) -> Result<Self, NotASize> {
        let (digits, shift) = UNITS
            .iter()
            .find_map(|(shift, letter)| Some((text.strip_suffix(letter)?, *shift)))
            .unwrap_or((text, 0));
        let number: u64 = super::config::decimal(digits).ok_or(NotASize)?;
        let bytes = number.checked_mul(1 << shift).ok_or(NotASize)?;
        if bytes % PAGE_SIZE != 0 {
            return Err(NotASize);
        }
        Ok(Self {
            pages: bytes / PAGE_SIZE,
        })
    }
}
