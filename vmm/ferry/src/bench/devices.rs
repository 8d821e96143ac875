//! `ferry bench devices`: how much goes through a guest's disk and network, beside QEMU with the same guest.

use std::fs::File;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;
use std::{env, fmt};

use serde_json::json;

use super::contender::Contender;
use super::figures::{Bound, Limit, Series, judge};
use super::{net_host, peers};
use crate::arguments::BenchDevicesArguments;
use crate::progress::ProgressLine;
use crate::{Failure, say};
use vmm::kvm::host::Host;

/// How long a guest may be silent beyond the time of a load: it boots, or a disk is slow.
const PATIENCE: Duration = Duration::from_secs(120);
/// Before each line that is meant for this program.
const MARK: &str = "ferry-bench: ";
const END: &str = "end";
const FERRY: &str = "ferry";

/// One of those that are measured.
struct Contestant {
    name: &'static str,
    command: fn(&Guest) -> Command,
    /// In the order in which the guest says them.
    loads: Vec<(String, Unit, Series)>,
}

/// The guest that all run.
struct Guest {
    this: PathBuf,
    /// Nothing, where there is none.
    qemu: PathBuf,
    kernel: PathBuf,
    initramfs: PathBuf,
    command_line: String,
    disk: PathBuf,
    tap: Option<String>,
    memory: u64,
}

/// What a load is counted in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Unit {
    /// Small requests: how many there are counts.
    Operations,
    /// Large ones: the bytes count.
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

pub(super) fn devices(arguments: &BenchDevicesArguments) -> Result<u8, Failure> {
    // Its message is better than that of a child.
    drop(Host::open()?);
    let directory = tempfile::Builder::new().prefix("ferry-bench-").tempdir()?;
    let disk = directory.path().join("disk.raw");
    fill(&disk, arguments.disk_size).map_err(|error| format!("{}: {error}", disk.display()))?;
    let program = peers::find_qemu(arguments.qemu.as_deref())?;
    let has_qemu = program.is_some();
    let guest = Guest::new(arguments, disk, program)?;
    let mut contestants = vec![Contestant::new(FERRY, ferry)];
    if has_qemu {
        contestants.push(Contestant::new("qemu", qemu));
    }
    let limit = PATIENCE + Duration::from_secs(arguments.seconds.into());
    let progress = ProgressLine::new();
    for run in 0..arguments.runs {
        for contestant in &mut contestants {
            let name = contestant.name;
            progress.show(run.into(), arguments.runs.into(), name);
            contestant.measure(&guest, limit)?;
        }
    }
    drop(progress);
    for line in table(&contestants, arguments) {
        say(&line)?;
    }
    judge(&limits(&contestants), arguments.json)
}

/// No hole anywhere: reading one would be reading nothing.
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
    fn new(
        arguments: &BenchDevicesArguments,
        disk: PathBuf,
        qemu: Option<PathBuf>,
    ) -> Result<Self, Failure> {
        let seconds = arguments.seconds;
        let mut command_line =
            format!("console=ttyS0 quiet panic=-1 ferry.disk=/dev/vda ferry.seconds={seconds}");
        if let (Some(host), Some(guest)) = (arguments.host_address, &arguments.guest_address) {
            let place = net_host::start(host)
                .map_err(|error| format!("--host-address {host}: {error}; is the tap up?"))?;
            command_line += &format!(" ferry.address={guest} ferry.host={place}");
        }
        Ok(Self {
            this: env::current_exe()?,
            qemu: qemu.unwrap_or_default(),
            kernel: arguments.kernel.clone(),
            initramfs: arguments.initramfs.clone(),
            command_line,
            disk,
            tap: arguments.tap.clone(),
            memory: arguments.memory,
        })
    }
}

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

/// Its devices as modern as Ferry's: virtio 1, described by ACPI.
fn qemu(guest: &Guest) -> Command {
    let mut command = peers::qemu(&guest.qemu, "acpi=on,auto-kernel-cmdline=off", guest.memory);
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

impl Contestant {
    fn new(name: &'static str, command: fn(&Guest) -> Command) -> Self {
        Self {
            name,
            command,
            loads: Vec::new(),
        }
    }

    /// Runs the guest once.
    fn measure(&mut self, guest: &Guest, limit: Duration) -> Result<(), Failure> {
        let mut running = Contender::start(self.name, (self.command)(guest))?;
        loop {
            let line = running.read_line(limit)?;
            let Some((_, said)) = line.split_once(MARK) else {
                continue;
            };
            if said.trim() == END {
                return Ok(());
            }
            let (load, unit, figure) =
                parse(said).ok_or_else(|| format!("{}: its guest says {said:?}", self.name))?;
            self.note(load, unit, figure);
        }
    }

    fn note(&mut self, load: &str, unit: Unit, figure: f64) {
        if let Some((.., series)) = self.loads.iter_mut().find(|(name, ..)| name == load) {
            series.push(figure);
            return;
        }
        let mut series = Series::default();
        series.push(figure);
        self.loads.push((load.into(), unit, series));
    }

    fn median(&self, load: &str) -> f64 {
        let found = self.loads.iter().find(|(name, ..)| name == load);
        found.map_or(f64::NAN, |(.., series)| series.median())
    }
}

/// A line of the guest: `NAME operations=N us=N`, or `NAME bytes=N us=N`.
#[allow(clippy::cast_precision_loss)] // Of figures that are rounded to be read.
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

fn table(contestants: &[Contestant], arguments: &BenchDevicesArguments) -> Vec<String> {
    let Some(ferry) = contestants.first() else {
        return Vec::new();
    };
    let mut lines = Vec::new();
    if !arguments.json {
        lines.push(format!(
            "through the devices of one guest: {} runs each, in turns, {} s a load; medians",
            arguments.runs, arguments.seconds
        ));
        let names: String = contestants
            .iter()
            .map(|each| format!("{:>12}", each.name))
            .collect();
        lines.push(format!("{:<22}{:>8}{names}", "", ""));
    }
    lines.extend(ferry.loads.iter().map(|(load, unit, _)| {
        let medians = contestants
            .iter()
            .map(|each| (each.name, each.median(load)));
        if arguments.json {
            let medians: serde_json::Map<_, _> = medians
                .map(|(name, median)| (name.to_owned(), median.into()))
                .collect();
            return json!({ "load": load, "unit": unit.to_string(), "medians": medians })
                .to_string();
        }
        let figures: String = medians
            .map(|(_, median)| format!("{median:>12.1}"))
            .collect();
        format!("{load:<22}{:>8}{figures}", unit.to_string())
    }));
    if !arguments.json {
        lines.push(String::new());
    }
    lines
}

/// Ferry is not slower than any other in any load.
fn limits(contestants: &[Contestant]) -> Vec<Limit> {
    let Some((ferry, peers)) = contestants.split_first() else {
        return Vec::new();
    };
    let mut limits = Vec::new();
    for peer in peers {
        limits.extend(ferry.loads.iter().map(|(load, ..)| Limit {
            what: format!("{load}, ferry's in {}'s", peer.name),
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
    fn small_requests_are_counted_and_large_ones_weighed() {
        let (name, unit, figure) = parse("block-read-4k operations=3000 us=1500000").unwrap();
        assert_eq!((name, unit), ("block-read-4k", Unit::Operations));
        assert!((figure - 2000.0).abs() < 1e-9);
        let (_, unit, figure) = parse("block-read-1m bytes=31457280 us=3000000\r").unwrap();
        assert_eq!(unit, Unit::Mebibytes);
        assert!((figure - 10.0).abs() < 1e-9);
    }

    #[test]
    fn what_is_no_result_is_none() {
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
    fn a_peer_that_did_not_do_a_load_misses_the_limit() {
        let mut ferry_alone = Contestant::new(FERRY, ferry);
        ferry_alone.note("x", Unit::Operations, 1.0);
        let peer = Contestant::new("qemu", qemu);
        let limits = limits(&[ferry_alone, peer]);
        assert_eq!(limits.len(), 1);
        assert!(!limits[0].holds());
    }
}
