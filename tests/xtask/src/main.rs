//! Runs the steps of Ferry's test command. `tests/run` installs what they need, builds this program and calls it;
//! `cargo xtask` calls it alone.
//!
//! A step is one command with a time limit, and its output goes to a log of its own ([`step`]). [`session`] counts
//! tests and failures and prints the closing lines. Which tests belong to a step, how long one test may take, and which
//! tests never run side by side is written in `.config/nextest.toml`.

mod build;
mod fetch;
mod fuzz;
mod lab;
mod places;
mod results;
mod session;
mod share;
mod step;
mod suites;

use std::process::ExitCode;

use clap::{Parser, ValueEnum};

use lab::Programs;
use places::Places;
use session::{Done, Expected, Failed, Session};
use suites::Native;

/// Runs Ferry's tests. Expects the packages that `tests/run` installs.
#[derive(Parser)]
#[command(name = "cargo xtask", max_term_width = 100)]
struct Arguments {
    #[arg(value_enum, default_value = "all")]
    mode: Mode,
}

/// What to run.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Mode {
    /// Everything but `measure`: checks, all test suites, fuzz targets, the native host and the lab
    All,
    /// Checks, unit and property tests, and the short whole-system tests on the native host
    Quick,
    /// Whole-system tests on this machine's /dev/kvm
    Native,
    /// Whole-system tests and stock Linux guests on emulated KVM hosts
    Lab,
    /// A minute of each fuzz target
    Fuzz,
    /// Benchmarks against their thresholds; needs an idle machine
    Measure,
    /// Only fetch the Debian kernels and the Debian root file system
    Fetch,
}

fn main() -> ExitCode {
    let mode = Arguments::parse().mode;
    let session = match Places::find().and_then(Session::start) {
        Ok(session) => session,
        Err(error) => {
            println!("FAILED the cache or the signal handlers cannot be prepared: {error}");
            println!("0 passed, 1 failed");
            return ExitCode::FAILURE;
        }
    };
    // A step that fails has been reported and counted.
    let _ = match mode {
        Mode::All => all(&session),
        Mode::Quick => quick(&session),
        Mode::Native => native(&session),
        Mode::Lab => lab(&session),
        Mode::Fuzz => {
            share::jobs(fuzz::build(&session));
            Ok(())
        }
        Mode::Measure => measure(&session),
        Mode::Fetch => fetch::all(&session),
    };
    session.finish(match mode {
        Mode::Fetch => Expected::NoTests,
        _ => Expected::Tests,
    })
}

fn all(session: &Session) -> Done {
    // The first lane uses cargo's directory `debug`, the second `release` and directories of its own.
    let (tests, (ferry, fuzz, models)) = share::both(
        || {
            let tests = build::tests(session);
            build::checks(session);
            build::documentation(session);
            tests
        },
        || {
            let ferry = build::ferry(session);
            let fetched = fetch::all(session);
            let models = suites::build_models(session);
            let _ = build::bare_metal(session);
            let fuzz = fuzz::build(session);
            (ferry.and(fetched), fuzz, models)
        },
    );
    tests?;
    let native = suites::look_for_native(session);
    suites::unit(session, native);
    // Timing matters to the tests on the native host, so nothing else runs beside them.
    if native == Native::Usable && ferry.is_ok() && suites::native_host(session).is_ok() {
        suites::native(session);
        suites::native_long(session);
    }
    let programs = ferry.and_then(|()| lab_is_ready(session));
    let mut jobs = fuzz;
    jobs.extend(suites::jobs(session, models));
    if let Ok(programs) = &programs {
        jobs.extend(lab::jobs(session, programs));
    }
    share::jobs(jobs);
    programs.map(|_| lab::ran(session))
}

fn quick(session: &Session) -> Done {
    build_both(session, || build::checks(session))?;
    let native = suites::look_for_native(session);
    suites::unit(session, native);
    match native {
        Native::Usable => {
            suites::native_host(session)?;
            suites::native(session);
            Ok(())
        }
        Native::Missing => {
            fetch::kernels(session)?;
            lab::quick(session)
        }
    }
}

fn native(session: &Session) -> Done {
    build_both(session, || ())?;
    suites::native_host(session)?;
    suites::native(session);
    suites::native_long(session);
    Ok(())
}

fn lab(session: &Session) -> Done {
    fetch::all(session)?;
    build_both(session, || ())?;
    let programs = lab_is_ready(session)?;
    share::jobs(lab::jobs(session, &programs));
    lab::ran(session);
    Ok(())
}

fn measure(session: &Session) -> Done {
    build_both(session, || ())?;
    suites::native_host(session)?;
    suites::measure(session);
    fetch::all(session)?;
    lab::linux_guest(session)?;
    lab::bench_devices(session, 3, 5, "");
    Ok(())
}

/// Builds the tests and the program; runs `besides` after the build of the tests.
///
/// # Errors
/// Returns [`Failed`] if a build failed.
fn build_both(session: &Session, besides: impl FnOnce() + Send) -> Done {
    let (tests, ferry) = share::both(
        || {
            let tests = build::tests(session);
            besides();
            tests
        },
        || build::ferry(session),
    );
    tests.and(ferry)
}

fn lab_is_ready(session: &Session) -> Result<Programs, Failed> {
    let programs = Programs::build(session)?;
    lab::linux_guest(session)?;
    Ok(programs)
}
