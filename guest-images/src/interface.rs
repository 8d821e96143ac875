//! Constants of the interface between a guest program and its monitor.

/// I/O port of COM1's transmit and receive register (IBM PC/AT; 16550 data sheet, register 0).
pub const SERIAL_PORT: u16 = 0x3f8;

/// I/O port of the debug exit. Writing a byte ends the guest with that exit status.
pub const DEBUG_EXIT_PORT: u16 = 0xf4;

/// Exit status: success.
pub const EXIT_SUCCESS: u8 = 0;
/// Exit status: the command line is invalid, or the machine cannot run the program.
pub const EXIT_BAD_REQUEST: u8 = 2;
/// Exit status: a lost or torn write was found.
pub const EXIT_MEMORY_FAULT: u8 = 3;
/// Exit status: the guest program crashed with an exception or a panic.
pub const EXIT_CRASH: u8 = 4;
/// Exit status: a device handled an attack in an unexpected way or stopped working.
pub const EXIT_NOT_REFUSED: u8 = 5;

/// Maximum number of vCPUs of a guest program.
pub const MAX_CPUS: u32 = 16;

/// Size of a guest page in bytes.
pub const PAGE_SIZE: u64 = 4096;

/// Maximum length of the command line in bytes, without the final zero.
pub const CMDLINE_MOST: usize = 2047;

/// Owner name of the ELF note that holds the PVH entry (Xen, public/elfnote.h).
pub const PVH_NOTE_OWNER: &str = "Xen";
/// Type of the PVH note, `XEN_ELFNOTE_PHYS32_ENTRY` (Xen, public/elfnote.h).
pub const PVH_NOTE_TYPE: u32 = 18;

/// Owner name of the ELF note that holds the direct-start entry.
pub const DIRECT_START_NOTE_OWNER: &str = "Ferry";
/// Type of the direct-start note.
pub const DIRECT_START_NOTE_TYPE: u32 = 1;
