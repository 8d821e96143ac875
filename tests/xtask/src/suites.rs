//! Test suites that need neither the lab nor a fuzzer, and the benchmarks.

use std::process::Command;

use crate::results::Runner;
use crate::session::{Done, Session};
use crate::share::Job;
use crate::step::Step;

/// Examples of `ferry-migration` to run. Each must end with status 0.
const EXAMPLES: &[&str] = &["embed"];
/// The same, for examples that need a usable /dev/kvm.
const KVM_EXAMPLES: &[&str] = &["kvm"];

/// Turns off the link-time optimization that the release profile has for the program `ferry`. It takes minutes and
/// changes no test result.
const FAST_LINK: &str =
    "--config profile.release.lto=false --config profile.release.codegen-units=16";

/// Whether this machine's own KVM can run guests.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Native {
    Usable,
    Missing,
}

/// Runs all tests of one profile of `.config/nextest.toml`. The workspace must be built: see [`crate::build::tests`].
pub(crate) fn profile(
    session: &Session,
    name: &str,
    profile: &str,
    limit_s: u64,
    options: &str,
) -> Done {
    let tests = session.places.cargo(&format!(
        "nextest run --workspace --locked --profile {profile} {options}"
    ));
    let step = Step::new(name, limit_s, tests).tests(Runner::Nextest);
    step.run(session).map(drop)
}

/// Unit and property tests, documentation tests, and examples. Tests of machines are left out where KVM cannot be used.
pub(crate) fn unit(session: &Session, native: Native) {
    let places = &session.places;
    let of = match native {
        Native::Usable => "default",
        Native::Missing => "no-kvm",
    };
    let _ = profile(session, "unit", of, 1200, "");
    let doc = places.cargo("test --doc --workspace --locked");
    let doc = Step::new("unit-doc", 300, doc).tests(Runner::Libtest);
    let _ = doc.run(session);
    // Within the workspace, ept is built with all its features.
    let alone = places.cargo("test -p ferry-ept --no-default-features --locked");
    let alone = Step::new("unit-ept-alone", 600, alone).tests(Runner::Libtest);
    let _ = alone.run(session);

    let examples = EXAMPLES.iter();
    let kvm_examples = KVM_EXAMPLES.iter().filter(|_| native == Native::Usable);
    for name in examples.chain(kvm_examples) {
        let example = places.tool(&format!("examples/{name}"));
        let _ = Step::new(format!("example-{name}"), 120, example).run(session);
    }
}

/// Finds out whether this machine's own KVM can be used, and says loudly where it cannot.
pub(crate) fn look_for_native(session: &Session) -> Native {
    let probe = session.places.tool("kvm-probe").output();
    let why = match probe {
        Ok(probe) if probe.status.success() => return Native::Usable,
        Ok(probe) => String::from_utf8_lossy(&probe.stderr).into_owned(),
        Err(error) => format!("kvm-probe cannot be started: {error}"),
    };
    session.leave_out(
        "NO NATIVE HOST",
        why.lines().last().unwrap_or("kvm-probe failed"),
        &[
            "LEFT OUT: every native-* step, and the tests of vmm that run machines.",
            "The lab alone decides.",
        ],
    );
    Native::Missing
}

/// Prints what the native host's KVM can do.
///
/// # Errors
/// Returns `Failed` if it cannot run guests.
pub(crate) fn native_host(session: &Session) -> Done {
    let probe = session.places.tool("kvm-probe");
    let probe = Step::new("native-host", 30, probe).shown();
    probe.run(session).map(drop)
}

/// The whole-system tests of the everyday subset on the native host.
pub(crate) fn native(session: &Session) {
    let places = &session.places;
    let _ = profile(session, "native", "native", 900, "");
    let mut demo = places.command(places.ferry());
    demo.args(["demo", "--json"]);
    let _ = Step::new("native-demo", 120, demo).run(session);
    session.ran_on(
        "native (/dev/kvm of this machine): whole-system tests, bad input, the API, attacks on virtio rings, \
         the view on a terminal, demo",
    );
}

/// The whole-system tests that the everyday subset leaves to the full run.
pub(crate) fn native_long(session: &Session) {
    let _ = profile(session, "native-long", "native-long", 1500, "");
    // Its thresholds are far from its figures, so that they hold on a machine that is busy otherwise.
    let _ = bench_start(session, &[]);
    session.ran_on(
        "native (/dev/kvm of this machine): faults, 100 migrations in a row, start beside QEMU",
    );
}

fn bench_start(session: &Session, options: &[&str]) -> Done {
    let places = &session.places;
    let mut bench = places.command(places.ferry());
    bench.args(["bench", "start"]).args(options);
    let step = Step::new("native-bench-start", 120, bench).shown();
    step.run(session).map(drop)
}

/// Benchmarks that judge figures by thresholds. They assume that the machine does nothing else.
pub(crate) fn measure(session: &Session) {
    let places = &session.places;
    let demo = places.tool("measure-demo");
    let _ = Step::new("measure-demo", 300, demo).shown().run(session);
    let mut compare = places.tool("compare-migration");
    compare.args(["--runs", "3"]);
    let _ = Step::new("compare", 900, compare).shown().run(session);
    let _ = bench_start(session, &["--runs", "31"]);
    session.ran_on(
        "native (/dev/kvm of this machine): measurements, comparison of migration with QEMU",
    );
}

fn loom(session: &Session, then: &str) -> Command {
    let places = &session.places;
    let mut models = places.cargo(&format!(
        "nextest run -p ferry-ept --lib --release --locked --profile models {FAST_LINK} {then}"
    ));
    models
        .env("RUSTFLAGS", "--cfg loom")
        .arg("--target-dir")
        .arg(places.target.join("loom"));
    models
}

/// Builds the loom models. Their flag changes every dependency of ept, so they have a build directory of their own.
pub(crate) fn build_models(session: &Session) -> Done {
    let build = loom(session, "--no-run");
    Step::new("build-models", 600, build).run(session).map(drop)
}

/// Emulated memory management units, the contest of the benchmarks and the models, for one processor each.
pub(crate) fn jobs(session: &Session, models_built: Done) -> Vec<Job<'_>> {
    let contest = Job::new(40, || {
        // Each contestant runs once, to assert that all come to the same result. Figures are not judged, so the debug
        // build is good enough.
        let contest =
            "bench --workspace --locked --profile dev --bench ratios -- --rounds 1 --quick";
        let _ = Step::new("contest", 600, session.places.cargo(contest)).run(session);
    });
    let oracles = Job::new(300, || {
        let _ = profile(session, "oracles", "oracles", 1200, "--test-threads 1");
        session.ran_on(
            "emulated MMUs (Bochs; QEMU x86, aarch64, riscv64): tables of the hardware formats",
        );
    });
    let mut jobs = vec![contest, oracles];
    if models_built.is_ok() {
        jobs.push(Job::new(200, || models(session)));
    }
    jobs
}

fn models(session: &Session) {
    let models = Step::new("models", 900, loom(session, "")).tests(Runner::Nextest);
    let _ = models.run(session);
    session.ran_on("models of ept's concurrency, in every order that loom's bound allows");
}
