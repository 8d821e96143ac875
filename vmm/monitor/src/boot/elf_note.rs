//! The "direct start" note of a kernel image, and the check for ELF images that are programs.
//!
//! The note is an ELF note with owner `Ferry` and type 1, whose descriptor is a 32-bit physical address. It asks the
//! monitor to start every vCPU except vCPU 0 at this address, in the PVH start state, with the index of the vCPU in
//! eax. It exists for hosts on which INIT and SIPI do not work because KVM emulates ring 0.
//!
//! Sources: ELF-64 Object File Format, "Program header" and "Note section".

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;

use vm_memory::GuestAddress;

/// Owner (name) of the note, with its terminating zero.
const OWNER: &[u8] = b"Ferry\0";
/// Type of the direct-start note.
const DIRECT_START: u32 = 1;
/// Type of a program header that names the interpreter.
const PT_INTERP: u32 = 3;
/// Type of a program header of notes.
const PT_NOTE: u32 = 4;
/// Bytes of one program header.
const PROGRAM_HEADER_BYTES: u64 = 56;
/// Maximum bytes of notes that are searched in one program header.
const NOTES_LIMIT: u64 = 64 * 1024;

/// Returns the address in the direct-start note of the image. Returns `None` if the file is not an ELF image or has no
/// such note.
pub(super) fn direct_start(file: &mut File) -> io::Result<Option<GuestAddress>> {
    for program in program_headers(file)? {
        if u32::from_le_bytes(field(&program, 0)) == PT_NOTE
            && let Some(found) = search(file, &program)?
        {
            return Ok(Some(found));
        }
    }
    Ok(None)
}

/// Returns true if the ELF image names an interpreter (PT_INTERP), as programs for an operating system do.
pub(super) fn is_program(file: &File) -> io::Result<bool> {
    let kind = |program: &[u8; 56]| u32::from_le_bytes(field(program, 0));
    Ok(program_headers(file)?.iter().any(|p| kind(p) == PT_INTERP))
}

/// Returns the program headers in the file. The list is empty if the file is not an ELF image.
fn program_headers(file: &File) -> io::Result<Vec<[u8; 56]>> {
    let mut found = Vec::new();
    let mut header = [0; 64];
    if !read_fully(file, &mut header, 0)? || !header.starts_with(b"\x7fELF") {
        return Ok(found);
    }
    let first = u64::from_le_bytes(field(&header, 32));
    let count = u16::from_le_bytes(field(&header, 56));
    for index in 0..u64::from(count) {
        let mut program = [0; 56];
        let Some(at) = first.checked_add(index * PROGRAM_HEADER_BYTES) else {
            break;
        };
        if !read_fully(file, &mut program, at)? {
            break;
        }
        found.push(program);
    }
    Ok(found)
}

/// Searches the notes of one program header for the direct-start note.
fn search(file: &File, program: &[u8; 56]) -> io::Result<Option<GuestAddress>> {
    let offset = u64::from_le_bytes(field(program, 8));
    let size = u64::from_le_bytes(field(program, 32)).min(NOTES_LIMIT);
    let mut notes = vec![0; usize::try_from(size).map_err(io::Error::other)?];
    if !read_fully(file, &mut notes, offset)? {
        return Ok(None);
    }
    Ok(in_notes(&notes))
}

/// Searches a sequence of notes for the direct-start note. Each note is name size, descriptor size, type, name and
/// descriptor; name and descriptor are padded to 4 bytes.
fn in_notes(mut notes: &[u8]) -> Option<GuestAddress> {
    loop {
        let (head, rest) = notes.split_at_checked(12)?;
        let name_size = usize::try_from(u32::from_le_bytes(field(head, 0))).ok()?;
        let size = usize::try_from(u32::from_le_bytes(field(head, 4))).ok()?;
        let (name, rest) = rest.split_at_checked(name_size.checked_next_multiple_of(4)?)?;
        let (descriptor, rest) = rest.split_at_checked(size.checked_next_multiple_of(4)?)?;
        let ours = name.get(..name_size) == Some(OWNER);
        if ours && u32::from_le_bytes(field(head, 8)) == DIRECT_START && size == 4 {
            return Some(GuestAddress(u64::from(u32::from_le_bytes(field(
                descriptor, 0,
            )))));
        }
        notes = rest;
    }
}

/// Fills `bytes` from the file. Returns false if the file ends earlier, or cannot have such an offset.
fn read_fully(file: &File, bytes: &mut [u8], offset: u64) -> io::Result<bool> {
    match file.read_exact_at(bytes, offset) {
        Ok(()) => Ok(true),
        Err(error)
            if matches!(
                error.kind(),
                io::ErrorKind::UnexpectedEof | io::ErrorKind::InvalidInput
            ) =>
        {
            Ok(false)
        }
        Err(error) => Err(error),
    }
}

/// Returns the `N` bytes at offset `at`, which must be inside `bytes`.
fn field<const N: usize>(bytes: &[u8], at: usize) -> [u8; N] {
    let mut field = [0; N];
    field.copy_from_slice(&bytes[at..at + N]);
    field
}

#[cfg(test)]
mod tests {
    use super::*;

    fn note(owner: &[u8], kind: u32, descriptor: &[u8]) -> Vec<u8> {
        let mut bytes = Vec::new();
        bytes.extend(u32::try_from(owner.len()).unwrap().to_le_bytes());
        bytes.extend(u32::try_from(descriptor.len()).unwrap().to_le_bytes());
        bytes.extend(kind.to_le_bytes());
        for part in [owner, descriptor] {
            bytes.extend(part);
            bytes.resize(bytes.len().next_multiple_of(4), 0);
        }
        bytes
    }

    #[test]
    fn the_note_is_found_among_others() {
        let mut notes = note(b"Xen\0", 18, &[1, 2, 3, 4, 5, 6, 7, 8]);
        notes.extend(note(b"Ferry\0", 2, &[9; 4]));
        notes.extend(note(b"Ferry\0", DIRECT_START, &0x10_2030_u32.to_le_bytes()));
        assert_eq!(in_notes(&notes), Some(GuestAddress(0x10_2030)));
    }

    #[test]
    fn broken_notes_are_no_note() {
        let whole = note(b"Ferry\0", DIRECT_START, &[1; 4]);
        for cut in 0..whole.len() {
            assert_eq!(in_notes(&whole[..cut]), None, "cut at {cut}");
        }
        assert_eq!(in_notes(&[0xff; 64]), None);
        assert_eq!(in_notes(&note(b"Ferry\0", DIRECT_START, &[1; 8])), None);
    }
}
