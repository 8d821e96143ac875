//! The command line of `ferry`: verbs, options and their help.

#![allow(
    rustdoc::broken_intra_doc_links,
    reason = "the help that clap takes from doc comments has optional parts in brackets"
)]

pub(crate) mod bench;
mod devices;
mod values;

use std::path::PathBuf;

use clap::{Args, Parser, Subcommand, ValueEnum};

use bench::BenchArguments;
pub(crate) use devices::DeviceArguments;
use migration::TimeoutStrategy;
pub(crate) use values::DescriptorOrPath;
use values::{parse_descriptor_or_path, parse_memory, parse_serial, parse_socket};
use vmm::config::{MemoryConfig, SerialConfig};
use vmm::kvm::dirty_log::DirtyLogMode;
use vmm::memory::Backing;
use vmm::migrate::Url;
use vmm::size::parse_size;

/// A small virtual machine monitor for KVM that migrates running guests to another process.
#[derive(Debug, Parser)]
#[command(
    name = "ferry",
    version,
    propagate_version = true,
    after_help = "Start with `ferry demo`. `ferry help VERB` shows examples of each verb."
)]
pub(crate) struct Arguments {
    #[command(subcommand)]
    pub(crate) verb: Verb,
}

#[derive(Debug, Subcommand)]
pub(crate) enum Verb {
    /// Migrate a guest while it dirties its memory, and verify that no write was lost
    Demo(DemoArguments),
    /// Run a guest
    Run(RunArguments),
    /// Receive a guest that another ferry process migrates here
    Receive(ReceiveArguments),
    /// Make one API call to a running ferry process
    Ctl(CtlArguments),
    /// Show the dirty rate, vCPU stalls, devices and migration of a running guest
    Top(TopArguments),
    /// Measure Ferry beside QEMU
    Bench(BenchArguments),
}

#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  ferry demo
  ferry demo --memory 2G --hot 256M --cpus 4 --transport unix
  ferry demo --json | tail -n 1

The demo starts two ferry processes. In the first, a guest writes to its memory as fast as it can.
The demo migrates the running guest to the second process, where the guest checks every page that
it has written. The exit status is 0 only if the digests of guest memory were equal at the
switchover and the guest found no lost write.")]
pub(crate) struct DemoArguments {
    /// Guest memory
    #[arg(long, value_name = "SIZE", default_value = "512M", value_parser = parse_size)]
    pub(crate) memory: u64,
    /// Part of guest memory that the guest rewrites continuously
    #[arg(long, value_name = "SIZE", default_value = "64M", value_parser = parse_size)]
    pub(crate) hot: u64,
    /// Further part of guest memory that the guest writes once and checks at the end
    #[arg(long, value_name = "SIZE", default_value = "16M", value_parser = parse_size)]
    pub(crate) cold: u64,
    /// Number of vCPUs
    #[arg(long, value_name = "N", default_value_t = 2, value_parser = clap::value_parser!(u32).range(1..=16))]
    pub(crate) cpus: u32,
    /// Target downtime
    #[arg(long, value_name = "MS", default_value_t = 50, value_parser = clap::value_parser!(u64).range(1..=3_600_000))]
    pub(crate) downtime_ms: u64,
    /// Connection between the two processes
    #[arg(long, value_enum, default_value_t = Transport::Tcp)]
    pub(crate) transport: Transport,
    /// Print JSON, one object per line, instead of the table
    #[arg(long)]
    pub(crate) json: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum Transport {
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
  ferry run --api-socket /run/guest.sock --event-monitor /run/guest.events

The kernel is an ELF image with a PVH note, a vmlinux or a bzImage. With --api-socket and no
guest, ferry waits for the API calls vm.create and vm.boot.

ferry exits when the guest powers off, or when it writes a status to the debug-exit port 0xf4;
that status becomes ferry's exit status. When the guest resets the machine, ferry loads the kernel
and the initramfs from their files again and reboots it. On a terminal, Ctrl-A x ends the guest.
After a migration to another process, ferry exits with status 0.

The guest finds its devices in this order: disks, network interfaces, rng, vsock, balloon,
console. A disk image is locked while a guest uses it.

With hugepages=on, a 4 KiB page in the balloon reads as zeros but stays allocated. Only whole huge
pages that the guest reports as free are released. If the guest uses a released page again while
the host has no free huge page, the vCPU blocks until there is one; /proc/sys/vm/nr_hugepages sets
their number.")]
pub(crate) struct RunArguments {
    /// Kernel to boot
    #[arg(long, value_name = "FILE")]
    pub(crate) kernel: Option<PathBuf>,
    #[command(flatten)]
    pub(crate) guest: Option<GuestArguments>,
    /// Serve the API on this Unix socket, or on the inherited listening socket N
    #[arg(long, value_name = "PATH|fd=N", value_parser = parse_descriptor_or_path)]
    pub(crate) api_socket: Option<DescriptorOrPath>,
    /// Append events as JSON lines to this file or named pipe, or to the inherited descriptor N
    #[arg(long, value_name = "PATH|fd=N", value_parser = parse_descriptor_or_path)]
    pub(crate) event_monitor: Option<DescriptorOrPath>,
    /// Read the configuration of the guest from this file (the API's VmConfig as JSON)
    #[arg(long, value_name = "FILE", conflicts_with_all = ["kernel", "guest", "devices"])]
    pub(crate) config: Option<PathBuf>,
    /// Exit when the guest resets the machine, instead of rebooting it
    #[arg(long)]
    pub(crate) no_reboot: bool,
    /// Mode of KVM's dirty log: get, get-clear or initially-set [default: best that KVM supports]
    #[arg(long, value_name = "MODE")]
    pub(crate) dirty_log: Option<DirtyLogMode>,
    /// Exit when the parent process, which has this process ID, exits
    #[arg(long, value_name = "PID", hide = true)]
    pub(crate) end_with_parent: Option<u32>,
    #[command(flatten)]
    pub(crate) devices: Option<DeviceArguments>,
}

/// Options of `ferry run` that describe the guest, besides its kernel and its devices.
#[derive(Clone, Debug, Default, Args)]
#[group(id = "guest", multiple = true)]
pub(crate) struct GuestArguments {
    /// Initramfs for the kernel
    #[arg(long, value_name = "FILE")]
    pub(crate) initramfs: Option<PathBuf>,
    /// Command line of the kernel
    #[arg(long, value_name = "TEXT", allow_hyphen_values = true)]
    pub(crate) cmdline: Option<String>,
    /// Number of vCPUs, 1 to 64 [default: 1]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=64))]
    pub(crate) cpus: Option<u32>,
    /// Guest memory: SIZE[,shared=on|off][,hugepages=on|off], such as 4G or 1G,hugepages=on
    /// [default: 512M]
    #[arg(long, value_name = "MEMORY", value_parser = parse_memory)]
    pub(crate) memory: Option<MemoryConfig>,
    /// Other end of the serial port: stdio, null or file:PATH [default: null]
    #[arg(long, value_name = "TARGET", value_parser = parse_serial)]
    pub(crate) serial: Option<SerialConfig>,
}

#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  ferry receive unix:/run/move.sock --serial stdio
  ferry receive tcp:127.0.0.1:4444 --api-socket /run/guest.sock --memory-limit 4G
  ferry receive unix:/run/move.sock --disk path=debian.raw --net tap=tap1 --rng

ferry waits until a guest arrives and then runs it. If a migration fails, ferry reports the error
and waits for the next one. ferry exits when the guest resets the machine, because the files that
it was booted from are on the source host. Plain TCP is allowed on loopback addresses only.

If the guest has devices, give the same ones here in the same order: disk images of the same size
and contents (the same file, or a file on storage that both hosts share) or the sockets of
vhost-user back ends that serve such disks, taps, and the vsock socket. MAC addresses and serial
numbers are part of the migrated state.

Disk images and taps are checked when ferry starts, and opened when a guest arrives.")]
pub(crate) struct ReceiveArguments {
    /// Address to listen on: unix:PATH or tcp:HOST:PORT (port 0 picks a free port, which
    /// `ferry ctl migration-progress` shows)
    #[arg(value_name = "URL")]
    pub(crate) url: Url,
    /// Other end of the serial port: stdio, null or file:PATH [default: null]
    #[arg(long, value_name = "TARGET", value_parser = parse_serial)]
    pub(crate) serial: Option<SerialConfig>,
    /// Serve the API on this Unix socket, or on the inherited listening socket N
    #[arg(long, value_name = "PATH|fd=N", value_parser = parse_descriptor_or_path)]
    pub(crate) api_socket: Option<DescriptorOrPath>,
    /// Append events as JSON lines to this file or named pipe, or to the inherited descriptor N
    #[arg(long, value_name = "PATH|fd=N", value_parser = parse_descriptor_or_path)]
    pub(crate) event_monitor: Option<DescriptorOrPath>,
    /// Refuse guests with more memory than this
    #[arg(long, value_name = "SIZE", value_parser = parse_size)]
    pub(crate) memory_limit: Option<u64>,
    /// Backing of guest memory: a shared memfd, private anonymous memory (with transparent huge
    /// pages), or hugetlb pages of 2 MiB
    #[arg(long, value_enum, default_value_t = BackingArgument::Memfd)]
    pub(crate) memory_backing: BackingArgument,
    /// Exit when the parent process, which has this process ID, exits
    #[arg(long, value_name = "PID", hide = true)]
    pub(crate) end_with_parent: Option<u32>,
    #[command(flatten)]
    pub(crate) devices: DeviceArguments,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum BackingArgument {
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
pub(crate) struct CtlArguments {
    /// API socket of the ferry process
    #[arg(long, value_name = "PATH", value_parser = parse_socket)]
    pub(crate) api_socket: PathBuf,
    #[command(subcommand)]
    pub(crate) call: Call,
}

#[derive(Debug, Subcommand)]
pub(crate) enum Call {
    /// Show the version and the process ID of the ferry process
    Ping,
    /// Show the configuration and the state of the guest
    Info,
    /// Create a guest from a configuration (the API's VmConfig as JSON), without booting it
    Create {
        /// File with the configuration; - reads standard input
        #[arg(value_name = "FILE")]
        file: PathBuf,
    },
    /// Boot the guest after create or shutdown
    Boot,
    /// Power the guest off and discard its configuration
    Delete,
    /// Show the counters of the vCPUs, the devices and the dirty tracker
    Counters,
    /// Measure how fast the vCPUs and each device dirty guest memory
    DirtyRate {
        /// Length of the measurement
        #[arg(long, value_name = "MS", default_value_t = 1000)]
        interval_ms: u64,
    },
    /// Print all metrics in the text format of Prometheus
    Metrics,
    /// Pause the vCPUs
    Pause,
    /// Resume the vCPUs
    Resume,
    /// Power the guest off without its cooperation; it can be booted again
    Shutdown,
    /// Power the guest off and end the ferry process
    ShutdownVmm,
    /// Press the power button, so that the guest powers itself off
    PowerButton,
    /// Reset the guest without its cooperation and boot it again
    Reboot,
    /// Set the target size of the balloon
    Resize {
        /// Size of the balloon; 0 returns all memory to the guest
        #[arg(long, value_name = "SIZE", value_parser = parse_size)]
        balloon: u64,
    },
    /// Migrate the running guest to another ferry process
    SendMigration(SendArguments),
    /// Show the progress of a migration
    MigrationProgress,
    /// Cancel a running migration; the guest stays here
    CancelMigration,
    /// Decide which side has the guest after COMMIT was sent and its confirmation was lost
    MigrationResolve {
        /// resume: the guest does not run at the destination, so resume it here;
        /// discard: it runs at the destination
        #[arg(value_enum)]
        action: ResolveArgument,
    },
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum ResolveArgument {
    Resume,
    Discard,
}

#[derive(Debug, Args)]
pub(crate) struct SendArguments {
    /// Address of the destination: unix:PATH or tcp:HOST:PORT
    #[arg(value_name = "URL")]
    pub(crate) url: Url,
    /// Target downtime
    #[arg(long, value_name = "MS", default_value_t = 300)]
    pub(crate) downtime_ms: u64,
    /// Time limit of the migration until the switchover
    #[arg(long, value_name = "S", default_value_t = 3600)]
    pub(crate) timeout_s: u64,
    /// Action when the time limit has passed: cancel the migration, or ignore the target downtime
    /// and switch over
    #[arg(long, value_enum, default_value_t = StrategyArgument::Cancel)]
    pub(crate) timeout_strategy: StrategyArgument,
    /// Maximum share of time that the vCPUs are throttled if the guest dirties memory too fast;
    /// 0 disables throttling
    #[arg(long, value_name = "PERCENT", default_value_t = 80)]
    pub(crate) throttle_max: u32,
    /// Compare digests of all guest memory before the switchover completes (adds downtime)
    #[arg(long)]
    pub(crate) verify: bool,
    /// Print the report as one JSON object instead of a table
    #[arg(long)]
    pub(crate) json: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum StrategyArgument {
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

#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  ferry top --api-socket /run/guest.sock
  ferry top --api-socket /run/guest.sock --interval-ms 250
  ferry top --api-socket /run/guest.sock --once

q or Ctrl-C quits; the guest continues to run. To measure the dirty rate, top enables dirty
logging, which slows the guest a little in each interval. With --no-dirty-rate, the pages that
vCPUs dirty are shown only during a migration.")]
pub(crate) struct TopArguments {
    /// API socket of the ferry process
    #[arg(long, value_name = "PATH", value_parser = parse_socket)]
    pub(crate) api_socket: PathBuf,
    /// Time between two samples
    #[arg(long, value_name = "MS", default_value_t = 1000, value_parser = clap::value_parser!(u64).range(100..=60_000))]
    pub(crate) interval_ms: u64,
    /// Print one sample as plain text and exit
    #[arg(long)]
    pub(crate) once: bool,
    /// Do not enable dirty logging
    #[arg(long)]
    pub(crate) no_dirty_rate: bool,
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
    fn value_names_leave_room_for_the_help() {
        fn check(command: &clap::Command) {
            for argument in command.get_arguments() {
                let names = argument.get_value_names().unwrap_or_default();
                for name in names {
                    assert!(name.len() <= 16, "{}: {name}", command.get_name());
                }
            }
            command.get_subcommands().for_each(check);
        }
        check(&Arguments::command());
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
    fn lines_after_the_options_are_not_wrapped_again() {
        // clap wraps help at 100 columns. The lines of these texts are broken by hand.
        fn check(command: &clap::Command) {
            let help = command.get_after_help();
            let help = help.map(ToString::to_string).unwrap_or_default();
            for line in help.lines() {
                assert!(line.chars().count() <= 98, "{}: {line}", command.get_name());
            }
            command.get_subcommands().for_each(check);
        }
        check(&Arguments::command());
    }

    #[test]
    fn a_configuration_file_conflicts_with_every_option_that_describes_the_guest() {
        let run = ["ferry", "run", "--config", "guest.json"];
        Arguments::try_parse_from(run).unwrap();
        for option in [
            &["--kernel", "/k"][..],
            &["--initramfs", "/i"],
            &["--cmdline", "quiet"],
            &["--cpus", "1"],
            &["--memory", "1G"],
            &["--serial", "null"],
            &["--disk", "path=/d"],
            &["--net", "tap=t"],
            &["--vsock", "socket=/s"],
            &["--rng"],
            &["--balloon", "size=0"],
            &["--console", "null"],
        ] {
            let error = Arguments::try_parse_from(run.iter().chain(option)).unwrap_err();
            assert_eq!(error.kind(), clap::error::ErrorKind::ArgumentConflict);
        }
    }
}
