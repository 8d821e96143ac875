//! Amounts of memory as they are written on the command line: `64M`, `4K`, `8192`.

use core::fmt;
use core::str::FromStr;

use crate::interface::PAGE_SIZE;

/// Powers of 1024 and their letters, largest first.
const UNITS: [(u32, &str); 4] = [(40, "T"), (30, "G"), (20, "M"), (10, "K")];

/// A whole number of pages.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub struct Size {
    pages: u64,
}

impl Size {
    /// `pages` pages of 4 KiB; `None` if that is more bytes than an address can count.
    #[must_use]
    pub const fn from_pages(pages: u64) -> Option<Self> {
        if pages <= u64::MAX / PAGE_SIZE {
            Some(Self { pages })
        } else {
            None
        }
    }

    /// `mebibytes` MiB.
    #[must_use]
    pub const fn from_mib(mebibytes: u32) -> Self {
        // Widening; `u64::from` is not const.
        #[allow(clippy::cast_lossless)]
        let pages = (mebibytes as u64) << 8;
        Self { pages }
    }

    /// The amount in pages.
    #[must_use]
    pub const fn pages(self) -> u64 {
        self.pages
    }

    /// The amount in bytes.
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

/// The text is no whole number of pages, with or without a unit.
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
