//! Shape of a radix tree of tables.

use core::fmt;

use crate::addr::{GpaRange, Level, SPACE_PAGES, TABLE_ENTRIES};

/// Level and size of a root table.
///
/// Tables below the root have [`TABLE_ENTRIES`] entries. The root can have another number: RISC-V's x4 modes have 2048
/// entries, Arm concatenates up to 16 tables to one root, and a tracker's root has only the entries that its regions need.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Geometry {
    root_level: Level,
    root_entries: usize,
}

/// Reason why a shape is invalid.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum GeometryError {
    /// The root would have entries of this level, 4 KiB, so that there would be no table above the leaf tables.
    RootTooLow(Level),
    /// A root with this number of entries has none, or has some beyond the 64-bit space.
    RootEntries(usize),
    /// The format has no addresses of this number of bits.
    AddressBits(u32),
}

impl fmt::Display for GeometryError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::RootTooLow(level) => write!(f, "{level} cannot be the root's"),
            Self::RootEntries(count) => write!(f, "a root of {count} entries is not possible"),
            Self::AddressBits(bits) => write!(f, "addresses of {bits} bits are not possible"),
        }
    }
}

impl core::error::Error for GeometryError {}

impl Geometry {
    /// Creates the shape of a tree whose root table has `root_entries` entries of level `root_level`.
    ///
    /// # Errors
    /// Returns [`GeometryError`] if the level is 0, or the root has no entries or reaches beyond the 64-bit space.
    pub fn new(root_level: Level, root_entries: usize) -> Result<Self, GeometryError> {
        if root_level == Level::PAGE {
            return Err(GeometryError::RootTooLow(root_level));
        }
        let fits = u64::try_from(root_entries)
            .is_ok_and(|entries| entries > 0 && entries <= SPACE_PAGES >> root_level.shift());
        if !fits {
            return Err(GeometryError::RootEntries(root_entries));
        }
        Ok(Self {
            root_level,
            root_entries,
        })
    }

    /// Creates a shape that is known to be valid.
    pub(crate) const fn with_root(level: u8, root_entries: usize) -> Self {
        Self {
            root_level: Level::known(level),
            root_entries,
        }
    }

    /// Creates the shape of the lowest tree that reaches `end_page` and whose root has at most [`TABLE_ENTRIES`] entries.
    pub(crate) fn reaching(end_page: u64) -> Self {
        let mut root_level = Level::PAGE.up();
        while end_page.div_ceil(root_level.pages()) > TABLE_ENTRIES as u64 {
            root_level = root_level.up();
        }
        let entries = end_page.div_ceil(root_level.pages()).max(1);
        Self {
            root_level,
            root_entries: usize::try_from(entries).unwrap_or(TABLE_ENTRIES),
        }
    }

    /// Returns the level of the entries of the root table.
    pub const fn root_level(&self) -> Level {
        self.root_level
    }

    /// Returns the number of entries in the root table.
    pub const fn root_entries(&self) -> usize {
        self.root_entries
    }

    /// Returns the range that the tree covers.
    pub const fn span(&self) -> GpaRange {
        GpaRange::of(0, (self.root_entries as u64) << self.root_level.shift())
    }

    /// Returns the index of `page` in its table of `level`.
    #[inline]
    pub(crate) fn index(&self, page: u64, level: Level) -> usize {
        let index = page >> level.shift();
        let within = if level == self.root_level {
            index
        } else {
            index & (TABLE_ENTRIES as u64 - 1)
        };
        // This cannot fail: an index is less than the number of entries of a table, which is a `usize`.
        usize::try_from(within).unwrap_or(usize::MAX)
    }
}
