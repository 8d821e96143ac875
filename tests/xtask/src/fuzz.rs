//! Fuzz targets, a minute each.

use std::path::PathBuf;
use std::process::Command;

use crate::session::{Done, Session};
use crate::share::Job;
use crate::step::Step;

/// Directories that have fuzz targets, with their targets.
const PACKAGES: [(&str, &[&str]); 3] = [
    (
        "ept",
        &["decode", "stage2_operations", "tracker_operations"],
    ),
    (
        "devices",
        &["block", "net", "rng", "console", "balloon", "vsock"],
    ),
    ("vmm/monitor", &["api_request"]),
];

const SECONDS: u32 = 60;
const VERSION: &str = "0.13.2";

/// Wrong results are looked for, which no sanitizer sees. Traced comparisons cost more runs than they find.
const BUILD_OPTIONS: [&str; 3] = ["--sanitizer", "none", "--no-trace-compares"];

/// Installs cargo-fuzz if it is missing, builds the targets, and returns a job for each target.
pub(crate) fn build(session: &Session) -> Vec<Job<'_>> {
    if install(session).is_err() {
        return Vec::new();
    }
    let mut jobs = Vec::new();
    for (package, targets) in PACKAGES {
        let name = format!("build-fuzz-{}", package.replace('/', "-"));
        let build = command(session, package, "build");
        if Step::new(name, 900, build).run(session).is_err() {
            continue;
        }
        jobs.extend(targets.iter().map(|target| {
            // The compiler that cargo calls to see that the target is built takes a moment, too.
            Job::new(SECONDS + 5, || run(session, package, target))
        }));
        let targets = targets.join(" ");
        session.ran_on(format!(
            "fuzzed bytes: {targets} of {package}, {SECONDS} s each"
        ));
    }
    jobs
}

fn tool(session: &Session) -> PathBuf {
    session.places.cache.join("tools/bin/cargo-fuzz")
}

fn install(session: &Session) -> Done {
    if tool(session).exists() {
        return Ok(());
    }
    let words = format!("install cargo-fuzz --version {VERSION} --locked --root");
    let mut install = session.places.cargo(&words);
    install.arg(session.places.cache.join("tools"));
    let step = Step::new("install-cargo-fuzz", 900, install);
    step.run(session).map(drop)
}

/// cargo-fuzz passes unstable options to the compiler, which a stable compiler takes with RUSTC_BOOTSTRAP.
fn command(session: &Session, package: &str, action: &str) -> Command {
    let places = &session.places;
    let mut command = places.command(tool(session));
    command
        .current_dir(places.root.join(package))
        .env("RUSTC_BOOTSTRAP", "1")
        .arg(action)
        .args(BUILD_OPTIONS)
        .arg("--target-dir")
        .arg(places.target.join("fuzz"));
    command
}

fn run(session: &Session, package: &str, target: &str) {
    let mut fuzz = command(session, package, "run");
    fuzz.args([target, "--"])
        .arg(format!("-max_total_time={SECONDS}"))
        .args(["-timeout=20", "-max_len=1024", "-len_control=0"])
        .args(["-verbosity=0", "-print_final_stats=1"]);
    let Ok(log) = Step::new(format!("fuzz-{target}"), 180, fuzz).run(session) else {
        return;
    };
    let runs = log
        .lines()
        .find_map(|line| line.strip_prefix("stat::number_of_executed_units:"));
    if let Some(runs) = runs {
        session.say(&format!("       fuzz-{target}: {} runs", runs.trim()));
    }
}
