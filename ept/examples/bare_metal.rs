//! An EPT for a hypervisor that runs on the bare machine: no operating system, no standard library.
//! The hypervisor calls [`ferry_bare_metal`] once with memory for tables, and writes what it returns into the VMCS.
//! Built as the library that it links: `cargo rustc -p ferry-ept --example bare_metal --crate-type staticlib
//! --no-default-features --release -- -C panic=abort`.
//! `unsafe` for what only a program without an operating system does: it is the global allocator, and takes
//! memory from its caller by address.
#![no_std]
#![allow(unsafe_code, missing_docs)]

use core::alloc::{GlobalAlloc, Layout};
use core::cell::UnsafeCell;
use core::sync::atomic::{AtomicU64, AtomicUsize, Ordering};

use ept::format::{Ept, EptFeatures, EptLevels, MemoryType, Permissions};
use ept::stage2::{Attributes, Stage2};
use ept::{Gpa, GpaRange, Hpa, Level};

/// Gives memory and never takes it back: all that is ever asked for is one list of free tables.
struct Heap(UnsafeCell<[u8; 65536]>, AtomicUsize);

#[global_allocator]
static HEAP: Heap = Heap(UnsafeCell::new([0; 65536]), AtomicUsize::new(0));
// SAFETY: each byte is given out once, by the counter.
unsafe impl Sync for Heap {}
// SAFETY: the pointer is into the array, aligned, and nobody else's; null where there is no room.
unsafe impl GlobalAlloc for Heap {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        let room = layout.size() + layout.align();
        let at = self.1.fetch_add(room, Ordering::Relaxed);
        if at.saturating_add(room) > 65536 {
            return core::ptr::null_mut();
        }
        let start = self.0.get().cast::<u8>().wrapping_add(at);
        start.wrapping_add(start.align_offset(layout.align()))
    }

    unsafe fn dealloc(&self, _: *mut u8, _: Layout) {}
}

#[cfg(not(feature = "std"))]
#[panic_handler]
fn halt(_: &core::panic::PanicInfo<'_>) -> ! {
    loop {
        core::hint::spin_loop();
    }
}

/// Maps the guest's first `bytes` to the memory at `hpa`, in leaves as large as it can be. Returns the EPTP, or 0.
///
/// # Safety
/// `tables` points to `count` zeroed pages that nobody else uses, mapped to their own physical address.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn ferry_bare_metal(
    tables: *const AtomicU64,
    count: usize,
    hpa: u64,
    bytes: u64,
) -> u64 {
    // SAFETY: as the caller promises; they are used for ever.
    let words: &'static [AtomicU64] =
        unsafe { core::slice::from_raw_parts(tables, count.saturating_mul(512)) };
    guest(words, Hpa(tables.addr() as u64), Hpa(hpa), bytes).unwrap_or(0)
}

fn guest(words: &'static [AtomicU64], base: Hpa, hpa: Hpa, bytes: u64) -> Option<u64> {
    let format = Ept {
        levels: EptLevels::Four,
        features: EptFeatures::ACCESSED_DIRTY,
    };
    let stage2 = Stage2::new(format, words, base).ok()?;
    let attributes = Attributes {
        permissions: Permissions::ALL,
        memory: MemoryType::WriteBack,
        largest: Level::GIB,
    };
    let range = GpaRange::with_len(Gpa(0), bytes).ok()?;
    stage2.map(range, hpa, attributes).ok()?;
    Some(format.pointer(stage2.root_id()))
}
