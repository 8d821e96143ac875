//! Runs the demo repeatedly, measures the memory of the monitor, and judges both by limits.
//!
//! The exit status is 0 only if every run was verified and every limit holds.

use std::error::Error;
use std::process::ExitCode;
use std::thread;
use std::time::Duration;

use clap::Parser;
use ferry_tests::endpoint::Endpoint;
use ferry_tests::ferry::{self, Ferry};
use ferry_tests::figures::Series;
use ferry_tests::machine::Machine;
use ferry_tests::{errors, paths};
use serde_json::Value;

/// Measures `ferry demo` with its defaults, and the memory of the monitor beyond guest RAM.
#[derive(Parser)]
#[command(after_help = "\
Limits: the median downtime at most the demo's target, 50 ms; the median pause, which is the stop of the
vCPUs alone, at most 5 ms; every run verified; the monitor's resident memory beyond guest RAM (RssAnon and
RssFile; guest RAM is a memfd of 512 MiB and counts as RssShmem) at most 8 MiB, at rest and at its highest
during a migration, on both sides.")]
struct Arguments {
    /// Number of runs of the demo.
    #[arg(long, default_value_t = 10, value_parser = clap::value_parser!(u32).range(1..))]
    runs: u32,
}

/// Default downtime limit of the demo.
const DOWNTIME_MOST_MS: f64 = 50.0;
const PAUSE_MOST_MS: f64 = 5.0;
const MONITOR_MOST_KIB: u64 = 8 * 1024;
const LIMIT: Duration = Duration::from_secs(60);
/// Interval between readings of the memory of a process during a migration.
const LOOK_EVERY: Duration = Duration::from_millis(1);

type Outcome<T> = Result<T, Box<dyn Error>>;

fn main() -> ExitCode {
    match measure(&Arguments::parse()) {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            eprintln!("measure-demo: {}", errors::chain(&*error));
            ExitCode::FAILURE
        }
    }
}

fn measure(arguments: &Arguments) -> Outcome<bool> {
    let verified = demos(arguments.runs)?;
    let small = monitors_memory()?;
    Ok(verified && small)
}

/// Runs the demo as the first command of the README does.
fn demos(runs: u32) -> Outcome<bool> {
    let [mut downtime, mut pause, mut total] = [const { Series::new() }; 3];
    let mut unverified = 0;
    println!("run   downtime ms   pause ms   total ms   rounds   throttle %   verdict");
    for run in 1..=runs {
        let ended = ferry::invoke(&["demo", "--json"], LIMIT)?;
        let last = ended.stdout.lines().last().unwrap_or_default();
        let Ok(finished) = serde_json::from_str::<Value>(last) else {
            return Err(format!("run {run} of the demo: no JSON at its end: {ended:?}").into());
        };
        let verified = ended.status.success() && finished["verified"] == true;
        unverified += u32::from(!verified);
        let [down, stop, all] = ["downtime_ms", "pause_ms", "total_ms"].map(|field| {
            let found = finished[field].as_f64();
            found.ok_or_else(|| format!("run {run} of the demo: no {field} in {last}"))
        });
        let (down, stop, all) = (down?, stop?, all?);
        downtime.push_ms(down);
        pause.push_ms(stop);
        total.push_ms(all);
        let [rounds, throttle] =
            ["rounds", "throttle_percent"].map(|field| finished[field].to_string());
        let verdict = if verified { "verified" } else { "NOT verified" };
        println!(
            "{run:>3}   {down:>11.1}   {stop:>8.2}   {all:>8.1}   {rounds:>6}   {throttle:>10}   {verdict}"
        );
    }
    let mut holds = judge("every run verified: failures", f64::from(unverified), 0.0);
    holds &= judge("median downtime, ms", downtime.median(), DOWNTIME_MOST_MS);
    holds &= judge("median pause, ms", pause.median(), PAUSE_MOST_MS);
    println!(
        "minima: downtime {:.1} ms, pause {:.2} ms, total {:.1} ms; median total {:.1} ms",
        downtime.minimum(),
        pause.minimum(),
        total.minimum(),
        total.median()
    );
    Ok(holds)
}

/// Measures the memory of the source at rest, and of both sides during a migration under the load of the demo.
fn monitors_memory() -> Outcome<bool> {
    let machine = Machine {
        kernel: paths::guest("dirtier.elf")?,
        initramfs: None,
        cmdline: "cpus=2 pattern=random memory=80M cold=16M serial=on".to_owned(),
        memory_mib: 512,
        cpus: 2,
    };
    let source = Ferry::run(&machine)?;
    source.serial().wait_for("dirtier: ready", LIMIT)?;
    let at_rest = source.resident()?.beyond_guest_kib();
    let endpoint = Endpoint::free_tcp()?;
    let mut destination = Ferry::receive(&endpoint)?;
    let (mut source_most, mut destination_most) = (0, 0);
    thread::scope(|scope| {
        let sending = scope.spawn(|| source.send_migration(&endpoint, &["--verify"]));
        while !sending.is_finished() {
            // A process that has just ended has no memory; its highest figure before counts.
            let now = source.resident().unwrap_or_default();
            source_most = source_most.max(now.beyond_guest_kib());
            let now = destination.resident().unwrap_or_default();
            destination_most = destination_most.max(now.beyond_guest_kib());
            thread::sleep(LOOK_EVERY);
        }
        sending.join()
    })
    .map_err(|_| "the thread that waited for the migration panicked")??;
    let after = destination.resident()?.beyond_guest_kib();
    destination.type_in("q")?;
    destination.wait(LIMIT)?;
    let mut holds = true;
    for (what, kib) in [
        ("monitor beyond guest RAM, at rest, KiB", at_rest),
        ("source during a migration, KiB", source_most),
        ("destination during a migration, KiB", destination_most),
        ("destination after it, KiB", after),
    ] {
        holds &= judge(what, number(kib), number(MONITOR_MOST_KIB));
    }
    Ok(holds)
}

/// Kibibytes of a process are far below 2^52, where floating point is exact.
#[allow(clippy::cast_precision_loss)]
fn number(kib: u64) -> f64 {
    kib as f64
}

fn judge(what: &str, found: f64, most: f64) -> bool {
    // NaN fails every limit.
    let holds = found <= most;
    let verdict = if holds { "holds" } else { "MISSED" };
    println!("{what}: {found:.2} of at most {most}: {verdict}");
    holds
}
