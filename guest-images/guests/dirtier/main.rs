//! `dirtier`: rewrites memory on every vCPU and notices every write that gets lost.
//!
//! The assembly in `runtime/boot.s` brings each vCPU to [`guest_main`] in ring 3, and everything after it
//! runs there. What it does, and how it is asked to, is described in the library's documentation;
//! the parts without unsafe code are the library's own files.

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

/// What its lines on the serial port begin with.
const NAME: &str = "dirtier";

global_asm!(include_str!("../runtime/boot.s"), options(att_syntax));

unsafe extern "C" {
    /// First byte after the image, stacks included.
    static image_end: u8;
}

/// Entered on every vCPU, in ring 3: `index` is 0 on the boot vCPU.
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

fn set_up(start_info: u32) -> Setup {
    let mut buffer = [0; CMDLINE_MOST];
    let (line, memory) = read_start_info(start_info, &mut buffer).unwrap_or_else(|t| refuse(t));
    let config = Config::parse(line).unwrap_or_else(|error| refuse(error));
    let usable = paging::map(&memory);
    let layout = Layout::new(&config, usable.pages()).unwrap_or_else(|error| refuse(error));
    // The end of RAM, because there the area is aligned for huge pages if its size is.
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

/// The toolchain's `core` is made for unwinding and names this function in tables that the linker
/// script drops.
#[unsafe(no_mangle)]
extern "C" fn rust_eh_personality() {}
