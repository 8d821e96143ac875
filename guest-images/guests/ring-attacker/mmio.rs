//! Loads and stores of device registers, in every width.
//!
//! Unsafe: inline assembly. A compiler may choose any instruction for a volatile access, but hosts emulate only some of
//! them for MMIO.

use core::arch::asm;

macro_rules! access {
    ($read:ident, $write:ident, $type:ty, $class:ident, $shape:literal) => {
        pub(crate) fn $read(at: u64) -> $type {
            let value: $type;
            // SAFETY: device registers are mapped, and a read changes no memory of this program.
            unsafe {
                asm!(concat!("mov {value", $shape, "}, [{at}]"), value = out($class) value, at = in(reg) at,
                     options(nostack, preserves_flags));
            }
            value
        }

        pub(crate) fn $write(at: u64, value: $type) {
            // SAFETY: a write makes a device write only to memory that is reserved for it.
            unsafe {
                asm!(concat!("mov [{at}], {value", $shape, "}"), value = in($class) value, at = in(reg) at,
                     options(nostack, preserves_flags));
            }
        }
    };
}

access!(read8, write8, u8, reg_byte, "");
access!(read16, write16, u16, reg, ":x");
access!(read32, write32, u32, reg, ":e");
access!(read64, write64, u64, reg, "");
