//! Guest memory that devices read and write, by physical address: all of the first 4 GiB is mapped as it is.
//!
//! Unsafe: loads and stores at numbers. Every place is either in [`arenas`], which nothing else uses, or named by
//! an attack that wants it in the first page of RAM, which is nobody's.

use core::arch::asm;
use core::cell::UnsafeCell;
use core::hint::spin_loop;

/// What each device has for rings and buffers.
pub(crate) const ARENA_BYTES: u64 = 256 << 10;
/// Places for devices on the bus.
pub(crate) const SLOTS: usize = 14;
/// What is used by one attack at a time.
pub(crate) const SCRATCH_BYTES: u64 = 2 << 20;

const BYTES: usize = SLOTS * ARENA_BYTES as usize + SCRATCH_BYTES as usize;

#[repr(C, align(4096))]
struct Memory(UnsafeCell<[u8; BYTES]>);

// SAFETY: it is used by vCPU 0 alone, and by devices, through volatile accesses only.
unsafe impl Sync for Memory {}

static MEMORY: Memory = Memory(UnsafeCell::new([0; BYTES]));

/// The arena of the device in `slot`.
pub(crate) fn arena(slot: usize) -> u64 {
    MEMORY.0.get().expose_provenance() as u64 + slot as u64 * ARENA_BYTES
}

/// Memory that no device has for itself.
pub(crate) fn scratch() -> u64 {
    arena(SLOTS)
}

/// Integers, of which every bit pattern is a value.
pub(crate) trait Plain: Copy {}
impl Plain for u8 {}
impl Plain for u16 {}
impl Plain for u32 {}
impl Plain for u64 {}

pub(crate) fn load<T: Plain>(at: u64) -> T {
    // SAFETY: see the head of the file; any bytes are a `T`.
    unsafe { core::ptr::with_exposed_provenance::<T>(at as usize).read_volatile() }
}

pub(crate) fn store<T: Plain>(at: u64, value: T) {
    // SAFETY: see the head of the file.
    unsafe { core::ptr::with_exposed_provenance_mut::<T>(at as usize).write_volatile(value) };
}

/// Big-endian, as networks have it.
pub(crate) fn store_be16(at: u64, value: u16) {
    store(at, value.to_be_bytes()[0]);
    store(at + 1, value.to_be_bytes()[1]);
}

pub(crate) fn load_be16(at: u64) -> u16 {
    u16::from_be_bytes([load(at), load(at + 1)])
}

pub(crate) fn write(at: u64, bytes: &[u8]) {
    for (index, byte) in (0..).zip(bytes) {
        store(at + index, *byte);
    }
}

pub(crate) fn fill(at: u64, byte: u8, bytes: u64) {
    // SAFETY: as for `store`; the direction flag is clear by the ABI.
    unsafe {
        asm!("rep stosb", inout("rcx") bytes => _, inout("rdi") at => _, in("al") byte,
             options(nostack, preserves_flags));
    }
}

pub(crate) fn is_filled(at: u64, byte: u8, bytes: u64) -> bool {
    (at..at + bytes).all(|at| load::<u8>(at) == byte)
}

/// Orders what was written before against what is read or written behind it, as the device sees it.
pub(crate) fn barrier() {
    core::sync::atomic::fence(core::sync::atomic::Ordering::SeqCst);
}

/// A bounded wait: some ten seconds of looking at memory, so that a device that hangs does not hang the guest.
pub(crate) struct Patience(u32);

impl Patience {
    pub(crate) fn new() -> Self {
        Self(1 << 28)
    }

    /// One more look; false when there were enough.
    pub(crate) fn look(&mut self) -> bool {
        spin_loop();
        self.0 = self.0.saturating_sub(1);
        self.0 > 0
    }

    /// Whether it is time to look at a register, which costs as much as thousands of looks at memory.
    pub(crate) fn is_due(&self) -> bool {
        self.0.is_multiple_of(4096)
    }
}
