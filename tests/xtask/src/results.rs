//! Counts the tests that a test runner reports in its output.

use std::ops::AddAssign;

/// Numbers of tests by outcome.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Counts {
    pub(crate) passed: u64,
    pub(crate) failed: u64,
    /// Tests that carry `#[ignore]`.
    pub(crate) ignored: u64,
}

impl AddAssign for Counts {
    fn add_assign(&mut self, other: Self) {
        self.passed += other.passed;
        self.failed += other.failed;
        self.ignored += other.ignored;
    }
}

/// The program that ran the tests and wrote the log.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Runner {
    /// Test programs of Rust's libtest, any number of them: on their own, in the lab, or run by `cargo test`.
    Libtest,
    /// One run of cargo-nextest.
    Nextest,
}

impl Runner {
    /// Counts the tests in a log.
    pub(crate) fn count(self, log: &str) -> Counts {
        let mut counts = Counts::default();
        for line in log.lines() {
            counts += match self {
                Self::Libtest => libtest_line(line),
                Self::Nextest => nextest_line(line),
            };
        }
        counts
    }
}

/// Reads `test result: ok. 3 passed; 0 failed; 1 ignored; 0 measured; 2 filtered out; finished in 0.01s`. Other output
/// of the same lab host can precede it on the line.
fn libtest_line(line: &str) -> Counts {
    let Some((_, result)) = line.split_once("test result: ") else {
        return Counts::default();
    };
    let result = result.split_once(". ").map_or(result, |(_, rest)| rest);
    let mut counts = Counts::default();
    for (number, outcome) in result.split(';').filter_map(number_and_outcome) {
        match outcome {
            "passed" => counts.passed += number,
            "failed" => counts.failed += number,
            "ignored" => counts.ignored += number,
            _ => {}
        }
    }
    counts
}

/// Reads `Summary [   1.234s] 9 tests run: 5 passed (1 slow), 1 failed, 2 timed out, 1 exec failed, 40 skipped`.
/// Skipped tests are those of other profiles, so they are not counted.
fn nextest_line(line: &str) -> Counts {
    let mut counts = Counts::default();
    let summary = line.trim_start().strip_prefix("Summary [");
    let Some((_, outcomes)) = summary.and_then(|rest| rest.split_once(" run: ")) else {
        return counts;
    };
    for (number, outcome) in outcomes.split(", ").filter_map(number_and_outcome) {
        match outcome.split(" (").next() {
            Some("passed") => counts.passed += number,
            Some("failed" | "timed out" | "exec failed") => counts.failed += number,
            _ => {}
        }
    }
    counts
}

fn number_and_outcome(part: &str) -> Option<(u64, &str)> {
    let (number, outcome) = part.trim().split_once(' ')?;
    Some((number.parse().ok()?, outcome))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn results_of_several_libtest_programs_are_added() {
        let log = "running 3 tests\ntest a ... ok\n\
            test result: ok. 2 passed; 0 failed; 1 ignored; 0 measured; 7 filtered out; finished in 0.01s\n\
            [  12.5] test result: FAILED. 4 passed; 2 failed; 0 ignored; 0 measured; 0 filtered out\n";
        let counts = Counts {
            passed: 6,
            failed: 2,
            ignored: 1,
        };
        assert_eq!(Runner::Libtest.count(log), counts);
    }

    #[test]
    fn every_way_to_fail_is_counted_for_nextest() {
        let log = "        PASS [   0.005s] (1/9) ferry-ept walk::s1\n------------\n     \
            Summary [   1.234s] 9 tests run: 5 passed (1 slow, 1 leaky), 1 failed, 2 timed out, 1 exec failed, 40 skipped\n";
        let counts = Counts {
            passed: 5,
            failed: 4,
            ignored: 0,
        };
        assert_eq!(Runner::Nextest.count(log), counts);
    }

    #[test]
    fn an_interrupted_nextest_run_is_counted() {
        let log = "     Summary [   0.500s] 2/9 tests run: 1 passed, 1 failed, 7 skipped\n";
        let counts = Counts {
            passed: 1,
            failed: 1,
            ignored: 0,
        };
        assert_eq!(Runner::Nextest.count(log), counts);
    }

    #[test]
    fn a_log_without_results_has_no_tests() {
        for runner in [Runner::Libtest, Runner::Nextest] {
            let log = "error: could not compile `ferry-ept`\n5 passed\n";
            assert_eq!(runner.count(log), Counts::default());
        }
    }
}
