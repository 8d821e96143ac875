//! Loads and stores of registers, in every width.
//!
//! Unsafe: inline assembly, because a compiler may make any instruction of a volatile access, and those who emulate
//! it know some of them only.

use core::arch::asm;

macro_rules! access {
    ($read:ident, $write:ident, $type:ty, $class:ident, $shape:literal) => {
        pub(crate) fn $read(at: u64) -> $type {
            let value: $type;
            // SAFETY: registers of devices are mapped, and reading them changes no memory of this program.
            unsafe {
                asm!(concat!("mov {value", $shape, "}, [{at}]"), value = out($class) value, at = in(reg) at,
                     options(nostack, preserves_flags));
            }
            value
        }

        pub(crate) fn $write(at: u64, value: $type) {
            // SAFETY: what a register makes a device write lies in memory that was made for it.
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
