//! The program `ferry`: its command line, one file a verb.

mod arguments;
mod bench;
mod ctl;
mod demo;
mod devices;
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

/// Any failure of a verb; its message is what the user reads.
type Failure = Box<dyn std::error::Error + Send + Sync>;

/// Writes a line to standard output, which may be closed, or full.
fn say(line: &str) -> std::io::Result<()> {
    let mut stdout = std::io::stdout().lock();
    writeln!(stdout, "{line}")?;
    stdout.flush()
}

/// Runs the program. Returns status 0 only for success.
fn main() -> ExitCode {
    let arguments = Arguments::parse();
    let done = match arguments.verb {
        Verb::Demo(arguments) => demo::demo(&arguments),
        Verb::Run(arguments) => run::run(&arguments),
        Verb::Receive(arguments) => receive::receive(&arguments),
        Verb::Ctl(arguments) => ctl::ctl(&arguments),
        Verb::Top(arguments) => top::top(&arguments),
        Verb::Bench(arguments) => bench::bench(&arguments.bench),
    };
    match done {
        Ok(status) => ExitCode::from(status),
        Err(error) => {
            complain(error);
            ExitCode::FAILURE
        }
    }
}
