//! Processor instructions that need inline assembly, and the memory functions that the compiler calls.
//!
//! Unsafe: inline assembly, and the memory functions of C, which take raw pointers.

use core::arch::asm;

use crate::interface::{DEBUG_EXIT_PORT, SERIAL_PORT};

/// Line status register, and its bit "data ready" (16550 data sheet).
const LINE_STATUS_PORT: u16 = SERIAL_PORT + 5;
const DATA_READY: u8 = 1;

/// Operations of `port_access` in `boot.s`.
const READ: u8 = 0;
const WRITE: u8 = 1;

/// Sends one byte without checking that the transmitter is empty. It always is in a monitor, and the
/// check would cost as much as the write.
pub(crate) fn serial_send(byte: u8) {
    write_port(SERIAL_PORT, byte);
}

/// Returns a received byte, or `None` if there is none.
pub(crate) fn serial_receive() -> Option<u8> {
    (read_port(LINE_STATUS_PORT) & DATA_READY != 0).then(|| read_port(SERIAL_PORT))
}

/// Ends the guest with this exit status.
pub(crate) fn exit(status: u8) -> ! {
    write_port(DEBUG_EXIT_PORT, status);
    loop {
        core::hint::spin_loop();
    }
}

/// Reads the time-stamp counter.
#[inline]
pub(crate) fn time_stamp() -> u64 {
    // SAFETY: RDTSC only reads a counter. CR4.TSD is clear, so that ring 3 may execute it.
    unsafe { core::arch::x86_64::_rdtsc() }
}

fn write_port(port: u16, byte: u8) {
    // SAFETY: the exception handler, `port_access` in `boot.s`, runs on the stack of ring 0, executes
    // one `out` and returns. The devices at these ports do not access memory.
    unsafe {
        asm!("int3", in("cl") WRITE, in("dx") port, in("al") byte, options(nomem, nostack));
    }
}

fn read_port(port: u16) -> u8 {
    let byte;
    // SAFETY: as in `write_port`. The handler changes only AL.
    unsafe {
        asm!("int3", in("cl") READ, in("dx") port, out("al") byte, options(nomem, nostack));
    }
    byte
}

/// Raises an undefined-instruction exception.
pub(crate) fn crash() {
    // SAFETY: the exception handler prints a line and ends the guest.
    unsafe { asm!("ud2", options(nomem, nostack)) };
}

// These functions use string instructions, because the compiler would replace a plain loop by a call
// of the function itself.

/// C's `memcpy`.
///
/// # Safety
/// The requirements are those of the C function.
#[unsafe(no_mangle)]
unsafe extern "C" fn memcpy(to: *mut u8, from: *const u8, count: usize) -> *mut u8 {
    // SAFETY: the caller guarantees both ranges. The ABI guarantees a clear direction flag.
    unsafe {
        asm!("rep movsb", inout("rcx") count => _, inout("rdi") to => _, inout("rsi") from => _,
             options(nostack, preserves_flags));
    }
    to
}

/// C's `memmove`.
///
/// # Safety
/// The requirements are those of the C function.
#[unsafe(no_mangle)]
unsafe extern "C" fn memmove(to: *mut u8, from: *const u8, count: usize) -> *mut u8 {
    if to.addr().wrapping_sub(from.addr()) >= count {
        // SAFETY: in ascending order, no byte is overwritten before it is read.
        return unsafe { memcpy(to, from, count) };
    }
    // SAFETY: the caller guarantees both ranges. In descending order, no byte is overwritten before it
    // is read. The direction flag is cleared again.
    unsafe {
        asm!("std", "rep movsb", "cld", inout("rcx") count => _,
             inout("rdi") to.wrapping_add(count).wrapping_sub(1) => _,
             inout("rsi") from.wrapping_add(count).wrapping_sub(1) => _, options(nostack));
    }
    to
}

/// C's `memset`.
///
/// # Safety
/// The requirements are those of the C function.
#[unsafe(no_mangle)]
unsafe extern "C" fn memset(to: *mut u8, byte: i32, count: usize) -> *mut u8 {
    // SAFETY: the caller guarantees the range.
    unsafe {
        asm!("rep stosb", inout("rcx") count => _, inout("rdi") to => _, in("al") byte as u8,
             options(nostack, preserves_flags));
    }
    to
}

/// C's `memcmp`.
///
/// # Safety
/// The requirements are those of the C function.
#[unsafe(no_mangle)]
unsafe extern "C" fn memcmp(one: *const u8, other: *const u8, count: usize) -> i32 {
    let mut index = 0;
    while index < count {
        // SAFETY: the caller guarantees both ranges. Volatile, so that the compiler keeps the loop.
        let (a, b) = unsafe {
            (
                one.add(index).read_volatile(),
                other.add(index).read_volatile(),
            )
        };
        if a != b {
            return i32::from(a) - i32::from(b);
        }
        index += 1;
    }
    0
}

/// C's `bcmp`.
///
/// # Safety
/// The requirements are those of the C function.
#[unsafe(no_mangle)]
unsafe extern "C" fn bcmp(one: *const u8, other: *const u8, count: usize) -> i32 {
    // SAFETY: the requirements of both functions are the same.
    unsafe { memcmp(one, other, count) }
}
