//! A walker of raw words, as hardware would be: written from the manuals, with nothing of the crate.

#![allow(dead_code, reason = "each test program uses a part of it")]

use std::sync::atomic::{AtomicU64, Ordering};

use ept::format::Permissions;

/// What hardware of one kind does.
#[derive(Clone, Copy)]
pub(crate) struct Kind {
    /// Level of the root's entries, counted from 0 for 4 KiB.
    root_level: u32,
    /// Bits of guest-physical address.
    gpa_bits: u32,
    /// What an entry means, for (raw, level).
    read: fn(u64, u32) -> Read,
    /// Bits to set by an access of this kind.
    touch: fn(Touch) -> u64,
}

/// What an entry means.
pub(crate) enum Read {
    /// Nothing is there.
    Nothing,
    /// The next table's address.
    Table(u64),
    /// The leaf's address, unmasked, and its permissions.
    Leaf(u64, Permissions),
}

/// What a guest did.
#[derive(Clone, Copy, PartialEq)]
pub(crate) enum Touch {
    /// Read.
    Read,
    /// Written.
    Write,
}

const fn kind(
    root_level: u32,
    gpa_bits: u32,
    read: fn(u64, u32) -> Read,
    touch: fn(Touch) -> u64,
) -> Kind {
    Kind {
        root_level,
        gpa_bits,
        read,
        touch,
    }
}

pub(crate) const EPT4: Kind = kind(3, 48, ept, ept_touch);
pub(crate) const EPT5: Kind = kind(4, 57, ept, ept_touch);
pub(crate) const NPT4: Kind = kind(3, 48, npt, npt_touch);
pub(crate) const NPT5: Kind = kind(4, 57, npt, npt_touch);
pub(crate) const ARM31: Kind = kind(1, 31, arm, arm_touch);
pub(crate) const ARM34: Kind = kind(1, 34, arm, arm_touch);
pub(crate) const ARM40: Kind = kind(2, 40, arm, arm_touch);
pub(crate) const ARM43: Kind = kind(2, 43, arm, arm_touch);
pub(crate) const ARM44: Kind = kind(3, 44, arm, arm_touch);
pub(crate) const ARM48: Kind = kind(3, 48, arm, arm_touch);
pub(crate) const SV39X4: Kind = kind(2, 41, riscv, riscv_touch);
pub(crate) const SV48X4: Kind = kind(3, 50, riscv, riscv_touch);
pub(crate) const SV57X4: Kind = kind(4, 59, riscv, riscv_touch);

const IN_PLACE: u64 = 0x000f_ffff_ffff_f000;

fn granted(read: bool, write: bool, execute: bool) -> Permissions {
    let one = |on, what| if on { what } else { Permissions::NONE };
    one(read, Permissions::READ)
        .union(one(write, Permissions::WRITE))
        .union(one(execute, Permissions::EXECUTE))
}

fn ept(raw: u64, level: u32) -> Read {
    match (raw & 7, level, raw >> 7 & 1) {
        (0, ..) => Read::Nothing,
        (_, 0, _) | (_, 1 | 2, 1) => {
            let allowed = granted(raw & 1 != 0, raw & 2 != 0, raw & 4 != 0);
            Read::Leaf(raw & IN_PLACE, allowed)
        }
        _ => Read::Table(raw & IN_PLACE),
    }
}

fn ept_touch(touch: Touch) -> u64 {
    if touch == Touch::Write { 0x300 } else { 0x100 }
}

fn npt(raw: u64, level: u32) -> Read {
    match (raw & 1, level, raw >> 7 & 1) {
        (0, ..) => Read::Nothing,
        (_, 0, _) | (_, 1 | 2, 1) => {
            let user = raw & 4 != 0;
            let allowed = granted(user, user && raw & 2 != 0, user && raw >> 63 == 0);
            let pat = if level == 0 { 0 } else { 0x1000 };
            Read::Leaf(raw & IN_PLACE & !pat, allowed)
        }
        _ => Read::Table(raw & IN_PLACE),
    }
}

fn npt_touch(touch: Touch) -> u64 {
    if touch == Touch::Write { 0x60 } else { 0x20 }
}

fn arm(raw: u64, level: u32) -> Read {
    let address = raw & 0x0000_ffff_ffff_f000;
    match (raw & 3, level) {
        (3, 0) | (1, 1 | 2) => {
            let writable = raw >> 51 & 1 != 0 || raw >> 7 & 1 != 0;
            let allowed = granted(raw >> 6 & 1 != 0, writable, raw >> 54 & 1 == 0);
            Read::Leaf(address, allowed)
        }
        (3, _) => Read::Table(address),
        _ => Read::Nothing,
    }
}

fn arm_touch(touch: Touch) -> u64 {
    if touch == Touch::Write { 0x480 } else { 0x400 }
}

fn riscv(raw: u64, _: u32) -> Read {
    let address = (raw >> 10 & 0xfff_ffff_ffff) << 12;
    match (raw & 1, raw & 0xe) {
        (0, _) => Read::Nothing,
        (_, 0) => Read::Table(address),
        _ => {
            assert_ne!(raw & 0x10, 0, "not a user's");
            Read::Leaf(address, granted(raw & 2 != 0, raw & 4 != 0, raw & 8 != 0))
        }
    }
}

fn riscv_touch(touch: Touch) -> u64 {
    if touch == Touch::Write { 0xc0 } else { 0x40 }
}

/// Hardware that walks `words`, which it finds at `base`; the root is first.
pub(crate) struct Mmu<'w> {
    kind: Kind,
    words: &'w [AtomicU64],
    base: u64,
}

impl<'w> Mmu<'w> {
    pub(crate) fn new(kind: Kind, words: &'w [AtomicU64], base: u64) -> Self {
        Self { kind, words, base }
    }

    /// Shows every word of the tables that hardware can find: (index of the word, level, raw value).
    pub(crate) fn for_each_entry(&self, show: &mut dyn FnMut(usize, u32, u64)) {
        let entries = 1 << (self.kind.gpa_bits - 12 - 9 * self.kind.root_level);
        self.entries_of(self.base, entries, self.kind.root_level, show);
    }

    fn entries_of(
        &self,
        table: u64,
        entries: usize,
        level: u32,
        show: &mut dyn FnMut(usize, u32, u64),
    ) {
        let first = usize::try_from((table - self.base) / 8).unwrap();
        for index in first..first + entries {
            let raw = self.words[index].load(Ordering::SeqCst);
            show(index, level, raw);
            if let Read::Table(below) = (self.kind.read)(raw, level) {
                self.entries_of(below, 512, level - 1, show);
            }
        }
    }

    /// Where `gpa` leads to, and what is allowed there.
    pub(crate) fn translate(&self, gpa: u64) -> Option<(u64, Permissions)> {
        let (_, level, address, permissions) = self.leaf(gpa)?;
        let inside = gpa & ((1 << (12 + 9 * level)) - 1);
        assert_eq!(
            address & ((1 << (12 + 9 * level)) - 1),
            0,
            "misaligned leaf"
        );
        Some((address + inside, permissions))
    }

    /// Pages that the leaf over `gpa` maps.
    pub(crate) fn leaf_pages(&self, gpa: u64) -> Option<u64> {
        self.leaf(gpa).map(|(_, level, ..)| 1 << (9 * level))
    }

    /// Sets the flags that hardware sets when a guest does this.
    pub(crate) fn touch(&self, gpa: u64, touch: Touch) {
        let (slot, ..) = self.leaf(gpa).expect("a guest touches what is mapped");
        slot.fetch_or((self.kind.touch)(touch), Ordering::SeqCst);
    }

    fn leaf(&self, gpa: u64) -> Option<(&'w AtomicU64, u32, u64, Permissions)> {
        assert_eq!(gpa >> self.kind.gpa_bits, 0, "{gpa:#x} is too wide");
        let (mut table, mut level) = (self.base, self.kind.root_level);
        // The root takes all bits that are left.
        let mut index = gpa >> (12 + 9 * level);
        loop {
            let word = (table - self.base) / 8 + index;
            let slot = &self.words[usize::try_from(word).unwrap()];
            match (self.kind.read)(slot.load(Ordering::SeqCst), level) {
                Read::Nothing => return None,
                Read::Leaf(address, permissions) => {
                    return Some((slot, level, address, permissions));
                }
                Read::Table(next) => {
                    table = next;
                    level -= 1;
                    index = gpa >> (12 + 9 * level) & 511;
                }
            }
        }
    }
}
