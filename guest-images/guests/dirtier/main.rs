//! `dirtier`: rewrites memory on every vCPU and detects every lost write.
//!
//! The assembly in `runtime/boot.s` enters [`guest_main`] on each vCPU in ring 3. The documentation of
//! the library describes the program and its command line. The modules without unsafe code are source
//! files of the library.

#![no_std]
#![no_main]

#[path = "../runtime/console.rs"]
mod console;
mod control;
#[path = "../runtime/cpu.rs"]
mod cpu;
#[allow(dead_code, unused_imports)]
#[path = "../../src/dirtier/mod.rs"]
mod dirtier;
#[allow(dead_code)]
#[path = "../../src/interface.rs"]
mod interface;
#[path = "../../src/memory.rs"]
mod memory;
mod pacer;
mod page;
mod paging;
mod selftest;
#[path = "../runtime/start_info.rs"]
mod start_info;
mod state;
#[path = "../runtime/trap.rs"]
mod trap;
mod worker;

use core::arch::global_asm;
use core::fmt::Display;
use core::panic::PanicInfo;

use dirtier::{Config, Layout};
use interface::{CMDLINE_MOST, EXIT_BAD_REQUEST, EXIT_CRASH};
use start_info::{StartInfo, Trouble};
use state::Setup;
use worker::Worker;

/// Prefix of the lines on the serial port.
const NAME: &str = "dirtier";

global_asm!(include_str!("../runtime/boot.s"), options(att_syntax));

unsafe extern "C" {
    /// First byte after the image, including the stacks.
    static image_end: u8;
}

/// Entry point of every vCPU, in ring 3. `index` is 0 on the boot vCPU.
#[unsafe(no_mangle)]
extern "C" fn guest_main(index: u32, start_info: u32) -> ! {
    if index == 0 {
        trap::install();
        state::publish(set_up(start_info));
    }
    let setup = state::wait_for_setup();
    if index >= setup.config.cpus {
        worker::idle();
    }
    Worker::new(index, setup).run()
}

/// Reads the start info, maps all RAM and divides it.
fn set_up(start_info: u32) -> Setup {
    let mut buffer = [0; CMDLINE_MOST];
    let (line, memory) = read_start_info(start_info, &mut buffer).unwrap_or_else(|t| refuse(t));
    let config = Config::parse(line).unwrap_or_else(|error| refuse(error));
    let usable = paging::map(&memory);
    let layout = Layout::new(&config, usable.pages()).unwrap_or_else(|error| refuse(error));
    // The area is at the end of RAM, so that it is aligned for huge pages if its size is.
    let first = usable.pages() - layout.pages();
    Setup {
        area: usable.window(first, layout.pages()),
        config,
        layout,
    }
}

fn read_start_info(
    at: u32,
    buffer: &mut [u8; CMDLINE_MOST],
) -> Result<(&str, memory::Runs), Trouble> {
    let info = StartInfo::at(at)?;
    let memory = info.memory((&raw const image_end).addr() as u64)?;
    Ok((info.command_line(buffer)?, memory))
}

/// Prints the reason why the program cannot run and ends the guest.
fn refuse(reason: impl Display) -> ! {
    console::print_and_exit(
        format_args!("{NAME}: cannot start: {reason}"),
        EXIT_BAD_REQUEST,
    )
}

#[panic_handler]
fn panic(info: &PanicInfo<'_>) -> ! {
    console::crash(format_args!("{NAME}: PANIC {info}"), EXIT_CRASH)
}

/// The prebuilt `core` refers to this function in unwind tables, which the linker script discards.
#[unsafe(no_mangle)]
extern "C" fn rust_eh_personality() {}
