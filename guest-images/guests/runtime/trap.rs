//! Exception handlers. Ring 3 requests port accesses with the breakpoint exception. Any other
//! exception is an error: its handler prints a line and ends the guest.
//!
//! Unsafe: writes the interrupt descriptor table. Ring 3 fills in its gates, because instructions in
//! ring 0 are slow on some hosts. An exception before that is a triple fault.

use core::fmt;

use crate::NAME;
use crate::console;
use crate::interface::EXIT_CRASH;

const VECTORS: usize = 32;
const BREAKPOINT: usize = 3;
/// Distance between two exception stubs in `boot.s`.
const STUB_SIZE: usize = 16;
const KERNEL_CODE: u64 = 0x08;
/// Present, 64-bit interrupt gate (Intel SDM vol. 3A, 6.14.1).
const GATE: u64 = 0x8e00;
/// The same gate with privilege level 3, so that `int3` in ring 3 may use it.
const OPEN_GATE: u64 = 0xee00;

unsafe extern "C" {
    static mut exception_gates: [[u64; 2]; VECTORS];
    static exception_stubs: u8;
    static port_access: u8;
}

/// Fills in the gates. Nothing can be printed before. vCPU 0 calls this once.
pub(crate) fn install() {
    for vector in 0..VECTORS {
        let stub = (&raw const exception_stubs).addr() + vector * STUB_SIZE;
        set(vector, gate(GATE, stub));
    }
    set(BREAKPOINT, gate(OPEN_GATE, (&raw const port_access).addr()));
}

fn set(vector: usize, gate: [u64; 2]) {
    // SAFETY: `vector` is below `VECTORS`, and only vCPU 0 writes the table, before the other vCPUs begin.
    unsafe {
        (&raw mut exception_gates)
            .cast::<[u64; 2]>()
            .add(vector)
            .write_volatile(gate);
    }
}

/// Returns the descriptor of a gate to a handler below 4 GiB.
fn gate(kind: u64, handler: usize) -> [u64; 2] {
    let handler = handler as u64;
    [
        (handler & 0xffff) | KERNEL_CODE << 16 | kind << 32 | (handler >> 16) << 48,
        0,
    ]
}

struct Exception {
    vector: u64,
    error: u64,
    instruction: u64,
    address: u64,
}

impl fmt::Display for Exception {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self {
            vector,
            error,
            instruction,
            address,
        } = self;
        write!(out, "{NAME}: EXCEPTION vector={vector} error={error:#x} ")?;
        write!(out, "rip={instruction:#x} cr2={address:#x}")
    }
}

/// Reports an exception and ends the guest. `boot.s` calls it in ring 3 on the interrupted stack.
#[unsafe(no_mangle)]
extern "C" fn report_exception(vector: u64, error: u64, instruction: u64, address: u64) -> ! {
    console::crash(
        Exception {
            vector,
            error,
            instruction,
            address,
        },
        EXIT_CRASH,
    )
}
