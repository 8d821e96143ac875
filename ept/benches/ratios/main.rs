//! The table of ratios: every figure of ept, its contestants in turns, in one run.
//!
//!     cargo bench -p ferry-ept --bench ratios -- --help
//!
//! A measurement, no test: whether targets are met or not, its exit status is 0. It fails where contestants
//! disagree about what came of their work.

#[path = "../contest/mod.rs"]
mod contest;
mod json;
mod measure;
#[path = "../peers/mod.rs"]
mod peers;
mod profile;
mod table;
mod verdict;

use std::process::ExitCode;

use clap::Parser;

use contest::{Planned, Sizes};
use measure::{Disagreement, Measured};

/// Measures P1 to P9 with Ferry, the plain loop and other people's crates side by side, and prints the table of
/// ratios.
#[derive(Parser)]
#[command(name = "cargo bench -p ferry-ept --bench ratios --")]
struct Options {
    /// Only figures of this number, such as P7; may be given several times.
    #[arg(long, value_name = "NUMBER", ignore_case = true, value_parser = numbers())]
    only: Vec<String>,
    /// Rounds of each contestant, after one that is not counted.
    #[arg(long, value_name = "N", default_value_t = 11, value_parser = clap::value_parser!(u32).range(1..))]
    rounds: u32,
    /// GiB of guest memory for P7 and P9; below 16 TiB.
    #[arg(long, value_name = "GIB", value_parser = clap::value_parser!(u64).range(1..16384))]
    gib: Option<u64>,
    /// Small sizes: checks that all agree, and measures little.
    #[arg(long)]
    quick: bool,
    /// Every contestant, not only those that are compared.
    #[arg(long)]
    all: bool,
    /// JSON, with every contestant, and no table.
    #[arg(long)]
    json: bool,
    /// Given by `cargo bench`; without it (`cargo test`), one quick round.
    #[arg(long, hide = true)]
    bench: bool,
}

fn numbers() -> clap::builder::PossibleValuesParser {
    ["P1", "P2", "P3", "P4", "P5", "P6", "P7", "P8", "P9"].into()
}

impl Options {
    fn sizes(&self) -> Sizes {
        let quick = self.quick || !self.bench;
        let usual = if quick { 1 } else { 64 };
        Sizes {
            gib: self.gib.unwrap_or(usual),
            quick,
        }
    }

    fn rounds(&self) -> u32 {
        if self.bench { self.rounds } else { 1 }
    }

    fn wants(&self, planned: &Planned) -> bool {
        let mut only = self.only.iter();
        self.only.is_empty() || only.any(|number| number.eq_ignore_ascii_case(planned.number))
    }
}

fn main() -> ExitCode {
    let options = Options::parse();
    match measured(&options) {
        Ok(figures) => {
            report(&options, &figures);
            ExitCode::SUCCESS
        }
        Err(error) => {
            eprintln!("{error}");
            ExitCode::FAILURE
        }
    }
}

fn measured(options: &Options) -> Result<Vec<Measured>, Disagreement> {
    let all = [
        contest::table_figures(),
        contest::tracker_figures(),
        contest::memory_figures(),
    ];
    let wanted = all.into_iter().flatten().filter(|one| options.wants(one));
    let sizes = options.sizes();
    wanted
        .map(|planned| measure::figure((planned.make)(sizes), options.rounds()))
        .collect()
}

fn report(options: &Options, figures: &[Measured]) {
    if options.json {
        println!("{}", json::of(figures, options.rounds()));
        return;
    }
    println!("{}", profile::summary(options.rounds()));
    print!("{}", table::ratios(figures));
    if options.all {
        print!("\n{}", table::contestants(figures));
    }
}
