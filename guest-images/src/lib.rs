//! Bare-metal x86-64 guest programs, built from source by this crate's build script, and what a
//! host needs to talk to them.
//!
//! | program | what it does |
//! |---|---|
//! | [`HELLO`] | prints one line and exits: for measuring how fast a guest starts |
//! | [`DIRTIER`] | rewrites memory on every vCPU and reports every write that gets lost or torn |
//! | [`RING_ATTACKER`] | breaks the rules of virtio on every device, and reports what is not refused |
//!
//! All are ELF files for any monitor that boots PVH kernels; `write-images DIR` writes them out.
//! With QEMU:
//!
//! ```text
//! cargo run -p ferry-guest-images --bin write-images -- DIR
//! qemu-system-x86_64 -M microvm,acpi=off,auto-kernel-cmdline=off -accel kvm -m 256 \
//!     -nodefaults -display none -no-reboot -serial stdio \
//!     -device isa-debug-exit,iobase=0xf4,iosize=4 \
//!     -kernel DIR/dirtier.elf -append 'memory=64M passes=5'
//! ```
//!
//! # What a guest program needs of its monitor
//!
//! - **Start.** The PVH start state at the address in the ELF note `Xen`, type 18: 32-bit protected
//!   mode, paging off, flat segments, interrupts off, EBX = `hvm_start_info`. The dirtier needs its
//!   version 1, with a memory map. The start info, the map and the command line must lie below
//!   4 GiB; they are copied at the start and their memory is not looked at again (RAM above 1 MiB
//!   becomes part of the dirtier's area, wherever they are). The images load at 1 MiB.
//! - **Serial port.** A 16550 at ports 0x3f8 to 0x3ff, polled; bytes are sent without asking
//!   whether the transmitter is free, because a port access from ring 3 can cost 50 us and more.
//! - **Exit.** One byte written to port 0xf4 ends the guest; it is the exit status: 0 for success,
//!   2 for a request that does not suit, 3 for memory that does not hold what was written, 4 for a
//!   crash, 5 for an attack that was not refused. (QEMU's `isa-debug-exit` ends with twice that plus one.) After it, the vCPU loops.
//! - **Nothing else.** No interrupt controller, timer, ACPI or CPUID leaf is used; of devices, only the
//!   attacker looks at those of virtio. It and the dirtier run in ring 3, since there are hosts that emulate ring 0 one instruction at a time. Their ring 0 is
//!   some 40 plain instructions a vCPU at the start, and four for each port access, which ring 3
//!   asks for with `int3`: no IOPL and no I/O bitmap, which some hosts lose. `hello` stays where it
//!   is started. A debugger that takes breakpoints for itself gets in its way.
//! - **Loading anew for a restart.** The images write to their own data.
//!
//! ## Direct start: more than one vCPU
//!
//! A second ELF note, owner `Ferry`, type 1, holds a 32-bit physical address. A monitor that knows
//! the note starts every vCPU n from 1 on at that address, in the PVH start state, with EBX as for
//! vCPU 0 and **EAX = n**, in MP state *runnable*; in any order and at any time, before or after
//! vCPU 0. At most 16 vCPUs. The note exists because INIT and SIPI do not start a vCPU on a host
//! whose ring 0 is emulated, and because it needs no local APIC.
//!
//! vCPUs work if `cpus=N` on the command line counts them in; the others idle. If vCPUs that the
//! command line names never start, the dirtier waits and, after some seconds, says so.
//!
//! # The dirtier
//!
//! Its command line is a [`dirtier::Config`]; its lines on the serial port are a
//! [`dirtier::GuestReport`] each (`dirtier: ready …`), or one that begins with `dirtier: cannot start:`,
//! `dirtier: waiting`, `dirtier: EXCEPTION` or `dirtier: PANIC`. It understands two bytes: `s`
//! prints a status line, `q` stops all vCPUs, has each audit all its pages, and ends the guest with
//! a verdict.
//!
//! Pages are stamped with a [`dirtier::Stamp`] at head, middle and tail. Before a page is rewritten
//! it must hold exactly the stamp of the [plan](dirtier::Plan); the plan is computed, never
//! remembered in memory that could be lost, and the little state that the loop has is kept twice,
//! in two pages, and compared at every step. A page whose three stamps agree on another iteration
//! is a lost write, anything else a torn one. `selftest=` makes the guest spoil its own memory, to
//! prove that it notices.
//!
//! The area is the end of RAM, so that it is aligned for huge pages if its size is; it is split
//! evenly between the vCPUs, cold pages likewise. The first pass populates it, unchecked and at full
//! speed whatever `rate=` says; `ready` is printed once every vCPU has been through it. RAM above
//! 512 GiB is not used. `quiet` silences `ready`, not the answers to commands.
//!
//! The bytes between the stamps are never written: pages compress well, and a page torn at other
//! places than between its stamps goes unnoticed. Comparing digests finds those.
//!
//! An exception ends the guest with a line and exit status 4. It is a triple fault only before
//! vCPU 0 has filled in the gates, some microseconds after it reached ring 3.
//!
//! # The ring attacker
//!
//! A driver for virtio-mmio devices (virtio 1.2) at 0xd0000000 and each of the 13 pages behind, where
//! Ferry puts them. It makes some hundred attacks, each on every queue or device that it is meant for:
//! chains that loop or name memory that is not there, rings and sizes that cannot be, steps of a
//! driver's start left out, registers written while the device works, and requests that make no sense
//! to that kind of device. After each, every **other** device has to do what it is for, and then so has
//! the attacked one, once it is reset. What that is:
//!
//! | device | operation |
//! |---|---|
//! | block | a sector below 8 is read, whose 64-bit words are its number; one of 8 to 15 is written and read back |
//! | net | an ARP request for 10.99.0.1 is answered; the guest is one of 10.99.0.10 to 209 |
//! | rng | bytes arrive, and no more than asked for |
//! | vsock | a connection to a port where nobody listens (from 2^20 on) is reset |
//! | balloon | a page that was given away is zeros, and is memory again |
//! | console | `line NUMBER` is printed, from 1 on |
//!
//! It says a line for each attack, and how many there were:
//!
//! ```text
//! attack chain-next-is-itself device=net queue=transmit outcome=needs-reset others=5 again=yes
//! ring-attacker: attacks=747 unexpected=0 operations=block:856,net:840,…
//! ```
//!
//! An outcome is `needs-reset` (with its interrupt), `ignored` (the device works on without a reset),
//! `quiet` (from then on it leaves alone what is the driver's), `survived` (it needs a reset or not, as
//! the race went), or what became of a request: `served`, `dropped`, `io-error`, `unsupported`,
//! `connection-reset`. What is not as it should be ends with `UNEXPECTED`, and the exit status is 5 then.
//! Every wait is a bounded number of looks, some ten seconds; the third that is in vain is the last.
//! With `hold` on its command line the guest stays until it gets a `q`. By hand, as root:
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

/// The program `hello`, an ELF file.
///
/// It prints `hello from ferry guest: cpus=… memory=… MiB cmdline="…"` and exits. `cpus` counts the
/// vCPUs that arrived; it waits some seconds for as many as `cpus=N` on the command line names.
/// `memory` is the RAM in the memory map.
pub const HELLO: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/hello.elf"));

/// The program `dirtier`, an ELF file.
pub const DIRTIER: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/dirtier.elf"));

/// The program `ring-attacker`, an ELF file.
pub const RING_ATTACKER: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/ring-attacker.elf"));
