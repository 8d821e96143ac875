//! Sleep control and sleep status registers, with which the guest powers the machine off.
//!
//! Specification: ACPI 6.5, section 4.8.3.7, tables 4.20 and 4.21.

use minicbor::{Decode, Encode};

use crate::{BusDevice, PortSpace, SavedState};

/// Port of the sleep control register.
pub const SLEEP_CONTROL_PORT: u16 = 0x600;
/// Port of the sleep status register.
pub const SLEEP_STATUS_PORT: u16 = 0x601;
/// Number of ports of both registers, from [`SLEEP_CONTROL_PORT`] on.
pub const SLEEP_PORTS: u16 = 2;
/// Sleep type of S5 (soft off), which `\_S5` in the DSDT names. No other sleep state is supported.
pub const SLEEP_TYPE_OFF: u8 = 5;

/// Offset of the control register. The status register follows it.
const CONTROL: u16 = 0;
/// SLP_TYP, bits 2 to 4 of the control register.
const TYPE_SHIFT: u32 = 2;
/// Mask of SLP_TYP after the shift.
const TYPE_MASK: u8 = 7;
/// SLP_EN: writing 1 enters the sleep state. The bit reads as 0.
const ENABLE: u8 = 1 << 5;

/// A saved sleep type does not fit SLP_TYP.
#[derive(Debug, thiserror::Error)]
#[error("sleep control state: sleep_type is {0}, but the maximum is {TYPE_MASK}")]
pub struct SleepError(u8);

/// Saved state of the sleep registers. The wake status is always 0, because nothing wakes a machine from S5.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Encode, Decode)]
#[cbor(map)]
pub struct SleepSnapshot {
    /// Last value of SLP_TYP that the guest wrote, 0 to 7.
    #[n(0)]
    pub sleep_type: u8,
}

impl SavedState for SleepSnapshot {
    const VERSION: u16 = 1;
}

/// Sleep control and status registers. Calls `on_off` when the guest enters S5.
pub struct SleepControl<F> {
    sleep_type: u8,
    on_off: F,
}

impl<F: Fn() + Send> SleepControl<F> {
    /// Creates the registers in their reset state.
    pub fn new(on_off: F) -> Self {
        Self {
            sleep_type: 0,
            on_off,
        }
    }

    /// Creates the registers from their saved state.
    ///
    /// # Errors
    /// Returns [`SleepError`] if the sleep type does not fit its field.
    pub fn restore(saved: SleepSnapshot, on_off: F) -> Result<Self, SleepError> {
        if saved.sleep_type > TYPE_MASK {
            return Err(SleepError(saved.sleep_type));
        }
        Ok(Self {
            sleep_type: saved.sleep_type,
            on_off,
        })
    }

    /// Returns the state of the registers.
    pub fn save(&self) -> SleepSnapshot {
        SleepSnapshot {
            sleep_type: self.sleep_type,
        }
    }
}

impl<F: Fn() + Send> BusDevice<PortSpace> for SleepControl<F> {
    fn read(&mut self, offset: u16, data: &mut [u8]) {
        data.fill(0);
        if let (CONTROL, Some(first)) = (offset, data.first_mut()) {
            *first = self.sleep_type << TYPE_SHIFT;
        }
    }

    fn write(&mut self, offset: u16, data: &[u8]) {
        let (CONTROL, Some(value)) = (offset, data.first()) else {
            return;
        };
        self.sleep_type = (value >> TYPE_SHIFT) & TYPE_MASK;
        if value & ENABLE != 0 && self.sleep_type == SLEEP_TYPE_OFF {
            (self.on_off)();
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicU32, Ordering};

    use super::*;

    const OFF: u8 = (SLEEP_TYPE_OFF << TYPE_SHIFT) | ENABLE;

    fn byte(device: &mut dyn BusDevice<PortSpace>, offset: u16) -> u8 {
        let mut byte = [0xaa];
        device.read(offset, &mut byte);
        byte[0]
    }

    #[test]
    fn only_s5_with_the_enable_bit_switches_off() {
        let offs = AtomicU32::new(0);
        let mut registers = SleepControl::new(|| {
            offs.fetch_add(1, Ordering::Relaxed);
        });
        // Linux writes (5 << 2) | 0x20, after it has cleared the wake status.
        assert_eq!(OFF, 0x34);
        registers.write(1, &[0x80]);
        registers.write(0, &[OFF & !ENABLE]);
        registers.write(0, &[(3 << TYPE_SHIFT) | ENABLE]);
        registers.write(1, &[OFF]);
        registers.write(0, &[]);
        assert_eq!(offs.load(Ordering::Relaxed), 0);
        registers.write(0, &[OFF]);
        assert_eq!(offs.load(Ordering::Relaxed), 1);
    }

    #[test]
    fn the_type_reads_back_without_the_enable_bit() {
        let mut registers = SleepControl::new(|| {});
        registers.write(0, &[0xff]);
        assert_eq!(byte(&mut registers, 0), 7 << TYPE_SHIFT);
        assert_eq!(byte(&mut registers, 1), 0);
    }

    #[test]
    fn saved_registers_go_on_and_impossible_ones_are_refused() {
        let mut registers = SleepControl::new(|| {});
        registers.write(0, &[SLEEP_TYPE_OFF << TYPE_SHIFT]);
        let mut other = SleepControl::restore(registers.save(), || {}).unwrap();
        assert_eq!(byte(&mut other, 0), SLEEP_TYPE_OFF << TYPE_SHIFT);
        let impossible = SleepSnapshot { sleep_type: 8 };
        let error = SleepControl::restore(impossible, || {}).err().unwrap();
        assert!(error.to_string().contains("sleep_type is 8"), "{error}");
    }
}
