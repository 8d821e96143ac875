//! Checks of the ELF files that need no virtual machine.

use guest_images::interface::{
    DIRECT_START_NOTE_OWNER, DIRECT_START_NOTE_TYPE, PVH_NOTE_OWNER, PVH_NOTE_TYPE,
};
use guest_images::{DIRTIER, HELLO, RING_ATTACKER};

const PT_LOAD: u64 = 1;
const PT_NOTE: u64 = 4;

/// Reads a little-endian integer of `size` bytes.
fn integer(bytes: &[u8], at: usize, size: usize) -> u64 {
    bytes[at..at + size]
        .iter()
        .rev()
        .fold(0, |sum, byte| sum << 8 | u64::from(*byte))
}

fn index(bytes: &[u8], at: usize, size: usize) -> usize {
    usize::try_from(integer(bytes, at, size)).unwrap()
}

/// Returns the program headers (ELF-64 Object File Format, version 1.5, figure 6).
fn headers(elf: &[u8]) -> impl Iterator<Item = &[u8]> {
    let (first, size, count) = (index(elf, 32, 8), index(elf, 54, 2), index(elf, 56, 2));
    (0..count).map(move |number| &elf[first + number * size..][..size])
}

fn header(elf: &[u8], kind: u64) -> &[u8] {
    let mut found = headers(elf).filter(|header| integer(header, 0, 4) == kind);
    let header = found.next().expect("a program header of that type");
    assert!(found.next().is_none(), "one program header of type {kind}");
    header
}

/// Returns the descriptor of the note with this owner and type.
fn note<'a>(elf: &'a [u8], owner: &str, kind: u32) -> &'a [u8] {
    let header = header(elf, PT_NOTE);
    let mut notes = &elf[index(header, 8, 8)..][..index(header, 32, 8)];
    while !notes.is_empty() {
        let (name, descriptor) = (index(notes, 0, 4), index(notes, 4, 4));
        let name_end = 12 + name.next_multiple_of(4);
        let found = (&notes[12..12 + name - 1], integer(notes, 8, 4));
        if found == (owner.as_bytes(), u64::from(kind)) {
            return &notes[name_end..name_end + descriptor];
        }
        notes = &notes[name_end + descriptor.next_multiple_of(4)..];
    }
    panic!("no note {owner} of type {kind}");
}

#[test]
fn each_is_a_static_x86_64_program_in_one_piece_at_1_mib() {
    for elf in [HELLO, DIRTIER, RING_ATTACKER] {
        assert_eq!(&elf[..6], b"\x7fELF\x02\x01");
        assert_eq!(
            (integer(elf, 16, 2), integer(elf, 18, 2)),
            (2, 62),
            "ET_EXEC, EM_X86_64"
        );
        let load = header(elf, PT_LOAD);
        assert_eq!(integer(load, 24, 8), 1 << 20, "physical address");
        assert!(integer(load, 40, 8) >= integer(load, 32, 8), "memory size");
    }
}

#[test]
fn each_has_two_entry_points_within_its_segment() {
    for elf in [HELLO, DIRTIER, RING_ATTACKER] {
        let load = header(elf, PT_LOAD);
        let loaded = integer(load, 24, 8)..integer(load, 24, 8) + integer(load, 32, 8);
        let pvh = note(elf, PVH_NOTE_OWNER, PVH_NOTE_TYPE);
        let direct = note(elf, DIRECT_START_NOTE_OWNER, DIRECT_START_NOTE_TYPE);
        assert!(loaded.contains(&integer(pvh, 0, pvh.len())));
        assert!(loaded.contains(&integer(direct, 0, direct.len())));
        assert_eq!(
            integer(pvh, 0, pvh.len()),
            integer(elf, 24, 8),
            "the ELF entry as well"
        );
    }
}

#[test]
fn hello_fits_in_a_page() {
    assert!(integer(header(HELLO, PT_LOAD), 40, 8) <= 4096);
}
