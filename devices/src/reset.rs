//! The reset line of the keyboard controller, by which x86 kernels restart a machine (`reboot=k`).

use std::io;

use vm_superio::{I8042Device, Trigger};

use crate::{BusDevice, PortSpace};

/// The controller's first port (data; command and status is 4 above it). IBM AT technical reference.
pub const I8042_PORT: u16 = 0x60;
/// How many ports from [`I8042_PORT`] on are its own.
pub const I8042_PORTS: u16 = 5;

struct OnReset<F>(F);

impl<F: Fn()> Trigger for OnReset<F> {
    type E = io::Error;

    fn trigger(&self) -> io::Result<()> {
        (self.0)();
        Ok(())
    }
}

/// A keyboard controller without a keyboard: it knows the reset command and no other.
///
/// It has no state to save: each access stands alone.
pub struct ResetController<F: Fn()> {
    controller: I8042Device<OnReset<F>>,
}

impl<F: Fn() + Send> ResetController<F> {
    /// A controller that calls `on_reset` when the guest pulls the reset line.
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
