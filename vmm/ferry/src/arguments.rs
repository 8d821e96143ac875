//! What may be written behind `ferry`.

use std::fmt;
use std::path::PathBuf;

use clap::{Args, Parser, Subcommand, ValueEnum};

use super::devices::DeviceArguments;
use migration::TimeoutStrategy;
use vmm::config::{SerialConfig, SerialMode};
use vmm::kvm::dirty_log::DirtyLogMode;
use vmm::memory::Backing;
use vmm::migrate::{Url, check_socket_path};
use vmm::size::parse_size;

/// A small KVM monitor that carries running guests to another process without losing a byte.
#[derive(Debug, Parser)]
#[command(
    name = "ferry",
    version,
    propagate_version = true,
    after_help = "Start with `ferry demo`; `ferry help VERB` shows examples for each verb."
)]
pub(super) struct Arguments {
    #[command(subcommand)]
    pub(super) verb: Verb,
}

#[derive(Debug, Subcommand)]
pub(super) enum Verb {
    /// Migrate a guest that dirties its memory, live, and prove that nothing was lost
    Demo(DemoArguments),
    /// Launch a guest
    Run(RunArguments),
    /// Wait for a guest that another ferry sends
    Receive(ReceiveArguments),
    /// Make one call to the API of a running ferry
    Ctl(CtlArguments),
    /// Watch a running guest: who dirties its memory, how long it stands, where its migration is
    Top(TopArguments),
    /// Measure Ferry beside its peers, in turns
    Bench(BenchArguments),
}

#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  ferry bench start
  ferry bench devices --kernel vmlinux --initramfs load.cpio

ferry help bench VERB says how each measures. The status is 3 where a limit is missed, 1 where
nothing was measured.")]
pub(super) struct BenchArguments {
    #[command(subcommand)]
    pub(super) bench: Bench,
}

#[derive(Debug, Subcommand)]
pub(super) enum Bench {
    /// How soon a guest says its first byte, and how much memory its monitor takes
    Start(BenchStartArguments),
    /// How much goes through a guest's disk and network
    Devices(BenchDevicesArguments),
    /// The least that starts a guest, for `start` to compare with
    #[command(hide = true)]
    BareStart(BareStartArguments),
}

#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  ferry bench start
  ferry bench start --runs 31 --json

Starts the same PVH guest again and again: by a bare program of ioctls, by ferry run, and by
QEMU's microvm where QEMU is installed, in turns. The time is from the start of the process to the
guest's first byte on its serial port; the memory is what is resident then beyond the guest's.
Status 0 if ferry takes at most 1.5 times the bare program's time, at most a quarter of QEMU's,
and at most 5 MiB; 3 if not. It wants an idle machine.")]
pub(super) struct BenchStartArguments {
    /// Starts of each
    #[arg(long, value_name = "N", default_value_t = 11, value_parser = clap::value_parser!(u32).range(1..=10_000))]
    pub(super) runs: u32,
    /// Guest memory
    #[arg(long, value_name = "SIZE", default_value = "256M", value_parser = parse_size)]
    pub(super) memory: u64,
    /// The QEMU to compare with [default: qemu-system-x86_64, if it is installed]
    #[arg(long, value_name = "FILE")]
    pub(super) qemu: Option<PathBuf>,
    /// Print JSON, one object a line, instead of the table
    #[arg(long)]
    pub(super) json: bool,
}

#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  ferry bench devices --kernel vmlinux --initramfs load.cpio
  ferry bench devices --kernel vmlinux --initramfs load.cpio --tap tap0 --host-address 10.0.0.1 \\
      --guest-address 10.0.0.2/24

Runs the same Linux guest in ferry run and in QEMU's microvm, where QEMU is installed, in turns;
both have a raw image as /dev/vda and, with --tap, the tap as eth0, over virtio-mmio. The
initramfs is told by the kernel's command line: ferry.disk=/dev/vda, ferry.host=ADDRESS:PORT,
ferry.address=ADDRESS/BITS, ferry.seconds=N. It works the devices and prints a line a load on the
serial port, `ferry-bench: NAME operations=N us=N` or `ferry-bench: NAME bytes=N us=N`, then
`ferry-bench: end`.

At ferry.host its connections are for what their first byte says: s, count what comes and answer
with 8 bytes when all is there; r, send without end; t, echo.

Ferry's own initramfs is written by write-device-load of the package ferry-tests, for Debian's
cloud kernels. Status 0 if ferry is not slower in any load; 3 if it is. It wants an idle machine.")]
pub(super) struct BenchDevicesArguments {
    /// The kernel to boot: an image that QEMU's microvm boots, too
    #[arg(long, value_name = "FILE")]
    pub(super) kernel: PathBuf,
    /// The initramfs that works the devices
    #[arg(long, value_name = "FILE")]
    pub(super) initramfs: PathBuf,
    /// A tap that is there, for the network
    #[arg(long, value_name = "NAME", requires_all = ["host_address", "guest_address"])]
    pub(super) tap: Option<String>,
    /// The host's address on the tap
    #[arg(long, value_name = "ADDRESS", requires = "tap")]
    pub(super) host_address: Option<std::net::IpAddr>,
    /// The guest's address, with the bits of its network
    #[arg(long, value_name = "ADDRESS/BITS", requires = "tap")]
    pub(super) guest_address: Option<String>,
    /// The size of the disk, which is a temporary file; of each run
    #[arg(long, value_name = "SIZE", default_value = "128M", value_parser = parse_size)]
    pub(super) disk_size: u64,
    /// Guest memory
    #[arg(long, value_name = "SIZE", default_value = "512M", value_parser = parse_size)]
    pub(super) memory: u64,
    /// Runs of each
    #[arg(long, value_name = "N", default_value_t = 3, value_parser = clap::value_parser!(u32).range(1..=1000))]
    pub(super) runs: u32,
    /// Seconds for each load
    #[arg(long, value_name = "N", default_value_t = 3, value_parser = clap::value_parser!(u32).range(1..=3600))]
    pub(super) seconds: u32,
    /// The QEMU to compare with [default: qemu-system-x86_64, if it is installed]
    #[arg(long, value_name = "FILE")]
    pub(super) qemu: Option<PathBuf>,
    /// Print JSON, one object a line, instead of the table
    #[arg(long)]
    pub(super) json: bool,
}

#[derive(Debug, Args)]
pub(super) struct BareStartArguments {
    /// The kernel: an ELF image with a PVH note
    #[arg(long, value_name = "FILE")]
    pub(super) kernel: PathBuf,
    /// Its command line
    #[arg(long, value_name = "TEXT", default_value = "")]
    pub(super) cmdline: String,
    /// Guest memory
    #[arg(long, value_name = "SIZE", value_parser = parse_size)]
    pub(super) memory: u64,
}

#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  ferry demo
  ferry demo --memory 2G --hot 256M --cpus 4 --transport unix
  ferry demo --json | tail -n 1

The demo starts two processes of this program, lets a guest write to its memory as fast as it can
in the first, migrates it live to the second, and lets the guest check every page that it ever
wrote. Its exit status is 0 only if memory was equal at the switchover and the guest found no
write lost.")]
pub(super) struct DemoArguments {
    /// Guest memory
    #[arg(long, value_name = "SIZE", default_value = "512M", value_parser = parse_size)]
    pub(super) memory: u64,
    /// How much of it the guest rewrites all the time
    #[arg(long, value_name = "SIZE", default_value = "64M", value_parser = parse_size)]
    pub(super) hot: u64,
    /// How much more of it the guest writes once, and finds unchanged at the end
    #[arg(long, value_name = "SIZE", default_value = "16M", value_parser = parse_size)]
    pub(super) cold: u64,
    /// vCPUs of the guest
    #[arg(long, value_name = "N", default_value_t = 2, value_parser = clap::value_parser!(u32).range(1..=16))]
    pub(super) cpus: u32,
    /// Aim to stop the guest no longer than this
    #[arg(long, value_name = "MS", default_value_t = 50, value_parser = clap::value_parser!(u64).range(1..=3_600_000))]
    pub(super) downtime_ms: u64,
    /// How the two processes are connected
    #[arg(long, value_enum, default_value_t = Transport::Tcp)]
    pub(super) transport: Transport,
    /// Print JSON, one object a line, instead of the table
    #[arg(long)]
    pub(super) json: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(super) enum Transport {
    Tcp,
    Unix,
}

#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  ferry run --kernel vmlinuz --initramfs initrd.cpio --cmdline 'console=ttyS0' --serial stdio
  ferry run --kernel vmlinuz --initramfs initrd.img --serial stdio \\
      --cmdline 'console=ttyS0 root=/dev/vda1' --disk path=debian.raw --net tap=tap0 --rng
  ferry run --kernel vmlinuz --initramfs initrd.img --serial stdio \\
      --cmdline 'console=ttyS0 root=/dev/vda1' --disk vhost_user=on,socket=/run/disk.sock
  ferry run --kernel guest.elf --cpus 2 --memory 1G,hugepages=on --api-socket /run/guest.sock
  ferry run --config guest.json --api-socket /run/guest.sock
  ferry run --api-socket /run/guest.sock --event-monitor path=/run/guest.events

Kernels: ELF images with a PVH note, vmlinux, bzImage. Without a kernel the monitor waits for the
API calls vm.create and vm.boot.

A guest ends when it switches the machine off, or writes a status to the debug-exit port 0xf4;
that status is then ferry's own. When it resets the machine it starts again, from its files as
they are then. On a terminal, Ctrl-A x ends the guest. After the guest was migrated away, ferry
ends with status 0.

The guest finds its devices in the order disks, interfaces, rng, vsock, balloon, console. An image
is locked while a guest has it.

With hugepages=on, a balloon's pages of 4 KiB become zeros and stay; what leaves are whole huge
pages that the guest reports as free. When it uses them again and the host has none left, it
stands until there are some in /proc/sys/vm/nr_hugepages.")]
pub(super) struct RunArguments {
    /// The kernel to boot
    #[arg(long, value_name = "FILE")]
    pub(super) kernel: Option<PathBuf>,
    /// An initramfs for the kernel
    #[arg(long, value_name = "FILE")]
    pub(super) initramfs: Option<PathBuf>,
    /// The kernel's command line
    #[arg(long, value_name = "TEXT", allow_hyphen_values = true)]
    pub(super) cmdline: Option<String>,
    /// vCPUs, 1 to 64 [default: 1]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=64))]
    pub(super) cpus: Option<u32>,
    /// Memory: SIZE[,shared=on|off][,hugepages=on|off], such as 4G or 1G,hugepages=on [default: 512M]
    #[arg(long, value_name = "MEMORY", value_parser = parse_memory)]
    pub(super) memory: Option<MemoryArgument>,
    /// Where the serial port leads: stdio, null, or file:PATH [default: null]
    #[arg(long, value_name = "WHERE", value_parser = parse_serial)]
    pub(super) serial: Option<SerialConfig>,
    /// Answer API calls on this Unix socket, or on one that descriptor N is
    #[arg(long, value_name = "PATH|fd=N", value_parser = parse_descriptor_or_path)]
    pub(super) api_socket: Option<DescriptorOrPath>,
    /// Append events to this file or named pipe, or to descriptor N, as JSON lines
    #[arg(long, value_name = "PATH|fd=N", value_parser = parse_descriptor_or_path)]
    pub(super) event_monitor: Option<DescriptorOrPath>,
    /// Read the guest's configuration from this file (the API's VmConfig as JSON)
    #[arg(long, value_name = "FILE", conflicts_with_all = [
        "kernel", "initramfs", "cmdline", "cpus", "memory", "serial", "disk", "net", "vsock", "rng", "balloon", "console"
    ])]
    pub(super) config: Option<PathBuf>,
    /// End when the guest resets the machine, instead of starting it again
    #[arg(long)]
    pub(super) no_reboot: bool,
    /// KVM's dirty log to use in migrations: get, get-clear, initially-set [default: the best there is]
    #[arg(long, value_name = "KIND")]
    pub(super) dirty_log: Option<DirtyLogMode>,
    /// End when this process, which started this one, ends
    #[arg(long, value_name = "PID", hide = true)]
    pub(super) end_with_parent: Option<u32>,
    #[command(flatten)]
    pub(super) devices: DeviceArguments,
}

impl RunArguments {
    /// The first option that says something of a guest besides its kernel.
    pub(super) fn of_a_guest(&self) -> Option<&'static str> {
        let given = [
            (self.initramfs.is_some(), "--initramfs"),
            (self.cmdline.is_some(), "--cmdline"),
            (self.cpus.is_some(), "--cpus"),
            (self.memory.is_some(), "--memory"),
            (self.serial.is_some(), "--serial"),
            (self.devices.are_given(), "a device"),
        ];
        given.iter().find(|(is, _)| *is).map(|(_, name)| *name)
    }
}

#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  ferry receive unix:/run/move.sock --serial stdio
  ferry receive tcp:127.0.0.1:4444 --api-socket /run/guest.sock --memory-limit 4G
  ferry receive unix:/run/move.sock --disk path=debian.raw --net tap=tap1 --rng

Waits until a guest has arrived, then is its monitor. An attempt that fails is reported, and the
next one waited for. A guest that resets the machine here ends, because the files that it was
launched from stayed where it came from. Plain TCP is for loopback only.

A guest with devices is taken where the same are given here, in the same order: images of the same
size and contents (the same file, or one on storage that both hosts see), vhost-user back ends of
such disks, its taps, its socket. Addresses and serial numbers come with the guest.

Images and taps are looked at when ferry starts, and taken when a guest comes.")]
pub(super) struct ReceiveArguments {
    /// Where to wait: unix:PATH or tcp:HOST:PORT (port 0: one that is free, told by migration-progress)
    #[arg(value_name = "URL")]
    pub(super) url: Url,
    /// Where the serial port leads: stdio, null, or file:PATH [default: null]
    #[arg(long, value_name = "WHERE", value_parser = parse_serial)]
    pub(super) serial: Option<SerialConfig>,
    /// Answer API calls on this Unix socket, or on one that descriptor N is
    #[arg(long, value_name = "PATH|fd=N", value_parser = parse_descriptor_or_path)]
    pub(super) api_socket: Option<DescriptorOrPath>,
    /// Append events to this file or named pipe, or to descriptor N, as JSON lines
    #[arg(long, value_name = "PATH|fd=N", value_parser = parse_descriptor_or_path)]
    pub(super) event_monitor: Option<DescriptorOrPath>,
    /// Refuse guests with more memory than this
    #[arg(long, value_name = "SIZE", value_parser = parse_size)]
    pub(super) memory_limit: Option<u64>,
    /// What guest memory is made of here: a memory file, private memory (with transparent huge pages), or
    /// huge pages of 2 MiB
    #[arg(long, value_enum, default_value_t = BackingArgument::Memfd)]
    pub(super) memory_backing: BackingArgument,
    /// End when this process, which started this one, ends
    #[arg(long, value_name = "PID", hide = true)]
    pub(super) end_with_parent: Option<u32>,
    #[command(flatten)]
    pub(super) devices: DeviceArguments,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(super) enum BackingArgument {
    Memfd,
    Anonymous,
    Hugetlb,
}

impl From<BackingArgument> for Backing {
    fn from(argument: BackingArgument) -> Self {
        match argument {
            BackingArgument::Memfd => Self::Memfd,
            BackingArgument::Anonymous => Self::Anonymous,
            BackingArgument::Hugetlb => Self::Hugetlb,
        }
    }
}

#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  ferry ctl --api-socket /run/guest.sock info
  ferry ctl --api-socket /run/guest.sock create guest.json
  ferry ctl --api-socket /run/guest.sock boot
  ferry ctl --api-socket /run/guest.sock dirty-rate --interval-ms 500
  ferry ctl --api-socket /run/guest.sock resize --balloon 256M
  ferry ctl --api-socket /run/guest.sock send-migration tcp:127.0.0.1:4444 --downtime-ms 100
  ferry ctl --api-socket /run/guest.sock migration-resolve resume")]
pub(super) struct CtlArguments {
    /// The API socket of the ferry to call
    #[arg(long, value_name = "PATH", value_parser = parse_socket)]
    pub(super) api_socket: PathBuf,
    #[command(subcommand)]
    pub(super) call: Call,
}

#[derive(Debug, Subcommand)]
pub(super) enum Call {
    /// Is it there, and which version is it
    Ping,
    /// Show the guest's configuration and state
    Info,
    /// Create a guest from its configuration (the API's VmConfig as JSON); it is off
    Create {
        /// The file; - is standard input
        #[arg(value_name = "FILE")]
        file: PathBuf,
    },
    /// Boot the guest that was created, or shut down
    Boot,
    /// Switch the guest off and forget it
    Delete,
    /// Show what was counted of the guest, its devices and the dirty tracker
    Counters,
    /// Measure how fast the guest dirties memory, and who does it
    DirtyRate {
        /// Measure for so long
        #[arg(long, value_name = "MS", default_value_t = 1000)]
        interval_ms: u64,
    },
    /// Print all figures in Prometheus' text format
    Metrics,
    /// Stop the guest's vCPUs
    Pause,
    /// Let them run again
    Resume,
    /// Switch the guest off without asking it; the monitor stays, and can boot it again
    Shutdown,
    /// End the guest and its monitor
    ShutdownVmm,
    /// Press the guest's power button: it is asked to switch itself off
    PowerButton,
    /// End the guest without asking it, and start it again
    Reboot,
    /// Ask the guest to have so much of its memory in its balloon
    Resize {
        /// The balloon's size; 0 gives all back
        #[arg(long, value_name = "SIZE", value_parser = parse_size)]
        balloon: u64,
    },
    /// Send the guest to another ferry, live
    SendMigration(SendArguments),
    /// Show where a migration is
    MigrationProgress,
    /// Give up a running migration; the guest stays
    CancelMigration,
    /// Say where the guest is after an unconfirmed hand-over
    MigrationResolve {
        /// resume: it does not run there, so run it here; discard: it runs there
        #[arg(value_enum)]
        action: ResolveArgument,
    },
}

#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  ferry top --api-socket /run/guest.sock
  ferry top --api-socket /run/guest.sock --interval-ms 250
  ferry top --api-socket /run/guest.sock --once

q or Ctrl-C ends the view, the guest runs on. While it is watched its dirty pages are logged,
which costs it a little time at each look: --no-dirty-rate leaves that out, and then who dirties
what is seen in migrations only.")]
pub(super) struct TopArguments {
    /// The API socket of the ferry to watch
    #[arg(long, value_name = "PATH", value_parser = parse_socket)]
    pub(super) api_socket: PathBuf,
    /// Look so often
    #[arg(long, value_name = "MS", default_value_t = 1000, value_parser = clap::value_parser!(u64).range(100..=60_000))]
    pub(super) interval_ms: u64,
    /// Print one look as plain text, without a terminal, and end
    #[arg(long)]
    pub(super) once: bool,
    /// Do not log dirty pages for the view
    #[arg(long)]
    pub(super) no_dirty_rate: bool,
}

/// Where something is: at a path, or already open.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum DescriptorOrPath {
    Path(PathBuf),
    Fd(i32),
}

impl fmt::Display for DescriptorOrPath {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Path(path) => write!(f, "{}", path.display()),
            Self::Fd(number) => write!(f, "fd={number}"),
        }
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(super) enum ResolveArgument {
    Resume,
    Discard,
}

#[derive(Debug, Args)]
pub(super) struct SendArguments {
    /// Where to: unix:PATH or tcp:HOST:PORT
    #[arg(value_name = "URL")]
    pub(super) url: Url,
    /// Aim to stop the guest no longer than this
    #[arg(long, value_name = "MS", default_value_t = 300)]
    pub(super) downtime_ms: u64,
    /// Try no longer than this
    #[arg(long, value_name = "S", default_value_t = 3600)]
    pub(super) timeout_s: u64,
    /// What to do after the timeout: cancel the migration, or ignore the downtime and stop the guest
    #[arg(long, value_enum, default_value_t = StrategyArgument::Cancel)]
    pub(super) timeout_strategy: StrategyArgument,
    /// Hold the vCPUs for up to this percentage of the time if the guest dirties memory too fast; 0: never
    #[arg(long, value_name = "PERCENT", default_value_t = 80)]
    pub(super) throttle_max: u32,
    /// Compare the digest of all memory before the guest is handed over (takes downtime)
    #[arg(long)]
    pub(super) verify: bool,
    /// Print the figures as one JSON object instead of a table
    #[arg(long)]
    pub(super) json: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(super) enum StrategyArgument {
    Cancel,
    Ignore,
}

impl From<StrategyArgument> for TimeoutStrategy {
    fn from(argument: StrategyArgument) -> Self {
        match argument {
            StrategyArgument::Cancel => Self::Cancel,
            StrategyArgument::Ignore => Self::Ignore,
        }
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct MemoryArgument {
    pub(super) size: u64,
    pub(super) shared: bool,
    pub(super) hugepages: bool,
}

fn parse_memory(text: &str) -> Result<MemoryArgument, String> {
    let mut parts = text.split(',');
    let first = parts.next().unwrap_or_default();
    let mut memory = MemoryArgument {
        size: parse_size(first.strip_prefix("size=").unwrap_or(first))?,
        shared: true,
        hugepages: false,
    };
    for part in parts {
        match part.split_once('=') {
            Some(("shared", value)) => memory.shared = on_off(part, value)?,
            Some(("hugepages", value)) => memory.hugepages = on_off(part, value)?,
            _ => return Err(format!("{part:?} is not shared=on|off or hugepages=on|off")),
        }
    }
    Ok(memory)
}

pub(super) fn on_off(part: &str, value: &str) -> Result<bool, String> {
    match value {
        "on" => Ok(true),
        "off" => Ok(false),
        _ => Err(format!("{part:?}: on or off")),
    }
}

pub(super) fn parse_serial(text: &str) -> Result<SerialConfig, String> {
    let file = text
        .strip_prefix("file:")
        .or_else(|| text.strip_prefix("file="));
    match (text, file) {
        ("stdio" | "tty", _) => Ok(SerialConfig {
            mode: SerialMode::Tty,
            file: None,
        }),
        ("null" | "off", _) => Ok(SerialConfig {
            mode: SerialMode::Null,
            file: None,
        }),
        (_, Some(path)) if !path.is_empty() => Ok(SerialConfig {
            mode: SerialMode::File,
            file: Some(path.into()),
        }),
        _ => Err(format!("{text:?} is not stdio, null or file:PATH")),
    }
}

fn parse_descriptor_or_path(text: &str) -> Result<DescriptorOrPath, String> {
    match text.strip_prefix("fd=") {
        Some(number) => number
            .parse()
            .map(DescriptorOrPath::Fd)
            .map_err(|_| format!("{number:?} is no descriptor's number")),
        None => match text.strip_prefix("path=").unwrap_or(text) {
            "" => Err("path=PATH or fd=N".into()),
            path => Ok(DescriptorOrPath::Path(path.into())),
        },
    }
}

fn parse_socket(text: &str) -> Result<PathBuf, String> {
    match text.strip_prefix("path=").unwrap_or(text) {
        "" => Err("a socket needs a path".into()),
        path => check_socket_path(path.as_ref())
            .map(|()| path.into())
            .map_err(|error| error.to_string()),
    }
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    use super::*;

    #[test]
    fn the_command_line_is_consistent() {
        Arguments::command().debug_assert();
    }

    #[test]
    fn names_of_values_leave_room_for_what_they_mean() {
        fn look(command: &clap::Command) {
            for argument in command.get_arguments() {
                let names = argument.get_value_names().unwrap_or_default();
                for name in names {
                    assert!(name.len() <= 16, "{}: {name}", command.get_name());
                }
            }
            command.get_subcommands().for_each(look);
        }
        look(&Arguments::command());
    }

    #[test]
    fn every_verb_shows_an_example() {
        for verb in Arguments::command().get_subcommands() {
            let help = verb
                .get_after_help()
                .map(ToString::to_string)
                .unwrap_or_default();
            assert!(help.contains("Example"), "{}", verb.get_name());
        }
    }

    #[test]
    fn no_line_below_the_options_is_wrapped_again() {
        // The help is wrapped at 100 columns; these lines are broken already.
        fn look(command: &clap::Command) {
            let help = command.get_after_help();
            let help = help.map(ToString::to_string).unwrap_or_default();
            for line in help.lines() {
                assert!(line.chars().count() <= 98, "{}: {line}", command.get_name());
            }
            command.get_subcommands().for_each(look);
        }
        look(&Arguments::command());
    }

    #[test]
    fn a_place_is_a_path_or_a_descriptor() {
        assert_eq!(
            parse_descriptor_or_path("fd=7"),
            Ok(DescriptorOrPath::Fd(7))
        );
        for text in ["/x", "path=/x"] {
            assert_eq!(
                parse_descriptor_or_path(text),
                Ok(DescriptorOrPath::Path("/x".into()))
            );
        }
        for text in ["", "path=", "fd=", "fd=x"] {
            parse_descriptor_or_path(text).unwrap_err();
        }
    }

    #[test]
    fn memory_is_read_with_its_options() {
        let memory = parse_memory("1G,hugepages=on").unwrap();
        assert_eq!(
            memory,
            MemoryArgument {
                size: 1 << 30,
                shared: true,
                hugepages: true
            }
        );
        assert!(!parse_memory("size=64M,shared=off").unwrap().shared);
        for text in ["", "1G,", "1G,shared", "1G,shared=yes", "1G,zones=on"] {
            parse_memory(text).unwrap_err();
        }
    }
}
