//! `ferry bench devices`: measures the throughput of a guest's disk and network, beside QEMU with the same guest.

use std::fs::File;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;
use std::{env, fmt};

use serde_json::json;

use super::figures::{Bound, Limit, Series, exit_status, print_limits, print_limits_as_json};
use super::monitor_process::MonitorProcess;
use super::{net_host, peers};
use crate::arguments::bench::BenchDevicesArguments;
use crate::progress::ProgressLine;
use crate::{Failure, print_line};
use vmm::kvm::host::Host;

/// Time that a guest may print nothing, in addition to the time of a load: it boots, or the disk is slow.
const SILENCE_LIMIT: Duration = Duration::from_secs(120);
/// Prefix of the guest's result lines.
const MARK: &str = "ferry-bench: ";
/// Result line that ends the measurement.
const END: &str = "end";

/// A monitor that is measured, and its results.
struct DeviceContender {
    name: &'static str,
    command: Box<dyn Fn(&Guest) -> Command>,
    /// Results of each load, in the order in which the guest prints them.
    loads: Vec<(String, Unit, Series)>,
}

/// The guest that all monitors run.
struct Guest {
    /// This program.
    this: PathBuf,
    kernel: PathBuf,
    initramfs: PathBuf,
    command_line: String,
    disk: PathBuf,
    tap: Option<String>,
    memory: u64,
}

/// Unit of the throughput of a load.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Unit {
    /// For loads with small requests.
    Operations,
    /// For loads with large requests.
    Mebibytes,
}

impl fmt::Display for Unit {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Operations => "1/s",
            Self::Mebibytes => "MiB/s",
        })
    }
}

/// Measures all monitors and prints the results. Returns the exit status.
pub(super) fn devices(arguments: &BenchDevicesArguments) -> Result<u8, Failure> {
    // If KVM is missing, this error is clearer than that of a child process.
    drop(Host::open()?);
    let directory = tempfile::Builder::new().prefix("ferry-bench-").tempdir()?;
    let disk = directory.path().join("disk.raw");
    fill(&disk, arguments.disk_size).map_err(|error| format!("{}: {error}", disk.display()))?;
    let mut contenders = vec![DeviceContender::new("ferry", ferry)];
    if let Some(program) = peers::find_qemu(arguments.qemu.as_deref())? {
        let command = move |guest: &Guest| qemu(&program, guest);
        contenders.push(DeviceContender::new("qemu", command));
    }
    let guest = Guest::new(arguments, disk)?;
    let limit = SILENCE_LIMIT + Duration::from_secs(arguments.seconds.into());
    let progress = ProgressLine::new();
    for run in 0..arguments.runs {
        for contender in &mut contenders {
            let name = contender.name;
            progress.show(run.into(), arguments.runs.into(), name);
            contender.measure(&guest, limit)?;
        }
    }
    drop(progress);
    let limits = limits(&contenders);
    if arguments.json {
        for line in json_lines(&contenders) {
            print_line(&line)?;
        }
        print_limits_as_json(&limits)?;
    } else {
        for line in table(&contenders, arguments) {
            print_line(&line)?;
        }
        print_limits(&limits)?;
    }
    Ok(exit_status(&limits))
}

/// Creates the disk image without holes, because reading a hole would not read the disk of the host.
fn fill(disk: &Path, bytes: u64) -> std::io::Result<()> {
    const PIECE: usize = 1 << 20;
    let mut file = File::create_new(disk)?;
    let piece: Vec<u8> = (0..=u8::MAX).cycle().take(PIECE).collect();
    for _ in 0..bytes / PIECE as u64 {
        file.write_all(&piece)?;
    }
    file.sync_all()
}

impl Guest {
    /// Builds the kernel command line, and starts the TCP server on the host if the guest has a network.
    fn new(arguments: &BenchDevicesArguments, disk: PathBuf) -> Result<Self, Failure> {
        let seconds = arguments.seconds;
        let mut command_line =
            format!("console=ttyS0 quiet panic=-1 ferry.disk=/dev/vda ferry.seconds={seconds}");
        if let (Some(host), Some(guest)) = (arguments.host_address, &arguments.guest_address) {
            let server = net_host::start(host).map_err(|error| {
                format!("--host-address {host}: cannot listen: {error} (is the tap up?)")
            })?;
            command_line += &format!(" ferry.address={guest} ferry.host={server}");
        }
        Ok(Self {
            this: env::current_exe()?,
            kernel: arguments.kernel.clone(),
            initramfs: arguments.initramfs.clone(),
            command_line,
            disk,
            tap: arguments.tap.clone(),
            memory: arguments.memory,
        })
    }
}

/// Returns the command line of `ferry run`.
fn ferry(guest: &Guest) -> Command {
    let mut command = peers::ferry(&guest.this, guest.memory);
    command.arg("--kernel").arg(&guest.kernel);
    command.arg("--initramfs").arg(&guest.initramfs);
    command.args(["--cmdline", &guest.command_line, "--disk"]);
    command.arg(format!("path={}", guest.disk.display()));
    if let Some(tap) = &guest.tap {
        command.args(["--net", &format!("tap={tap}")]);
    }
    command
}

/// Returns the command line of QEMU with the same devices as Ferry's: virtio 1 over virtio-mmio, described by ACPI.
fn qemu(program: &Path, guest: &Guest) -> Command {
    let mut command = peers::qemu(program, "acpi=on,auto-kernel-cmdline=off", guest.memory);
    command.arg("-kernel").arg(&guest.kernel);
    command.arg("-initrd").arg(&guest.initramfs);
    command.args(["-append", &guest.command_line]);
    command.args(["-global", "virtio-mmio.force-legacy=false", "-drive"]);
    command.arg(format!(
        "id=disk,if=none,format=raw,file={}",
        guest.disk.display()
    ));
    command.args(["-device", "virtio-blk-device,drive=disk"]);
    if let Some(tap) = &guest.tap {
        let netdev = format!("tap,id=net,ifname={tap},script=no,downscript=no");
        command.args([
            "-netdev",
            &netdev,
            "-device",
            "virtio-net-device,netdev=net",
        ]);
    }
    command
}

impl DeviceContender {
    fn new(name: &'static str, command: impl Fn(&Guest) -> Command + 'static) -> Self {
        Self {
            name,
            command: Box::new(command),
            loads: Vec::new(),
        }
    }

    /// Runs the guest once and adds its results.
    fn measure(&mut self, guest: &Guest, limit: Duration) -> Result<(), Failure> {
        let mut running = MonitorProcess::start(self.name, (self.command)(guest))?;
        loop {
            let line = running.read_line(limit)?;
            let Some((_, result)) = line.split_once(MARK) else {
                continue;
            };
            if result.trim() == END {
                return Ok(());
            }
            let (load, unit, figure) = parse(result)
                .ok_or_else(|| format!("{}: the guest printed the result {result:?}", self.name))?;
            self.add(load, unit, figure);
        }
    }

    /// Adds the figure of one run to the series of a load.
    fn add(&mut self, load: &str, unit: Unit, figure: f64) {
        if let Some((.., series)) = self.loads.iter_mut().find(|(name, ..)| name == load) {
            series.push(figure);
            return;
        }
        let mut series = Series::default();
        series.push(figure);
        self.loads.push((load.into(), unit, series));
    }

    /// Returns the median of a load, or NaN if the guest did not run it.
    fn median(&self, load: &str) -> f64 {
        let found = self.loads.iter().find(|(name, ..)| name == load);
        found.map_or(f64::NAN, |(.., series)| series.median())
    }
}

/// Parses a result of the guest: `NAME operations=N us=N` or `NAME bytes=N us=N`.
#[allow(
    clippy::cast_precision_loss,
    reason = "the figures are rounded when they are printed"
)]
fn parse(line: &str) -> Option<(&str, Unit, f64)> {
    const MIB: f64 = 1024.0 * 1024.0;
    let mut words = line.split_whitespace();
    let name = words.next()?;
    let mut field = || -> Option<(&str, f64)> {
        let (name, value) = words.next()?.split_once('=')?;
        Some((name, value.parse::<u64>().ok()? as f64))
    };
    let (counted, count) = field()?;
    let seconds = field().filter(|(name, _)| *name == "us")?.1 / 1e6;
    if count <= 0.0 || seconds <= 0.0 {
        return None;
    }
    match counted {
        "operations" => Some((name, Unit::Operations, count / seconds)),
        "bytes" => Some((name, Unit::Mebibytes, count / MIB / seconds)),
        _ => None,
    }
}

fn table(contenders: &[DeviceContender], arguments: &BenchDevicesArguments) -> Vec<String> {
    let names: String = contenders
        .iter()
        .map(|contender| format!("{:>12}", contender.name))
        .collect();
    let mut lines = vec![
        format!(
            "device throughput: medians of {} runs each, alternating, {} s per load",
            arguments.runs, arguments.seconds
        ),
        format!("{:<22}{:>8}{names}", "", ""),
    ];
    lines.extend(loads(contenders).map(|(load, unit)| {
        let medians: String = contenders
            .iter()
            .map(|contender| format!("{:>12.1}", contender.median(load)))
            .collect();
        format!("{load:<22}{:>8}{medians}", unit.to_string())
    }));
    lines.push(String::new());
    lines
}

fn json_lines(contenders: &[DeviceContender]) -> impl Iterator<Item = String> {
    loads(contenders).map(|(load, unit)| {
        let medians: serde_json::Map<_, _> = contenders
            .iter()
            .map(|contender| (contender.name.to_owned(), contender.median(load).into()))
            .collect();
        json!({ "load": load, "unit": unit.to_string(), "medians": medians }).to_string()
    })
}

/// Returns the loads that ran in Ferry's guest, which is the first contender.
fn loads(contenders: &[DeviceContender]) -> impl Iterator<Item = (&str, Unit)> {
    let ferry = contenders.first().into_iter();
    ferry.flat_map(|ferry| {
        ferry
            .loads
            .iter()
            .map(|(load, unit, _)| (load.as_str(), *unit))
    })
}

/// Returns the limits: Ferry is at least as fast as each peer in each load.
fn limits(contenders: &[DeviceContender]) -> Vec<Limit> {
    let Some((ferry, peers)) = contenders.split_first() else {
        return Vec::new();
    };
    let mut limits = Vec::new();
    for peer in peers {
        limits.extend(ferry.loads.iter().map(|(load, ..)| Limit {
            what: format!("{load}: throughput of ferry / throughput of {}", peer.name),
            found: ferry.median(load) / peer.median(load),
            bound: Bound::Least(1.0),
        }));
    }
    limits
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn results_are_parsed_as_operations_or_mebibytes_per_second() {
        let (name, unit, figure) = parse("block-read-4k operations=3000 us=1500000").unwrap();
        assert_eq!((name, unit), ("block-read-4k", Unit::Operations));
        assert!((figure - 2000.0).abs() < 1e-9);
        let (_, unit, figure) = parse("block-read-1m bytes=31457280 us=3000000\r").unwrap();
        assert_eq!(unit, Unit::Mebibytes);
        assert!((figure - 10.0).abs() < 1e-9);
    }

    #[test]
    fn other_lines_are_not_parsed() {
        for line in [
            "failed: no virtio_blk",
            "",
            "x operations=1",
            "x operations=1 us=0",
            "x operations=0 us=1",
            "x operations=-1 us=1",
            "x us=1 operations=1",
            "x pages=1 us=1",
        ] {
            assert!(parse(line).is_none(), "{line:?}");
        }
    }

    #[test]
    fn a_load_that_a_peer_did_not_run_misses_the_limit() {
        let mut ferry_alone = DeviceContender::new("ferry", ferry);
        ferry_alone.add("x", Unit::Operations, 1.0);
        let peer = DeviceContender::new("qemu", ferry);
        let limits = limits(&[ferry_alone, peer]);
        assert_eq!(limits.len(), 1);
        assert!(!limits[0].holds());
    }
}
