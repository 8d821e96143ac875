//! Runs commands in the lab: `lab-run --kernel 6.12 --program target/debug/ferry:/bin/ferry -- ferry --version`.
//!
//! The output of the commands goes to stdout as it was, the exit status is that of the first
//! command that failed, and a lab that cannot be had is status 125.

use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use clap::Parser;
use ferry_tests::errors;
use ferry_tests::kernels::Series;
use ferry_tests::lab::{Lab, Report};

/// Runs shell commands in the lab: a Debian kernel with a real KVM, in emulation.
#[derive(Parser)]
#[command(
    after_help = "Example: lab-run --kernel 6.1 'cat /sys/module/kvm_amd/parameters/npt' 'ls /dev/kvm'"
)]
struct Arguments {
    /// The lab host's kernel: 6.1 or 6.12.
    #[arg(long, default_value = "6.12")]
    kernel: Series,
    /// The lab host's memory in MiB.
    #[arg(long, default_value_t = 3072)]
    memory_mib: u32,
    /// Seconds after which the run is ended as a failure.
    #[arg(long, default_value_t = 120)]
    limit_s: u64,
    /// A program to put in with its libraries: HERE:THERE.
    #[arg(long, value_name = "HERE:THERE", value_parser = placement)]
    program: Vec<(PathBuf, String)>,
    /// A file to put in: HERE:THERE.
    #[arg(long, value_name = "HERE:THERE", value_parser = placement)]
    file: Vec<(PathBuf, String)>,
    /// The commands, each one argument, run one after the other.
    #[arg(required = true)]
    commands: Vec<String>,
}

/// The lab itself failed, not a command in it.
const NO_LAB: u8 = 125;

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    match prepared(arguments).run() {
        Ok(report) => ExitCode::from(print(&report)),
        Err(error) => {
            eprintln!("lab-run: {}", errors::chain(&error));
            ExitCode::from(NO_LAB)
        }
    }
}

fn prepared(arguments: Arguments) -> Lab {
    let mut lab = Lab::new(arguments.kernel)
        .memory_mib(arguments.memory_mib)
        .limit(Duration::from_secs(arguments.limit_s));
    for (here, there) in arguments.program {
        lab = lab.program(here, there);
    }
    for (here, there) in arguments.file {
        lab = lab.file(here, there);
    }
    arguments.commands.into_iter().fold(lab, Lab::command)
}

/// Prints what the commands printed; returns the first exit status that is not 0.
fn print(report: &Report) -> u8 {
    for outcome in &report.outcomes {
        print!("{}", outcome.output);
        if !outcome.succeeded() {
            eprintln!(
                "lab-run: status {} of {:?}",
                outcome.status, outcome.command
            );
        }
    }
    eprintln!(
        "lab-run: kernel {}, {:.1} s",
        report.release,
        report.took.as_secs_f64()
    );
    let failed = report.outcomes.iter().find(|outcome| !outcome.succeeded());
    failed.map_or(0, |outcome| u8::try_from(outcome.status).unwrap_or(1))
}

fn placement(text: &str) -> Result<(PathBuf, String), String> {
    match text.rsplit_once(':') {
        Some((here, there)) if there.starts_with('/') => Ok((here.into(), there.to_owned())),
        _ => Err(format!("{text:?} is not HERE:THERE with an absolute THERE")),
    }
}
