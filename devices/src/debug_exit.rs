//! The debug-exit port: a guest writes one byte to it and is over, with that byte as its status.
//!
//! Bare-metal test guests end this way; QEMU's `isa-debug-exit` is the same idea at the same port.

use crate::{BusDevice, PortSpace};

/// The port, one wide. The customary place of QEMU's `isa-debug-exit` (`iobase=0xf4`).
pub const DEBUG_EXIT_PORT: u16 = 0xf4;

/// Calls `on_exit` with the status that the guest wrote.
pub struct DebugExit<F> {
    on_exit: F,
}

impl<F: FnMut(u8) + Send> DebugExit<F> {
    /// A port that hands the guest's status (0 = success) to `on_exit`.
    pub fn new(on_exit: F) -> Self {
        Self { on_exit }
    }
}

impl<F: FnMut(u8) + Send> BusDevice<PortSpace> for DebugExit<F> {
    /// There is nothing to read: all ones, as on an empty bus.
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
