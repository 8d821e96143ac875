//! The program `ferry`: parses the command line and runs one verb.

mod arguments;
mod bench;
mod ctl;
mod demo;
mod inherited;
mod progress;
mod receive;
mod report;
mod run;
mod service;
mod stdio;
mod top;

use std::io::Write;
use std::process::ExitCode;

use clap::Parser;

use arguments::{Arguments, Verb};
use vmm::complain::complain;

/// Error of a verb. Its message is printed for the user.
type Failure = Box<dyn std::error::Error + Send + Sync>;

/// Runs a verb. The exit status is 0 only if it succeeded.
fn main() -> ExitCode {
    let result = match Arguments::parse().verb {
        Verb::Demo(arguments) => demo::demo(&arguments),
        Verb::Run(arguments) => run::run(arguments),
        Verb::Receive(arguments) => receive::receive(arguments),
        Verb::Ctl(arguments) => ctl::ctl(&arguments),
        Verb::Top(arguments) => top::top(&arguments),
        Verb::Bench(arguments) => bench::bench(&arguments.bench),
    };
    match result {
        Ok(status) => ExitCode::from(status),
        Err(error) => {
            complain(error);
            ExitCode::FAILURE
        }
    }
}

/// Prints a line to standard output. Unlike `println!`, it returns an error if standard output is closed or full.
fn print_line(line: &str) -> std::io::Result<()> {
    let mut stdout = std::io::stdout().lock();
    writeln!(stdout, "{line}")?;
    stdout.flush()
}
