//! The shape of a radix tree, as a value.

use core::fmt;

use crate::addr::{GpaRange, Level, SPACE_PAGES, TABLE_ENTRIES};

/// Which level the root table stands at, and how many entries it has.
///
/// Tables below the root have [`TABLE_ENTRIES`] entries. The root has its own count because it
/// differs: RISC-V's x4 modes have 2048 entries, Arm concatenates up to 16 tables into one root,
/// and a tracker's root is cut to what its regions need.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Geometry {
    root_level: Level,
    root_entries: usize,
}

/// Why a shape is impossible.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum GeometryError {
    /// A root of 4 KiB entries: there is no table above the leaf tables.
    RootTooLow(Level),
    /// A root with no entries, or with entries beyond the 64-bit space.
    RootEntries(usize),
    /// Addresses of so many bits, which the format does not have.
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
    /// A tree whose root table holds `root_entries` entries of level `root_level`.
    ///
    /// # Errors
    /// A root at level 0, without entries, or reaching beyond the 64-bit space.
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

    /// A shape that is known to be possible.
    pub(crate) const fn with_root(level: u8, root_entries: usize) -> Self {
        Self {
            root_level: Level::known(level),
            root_entries,
        }
    }

    /// The lowest tree with a root of at most [`TABLE_ENTRIES`] entries that reaches `end_page`,
    /// which lies inside the 64-bit space.
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

    /// The level of the root table's entries.
    pub const fn root_level(&self) -> Level {
        self.root_level
    }

    /// Entries in the root table.
    pub const fn root_entries(&self) -> usize {
        self.root_entries
    }

    /// The range that the tree can describe.
    pub const fn span(&self) -> GpaRange {
        GpaRange::of(0, (self.root_entries as u64) << self.root_level.shift())
    }

    /// Index of `page` in its table at `level`.
    #[inline]
    pub(crate) fn index(&self, page: u64, level: Level) -> usize {
        let index = page >> level.shift();
        let within = if level == self.root_level {
            index
        } else {
            index & (TABLE_ENTRIES as u64 - 1)
        };
        // An index is below a table's entry count, which is a usize.
        usize::try_from(within).unwrap_or(usize::MAX)
    }
}
