//! Addresses, page ranges and levels: the vocabulary every other file uses.

use core::fmt;

/// Bytes in one page, the unit of every range in this crate.
pub const PAGE_SIZE: u64 = 1 << PAGE_SHIFT;

/// log2 of [`PAGE_SIZE`].
pub(crate) const PAGE_SHIFT: u32 = 12;

/// Pages in the 64-bit guest-physical space.
pub(crate) const SPACE_PAGES: u64 = 1 << (64 - PAGE_SHIFT);

/// Index bits that one level of tables resolves: 512 entries, with 4 KiB pages, in every format.
pub(crate) const LEVEL_BITS: u32 = 9;

/// Entries in a table that is not the root.
pub const TABLE_ENTRIES: usize = 1 << LEVEL_BITS;

/// Levels that a 64-bit space can need.
pub(crate) const MAX_LEVELS: usize = 6;

/// A guest-physical byte address.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Gpa(pub u64);

/// A host-physical byte address.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Hpa(pub u64);

impl Gpa {
    /// The number of the page that holds this byte.
    pub const fn page(self) -> u64 {
        self.0 >> PAGE_SHIFT
    }

    /// The first byte of page `page`; `None` beyond the last page of the space.
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

/// A half-open, page-aligned, never empty range of guest-physical memory.
///
/// It holds page numbers, so that a range may end at the last byte of the 64-bit space.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct GpaRange {
    first: u64,
    end: u64,
}

/// Why a range could not be made.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RangeError {
    /// The range starting here has no page in it.
    Empty(Gpa),
    /// The end lies before the start.
    Inverted {
        /// First byte asked for.
        start: Gpa,
        /// End asked for.
        end: Gpa,
    },
    /// This address, or length in bytes, is no multiple of [`PAGE_SIZE`].
    Misaligned(u64),
    /// The range would run beyond the 64-bit space.
    Overflow {
        /// First page asked for.
        first_page: u64,
        /// Pages asked for.
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

    /// The range [`start`, `end`), both page-aligned byte addresses.
    ///
    /// A range up to the last byte of the space has no such `end`: see [`GpaRange::with_len`].
    ///
    /// # Errors
    /// Empty, inverted or misaligned bounds.
    pub const fn new(start: Gpa, end: Gpa) -> Result<Self, RangeError> {
        if end.0 < start.0 {
            return Err(RangeError::Inverted { start, end });
        }
        Self::with_len(start, end.0 - start.0)
    }

    /// `len` bytes from `start`, both multiples of the page size.
    ///
    /// # Errors
    /// An empty or misaligned range, or one that runs beyond the space.
    pub const fn with_len(start: Gpa, len: u64) -> Result<Self, RangeError> {
        if !start.0.is_multiple_of(PAGE_SIZE) {
            return Err(RangeError::Misaligned(start.0));
        }
        if !len.is_multiple_of(PAGE_SIZE) {
            return Err(RangeError::Misaligned(len));
        }
        Self::from_pages(start.page(), len >> PAGE_SHIFT)
    }

    /// `pages` pages from page number `first_page`.
    ///
    /// # Errors
    /// An empty range, or one that runs beyond the space.
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

    /// A range from page numbers that are known to be in order and inside the space.
    pub(crate) const fn of(first: u64, end: u64) -> Self {
        debug_assert!(first < end && end <= SPACE_PAGES);
        Self { first, end }
    }

    /// The first byte.
    pub const fn start(&self) -> Gpa {
        Gpa(self.first << PAGE_SHIFT)
    }

    /// The byte after the range; `None` where the range ends with the space.
    pub const fn end(&self) -> Option<Gpa> {
        Gpa::from_page(self.end)
    }

    /// The last byte.
    pub const fn last(&self) -> Gpa {
        Gpa(((self.end - 1) << PAGE_SHIFT) | (PAGE_SIZE - 1))
    }

    /// The number of the first page.
    pub const fn first_page(&self) -> u64 {
        self.first
    }

    /// The number of the page after the range; at most 2⁵².
    pub const fn end_page(&self) -> u64 {
        self.end
    }

    /// Length in pages, never 0.
    pub const fn pages(&self) -> u64 {
        self.end - self.first
    }

    /// Length in bytes; the whole space is 2⁶⁴.
    pub const fn bytes(&self) -> u128 {
        (self.pages() as u128) << PAGE_SHIFT
    }

    /// Whether this byte lies inside.
    pub const fn contains(&self, gpa: Gpa) -> bool {
        self.first <= gpa.page() && gpa.page() < self.end
    }

    pub(crate) const fn contains_page(&self, page: u64) -> bool {
        self.first <= page && page < self.end
    }

    /// Whether every page of `other` lies inside.
    pub const fn covers(&self, other: &Self) -> bool {
        self.first <= other.first && other.end <= self.end
    }

    /// Whether the two have a page in common.
    pub const fn overlaps(&self, other: &Self) -> bool {
        self.first < other.end && other.first < self.end
    }

    /// The pages that both have.
    pub fn intersection(&self, other: &Self) -> Option<Self> {
        let (first, end) = (self.first.max(other.first), self.end.min(other.end));
        (first < end).then_some(Self { first, end })
    }

    /// The smallest range that has the pages of both.
    pub fn hull(&self, other: &Self) -> Self {
        Self {
            first: self.first.min(other.first),
            end: self.end.max(other.end),
        }
    }

    /// The part from `gpa`'s page on; `None` where nothing is left.
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

/// How far above the pages an entry stands: 0 maps 4 KiB, 1 maps 2 MiB, 2 maps 1 GiB,
/// 3 maps 512 GiB, and so on to 5.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Level(u8);

impl Level {
    /// 4 KiB entries.
    pub const PAGE: Self = Self(0);
    /// 2 MiB entries.
    pub const MIB2: Self = Self(1);
    /// 1 GiB entries.
    pub const GIB: Self = Self(2);

    /// The level numbered `number`; `None` above 5, whose entries would exceed the space.
    pub const fn new(number: u8) -> Option<Self> {
        if (number as usize) < MAX_LEVELS {
            Some(Self(number))
        } else {
            None
        }
    }

    /// The level's number.
    pub const fn number(self) -> u8 {
        self.0
    }

    /// Bytes that one entry of this level maps.
    pub const fn span(self) -> u64 {
        self.pages() << PAGE_SHIFT
    }

    /// Pages that one entry of this level maps.
    pub const fn pages(self) -> u64 {
        1 << self.shift()
    }

    /// The range that the entry covering page `page` maps.
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

    /// The level numbered `number`, which is at most 5.
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
