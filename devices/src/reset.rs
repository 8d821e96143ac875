//! Reset line of the keyboard controller, with which x86 kernels can restart the machine (`reboot=k` on Linux).

use std::io;

use vm_superio::{I8042Device, Trigger};

use crate::{BusDevice, PortSpace};

/// First port of the keyboard controller: data. The port for commands and status is 4 above it (IBM AT technical
/// reference).
pub const I8042_PORT: u16 = 0x60;
/// Number of ports of the keyboard controller, from [`I8042_PORT`] on.
pub const I8042_PORTS: u16 = 5;

struct OnReset<F>(F);

impl<F: Fn()> Trigger for OnReset<F> {
    type E = io::Error;

    fn trigger(&self) -> io::Result<()> {
        (self.0)();
        Ok(())
    }
}

/// Keyboard controller without a keyboard. The reset command is the only command that it supports.
///
/// It has no state to save, because no access depends on an earlier one.
pub struct ResetController<F: Fn()> {
    controller: I8042Device<OnReset<F>>,
}

impl<F: Fn() + Send> ResetController<F> {
    /// Creates a controller that calls `on_reset` when the guest pulses the reset line.
    pub fn new(on_reset: F) -> Self {
        Self {
            controller: I8042Device::new(OnReset(on_reset)),
        }
    }
}

impl<F: Fn() + Send> BusDevice<PortSpace> for ResetController<F> {
    fn read(&mut self, offset: u16, data: &mut [u8]) {
        data.fill(0);
        if let (Some(first), Ok(offset)) = (data.first_mut(), u8::try_from(offset)) {
            *first = self.controller.read(offset);
        }
    }

    fn write(&mut self, offset: u16, data: &[u8]) {
        if let (Some(value), Ok(offset)) = (data.first(), u8::try_from(offset)) {
            let Ok(()) = self.controller.write(offset, *value) else {
                unreachable!("the trigger above always succeeds");
            };
        }
    }
}

#[cfg(test)]
mod tests {
    use std::cell::Cell;

    use super::*;

    #[test]
    fn only_the_reset_command_at_the_command_port_resets() {
        thread_local!(static RESETS: Cell<u32> = const { Cell::new(0) });
        let mut controller = ResetController::new(|| RESETS.set(RESETS.get() + 1));
        controller.write(0, &[0xfe]);
        controller.write(4, &[0xaa]);
        assert_eq!(RESETS.get(), 0);
        controller.write(4, &[0xfe]);
        assert_eq!(RESETS.get(), 1);
    }
}
