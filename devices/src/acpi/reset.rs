//! ACPI reset register. The FADT describes its port, and the value that resets the machine.
//!
//! Specification: ACPI 6.5, section 4.8.3.6.

use crate::{BusDevice, PortSpace};

/// Port of the reset register, 1 byte wide.
pub const RESET_PORT: u16 = 0x602;
/// RESET_VALUE of the FADT, which resets the machine when the guest writes it. Other values have no effect.
pub const RESET_VALUE: u8 = 0x01;

/// ACPI reset register. Calls `on_reset` when the guest resets the machine. It has no state to save.
pub struct ResetRegister<F> {
    on_reset: F,
}

impl<F: Fn() + Send> ResetRegister<F> {
    /// Creates a register that calls `on_reset`.
    pub fn new(on_reset: F) -> Self {
        Self { on_reset }
    }
}

impl<F: Fn() + Send> BusDevice<PortSpace> for ResetRegister<F> {
    /// The register is write-only and reads as 0.
    fn read(&mut self, _offset: u16, data: &mut [u8]) {
        data.fill(0);
    }

    fn write(&mut self, _offset: u16, data: &[u8]) {
        if data.first() == Some(&RESET_VALUE) {
            (self.on_reset)();
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicU32, Ordering};

    use super::*;

    #[test]
    fn only_the_value_of_the_fadt_resets() {
        let resets = AtomicU32::new(0);
        let mut register = ResetRegister::new(|| {
            resets.fetch_add(1, Ordering::Relaxed);
        });
        for value in [0, 2, 0xff] {
            register.write(0, &[value]);
        }
        register.write(0, &[]);
        assert_eq!(resets.load(Ordering::Relaxed), 0);
        register.write(0, &[RESET_VALUE]);
        assert_eq!(resets.load(Ordering::Relaxed), 1);
    }
}
