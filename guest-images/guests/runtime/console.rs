//! Output of lines on the serial port. A lock keeps the lines of different vCPUs apart.

use core::fmt::{self, Display, Write};
use core::hint::spin_loop;
use core::sync::atomic::{AtomicBool, Ordering};

use crate::cpu;

static BUSY: AtomicBool = AtomicBool::new(false);

struct Serial;

impl Write for Serial {
    fn write_str(&mut self, text: &str) -> fmt::Result {
        text.bytes().for_each(cpu::serial_send);
        Ok(())
    }
}

/// Prints one line.
pub(crate) fn print(line: impl Display) {
    while BUSY.swap(true, Ordering::Acquire) {
        spin_loop();
    }
    write_line(line);
    BUSY.store(false, Ordering::Release);
}

/// Prints a last line and ends the guest. No other vCPU can print after it.
pub(crate) fn print_and_exit(line: impl Display, status: u8) -> ! {
    while BUSY.swap(true, Ordering::Acquire) {
        spin_loop();
    }
    write_line(line);
    cpu::exit(status)
}

/// Prints a last line and ends the guest without waiting for the lock, because this vCPU itself may hold it.
pub(crate) fn crash(line: impl Display, status: u8) -> ! {
    BUSY.store(true, Ordering::Release);
    write_line(line);
    cpu::exit(status)
}

fn write_line(line: impl Display) {
    // Neither the port nor any `Display` of the guest fails.
    let _ = writeln!(Serial, "{line}");
}
