//! The few processor instructions that Rust has no words for, and the memory functions that the
//! compiler calls.
//!
//! Unsafe: inline assembly, and C's memory functions by their nature.

use core::arch::asm;

use crate::interface::{DEBUG_EXIT_PORT, SERIAL_PORT};

/// Line status register, and its bit for "a byte was received" (16550 data sheet).
const LINE_STATUS_PORT: u16 = SERIAL_PORT + 5;
const DATA_READY: u8 = 1;

/// What `port_access` in `boot.s` is to do.
const READ: u8 = 0;
const WRITE: u8 = 1;

/// Sends one byte. The transmitter is not asked first: a monitor's is always ready, and asking
/// costs as much as sending.
pub(crate) fn serial_send(byte: u8) {
    write_port(SERIAL_PORT, byte);
}

/// Takes a byte that has been received.
pub(crate) fn serial_receive() -> Option<u8> {
    (read_port(LINE_STATUS_PORT) & DATA_READY != 0).then(|| read_port(SERIAL_PORT))
}

/// Ends the guest with this status.
pub(crate) fn exit(status: u8) -> ! {
    write_port(DEBUG_EXIT_PORT, status);
    loop {
        core::hint::spin_loop();
    }
}

/// The time-stamp counter.
#[inline]
pub(crate) fn time_stamp() -> u64 {
    // SAFETY: RDTSC reads a counter; CR4.TSD is clear, so ring 3 may.
    unsafe { core::arch::x86_64::_rdtsc() }
}

fn write_port(port: u16, byte: u8) {
    // SAFETY: the exception's handler, `port_access` in `boot.s`, does one `out` on ring 0's own
    // stack and returns; the devices at the ports used here do not access memory.
    unsafe {
        asm!("int3", in("cl") WRITE, in("dx") port, in("al") byte, options(nomem, nostack));
    }
}

fn read_port(port: u16) -> u8 {
    let byte;
    // SAFETY: as for writing; the handler changes AL only.
    unsafe {
        asm!("int3", in("cl") READ, in("dx") port, out("al") byte, options(nomem, nostack));
    }
    byte
}

/// Raises an undefined-instruction exception.
pub(crate) fn crash() {
    // SAFETY: the exception ends the guest in good order.
    unsafe { asm!("ud2", options(nomem, nostack)) };
}

// The loops must be string instructions: the compiler would turn plain loops into calls of the
// very functions that they are in.

/// C's `memcpy`.
///
/// # Safety
/// As in C.
#[unsafe(no_mangle)]
unsafe extern "C" fn memcpy(to: *mut u8, from: *const u8, count: usize) -> *mut u8 {
    // SAFETY: the caller vouches for both ranges; the direction flag is clear by the ABI.
    unsafe {
        asm!("rep movsb", inout("rcx") count => _, inout("rdi") to => _, inout("rsi") from => _,
             options(nostack, preserves_flags));
    }
    to
}

/// C's `memmove`.
///
/// # Safety
/// As in C.
#[unsafe(no_mangle)]
unsafe extern "C" fn memmove(to: *mut u8, from: *const u8, count: usize) -> *mut u8 {
    if to.addr().wrapping_sub(from.addr()) >= count {
        // SAFETY: ascending, no byte is overwritten before it is read.
        return unsafe { memcpy(to, from, count) };
    }
    // SAFETY: the caller vouches for both ranges; descending, no byte is overwritten before it is
    // read, and the direction flag is put back.
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
/// As in C.
#[unsafe(no_mangle)]
unsafe extern "C" fn memset(to: *mut u8, byte: i32, count: usize) -> *mut u8 {
    // SAFETY: the caller vouches for the range.
    unsafe {
        asm!("rep stosb", inout("rcx") count => _, inout("rdi") to => _, in("al") byte as u8,
             options(nostack, preserves_flags));
    }
    to
}

/// C's `memcmp`.
///
/// # Safety
/// As in C.
#[unsafe(no_mangle)]
unsafe extern "C" fn memcmp(one: *const u8, other: *const u8, count: usize) -> i32 {
    let mut index = 0;
    while index < count {
        // SAFETY: the caller vouches for both ranges. Volatile, so that the loop stays a loop.
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
/// As in C.
#[unsafe(no_mangle)]
unsafe extern "C" fn bcmp(one: *const u8, other: *const u8, count: usize) -> i32 {
    // SAFETY: the same promise.
    unsafe { memcmp(one, other, count) }
}
