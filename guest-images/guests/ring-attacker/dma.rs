//! Guest memory that devices read and write, by physical address. The first 4 GiB are identity mapped.
//!
//! Unsafe: loads and stores at addresses that are numbers. Each address is in [`MEMORY`], which nothing else uses, or in
//! the first page of RAM, which is unused and which one attack needs.

use core::arch::asm;
use core::cell::UnsafeCell;
use core::hint::spin_loop;

/// Size of the arena of a device, which contains its rings and buffers.
pub(crate) const ARENA_BYTES: u64 = 256 << 10;
/// Number of slots for devices on the bus.
pub(crate) const SLOTS: usize = 14;
/// Size of the memory for the current attack.
pub(crate) const SCRATCH_BYTES: u64 = 2 << 20;

const BYTES: usize = SLOTS * ARENA_BYTES as usize + SCRATCH_BYTES as usize;

#[repr(C, align(4096))]
struct Memory(UnsafeCell<[u8; BYTES]>);

// SAFETY: only vCPU 0 and devices use it, and vCPU 0 only by volatile accesses.
unsafe impl Sync for Memory {}

static MEMORY: Memory = Memory(UnsafeCell::new([0; BYTES]));

/// Returns the address of the arena of the device in `slot`.
pub(crate) fn arena(slot: usize) -> u64 {
    MEMORY.0.get().expose_provenance() as u64 + slot as u64 * ARENA_BYTES
}

/// Returns the address of the memory for the current attack.
pub(crate) fn scratch() -> u64 {
    arena(SLOTS)
}

/// Integer types, for which every bit pattern is a valid value.
pub(crate) trait Plain: Copy {}
impl Plain for u8 {}
impl Plain for u16 {}
impl Plain for u32 {}
impl Plain for u64 {}

pub(crate) fn load<T: Plain>(at: u64) -> T {
    // SAFETY: see the head of the file. Any bytes are a valid `T`.
    unsafe { core::ptr::with_exposed_provenance::<T>(at as usize).read_volatile() }
}

pub(crate) fn store<T: Plain>(at: u64, value: T) {
    // SAFETY: see the head of the file.
    unsafe { core::ptr::with_exposed_provenance_mut::<T>(at as usize).write_volatile(value) };
}

/// Stores a number in network byte order (big-endian).
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
    // SAFETY: as in `store`. The ABI guarantees a clear direction flag.
    unsafe {
        asm!("rep stosb", inout("rcx") bytes => _, inout("rdi") at => _, in("al") byte,
             options(nostack, preserves_flags));
    }
}

pub(crate) fn is_filled(at: u64, byte: u8, bytes: u64) -> bool {
    (at..at + bytes).all(|at| load::<u8>(at) == byte)
}

/// Memory barrier between the accesses before and after it, as the device sees them.
pub(crate) fn barrier() {
    core::sync::atomic::fence(core::sync::atomic::Ordering::SeqCst);
}

/// Limit of a polling loop: about ten seconds, so that a hanging device does not hang the guest.
pub(crate) struct Patience(u32);

impl Patience {
    pub(crate) fn new() -> Self {
        Self(1 << 28)
    }

    /// Counts one poll. Returns false when the limit is reached.
    pub(crate) fn look(&mut self) -> bool {
        spin_loop();
        self.0 = self.0.saturating_sub(1);
        self.0 > 0
    }

    /// Returns true if a register should be read now. A register access costs as much as thousands of memory accesses.
    pub(crate) fn is_due(&self) -> bool {
        self.0.is_multiple_of(4096)
    }
}
