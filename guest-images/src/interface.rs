//! The numbers that a guest program and its monitor agree on.

/// COM1's transmit and receive register (IBM PC/AT; 16550 data sheet, register 0).
pub const SERIAL_PORT: u16 = 0x3f8;

/// A byte written to this port ends the guest; it is the exit status.
pub const DEBUG_EXIT_PORT: u16 = 0xf4;

/// Exit status: the guest did what it was asked to do.
pub const EXIT_SUCCESS: u8 = 0;
/// Exit status: the command line, or the machine it was started on, does not suit.
pub const EXIT_BAD_REQUEST: u8 = 2;
/// Exit status: memory does not hold what was written to it.
pub const EXIT_MEMORY_FAULT: u8 = 3;
/// Exit status: the guest program itself went wrong (an exception or a panic).
pub const EXIT_CRASH: u8 = 4;
/// Exit status: a device did not refuse what it must, or did not live on.
pub const EXIT_NOT_REFUSED: u8 = 5;

/// Most vCPUs that a guest program runs on.
pub const MAX_CPUS: u32 = 16;

/// Bytes in a guest page.
pub const PAGE_SIZE: u64 = 4096;

/// Longest command line that a guest program reads, in bytes, without the final zero.
pub const CMDLINE_MOST: usize = 2047;

/// Owner name of the ELF note that holds the PVH entry (Xen, public/elfnote.h).
pub const PVH_NOTE_OWNER: &str = "Xen";
/// Type of the PVH note, `XEN_ELFNOTE_PHYS32_ENTRY` (Xen, public/elfnote.h).
pub const PVH_NOTE_TYPE: u32 = 18;

/// Owner name of the ELF note that holds the direct-start entry.
pub const DIRECT_START_NOTE_OWNER: &str = "Ferry";
/// Type of the direct-start note.
pub const DIRECT_START_NOTE_TYPE: u32 = 1;
