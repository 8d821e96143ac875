//! Bare-metal x86-64 guest programs, which the build script of this crate compiles from source, and
//! the types with which a host configures them and parses their output.
//!
//! | program | purpose |
//! |---|---|
//! | [`HELLO`] | prints one line and exits, to measure how fast a guest starts |
//! | [`DIRTIER`] | rewrites memory on every vCPU and reports every lost or torn write |
//! | [`RING_ATTACKER`] | violates the virtio specification on every device and reports devices that fail |
//!
//! The programs are ELF files for any monitor that boots PVH kernels. `write-images DIR` writes them
//! to files. With QEMU:
//!
//! ```text
//! cargo run -p ferry-guest-images --bin write-images -- DIR
//! qemu-system-x86_64 -M microvm,acpi=off,auto-kernel-cmdline=off -accel kvm -m 256 \
//!     -nodefaults -display none -no-reboot -serial stdio \
//!     -device isa-debug-exit,iobase=0xf4,iosize=4 \
//!     -kernel DIR/dirtier.elf -append 'memory=64M passes=5'
//! ```
//!
//! # Requirements for the monitor
//!
//! - **Start.** The monitor enters the program in the PVH start state, at the address in the ELF note
//!   with owner `Xen` and type 18: 32-bit protected mode, paging off, flat segments, interrupts off,
//!   EBX = `hvm_start_info`. The dirtier needs version 1 of that structure, with a memory map. The
//!   structure, the memory map and the command line must lie below 4 GiB. The program copies them
//!   at the start and does not read them again, because their memory may become part of the
//!   dirtier's area (all RAM above 1 MiB may). The images are loaded at 1 MiB.
//! - **Serial port.** A 16550 at ports 0x3f8 to 0x3ff, which the program polls. It sends bytes
//!   without checking that the transmitter is empty, because a port access from ring 3 can cost
//!   50 us and more.
//! - **Exit.** A byte written to port 0xf4 ends the guest with that exit status: 0 for success, 2
//!   for an invalid command line or an unsuitable machine, 3 for a lost or torn write, 4 for a crash,
//!   5 for an attack with an unexpected result. (QEMU's `isa-debug-exit` exits with twice the status
//!   plus one.) After the write, the vCPU loops.
//! - **No other devices.** The programs use no interrupt controller, timer, ACPI table or CPUID leaf.
//!   Only the ring attacker uses virtio devices.
//! - **Privilege levels.** The dirtier and the ring attacker run in ring 3, because some hosts emulate
//!   ring 0 one instruction at a time. Each vCPU executes about 40 plain instructions in ring 0 at
//!   the start, and four for each port access. Ring 3 requests a port access with `int3`, because
//!   some hosts lose IOPL and the I/O bitmap. A debugger that intercepts breakpoints therefore
//!   disturbs the program. `hello` runs in ring 0.
//! - **Reset.** The monitor must load the image again, because the programs write to their data.
//!
//! ## Direct start: more than one vCPU
//!
//! A second ELF note, with owner `Ferry` and type 1, holds a 32-bit physical address. A monitor that
//! supports the note starts each vCPU n, from 1 on, at that address, in the PVH start state, with
//! EBX as for vCPU 0 and **EAX = n**, in the MP state *runnable*. The order of the vCPUs and the time
//! of their start do not matter. There can be at most 16 vCPUs. The note exists because INIT and SIPI
//! do not start a vCPU on a host that emulates ring 0, and because it needs no local APIC.
//!
//! `cpus=N` on the command line sets the number of vCPUs that work; further vCPUs idle. If some of
//! them do not start, the dirtier waits, and prints a message after some seconds.
//!
//! # The dirtier
//!
//! Its command line is a [`dirtier::Config`]. Each line that it prints on the serial port is a
//! [`dirtier::GuestReport`] (`dirtier: ready …`), or begins with `dirtier: cannot start:`,
//! `dirtier: waiting`, `dirtier: EXCEPTION` or `dirtier: PANIC`. It accepts two commands of one byte:
//! `s` prints a status line. `q` stops all vCPUs; each vCPU then audits all its pages, and the guest
//! exits with a verdict.
//!
//! Each page has a [`dirtier::Stamp`] at its head, middle and tail. Before the dirtier rewrites a
//! page, it checks that the page holds exactly the stamp that the [plan](dirtier::Plan) predicts. The
//! plan is computed and not kept in memory that could be lost. The small state of the loop is kept
//! twice, in two pages, and compared at every step. A page with three equal stamps of another
//! iteration is a lost write; any other mismatch is a torn write. With `selftest=`, the guest
//! corrupts its own memory to prove that it detects the corruption.
//!
//! The area is at the end of RAM, so that it is aligned for huge pages if its size is a multiple of
//! theirs. The vCPUs share it evenly, and likewise the cold pages. The first pass populates the area
//! without checks and at full speed, regardless of `rate=`. `ready` is printed when every vCPU has
//! completed it. RAM above 512 GiB is not used. `quiet` suppresses `ready` but not the answers to
//! commands.
//!
//! The dirtier never writes to the bytes between the stamps. Therefore its pages compress well, and a
//! page that is torn between two stamps is not detected. A comparison of memory digests detects it.
//!
//! An exception ends the guest with a line and exit status 4. Only an exception in the first
//! microseconds, before vCPU 0 has installed the handlers, causes a triple fault.
//!
//! # The ring attacker
//!
//! A driver for the virtio-mmio devices (virtio 1.2) at 0xd0000000 and at the 13 pages after it,
//! which is where Ferry places them. It makes about a hundred attacks, each on every queue or device
//! that the attack applies to: descriptor chains that loop or point outside memory, invalid ring
//! addresses and queue sizes, missing steps of the initialization, register writes while the device
//! works, and invalid requests. After each attack, every **other** device must complete an operation,
//! and then the attacked device must complete one after a reset. The operations are:
//!
//! | device | operation |
//! |---|---|
//! | block | read a sector below 8, whose 64-bit words must be its number; write one of the sectors 8 to 15 and read it back |
//! | net | send an ARP request for 10.99.0.1 from one of the addresses 10.99.0.10 to 10.99.0.209 and receive the reply |
//! | rng | receive bytes, and not more than requested |
//! | vsock | connect to a port without a listener (from 2^20 on) and receive a reset |
//! | balloon | inflate a page, which must read as zeros, and deflate it, which must make it usable |
//! | console | print `line NUMBER`, counting from 1 |
//!
//! It prints one line for each attack, and a summary:
//!
//! ```text
//! attack chain-next-is-itself device=net queue=transmit outcome=needs-reset others=5 again=yes
//! ring-attacker: attacks=747 unexpected=0 operations=block:856,net:840,…
//! ```
//!
//! The outcome is `needs-reset` (DEVICE_NEEDS_RESET with its interrupt), `ignored` (the device works
//! without a reset), `quiet` (the device no longer writes to the memory of the driver), `survived`
//! (the device served the requests or needs a reset, depending on a race), or the result of a request:
//! `served`, `dropped`, `io-error`, `unsupported`, `connection-reset`. A line with an unexpected
//! result ends with `UNEXPECTED`, and the exit status is then 5. Each wait is bounded to about ten
//! seconds; the attacker stops after the third timeout. With `hold` on the command line, the guest
//! stays until it receives a `q`. To run it by hand, as root:
//!
//! ```text
//! python3 -c 'import struct, sys
//! sys.stdout.buffer.write(b"".join(struct.pack("<Q", n) * 64 for n in range(64)))' >disk.img
//! ip tuntap add tap0 mode tap && ip addr add 10.99.0.1/24 dev tap0 && ip link set tap0 up
//! ferry run --kernel DIR/ring-attacker.elf --memory 64M --serial stdio --disk path=disk.img \
//!     --net tap=tap0 --rng --vsock socket=vsock --balloon size=0,free_page_reporting=on --console file:out
//! ```

mod command_line;
pub mod dirtier;
pub mod interface;
pub mod memory;

/// ELF file of the program `hello`.
///
/// It prints `hello from ferry guest: cpus=… memory=… MiB cmdline="…"` and exits. `cpus` is the number
/// of vCPUs that have started. If the command line contains `cpus=N`, the program waits some seconds
/// for N of them. `memory` is the size of the RAM in the memory map.
pub const HELLO: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/hello.elf"));

/// ELF file of the program `dirtier`.
pub const DIRTIER: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/dirtier.elf"));

/// ELF file of the program `ring-attacker`.
pub const RING_ATTACKER: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/ring-attacker.elf"));
