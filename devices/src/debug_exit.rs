//! Debug-exit port: a guest ends by writing its exit status to it.
//!
//! Bare-metal test guests use it. QEMU offers the same as `isa-debug-exit`.

use crate::{BusDevice, PortSpace};

/// Debug-exit port, 1 byte wide. QEMU's `isa-debug-exit` is usually at the same port (`iobase=0xf4`).
pub const DEBUG_EXIT_PORT: u16 = 0xf4;

/// Debug-exit port. Calls `on_exit` with the status that the guest writes.
pub struct DebugExit<F> {
    on_exit: F,
}

impl<F: FnMut(u8) + Send> DebugExit<F> {
    /// Creates a port that passes the guest's status to `on_exit`. A status of 0 means success.
    pub fn new(on_exit: F) -> Self {
        Self { on_exit }
    }
}

impl<F: FnMut(u8) + Send> BusDevice<PortSpace> for DebugExit<F> {
    /// The port is write-only and reads as all ones, like a port without a device.
    fn read(&mut self, _offset: u16, data: &mut [u8]) {
        data.fill(0xff);
    }

    fn write(&mut self, _offset: u16, data: &[u8]) {
        if let Some(status) = data.first() {
            (self.on_exit)(*status);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_low_byte_is_the_status() {
        let mut seen = Vec::new();
        {
            let mut port = DebugExit::new(|status| seen.push(status));
            port.write(0, &[3]);
            port.write(0, &[4, 5, 6, 7]);
            let mut data = [0; 2];
            port.read(0, &mut data);
            assert_eq!(data, [0xff; 2]);
        }
        assert_eq!(seen, [3, 4]);
    }
}
