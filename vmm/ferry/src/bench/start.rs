//! `ferry bench start`: measures the time from the start of a monitor to the first byte of its guest, and the memory
//! overhead of the monitor.

use std::env;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use serde_json::json;

use super::figures::{Bound, Limit, Series, exit_status, print_limits, print_limits_as_json};
use super::monitor_process::MonitorProcess;
use super::peers;
use crate::arguments::bench::BenchStartArguments;
use crate::{Failure, print_line};
use vmm::kvm::host::Host;

/// Time limit for each part of the guest's first line.
const READ_LIMIT: Duration = Duration::from_secs(30);
/// Start of the line that the guest program `hello` prints.
const GREETING: &str = "hello from ferry guest: cpus=";
/// Kernel command line. The guest waits about a second for a vCPU 1 that never starts, so that the process still runs when
/// its memory is read.
const COMMAND_LINE: &str = "cpus=2";

// Limits that hold on any host: Ferry's time relative to that of the bare program and of QEMU, and its memory overhead.
const MOST_OF_BARE: f64 = 1.5;
const MOST_OF_QEMU: f64 = 0.25;
const MOST_OVERHEAD_MIB: f64 = 5.0;

/// A monitor that is measured, and its results.
struct StartContender {
    name: &'static str,
    command: Box<dyn Fn() -> Command>,
    /// Times to the first byte.
    milliseconds: Series,
    /// Resident memory of the monitor without guest memory.
    overhead_mib: Series,
}

/// Measures all monitors and prints the results. Returns the exit status.
pub(super) fn start(arguments: &BenchStartArguments) -> Result<u8, Failure> {
    // If KVM is missing, this error is clearer than that of a child process.
    drop(Host::open()?);
    let directory = tempfile::Builder::new().prefix("ferry-bench-").tempdir()?;
    let kernel = directory.path().join("hello.elf");
    std::fs::write(&kernel, guest_images::HELLO)?;
    let mut contenders = contenders(arguments, &kernel)?;
    for _ in 0..arguments.runs {
        for contender in &mut contenders {
            contender.measure()?;
        }
    }
    let limits = limits(&contenders);
    if arguments.json {
        for contender in &contenders {
            print_line(&contender.json())?;
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

fn contenders(
    arguments: &BenchStartArguments,
    kernel: &Path,
) -> Result<Vec<StartContender>, Failure> {
    let this = env::current_exe()?;
    let memory = arguments.memory;
    let mut all = vec![
        StartContender::new("bare ioctls", bare(this.clone(), kernel.into(), memory)),
        StartContender::new("ferry", ferry(this, kernel.into(), memory)),
    ];
    if let Some(program) = peers::find_qemu(arguments.qemu.as_deref())? {
        let qemu = qemu(program, kernel.into(), memory);
        all.push(StartContender::new("qemu microvm", qemu));
    }
    Ok(all)
}

fn bare(this: PathBuf, kernel: PathBuf, memory: u64) -> impl Fn() -> Command {
    move || {
        let mut command = Command::new(&this);
        command.args(["bench", "bare-start", "--cmdline", COMMAND_LINE]);
        command.arg("--memory").arg(memory.to_string());
        command.arg("--kernel").arg(&kernel);
        command
    }
}

fn ferry(this: PathBuf, kernel: PathBuf, memory: u64) -> impl Fn() -> Command {
    move || {
        let mut command = peers::ferry(&this, memory);
        command.args(["--cmdline", COMMAND_LINE, "--kernel"]);
        command.arg(&kernel);
        command
    }
}

fn qemu(program: PathBuf, kernel: PathBuf, memory: u64) -> impl Fn() -> Command {
    move || {
        let lean = "acpi=off,rtc=off,auto-kernel-cmdline=off";
        let mut command = peers::qemu(&program, lean, memory);
        command.args(["-device", "isa-debug-exit,iobase=0xf4,iosize=4"]);
        command.args(["-append", COMMAND_LINE, "-kernel"]);
        command.arg(&kernel);
        command
    }
}

impl StartContender {
    fn new(name: &'static str, command: impl Fn() -> Command + 'static) -> Self {
        Self {
            name,
            command: Box::new(command),
            milliseconds: Series::default(),
            overhead_mib: Series::default(),
        }
    }

    /// Starts the monitor once and adds its results.
    fn measure(&mut self) -> Result<(), Failure> {
        let mut running = MonitorProcess::start(self.name, (self.command)())?;
        let mut printed = [0; GREETING.len()];
        let mut count = running.read(&mut printed[..1], READ_LIMIT)?;
        let first_byte = running.began().elapsed();
        while count < printed.len() {
            count += running.read(&mut printed[count..], READ_LIMIT)?;
        }
        if printed != GREETING.as_bytes() {
            let printed = String::from_utf8_lossy(&printed);
            return Err(format!(
                "{}: the guest printed {printed:?} instead of {GREETING:?}",
                self.name
            )
            .into());
        }
        self.overhead_mib.push(mib(running.overhead_kib()?));
        self.milliseconds.push(first_byte.as_secs_f64() * 1e3);
        Ok(())
    }

    fn json(&self) -> String {
        json!({
            "contestant": self.name,
            "median_ms": self.milliseconds.median(),
            "minimum_ms": self.milliseconds.minimum(),
            "maximum_ms": self.milliseconds.maximum(),
            "beyond_guest_mib": self.overhead_mib.median(),
        })
        .to_string()
    }
}

#[allow(
    clippy::cast_precision_loss,
    reason = "the memory of a process is far below 2^52 KiB"
)]
fn mib(kib: u64) -> f64 {
    kib as f64 / 1024.0
}

fn table(contenders: &[StartContender], arguments: &BenchStartArguments) -> Vec<String> {
    let mut lines = vec![
        format!(
            "time to the first byte on the serial port: {} runs each, alternating; {} MiB, one vCPU",
            arguments.runs,
            arguments.memory >> 20
        ),
        format!(
            "{:<14}{:>12}{:>10}{:>10}{:>24}",
            "", "median ms", "min", "max", "memory overhead, MiB"
        ),
    ];
    lines.extend(contenders.iter().map(|contender| {
        let time = &contender.milliseconds;
        format!(
            "{:<14}{:>12.2}{:>10.2}{:>10.2}{:>24.1}",
            contender.name,
            time.median(),
            time.minimum(),
            time.maximum(),
            contender.overhead_mib.median()
        )
    }));
    lines.push(String::new());
    lines
}

fn limits(contenders: &[StartContender]) -> Vec<Limit> {
    let find = |name: &str| contenders.iter().find(|contender| contender.name == name);
    let mut limits = Vec::new();
    let Some(ferry) = find("ferry") else {
        return limits;
    };
    for (name, most) in [
        ("bare ioctls", MOST_OF_BARE),
        ("qemu microvm", MOST_OF_QEMU),
    ] {
        limits.extend(find(name).map(|peer| Limit {
            what: format!("time of ferry / time of {name}"),
            found: ferry.milliseconds.median() / peer.milliseconds.median(),
            bound: Bound::Most(most),
        }));
    }
    limits.push(Limit {
        what: "memory overhead of ferry, MiB".into(),
        found: ferry.overhead_mib.median(),
        bound: Bound::Most(MOST_OVERHEAD_MIB),
    });
    limits
}
