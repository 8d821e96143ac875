//! `ferry bench start`: how soon a guest says its first byte, and how much memory its monitor takes beside it.

use std::env;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use serde_json::json;

use super::contender::Contender;
use super::figures::{Bound, Limit, Series, judge};
use super::peers;
use crate::arguments::BenchStartArguments;
use crate::{Failure, say};
use vmm::kvm::host::Host;

/// How long a guest may take to say anything.
const LIMIT: Duration = Duration::from_secs(30);
/// What `hello` says before it waits for a second vCPU, which does not come: it stays for a second.
const GREETING: &str = "hello from ferry guest: cpus=";
const COMMAND_LINE: &str = "cpus=2";

/// The limits of performance.md's P10 that hold on every host: of Ferry's time, in the bare program's and in QEMU's.
const MOST_OF_BARE: f64 = 1.5;
const MOST_OF_QEMU: f64 = 0.25;
const MOST_BEYOND_GUEST_MIB: f64 = 5.0;

/// One of those that are measured.
struct Contestant {
    name: &'static str,
    command: Box<dyn Fn() -> Command>,
    milliseconds: Series,
    beyond_guest_mib: Series,
}

pub(super) fn start(arguments: &BenchStartArguments) -> Result<u8, Failure> {
    // Its message is better than that of a child.
    drop(Host::open()?);
    let directory = tempfile::Builder::new().prefix("ferry-bench-").tempdir()?;
    let kernel = directory.path().join("hello.elf");
    std::fs::write(&kernel, guest_images::HELLO)?;
    let mut contestants = contestants(arguments, &kernel)?;
    for _ in 0..arguments.runs {
        for contestant in &mut contestants {
            contestant.measure()?;
        }
    }
    for line in table(&contestants, arguments) {
        say(&line)?;
    }
    judge(&limits(&contestants), arguments.json)
}

fn contestants(arguments: &BenchStartArguments, kernel: &Path) -> Result<Vec<Contestant>, Failure> {
    let this = env::current_exe()?;
    let memory = arguments.memory;
    let mut all = vec![
        Contestant::new("bare ioctls", bare(this.clone(), kernel.into(), memory)),
        Contestant::new("ferry", ferry(this, kernel.into(), memory)),
    ];
    if let Some(program) = peers::find_qemu(arguments.qemu.as_deref())? {
        let qemu = qemu(program, kernel.into(), memory);
        all.push(Contestant::new("qemu microvm", qemu));
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

impl Contestant {
    fn new(name: &'static str, command: impl Fn() -> Command + 'static) -> Self {
        Self {
            name,
            command: Box::new(command),
            milliseconds: Series::default(),
            beyond_guest_mib: Series::default(),
        }
    }

    /// Starts it once.
    fn measure(&mut self) -> Result<(), Failure> {
        let mut running = Contender::start(self.name, (self.command)())?;
        let mut said = [0; GREETING.len()];
        let mut count = running.read(&mut said[..1], LIMIT)?;
        let first = running.began().elapsed();
        while count < said.len() {
            count += running.read(&mut said[count..], LIMIT)?;
        }
        if said != GREETING.as_bytes() {
            let said = String::from_utf8_lossy(&said);
            return Err(format!("{}: its guest says {said:?}, not {GREETING:?}", self.name).into());
        }
        self.beyond_guest_mib.push(mib(running.beyond_guest_kib()?));
        self.milliseconds.push(first.as_secs_f64() * 1e3);
        Ok(())
    }
}

/// A process's memory is far below 2^52 KiB, where floating point is exact.
#[allow(clippy::cast_precision_loss)]
fn mib(kib: u64) -> f64 {
    kib as f64 / 1024.0
}

fn table(contestants: &[Contestant], arguments: &BenchStartArguments) -> Vec<String> {
    if arguments.json {
        return contestants.iter().map(Contestant::json).collect();
    }
    let mut lines = vec![
        format!(
            "start to the guest's first byte on the serial port: {} runs each, in turns; {} MiB, one vCPU",
            arguments.runs,
            arguments.memory >> 20
        ),
        format!(
            "{:<14}{:>12}{:>10}{:>10}{:>28}",
            "", "median ms", "min", "max", "beyond guest memory, MiB"
        ),
    ];
    lines.extend(contestants.iter().map(|contestant| {
        let time = &contestant.milliseconds;
        format!(
            "{:<14}{:>12.2}{:>10.2}{:>10.2}{:>28.1}",
            contestant.name,
            time.median(),
            time.minimum(),
            time.maximum(),
            contestant.beyond_guest_mib.median()
        )
    }));
    lines.push(String::new());
    lines
}

impl Contestant {
    fn json(&self) -> String {
        json!({
            "contestant": self.name,
            "median_ms": self.milliseconds.median(),
            "minimum_ms": self.milliseconds.minimum(),
            "maximum_ms": self.milliseconds.maximum(),
            "beyond_guest_mib": self.beyond_guest_mib.median(),
        })
        .to_string()
    }
}

fn limits(contestants: &[Contestant]) -> Vec<Limit> {
    let of = |name: &str| {
        contestants
            .iter()
            .find(|contestant| contestant.name == name)
    };
    let mut limits = Vec::new();
    let Some(ferry) = of("ferry") else {
        return limits;
    };
    for (name, most) in [
        ("bare ioctls", MOST_OF_BARE),
        ("qemu microvm", MOST_OF_QEMU),
    ] {
        limits.extend(of(name).map(|peer| Limit {
            what: format!("ferry's time in that of {name}"),
            found: ferry.milliseconds.median() / peer.milliseconds.median(),
            bound: Bound::Most(most),
        }));
    }
    limits.push(Limit {
        what: "ferry beyond guest memory, MiB".into(),
        found: ferry.beyond_guest_mib.median(),
        bound: Bound::Most(MOST_BEYOND_GUEST_MIB),
    });
    limits
}
