//! Lines on the serial port, one vCPU at a time.

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

/// Prints one last line and ends the guest. No other vCPU gets a word in after it.
pub(crate) fn print_and_exit(line: impl Display, status: u8) -> ! {
    while BUSY.swap(true, Ordering::Acquire) {
        spin_loop();
    }
    write_line(line);
    cpu::exit(status)
}

/// As [`print_and_exit`], but whoever is printing is interrupted: it may be this very vCPU.
pub(crate) fn crash(line: impl Display, status: u8) -> ! {
    BUSY.store(true, Ordering::Release);
    write_line(line);
    cpu::exit(status)
}

fn write_line(line: impl Display) {
    // The port takes everything, and no `Display` in the guest fails.
    let _ = writeln!(Serial, "{line}");
}
