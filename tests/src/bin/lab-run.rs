//! Runs commands in the lab: `lab-run --kernel 6.12 --program target/debug/ferry:/bin/ferry -- ferry --version`.
//!
//! Prints the output of the commands to stdout. The exit status is that of the first command that failed, or 125 if the
//! lab itself failed.

use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use clap::Parser;
use ferry_tests::errors;
use ferry_tests::kernels::Series;
use ferry_tests::lab::{Lab, Report};

/// Runs shell commands in the lab: an emulated KVM host with a Debian kernel.
#[derive(Parser)]
#[command(
    after_help = "Example: lab-run --kernel 6.1 'cat /sys/module/kvm_amd/parameters/npt' 'ls /dev/kvm'"
)]
struct Arguments {
    /// Kernel of the lab host: 6.1 or 6.12.
    #[arg(long, default_value = "6.12")]
    kernel: Series,
    /// Memory of the lab host in MiB.
    #[arg(long, default_value_t = 3072)]
    memory_mib: u32,
    /// Time limit of the run in seconds.
    #[arg(long, default_value_t = 120)]
    limit_s: u64,
    /// Copy a program with its shared libraries into the lab host.
    #[arg(long, value_name = "HERE:THERE", value_parser = placement)]
    program: Vec<(PathBuf, String)>,
    /// Copy a file into the lab host.
    #[arg(long, value_name = "HERE:THERE", value_parser = placement)]
    file: Vec<(PathBuf, String)>,
    /// Shell commands to run one after the other, each as one argument.
    #[arg(required = true)]
    commands: Vec<String>,
}

/// Exit status if the lab itself failed.
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

/// Prints the output of the commands. Returns the first exit status that is not 0.
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
