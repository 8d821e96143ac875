//! Addresses, page ranges and levels, which all other files use.

use core::fmt;

/// Bytes of a page, the unit of every range in this crate.
pub const PAGE_SIZE: u64 = 1 << PAGE_SHIFT;

/// log2 of [`PAGE_SIZE`].
pub(crate) const PAGE_SHIFT: u32 = 12;

/// Pages in the 64-bit guest-physical space.
pub(crate) const SPACE_PAGES: u64 = 1 << (64 - PAGE_SHIFT);

/// Number of address bits that one level of tables resolves: in every format, a table of 4 KiB pages has 512 entries.
pub(crate) const LEVEL_BITS: u32 = 9;

/// Number of entries in a table below the root.
pub const TABLE_ENTRIES: usize = 1 << LEVEL_BITS;

/// Maximum number of levels that a 64-bit space needs.
pub(crate) const MAX_LEVELS: usize = 6;

/// A guest-physical byte address.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Gpa(pub u64);

/// A host-physical byte address.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Hpa(pub u64);

impl Gpa {
    /// Returns the number of the page that contains this byte.
    pub const fn page(self) -> u64 {
        self.0 >> PAGE_SHIFT
    }

    /// Returns the address of page `page`; `None` if it lies beyond the 64-bit space.
    pub const fn from_page(page: u64) -> Option<Self> {
        if page < SPACE_PAGES {
            Some(Self(page << PAGE_SHIFT))
        } else {
            None
        }
    }
}

impl fmt::Display for Gpa {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:#x}", self.0)
    }
}

impl fmt::Display for Hpa {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:#x}", self.0)
    }
}

/// A range of guest-physical memory: half-open, page-aligned, and never empty.
///
/// It stores page numbers, so a range can end at the last byte of the 64-bit space.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct GpaRange {
    first: u64,
    end: u64,
}

/// Reason why a range is invalid.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RangeError {
    /// The range that starts here has no page.
    Empty(Gpa),
    /// The end lies before the start.
    Inverted {
        /// Requested start.
        start: Gpa,
        /// Requested end.
        end: Gpa,
    },
    /// This address or length in bytes is no multiple of [`PAGE_SIZE`].
    Misaligned(u64),
    /// The range would end beyond the 64-bit space.
    Overflow {
        /// Requested first page.
        first_page: u64,
        /// Requested number of pages.
        pages: u64,
    },
}

impl fmt::Display for RangeError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Empty(start) => write!(f, "range at {start} is empty"),
            Self::Inverted { start, end } => write!(f, "range starts at {start} and ends at {end}"),
            Self::Misaligned(value) => write!(f, "{value:#x} is no multiple of the page size"),
            Self::Overflow { first_page, pages } => write!(
                f,
                "{pages:#x} pages from page {first_page:#x} leave the 64-bit space"
            ),
        }
    }
}

impl core::error::Error for RangeError {}

impl GpaRange {
    /// The whole 64-bit space.
    pub const ALL: Self = Self {
        first: 0,
        end: SPACE_PAGES,
    };

    /// Creates the range from `start` up to, but without, `end`. Both are page-aligned byte addresses.
    ///
    /// For a range that ends with the 64-bit space there is no such `end`: use [`GpaRange::with_len`].
    ///
    /// # Errors
    /// Returns [`RangeError`] if the range is empty, or `end` lies before `start`, or either is misaligned.
    pub const fn new(start: Gpa, end: Gpa) -> Result<Self, RangeError> {
        if end.0 < start.0 {
            return Err(RangeError::Inverted { start, end });
        }
        Self::with_len(start, end.0 - start.0)
    }

    /// Creates the range of `len` bytes from `start`, both multiples of the page size.
    ///
    /// # Errors
    /// Returns [`RangeError`] if the range is empty or misaligned, or ends beyond the 64-bit space.
    pub const fn with_len(start: Gpa, len: u64) -> Result<Self, RangeError> {
        if !start.0.is_multiple_of(PAGE_SIZE) {
            return Err(RangeError::Misaligned(start.0));
        }
        if !len.is_multiple_of(PAGE_SIZE) {
            return Err(RangeError::Misaligned(len));
        }
        Self::from_pages(start.page(), len >> PAGE_SHIFT)
    }

    /// Creates the range of `pages` pages from page number `first_page`.
    ///
    /// # Errors
    /// Returns [`RangeError`] if the range is empty or ends beyond the 64-bit space.
    pub const fn from_pages(first_page: u64, pages: u64) -> Result<Self, RangeError> {
        let overflow = Err(RangeError::Overflow { first_page, pages });
        let Some(end) = first_page.checked_add(pages) else {
            return overflow;
        };
        if end > SPACE_PAGES {
            return overflow;
        }
        if pages == 0 {
            return Err(RangeError::Empty(Gpa(first_page << PAGE_SHIFT)));
        }
        Ok(Self {
            first: first_page,
            end,
        })
    }

    /// Creates a range from page numbers that are known to be in order and inside the space.
    pub(crate) const fn of(first: u64, end: u64) -> Self {
        debug_assert!(first < end && end <= SPACE_PAGES);
        Self { first, end }
    }

    /// Returns the address of the first byte.
    pub const fn start(&self) -> Gpa {
        Gpa(self.first << PAGE_SHIFT)
    }

    /// Returns the address of the byte after the range; `None` if the range ends with the 64-bit space.
    pub const fn end(&self) -> Option<Gpa> {
        Gpa::from_page(self.end)
    }

    /// Returns the address of the last byte.
    pub const fn last(&self) -> Gpa {
        Gpa(((self.end - 1) << PAGE_SHIFT) | (PAGE_SIZE - 1))
    }

    /// Returns the number of the first page.
    pub const fn first_page(&self) -> u64 {
        self.first
    }

    /// Returns the number of the page after the range, which is at most 2⁵².
    pub const fn end_page(&self) -> u64 {
        self.end
    }

    /// Returns the length in pages, which is never 0.
    pub const fn pages(&self) -> u64 {
        self.end - self.first
    }

    /// Returns the length in bytes, which is at most 2⁶⁴.
    pub const fn bytes(&self) -> u128 {
        (self.pages() as u128) << PAGE_SHIFT
    }

    /// Returns whether this byte lies in the range.
    pub const fn contains(&self, gpa: Gpa) -> bool {
        self.first <= gpa.page() && gpa.page() < self.end
    }

    pub(crate) const fn contains_page(&self, page: u64) -> bool {
        self.first <= page && page < self.end
    }

    /// Returns whether every page of `other` lies in the range.
    pub const fn covers(&self, other: &Self) -> bool {
        self.first <= other.first && other.end <= self.end
    }

    /// Returns whether the two ranges have a page in common.
    pub const fn overlaps(&self, other: &Self) -> bool {
        self.first < other.end && other.first < self.end
    }

    /// Returns the pages that both ranges contain; `None` if there is none.
    pub fn intersection(&self, other: &Self) -> Option<Self> {
        let (first, end) = (self.first.max(other.first), self.end.min(other.end));
        (first < end).then_some(Self { first, end })
    }

    /// Returns the smallest range that contains both.
    pub fn hull(&self, other: &Self) -> Self {
        Self {
            first: self.first.min(other.first),
            end: self.end.max(other.end),
        }
    }

    /// Returns the part of the range from the page of `gpa` on; `None` if it is empty.
    pub fn from(&self, gpa: Gpa) -> Option<Self> {
        let first = self.first.max(gpa.page());
        (first < self.end).then_some(Self {
            first,
            end: self.end,
        })
    }
}

impl fmt::Display for GpaRange {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}..={}", self.start(), self.last())
    }
}

impl fmt::Debug for GpaRange {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

/// Level of a page-table entry. An entry of level 0 maps 4 KiB, of level 1 2 MiB, of level 2 1 GiB, of level 3 512 GiB, and
/// so on up to level 5.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Level(u8);

impl Level {
    /// Level of entries that map 4 KiB.
    pub const PAGE: Self = Self(0);
    /// Level of entries that map 2 MiB.
    pub const MIB2: Self = Self(1);
    /// Level of entries that map 1 GiB.
    pub const GIB: Self = Self(2);

    /// Returns level `number`; `None` above 5, whose entries would exceed the 64-bit space.
    pub const fn new(number: u8) -> Option<Self> {
        if (number as usize) < MAX_LEVELS {
            Some(Self(number))
        } else {
            None
        }
    }

    /// Returns the number of the level.
    pub const fn number(self) -> u8 {
        self.0
    }

    /// Returns the number of bytes that an entry of this level maps.
    pub const fn span(self) -> u64 {
        self.pages() << PAGE_SHIFT
    }

    /// Returns the number of pages that an entry of this level maps.
    pub const fn pages(self) -> u64 {
        1 << self.shift()
    }

    /// Returns the range of the entry of this level that contains page `page`.
    pub const fn span_at(self, page: u64) -> GpaRange {
        let first = page & !(self.pages() - 1);
        GpaRange::of(first, first + self.pages())
    }

    pub(crate) const fn shift(self) -> u32 {
        self.0 as u32 * LEVEL_BITS
    }

    pub(crate) const fn index(self) -> usize {
        self.0 as usize
    }

    /// Returns level `number`, which is at most 5.
    pub(crate) const fn known(number: u8) -> Self {
        Self(number)
    }

    pub(crate) const fn up(self) -> Self {
        Self(self.0 + 1)
    }

    pub(crate) const fn down(self) -> Self {
        Self(self.0 - 1)
    }
}

impl fmt::Display for Level {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "level {}", self.0)
    }
}
