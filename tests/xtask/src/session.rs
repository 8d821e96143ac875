//! What one run of the test command has done so far: counts, failures and hosts, and the interrupt that ends it.

use std::io::{self, Write};
use std::process::ExitCode;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM};

use crate::places::Places;
use crate::results::Counts;
use crate::step::{End, Output, Step};

/// A step failed. The failure has been reported and counted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Failed;

pub(crate) type Done = Result<(), Failed>;

/// Exit status after an interrupt, as a shell reports SIGINT.
const INTERRUPTED: u8 = 130;

/// One run of the test command. Steps on several threads share it.
pub(crate) struct Session {
    pub(crate) places: Places,
    began: Instant,
    interrupted: Arc<AtomicBool>,
    tally: Mutex<Tally>,
}

#[derive(Default)]
struct Tally {
    counts: Counts,
    /// Hosts that ran tests, and the tests that they ran.
    ran: Vec<String>,
    troubles: Vec<String>,
    /// Why tests were left out.
    left_out: Vec<String>,
}

impl Session {
    /// Begins a run, which SIGINT, SIGTERM and SIGHUP interrupt.
    ///
    /// # Errors
    /// Returns the error of the system if a signal handler cannot be installed.
    pub(crate) fn start(places: Places) -> io::Result<Self> {
        let interrupted = Arc::new(AtomicBool::new(false));
        for signal in [SIGINT, SIGTERM, SIGHUP] {
            signal_hook::flag::register(signal, Arc::clone(&interrupted))?;
        }
        Ok(Self {
            places,
            began: Instant::now(),
            interrupted,
            tally: Mutex::default(),
        })
    }

    /// Whether a signal asked the run to end. Running steps end their processes then, and no other step starts.
    pub(crate) fn is_interrupted(&self) -> bool {
        self.interrupted.load(Ordering::Relaxed)
    }

    /// Prints a line.
    pub(crate) fn say(&self, line: &str) {
        // There is nobody to tell if stdout is closed; the exit status still says how the run ended.
        let _ = writeln!(io::stdout(), "{line}");
    }

    /// Notes which host ran which tests, for the closing lines. An interrupted run has not run them all.
    pub(crate) fn ran_on(&self, what: impl Into<String>) {
        if !self.is_interrupted() {
            self.tally().ran.push(what.into());
        }
    }

    /// Says loudly that tests are left out, and why; repeats it in the closing lines.
    pub(crate) fn leave_out(&self, title: &str, why: &str, consequences: &[&str]) {
        let line = "=".repeat(80);
        let mut text = vec![line.clone(), format!("{title}: {why}")];
        text.extend(consequences.iter().map(|&line| line.to_owned()));
        text.push(line);
        self.say(&text.join("\n"));
        self.tally().left_out.push(format!("{title}: {why}"));
    }

    /// Reports a failure that is not one of a command.
    pub(crate) fn trouble(&self, what: impl Into<String>) -> Failed {
        let what = what.into();
        self.say(&format!("FAILED {what}"));
        let mut tally = self.tally();
        tally.counts.failed += 1;
        tally.troubles.push(what);
        Failed
    }

    /// Reports how a step ended and counts its tests; returns its log if it succeeded.
    pub(crate) fn judge(
        &self,
        step: &Step,
        end: io::Result<End>,
        took: Duration,
        log: String,
    ) -> Result<String, Failed> {
        let name = &step.name;
        let why = match end {
            Ok(End::Exited(status)) if status.success() => None,
            Ok(End::Exited(status)) => Some(status.to_string()),
            Ok(End::OverLimit(limit)) => Some(format!("still running after {} s", limit.as_secs())),
            Ok(End::Interrupted) => return Err(Failed),
            Err(error) => Some(error.to_string()),
        };
        let mut counts = step.runner.map(|runner| runner.count(&log));
        let nothing_wrong = counts.is_none_or(|tests| tests.passed > 0 && tests.failed == 0);
        let why = why.or_else(|| (!nothing_wrong).then(|| "no test passed, or one failed".into()));
        let failed = why.is_some();
        // The failed tests of a step are its failure; a step without them is one itself.
        let own_failure = failed && counts.is_none_or(|tests| tests.failed == 0);
        let numbers = counts.map_or(String::new(), |tests| {
            format!(", {} passed, {} failed", tests.passed, tests.failed)
        });
        let counts = counts.get_or_insert_default();
        counts.failed += u64::from(own_failure);

        let mut tally = self.tally();
        tally.counts += *counts;
        let seconds = took.as_secs_f64();
        let mut report = match &why {
            None => format!("ok     {name}: {seconds:.1} s{numbers}"),
            Some(why) => format!("FAILED {name}: {why}, {seconds:.1} s{numbers}"),
        };
        match &why {
            Some(_) => report += &format!("; its log:\n{log}"),
            None if step.output == Output::Shown => report += &format!("\n{}", indented(&log)),
            None => {}
        }
        self.say(report.trim_end());
        if let Some(why) = why {
            tally.troubles.push(format!("{name}: {why}"));
            return Err(Failed);
        }
        Ok(log)
    }

    /// Prints the closing lines; the last one is `N passed, N failed`.
    pub(crate) fn finish(&self, expected: Expected) -> ExitCode {
        if self.is_interrupted() {
            self.say("\ninterrupted: the other steps were left out");
        } else if expected == Expected::Tests && self.tally().ran.is_empty() {
            self.trouble("no host ran any test");
        }
        let tally = self.tally();
        let mut lines = vec![String::new()];
        lines.extend(tally.ran.iter().map(|what| format!("ran on {what}")));
        lines.extend(tally.left_out.iter().map(|why| format!("LEFT OUT: {why}")));
        lines.extend(tally.troubles.iter().map(|what| format!("failed: {what}")));
        let Counts {
            passed,
            failed,
            ignored,
        } = tally.counts;
        if ignored > 0 {
            lines.push(format!("{ignored} ignored (they carry #[ignore])"));
        }
        let took = self.began.elapsed().as_secs();
        let logs = self.places.logs.display();
        lines.push(format!("logs: {logs}; {} min {} s", took / 60, took % 60));
        lines.push(format!("{passed} passed, {failed} failed"));
        self.say(&lines.join("\n"));
        if self.is_interrupted() {
            ExitCode::from(INTERRUPTED)
        } else if failed > 0 {
            ExitCode::FAILURE
        } else {
            ExitCode::SUCCESS
        }
    }

    fn tally(&self) -> MutexGuard<'_, Tally> {
        self.tally.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// What a run is expected to do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Expected {
    /// Run tests: a run without any has failed.
    Tests,
    /// Fetch files only.
    NoTests,
}

fn indented(log: &str) -> String {
    let lines: Vec<String> = log.lines().map(|line| format!("    {line}")).collect();
    lines.join("\n")
}
