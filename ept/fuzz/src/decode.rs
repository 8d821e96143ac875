//! Words that may be anything, also what no table of the crate's ever holds.

use arbitrary::Arbitrary;
use ept::format::{Entry, HardwareFormat, Leaf, Permissions};
use ept::{Hpa, Level};

use crate::formats::{Choice, Hardware, Job, Kept};
use crate::hostile::{Hostile, Step};

/// Words for every level of a format, and for leaf tables.
#[derive(Arbitrary, Debug)]
pub struct Raw {
    format: Choice,
    permissions: u8,
    words: Vec<u64>,
    tables: Option<[Step; 4]>,
}

impl Raw {
    /// Decodes them everywhere, and asks the format all that can be asked of them.
    pub fn run(self) {
        for raw in self.words.iter().copied() {
            self.format.with(Word {
                raw,
                permissions: permissions(self.permissions),
            });
        }
        if let Some(steps) = self.tables {
            self.format.with(Hostile {
                words: &self.words,
                steps,
            });
        }
    }
}

/// Any of the eight.
pub(crate) fn permissions(bits: u8) -> Permissions {
    let one = |bit, permission| {
        if bits & bit != 0 {
            permission
        } else {
            Permissions::NONE
        }
    };
    one(1, Permissions::READ)
        .union(one(2, Permissions::WRITE))
        .union(one(4, Permissions::EXECUTE))
}

struct Word {
    raw: u64,
    permissions: Permissions,
}

impl Job for Word {
    fn run<F: HardwareFormat>(self, format: F, hardware: Hardware) {
        let root = format.geometry().root_level();
        for level in (0..=root.number()).filter_map(Level::new) {
            match format.decode(self.raw, level) {
                Entry::Absent => assert_eq!(format.encode(Entry::Absent, level), 0),
                Entry::Table(table) => {
                    let again = format.encode(Entry::Table(table), level);
                    assert_eq!(format.decode(again, level), Entry::Table(table));
                }
                Entry::Leaf(leaf) => Checked {
                    format,
                    hardware,
                    level,
                    raw: self.raw,
                    leaf,
                }
                .all(self.permissions),
            }
        }
        assert_eq!(format.decode(0, root), Entry::Absent);
    }
}

/// A word that says leaf.
struct Checked<F> {
    format: F,
    hardware: Hardware,
    level: Level,
    raw: u64,
    leaf: Leaf,
}

impl<F: HardwareFormat> Checked<F> {
    fn all(&self, permissions: Permissions) {
        assert!(self.level <= self.format.largest_leaf(), "{self}");
        self.comes_back();
        self.takes_permissions(permissions);
        self.loses_flags();
    }

    fn decode(&self, raw: u64) -> Leaf {
        match self.format.decode(raw, self.level) {
            Entry::Leaf(leaf) => leaf,
            other => panic!("{self} became {other:?}"),
        }
    }

    /// What the crate itself would write for this leaf says the same, if the format has it at all.
    fn comes_back(&self) {
        if self.format.check(&self.leaf, self.level).is_err() {
            return;
        }
        let made = self.format.encode(Entry::Leaf(self.leaf), self.level);
        assert_eq!(self.decode(made), self.counted(self.leaf), "{self}");
        let again = Entry::Leaf(self.decode(made));
        assert_eq!(self.format.encode(again, self.level), made, "{self}");
    }

    /// Flags that nobody keeps are set where they could be.
    fn counted(&self, leaf: Leaf) -> Leaf {
        let writable = leaf.permissions.allows(Permissions::WRITE);
        Leaf {
            accessed: leaf.accessed || self.hardware.accessed == Kept::Always,
            dirty: leaf.dirty || writable && self.hardware.dirty == Kept::Always,
            ..leaf
        }
    }

    /// Other permissions, and nothing else: not even bits that the format does not know.
    fn takes_permissions(&self, permissions: Permissions) {
        if !self.format.admits(permissions) {
            return;
        }
        let raw = self
            .format
            .with_permissions(self.raw, self.level, permissions);
        let (found, foreign) = (self.decode(raw), !self.hardware.permission_bits);
        assert_eq!(raw & foreign, self.raw & foreign, "{self}: foreign bits");
        let expected = Leaf {
            permissions,
            dirty: found.dirty,
            ..self.leaf
        };
        assert_eq!(found, expected, "{self}");
        assert!(found.dirty || !self.leaf.dirty, "{self} was dirty");
        let expected = self.counted(expected).dirty || self.leaf.dirty;
        assert!(expected || !found.dirty, "{self} was clean");
    }

    /// One atomic and takes one flag, and nothing else.
    fn loses_flags(&self) {
        let found = self.decode(self.raw & !self.format.dirty_bits(self.raw));
        let needs = self.hardware.dirty_needs;
        let kept = match needs {
            0 => self.hardware.dirty != Kept::Always,
            needs => self.raw & needs != 0,
        };
        let counts = self.leaf.permissions.allows(Permissions::WRITE) && !kept;
        let dirty = self.leaf.dirty && counts;
        assert_eq!(found, Leaf { dirty, ..self.leaf }, "{self}");

        let bits = self.format.accessed_bits(self.raw);
        let found = self.decode(self.raw & !bits);
        let accessed = self.leaf.accessed && bits == 0;
        let expected = Leaf {
            accessed,
            ..self.leaf
        };
        assert_eq!(found, expected, "{self}");
        assert!(bits != 0 || self.hardware.accessed == Kept::Always);
    }
}

impl<F: HardwareFormat> std::fmt::Display for Checked<F> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Hpa(hpa) = self.leaf.hpa;
        write!(
            f,
            "{:#x} at {}, a leaf to {hpa:#x}, {}",
            self.raw, self.level, self.leaf.permissions
        )
    }
}
