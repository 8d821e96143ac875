//! The command line of `ferry bench`.

use std::net::IpAddr;
use std::path::PathBuf;

use clap::{Args, Subcommand};

use vmm::size::parse_size;

#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  ferry bench start
  ferry bench devices --kernel vmlinux --initramfs load.cpio

`ferry help bench VERB` describes each measurement. The exit status is 0 if all limits hold, 3 if
one is missed, and 1 if the measurement failed.")]
pub(crate) struct BenchArguments {
    #[command(subcommand)]
    pub(crate) bench: Bench,
}

#[derive(Debug, Subcommand)]
pub(crate) enum Bench {
    /// Measure the time to the first byte of a guest, and the memory overhead of its monitor
    Start(BenchStartArguments),
    /// Measure the throughput of the disk and the network of a guest
    Devices(BenchDevicesArguments),
    /// Boot a guest with the fewest KVM ioctls, as the baseline of `ferry bench start`
    #[command(hide = true)]
    BareStart(BareStartArguments),
}

#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  ferry bench start
  ferry bench start --runs 31 --json

Starts the same PVH guest many times, alternating between a bare program of KVM ioctls, ferry run,
and QEMU's microvm if QEMU is installed. The time runs from the start of the process to the first
byte that the guest writes to its serial port. The memory is the resident memory of the process at
that time, without guest memory.

The exit status is 0 if ferry takes at most 1.5 times as long as the bare program, at most a
quarter of QEMU's time, and at most 5 MiB; it is 3 otherwise. Use an idle machine.")]
pub(crate) struct BenchStartArguments {
    /// Starts of each monitor
    #[arg(long, value_name = "N", default_value_t = 11, value_parser = clap::value_parser!(u32).range(1..=10_000))]
    pub(crate) runs: u32,
    /// Guest memory
    #[arg(long, value_name = "SIZE", default_value = "256M", value_parser = parse_size)]
    pub(crate) memory: u64,
    /// QEMU binary to compare with [default: qemu-system-x86_64, if it is installed]
    #[arg(long, value_name = "FILE")]
    pub(crate) qemu: Option<PathBuf>,
    /// Print JSON, one object per line, instead of the table
    #[arg(long)]
    pub(crate) json: bool,
}

#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  ferry bench devices --kernel vmlinux --initramfs load.cpio
  ferry bench devices --kernel vmlinux --initramfs load.cpio --tap tap0 --host-address 10.0.0.1 \\
      --guest-address 10.0.0.2/24

Runs the same Linux guest several times, alternating between ferry run and QEMU's microvm if QEMU
is installed. The guest has a raw image as /dev/vda and, with --tap, the tap as eth0. Both are
virtio-mmio devices.

The initramfs reads its task from the kernel command line: ferry.disk=/dev/vda,
ferry.host=ADDRESS:PORT, ferry.address=ADDRESS/BITS, ferry.seconds=N. For each load it prints one
line on the serial port, `ferry-bench: NAME operations=N us=N` or
`ferry-bench: NAME bytes=N us=N`, and at the end `ferry-bench: end`.

The first byte of a connection to ferry.host selects what the server does with it: s counts the
bytes that the guest sends and answers with the 8-byte count, r sends bytes until the guest closes
the connection, t echoes each byte.

The program write-device-load of the package ferry-tests writes such an initramfs for Debian's
cloud kernels. The exit status is 0 if ferry is at least as fast as QEMU in each load; it is 3
otherwise. Use an idle machine.")]
pub(crate) struct BenchDevicesArguments {
    /// Kernel to boot: an image that QEMU's microvm can boot too
    #[arg(long, value_name = "FILE")]
    pub(crate) kernel: PathBuf,
    /// Initramfs that generates the loads
    #[arg(long, value_name = "FILE")]
    pub(crate) initramfs: PathBuf,
    /// Existing tap for the network loads
    #[arg(long, value_name = "NAME", requires_all = ["host_address", "guest_address"])]
    pub(crate) tap: Option<String>,
    /// Address of the host on the tap
    #[arg(long, value_name = "ADDRESS", requires = "tap")]
    pub(crate) host_address: Option<IpAddr>,
    /// Address of the guest, with the prefix length of its network
    #[arg(long, value_name = "ADDRESS/BITS", requires = "tap")]
    pub(crate) guest_address: Option<String>,
    /// Size of the disk, which is a temporary file
    #[arg(long, value_name = "SIZE", default_value = "128M", value_parser = parse_size)]
    pub(crate) disk_size: u64,
    /// Guest memory
    #[arg(long, value_name = "SIZE", default_value = "512M", value_parser = parse_size)]
    pub(crate) memory: u64,
    /// Runs of each monitor
    #[arg(long, value_name = "N", default_value_t = 3, value_parser = clap::value_parser!(u32).range(1..=1000))]
    pub(crate) runs: u32,
    /// Seconds per load
    #[arg(long, value_name = "N", default_value_t = 3, value_parser = clap::value_parser!(u32).range(1..=3600))]
    pub(crate) seconds: u32,
    /// QEMU binary to compare with [default: qemu-system-x86_64, if it is installed]
    #[arg(long, value_name = "FILE")]
    pub(crate) qemu: Option<PathBuf>,
    /// Print JSON, one object per line, instead of the table
    #[arg(long)]
    pub(crate) json: bool,
}

#[derive(Debug, Args)]
pub(crate) struct BareStartArguments {
    /// Kernel: an ELF image with a PVH note
    #[arg(long, value_name = "FILE")]
    pub(crate) kernel: PathBuf,
    /// Command line of the kernel
    #[arg(long, value_name = "TEXT", default_value = "")]
    pub(crate) cmdline: String,
    /// Guest memory
    #[arg(long, value_name = "SIZE", value_parser = parse_size)]
    pub(crate) memory: u64,
}
