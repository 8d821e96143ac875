//! The smallest PVH kernel: one line on the serial port, then the debug exit.
//!
//! It exists to measure how soon a monitor gets a guest going. All of it is 32-bit assembly that
//! runs where the monitor starts it: no paging, no mode switch and no stack deeper than a few
//! words. That is also the fastest way on a host which emulates ring 0, because a port write costs
//! about 15 us from there and 115 us from ring 3.

#![no_std]
#![no_main]

use core::arch::global_asm;
use core::panic::PanicInfo;

global_asm!(include_str!("hello.s"), options(att_syntax));

/// Never called: there is no Rust code to panic.
#[panic_handler]
fn panic(_: &PanicInfo<'_>) -> ! {
    loop {}
}
