//! What a leaf of a hardware format says, in words that all formats share.

use core::fmt;

use crate::addr::{Hpa, Level};

/// What a guest may do with a page.
#[derive(Clone, Copy, Default, PartialEq, Eq, Hash)]
pub struct Permissions(u8);

impl Permissions {
    /// Nothing.
    pub const NONE: Self = Self(0);
    /// Read.
    pub const READ: Self = Self(1);
    /// Write.
    pub const WRITE: Self = Self(2);
    /// Run code.
    pub const EXECUTE: Self = Self(4);
    /// Everything.
    pub const ALL: Self = Self(7);

    /// What either of the two allows.
    #[must_use]
    pub const fn union(self, other: Self) -> Self {
        Self(self.0 | other.0)
    }

    /// What this allows and `other` does not.
    #[must_use]
    pub const fn without(self, other: Self) -> Self {
        Self(self.0 & !other.0)
    }

    /// Whether all that `other` allows is allowed.
    pub const fn allows(self, other: Self) -> bool {
        self.0 & other.0 == other.0
    }

    /// The bits of those that are allowed, given each one's.
    pub(crate) const fn to_bits(self, read: u64, write: u64, execute: u64) -> u64 {
        let read = if self.allows(Self::READ) { read } else { 0 };
        let write = if self.allows(Self::WRITE) { write } else { 0 };
        let execute = if self.allows(Self::EXECUTE) {
            execute
        } else {
            0
        };
        read | write | execute
    }

    /// Those of which any bit is set in `raw`, given each one's bits.
    pub(crate) const fn from_bits(raw: u64, read: u64, write: u64, execute: u64) -> Self {
        let read = if raw & read != 0 { Self::READ.0 } else { 0 };
        let write = if raw & write != 0 { Self::WRITE.0 } else { 0 };
        let execute = if raw & execute != 0 {
            Self::EXECUTE.0
        } else {
            0
        };
        Self(read | write | execute)
    }
}

impl fmt::Display for Permissions {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (one, letter) in [(Self::READ, 'r'), (Self::WRITE, 'w'), (Self::EXECUTE, 'x')] {
            write!(f, "{}", if self.allows(one) { letter } else { '-' })?;
        }
        Ok(())
    }
}

impl fmt::Debug for Permissions {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

/// How accesses to a page are cached.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum MemoryType {
    /// Ordinary memory.
    #[default]
    WriteBack,
    /// Uncached, writes may be combined: frame buffers.
    WriteCombining,
    /// Uncached, in order: device registers.
    Uncached,
    /// Something else, as the format's own bits, shifted down to bit 0.
    Other(u8),
}

/// A leaf: where its span lies, and what holds for all of it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Leaf {
    /// The first byte that it maps to.
    pub hpa: Hpa,
    /// What the guest may do.
    pub permissions: Permissions,
    /// How it is cached.
    pub memory: MemoryType,
    /// The guest has used it since this was last cleared. Where the hardware does not keep the flag
    /// (an EPT without accessed and dirty flags), only software sets it.
    pub accessed: bool,
    /// The guest has written to it since this was last cleared; as above.
    pub dirty: bool,
    /// The guest may write to it and is not allowed to yet, so that its first write faults: see
    /// [`Stage2::track_writes`](crate::stage2::Stage2::track_writes). Only where `permissions` do not allow writing.
    pub write_tracked: bool,
}

impl Leaf {
    /// A leaf that nobody has used yet.
    pub const fn new(hpa: Hpa, permissions: Permissions, memory: MemoryType) -> Self {
        Self {
            hpa,
            permissions,
            memory,
            accessed: false,
            dirty: false,
            write_tracked: false,
        }
    }

    /// The leaf that says of part `index` of its span, one `level` lower, what this one says.
    #[must_use]
    pub(crate) fn part(self, index: usize, level: Level) -> Self {
        Self {
            hpa: Hpa(self.hpa.0 + index as u64 * level.span()),
            ..self
        }
    }
}

/// A format has no entry for this.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Unsupported {
    /// No entry allows just this.
    Permissions(Permissions),
    /// No entry has this memory type.
    Memory(MemoryType),
    /// The address has more bits than an entry holds, or is not aligned to the leaf.
    Address(Hpa),
    /// No leaf stands at this level.
    Level(Level),
}

impl fmt::Display for Unsupported {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Permissions(permissions) => {
                write!(f, "no entry of this format allows just {permissions}")
            }
            Self::Memory(memory) => write!(f, "no entry of this format makes memory {memory:?}"),
            Self::Address(hpa) => write!(f, "no entry of this format can point to {hpa}"),
            Self::Level(level) => write!(f, "this format has no leaf at {level}"),
        }
    }
}

impl core::error::Error for Unsupported {}
