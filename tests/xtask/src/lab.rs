//! The lab: Debian kernels 6.1 and 6.12 with KVM and nested paging, emulated by QEMU on one processor each. Test
//! programs are copied into the emulated host and run there by themselves.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::Command;

use serde_json::Value;

use crate::build::{self, LAB_ONLY};
use crate::fetch::SERIES;
use crate::results::Runner;
use crate::session::{Done, Failed, Session};
use crate::share::Job;
use crate::step::Step;
use crate::suites;

/// Test programs of `ferry-tests` that run on the native host, too.
const SHARED: [&str; 3] = ["system", "faults", "ring-attacks"];
/// The unit tests of ferry-vmm in the lab.
const VMM_UNITS: &str = "vmm-units";

/// Few faults are tried in the lab, because a migration takes a minute of a processor there.
const FAULTS: &str = "a_cut_at_the_end_of_a_round a_lost_commit_is_resolved_by_resuming_the_source \
                      a_lost_done_is_resolved_by_discarding_the_source";
const DEMO: &str =
    "ferry demo --memory 128M --hot 16M --cold 8M --downtime-ms 5000 --cpus 2 --json";

/// What tells the tests in the lab where their files are.
const VARIABLES: &str = "export FERRY_BIN=/bin/ferry FERRY_GUESTS=/guests \
                         FERRY_LINUX_GUEST=/linux-guest FERRY_TOOLS=/bin";

/// The test programs for the lab, by name.
pub(crate) struct Programs(BTreeMap<String, PathBuf>);

impl Programs {
    /// Builds the test programs that run in the lab.
    ///
    /// # Errors
    /// Returns [`Failed`] if cargo fails or does not name every program.
    pub(crate) fn build(session: &Session) -> Result<Self, Failed> {
        let mut cargo = session
            .places
            .cargo("test --no-run --workspace --locked --message-format=json --lib");
        cargo
            .args(SHARED.map(|name| format!("--test={name}")))
            .args(build::lab_only_options());
        let log = Step::new("build-lab-programs", 900, cargo).run(session)?;
        let programs: BTreeMap<_, _> = log.lines().filter_map(test_program).collect();
        let wanted = SHARED.iter().chain(&LAB_ONLY).chain([&VMM_UNITS]);
        for name in wanted {
            if !programs.contains_key(*name) {
                let what = format!("build-lab-programs: cargo names no test program {name}");
                return Err(session.trouble(what));
            }
        }
        Ok(Self(programs))
    }

    fn path(&self, name: &str) -> &Path {
        &self.0[name]
    }
}

/// Reads the name and the path of a test program from a line of cargo's JSON messages.
fn test_program(line: &str) -> Option<(String, PathBuf)> {
    let message: Value = serde_json::from_str(line).ok()?;
    if message["profile"]["test"] != true {
        return None;
    }
    let target = &message["target"];
    let name = match (target["kind"][0].as_str()?, target["name"].as_str()?) {
        ("lib", "vmm") => VMM_UNITS,
        ("test", name) => name,
        _ => return None,
    };
    Some((name.to_owned(), message["executable"].as_str()?.into()))
}

/// Prepares the stock Linux guests: kernels, an initramfs, a disk, and the load of the device benchmark.
///
/// # Errors
/// Returns [`Failed`] if a step failed.
pub(crate) fn linux_guest(session: &Session) -> Done {
    build::static_tools(session)?;
    let places = &session.places;
    let folder = places.cache.join("linux-guest");
    let mut write = places.tool("write-linux-guest");
    write.arg(&folder);
    Step::new("write-linux-guest", 60, write).run(session)?;
    let mut write = places.tool("write-device-load");
    write.arg(folder.join("device-load.cpio"));
    let write = Step::new("write-device-load", 60, write);
    write.run(session).map(drop)
}

/// Command line of `lab-run`.
struct Host {
    command: Command,
    limit_s: u64,
}

impl Host {
    fn new(session: &Session, kernel: &str, limit_s: u64) -> Self {
        let places = &session.places;
        let mut command = places.tool("lab-run");
        command
            .args(["--kernel", kernel])
            .args(["--limit-s", &limit_s.to_string()]);
        Self { command, limit_s }.program(places.ferry(), "/bin/ferry")
    }

    /// With the guests, all test programs and the tools that they call.
    fn with_tests(session: &Session, programs: &Programs, kernel: &str, limit_s: u64) -> Self {
        let places = &session.places;
        let mut host = Self::new(session, kernel, limit_s);
        for name in ["hello.elf", "dirtier.elf", "ring-attacker.elf"] {
            host = host.file(places.guests().join(name), format!("/guests/{name}"));
        }
        for name in [
            "6.1/vmlinuz",
            "6.1/vmlinux",
            "6.12/vmlinuz",
            "6.12/vmlinux",
            "guest.cpio",
            "root.img",
        ] {
            let file = places.cache.join("linux-guest").join(name);
            host = host.file(file, format!("/linux-guest/{name}"));
        }
        for (file, name) in [
            ("/sbin/e2fsck", "e2fsck"),
            ("/sbin/debugfs", "debugfs"),
            ("/usr/bin/qemu-storage-daemon", "qemu-storage-daemon"),
        ] {
            host = host.program(file, format!("/bin/{name}"));
        }
        for (name, program) in &programs.0 {
            host = host.program(program, format!("/bin/{name}"));
        }
        host
    }

    /// Copies a program with its shared libraries.
    fn program(self, from: impl AsRef<Path>, to: impl AsRef<str>) -> Self {
        self.copy("--program", from.as_ref(), to.as_ref())
    }

    fn file(self, from: impl AsRef<Path>, to: impl AsRef<str>) -> Self {
        self.copy("--file", from.as_ref(), to.as_ref())
    }

    fn copy(mut self, option: &str, from: &Path, to: &str) -> Self {
        let mut value = from.as_os_str().to_owned();
        value.push(":");
        value.push(to);
        self.command.arg(option).arg(value);
        self
    }

    /// The step that boots the host and runs a shell command in it.
    fn step(mut self, name: &str, command: &str) -> Step {
        self.command.arg(command);
        Step::new(name, self.limit_s + 30, self.command)
    }
}

/// Test programs to run on one lab host that is booted for them.
struct Suite {
    /// The step is called `lab-SERIES-NAME`.
    name: &'static str,
    kernel: &'static str,
    /// About how long it takes.
    seconds: u32,
    limit_s: u64,
    command: String,
    runner: Option<Runner>,
}

/// The suites in the lab, but for the whole Debian and the benchmark of the devices, which need other files.
fn suites() -> Vec<Suite> {
    let tests = |kernel, name, seconds, limit_s, command: &str| Suite {
        name,
        kernel,
        seconds,
        limit_s,
        command: command.to_owned(),
        runner: Some(Runner::Libtest),
    };
    let mut suites = Vec::new();
    for kernel in SERIES {
        // There is no disassembler in the lab; the tests that call one do not need its KVM.
        let units = "vmm-units --test-threads=2 --skip iasl --skip disassembler";
        let faults = format!("faults --test-threads=1 --exact {FAULTS}");
        suites.extend([
            tests(kernel, VMM_UNITS, 60, 200, units),
            tests(kernel, "system", 150, 400, "system --test-threads=1"),
            tests(kernel, "faults", 200, 400, &faults),
            tests(kernel, "linux", 200, 500, "linux-guest --test-threads=1"),
            Suite {
                runner: None,
                ..tests(kernel, "demo", 60, 200, DEMO)
            },
        ]);
    }
    // These guests run both kernels; the kernel of their host makes no difference to a device.
    suites.extend([
        tests("6.12", "ring-attacks", 200, 400, "ring-attacks"),
        tests("6.12", "life", 250, 500, "linux-life --test-threads=1"),
        tests(
            "6.12",
            "devices",
            400,
            900,
            "linux-devices --test-threads=1",
        ),
        tests("6.12", "limits", 150, 300, "linux-limits --test-threads=1"),
        tests(
            "6.12",
            "vhost-user",
            300,
            900,
            "vhost-user --test-threads=1",
        ),
    ]);
    suites
}

impl Suite {
    fn run(&self, session: &Session, programs: &Programs) {
        let host = Host::with_tests(session, programs, self.kernel, self.limit_s);
        let name = format!("lab-{}-{}", self.kernel, self.name);
        let mut step = host.step(&name, &format!("{VARIABLES}; {}", self.command));
        step.runner = self.runner;
        let _ = step.run(session);
    }
}

/// Everything that runs in the lab, as jobs for one processor each. All of it must have been built and fetched.
pub(crate) fn jobs<'a>(session: &'a Session, programs: &'a Programs) -> Vec<Job<'a>> {
    let suites = suites().into_iter();
    let mut jobs: Vec<_> = suites
        .map(|suite| Job::new(suite.seconds, move || suite.run(session, programs)))
        .collect();
    jobs.push(Job::new(100, || lab_itself(session)));
    // Whether Ferry is faster (status 3 where it is not) is judged by `measure`; here the benchmark has to work.
    jobs.push(Job::new(100, || {
        bench_devices(session, 1, 1, "|| [ $? -eq 3 ]");
    }));
    // If it could not be made, that was reported.
    if session.places.cache.join("debian").is_dir() {
        jobs.push(Job::new(250, || debian(session, programs)));
    }
    jobs
}

/// Notes what the jobs ran on, for the closing lines.
pub(crate) fn ran(session: &Session) {
    for kernel in SERIES {
        session.ran_on(format!(
            "lab (kernel {kernel}, kvm_amd with nested paging): unit tests of the monitor, demo, whole-system tests, \
             some faults, stock Linux guests"
        ));
    }
    session.ran_on(
        "lab (kernel 6.12): attacks on virtio rings; stock Linux guests with disks, all virtio devices, limits, \
         disks behind qemu-storage-daemon, and a whole Debian",
    );
}

/// The whole-system tests, which replace those of the native host in the everyday subset.
pub(crate) fn quick(session: &Session) -> Done {
    let programs = Programs::build(session)?;
    linux_guest(session)?;
    let suites = suites().into_iter();
    suites
        .filter(|suite| suite.kernel == "6.12" && suite.name == "system")
        .for_each(|suite| suite.run(session, &programs));
    session.ran_on("lab (kernel 6.12, kvm_amd with nested paging): whole-system tests");
    Ok(())
}

/// Tests of the lab from outside.
fn lab_itself(session: &Session) {
    let _ = suites::profile(session, "lab-host", "lab-host", 600, "--test-threads 1");
}

/// A whole Debian as the README describes it. Its host has a shell and an `ip` that are not busybox's.
fn debian(session: &Session, programs: &Programs) {
    let mut host = Host::new(session, "6.12", 400);
    for name in ["vmlinuz", "initrd.img", "tree.tar"] {
        let file = session.places.cache.join("debian").join(name);
        host = host.file(file, format!("/debian/{name}"));
    }
    for (program, name) in [
        ("/sbin/mkfs.ext4", "mkfs.ext4"),
        ("/sbin/e2fsck", "e2fsck"),
        ("/sbin/ip", "ip"),
        ("/bin/dash", "dash"),
    ] {
        host = host.program(program, format!("/usr/local/bin/{name}"));
    }
    let test = programs.path("linux-debian");
    let _ = host
        .program(test, "/bin/linux-debian")
        .step(
            "lab-6.12-debian",
            "export FERRY_DEBIAN=/debian; linux-debian",
        )
        .tests(Runner::Libtest)
        .run(session);
}

/// Compares Ferry's virtio devices with QEMU's in the lab. The shell of the lab host appends `more` to the command.
pub(crate) fn bench_devices(session: &Session, seconds: u32, runs: u32, more: &str) {
    const QEMU: &str = "/usr/bin/qemu-system-x86_64";
    const FIRMWARE: &str = "/usr/share/qemu/bios-microvm.bin";
    const TAP: &str = "bench0";
    let guest = session.places.cache.join("linux-guest");
    let network =
        format!("tunctl -t {TAP} && ip addr add 10.8.0.1/24 dev {TAP} && ip link set {TAP} up");
    let bench = format!(
        "ferry bench devices --kernel /vmlinux --initramfs /device-load.cpio --tap {TAP} --host-address 10.8.0.1 \
         --guest-address 10.8.0.2/24 --memory 256M --disk-size 64M --qemu {QEMU} --seconds {seconds} --runs {runs} {more}"
    );
    let mut host = Host::new(session, "6.12", 870)
        .program(QEMU, QEMU)
        .file(FIRMWARE, FIRMWARE)
        .file(guest.join("6.12/vmlinux"), "/vmlinux")
        .file(guest.join("device-load.cpio"), "/device-load.cpio");
    host.command.arg(network);
    let _ = host.step("bench-devices", &bench).shown().run(session);
    session.ran_on("lab (kernel 6.12): disk and network of a stock Linux guest, beside QEMU's");
}
