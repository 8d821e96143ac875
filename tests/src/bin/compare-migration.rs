//! Compares live migration by Ferry and by QEMU, and judges the results by thresholds.
//!
//! Both migrate the same guest over TCP on the loopback interface, in turns. QEMU runs twice: with its default
//! settings, and without its bandwidth limit. After each migration the guest audits its memory at the destination. The
//! exit status is 0 only if every threshold holds.

use std::error::Error;
use std::path::PathBuf;
use std::process::{Command, ExitCode};
use std::time::{Duration, Instant};

use clap::{Parser, ValueEnum};
use ferry_tests::endpoint::Endpoint;
use ferry_tests::ferry::Ferry;
use ferry_tests::figures::Series;
use ferry_tests::machine::Machine;
use ferry_tests::qemu::{CHANNELS, Limits, Qemu, QemuError};
use ferry_tests::{errors, paths, process};
use serde_json::{Value, json};

/// Compares live migration by Ferry and by QEMU, in turns, side by side.
#[derive(Parser)]
#[command(after_help = "\
The workload: the project's dirtier, a PVH guest with 1 GiB of memory and one vCPU, that rewrites 32 MiB at
full speed; sparse: beside them 32 MiB are populated and constant, the rest was never touched; populated:
all memory holds data.

The contenders, each over loopback TCP with a downtime of at most 300 ms aimed at, the default of both:
  ferry           one connection, no limit on the bandwidth
  qemu            multifd on 2 channels, its own limit of 128 MiB/s
  qemu-unlimited  multifd on 2 channels, that limit lifted

The time of a migration is what its caller waits for: for Ferry the whole `ferry ctl send-migration`, for
QEMU the time from the command to the event `completed`. One that is not over after 60 s counts as 60 s,
and its contender is not asked again for this guest.

Thresholds, of medians: sparse: at most 0.3 s, and at most a tenth of qemu's; populated: at most
qemu-unlimited's.")]
struct Arguments {
    /// Number of migrations of each guest by each contender.
    #[arg(long, default_value_t = 5, value_parser = clap::value_parser!(u32).range(1..))]
    runs: u32,
    /// Run only this guest.
    #[arg(long)]
    guest: Option<Guest>,
    /// Run only this contender, and judge no threshold.
    #[arg(long)]
    only: Option<Contender>,
    /// Guest program (a PVH ELF file) to run instead of the dirtier.
    #[arg(long)]
    kernel: Option<PathBuf>,
    /// Print one JSON object per line instead of a table.
    #[arg(long)]
    json: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Contender {
    Ferry,
    Qemu,
    QemuUnlimited,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Guest {
    Sparse,
    Populated,
}

/// Downtime limit of all contenders: the default of Ferry and of QEMU.
const DOWNTIME: Duration = Duration::from_millis(300);
/// Time limit for a migration that does not converge.
const PATIENCE: Duration = Duration::from_secs(60);
/// Time limit for the guest to populate its memory, which takes up to 45 µs a page.
const READY_LIMIT: Duration = Duration::from_secs(90);
const AUDIT_LIMIT: Duration = Duration::from_secs(60);
const MEMORY_MIB: u32 = 1024;
const HOT_MIB: u32 = 32;

impl Contender {
    const ALL: [Self; 3] = [Self::Ferry, Self::Qemu, Self::QemuUnlimited];

    fn name(self) -> &'static str {
        match self {
            Self::Ferry => "ferry",
            Self::Qemu => "qemu",
            Self::QemuUnlimited => "qemu-unlimited",
        }
    }

    fn migrate(self, machine: &Machine) -> Outcome<Measured> {
        match self {
            Self::Ferry => migrate_ferry(machine),
            Self::Qemu => migrate_qemu(machine, Limits::Defaults),
            Self::QemuUnlimited => migrate_qemu(machine, Limits::Downtime(DOWNTIME)),
        }
    }
}

impl Guest {
    const ALL: [Self; 2] = [Self::Sparse, Self::Populated];

    fn name(self) -> &'static str {
        match self {
            Self::Sparse => "sparse",
            Self::Populated => "populated",
        }
    }

    /// MiB that hold data.
    fn populated_mib(self) -> u32 {
        match self {
            Self::Sparse => 64,
            // The guest and its devices use the rest of 1 GiB.
            Self::Populated => 1016,
        }
    }

    fn cmdline(self) -> String {
        let (memory, cold) = (self.populated_mib(), self.populated_mib() - HOT_MIB);
        format!("cpus=1 memory={memory}M cold={cold}M serial=on")
    }

    fn machine(self, arguments: &Arguments) -> Outcome<Machine> {
        let kernel = arguments.kernel.clone();
        Ok(Machine {
            kernel: kernel.map_or_else(|| paths::guest("dirtier.elf"), Ok)?,
            initramfs: None,
            cmdline: self.cmdline(),
            memory_mib: MEMORY_MIB,
            cpus: 1,
        })
    }
}

/// Result of one migration.
struct Measured {
    total: Duration,
    /// None if the migration did not complete.
    downtime: Option<Duration>,
}

/// All migrations of one guest by one contender.
#[derive(Default)]
struct Figures {
    total: Series,
    downtime: Series,
    overdue: u32,
}

impl Figures {
    fn push(&mut self, measured: &Measured) {
        self.total.push(measured.total);
        match measured.downtime {
            Some(downtime) => self.downtime.push(downtime),
            None => self.overdue += 1,
        }
    }
}

type Outcome<T> = Result<T, Box<dyn Error>>;

fn main() -> ExitCode {
    match compare(&Arguments::parse()) {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            eprintln!("compare-migration: {}", errors::chain(&*error));
            ExitCode::FAILURE
        }
    }
}

fn compare(arguments: &Arguments) -> Outcome<bool> {
    let mut all_hold = true;
    describe(arguments)?;
    let chosen = |guest: &Guest| arguments.guest.is_none_or(|only| only == *guest);
    for guest in Guest::ALL.into_iter().filter(chosen) {
        let figures = measure(arguments, guest)?;
        for (contender, figures) in Contender::ALL.into_iter().zip(&figures) {
            report(arguments, guest, contender, figures);
        }
        if arguments.only.is_none() {
            all_hold &= judge(arguments, guest, &figures);
        }
    }
    if arguments.only.is_some() {
        eprintln!("compare-migration: one contender alone: no threshold judged");
    }
    Ok(all_hold)
}

/// Prints the setup, so that the figures can be read without this file.
fn describe(arguments: &Arguments) -> Outcome<()> {
    let version = process::run(
        Command::new("qemu-system-x86_64").arg("--version"),
        AUDIT_LIMIT,
    )?;
    let version = version.stdout.lines().next().unwrap_or_default().to_owned();
    let (downtime, patience) = (DOWNTIME.as_millis(), PATIENCE.as_secs());
    if arguments.json {
        let line = json!({"event": "compare/started", "qemu": version, "channels": CHANNELS,
            "downtime_limit_ms": downtime, "patience_s": patience, "memory_mib": MEMORY_MIB, "cpus": 1,
            "sparse": Guest::Sparse.cmdline(), "populated": Guest::Populated.cmdline()});
        println!("{line}");
        return Ok(());
    }
    println!(
        "guests of {MEMORY_MIB} MiB with 1 vCPU over loopback TCP, downtime limit {downtime} ms;"
    );
    for guest in Guest::ALL {
        let (name, all, command) = (guest.name(), guest.populated_mib(), guest.cmdline());
        let name = format!("{name}:");
        println!(
            "{name:<11}{all} MiB hold data, {HOT_MIB} of them rewritten at full speed ({command})"
        );
    }
    println!(
        "qemu:      {version}, multifd on {CHANNELS} channels; qemu-unlimited: its limit of 128 MiB/s lifted"
    );
    println!(
        "in turns, {} of each; a migration not over after {patience} s counts as that and is the last\n",
        arguments.runs
    );
    Ok(())
}

/// Runs the contenders in turns, so that a noisy moment of the machine affects all of them, and starts each turn with
/// another one. Returns the results in the order of [`Contender::ALL`].
fn measure(arguments: &Arguments, guest: Guest) -> Outcome<[Figures; 3]> {
    let machine = guest.machine(arguments)?;
    let mut all: [Figures; 3] = Default::default();
    let count = all.len();
    for turn in 0..usize::try_from(arguments.runs)? * count {
        let index = (turn / count + turn % count) % count;
        let (contender, figures) = (Contender::ALL[index], &mut all[index]);
        if arguments.only.is_none_or(|only| only == contender) && figures.overdue == 0 {
            figures.push(&contender.migrate(&machine)?);
        }
    }
    Ok(all)
}

/// Allocates as much memory as a destination can need, writes to all of it and frees it.
///
/// If this machine is itself a guest, it returns free memory to its host within seconds. Getting that memory back takes
/// ten times as long as copying to it, seconds for a GiB, and would slow down whichever contender gets it. After this
/// call, all contenders get memory that was just in use.
fn have_memory_at_hand() {
    let bytes = vec![1_u8; (MEMORY_MIB as usize + MEMORY_MIB as usize / 2) << 20];
    drop(std::hint::black_box(bytes));
}

/// Measures the time that a user waits: from the start of `ferry ctl send-migration` to its end.
fn migrate_ferry(machine: &Machine) -> Outcome<Measured> {
    let mut source = Ferry::run(machine)?;
    source.serial().wait_for("dirtier: ready", READY_LIMIT)?;
    let endpoint = Endpoint::free_tcp()?;
    let mut destination = Ferry::receive(&endpoint)?;
    let (downtime, patience) = (
        DOWNTIME.as_millis().to_string(),
        PATIENCE.as_secs().to_string(),
    );
    let options = ["--downtime-ms", &downtime, "--timeout-s", &patience];
    let options = [&options[..], &["--json"]].concat();
    have_memory_at_hand();
    let started = Instant::now();
    let answer = source.send_migration(&endpoint, &options)?;
    let total = started.elapsed();
    // Measured before the audit of the guest, during which the source frees its memory.
    source.wait(AUDIT_LIMIT)?;
    destination.type_in("q")?;
    let ended = destination.wait(AUDIT_LIMIT)?;
    if !ended.status.success() {
        return Err(format!("the guest's audit failed after Ferry's migration: {ended:?}").into());
    }
    Ok(Measured {
        total,
        downtime: Some(reported_downtime(&answer)?),
    })
}

fn reported_downtime(answer: &str) -> Outcome<Duration> {
    let snapshot: Value = serde_json::from_str(answer.trim())?;
    let milliseconds = snapshot["downtime_ms"].as_f64();
    let milliseconds = milliseconds.ok_or_else(|| format!("no downtime_ms in {answer}"))?;
    Ok(Duration::try_from_secs_f64(milliseconds / 1000.0)?)
}

fn migrate_qemu(machine: &Machine, limits: Limits) -> Outcome<Measured> {
    /// `isa-debug-exit` ends QEMU with twice the guest's status plus one.
    const AUDITED: i32 = 1;
    let mut source = Qemu::start(machine)?;
    source.serial().wait_for("dirtier: ready", READY_LIMIT)?;
    let mut destination = Qemu::start_incoming(machine)?;
    have_memory_at_hand();
    let migrated = match source.migrate(&mut destination, limits, PATIENCE) {
        Ok(migrated) => migrated,
        Err(QemuError::Overdue(total)) => {
            return Ok(Measured {
                total,
                downtime: None,
            });
        }
        Err(error) => return Err(error.into()),
    };
    drop(source);
    destination.type_in("q")?;
    let ended = destination.wait(AUDIT_LIMIT)?;
    if ended.status.code() != Some(AUDITED) {
        return Err(format!("the guest's audit failed after QEMU's migration: {ended:?}").into());
    }
    Ok(Measured {
        total: migrated.wall,
        downtime: Some(migrated.downtime),
    })
}

fn report(arguments: &Arguments, guest: Guest, contender: Contender, figures: &Figures) {
    if figures.total.median().is_nan() {
        return;
    }
    let (total, downtime) = (&figures.total, &figures.downtime);
    if arguments.json {
        let line = json!({
            "event": "compare/figures", "guest": guest.name(), "contender": contender.name(),
            "runs": arguments.runs, "overdue": figures.overdue,
            "total_ms": {"median": total.median(), "minimum": total.minimum(), "maximum": total.maximum()},
            "downtime_ms": {"median": downtime.median(), "minimum": downtime.minimum()},
        });
        println!("{line}");
        return;
    }
    let overdue = match figures.overdue {
        0 => String::new(),
        _ => format!(
            "   not over after {} s, not asked again",
            PATIENCE.as_secs()
        ),
    };
    println!(
        "{:<10} {:<14} total ms: median {:>8.1}, min {:>8.1}, max {:>8.1}   downtime ms: median {:>6.1}, min {:>6.1}{overdue}",
        guest.name(),
        contender.name(),
        total.median(),
        total.minimum(),
        total.maximum(),
        downtime.median(),
        downtime.minimum(),
    );
}

fn judge(arguments: &Arguments, guest: Guest, figures: &[Figures; 3]) -> bool {
    let [ferry, qemu, unlimited] = figures;
    let found = ferry.total.median();
    let mut all_hold = true;
    for (text, limit) in thresholds(guest, qemu, unlimited) {
        // NaN fails every threshold.
        let holds = found <= limit;
        all_hold &= holds;
        if arguments.json {
            let line = json!({"event": "compare/threshold", "guest": guest.name(), "threshold": text,
                "found_ms": found, "limit_ms": limit, "holds": holds});
            println!("{line}");
        } else {
            let verdict = if holds { "holds" } else { "MISSED" };
            let name = guest.name();
            println!("{name:<10} {text}: {found:.1} of {limit:.1} ms: {verdict}");
        }
    }
    if !arguments.json {
        println!(
            "{:<10} ferry takes {:.3} of the time of qemu, {:.3} of qemu-unlimited's\n",
            guest.name(),
            found / qemu.total.median(),
            found / unlimited.total.median()
        );
    }
    all_hold
}

/// Upper limit for the median of Ferry, in milliseconds.
fn thresholds(guest: Guest, qemu: &Figures, unlimited: &Figures) -> Vec<(&'static str, f64)> {
    match guest {
        Guest::Sparse => vec![
            ("at most 0.3 s", 300.0),
            ("at most a tenth of qemu's", qemu.total.median() / 10.0),
        ],
        Guest::Populated => vec![("at most qemu-unlimited's", unlimited.total.median())],
    }
}
