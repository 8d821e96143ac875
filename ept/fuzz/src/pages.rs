//! Ranges of pages by their numbers.

use ept::{Gpa, GpaRange};

/// Returns the address of the first byte of a page.
pub(crate) fn gpa(page: u64) -> Gpa {
    Gpa(page << 12)
}

/// Returns the pages from `first` to before `end`.
pub(crate) fn pages(first: u64, end: u64) -> GpaRange {
    GpaRange::from_pages(first, end - first).expect("a range within the address space")
}

/// Returns the number of pages in `ranges`, which do not overlap.
pub(crate) fn count(ranges: &[GpaRange]) -> u64 {
    ranges.iter().map(GpaRange::pages).sum()
}
