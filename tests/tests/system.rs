//! Whole-system tests that run on every KVM host: the native host and the lab.

use std::fs;
use std::path::Path;
use std::process::Command;
use std::thread;
use std::time::{Duration, Instant};

use ferry_tests::dirtier::{self, LIMIT, PATIENT, assert_ends, assert_only_runs, audit};
use ferry_tests::endpoint::Endpoint;
use ferry_tests::ferry::{self, Ferry};
use ferry_tests::paths;
use ferry_tests::process::{self, Process};

/// Upper limit for the memory of the monitor beyond guest RAM.
const MONITOR_MOST_KIB: u64 = 8 * 1024;

#[test]
fn hello_prints_and_ends_with_status_0() {
    let guest = paths::guest("hello.elf").unwrap();
    let guest = guest.to_str().unwrap();
    let arguments = [
        "run", "--kernel", guest, "--memory", "64M", "--serial", "stdio",
    ];
    let ended = ferry::invoke(&arguments, LIMIT).unwrap();
    assert!(ended.status.success(), "{ended:?}");
    assert!(
        ended.stdout.contains("hello from ferry guest: cpus="),
        "{ended:?}"
    );
}

#[test]
fn serial_output_goes_to_a_file() {
    let folder = tempfile::tempdir().unwrap();
    let output = folder.path().join("serial");
    let guest = paths::guest("hello.elf").unwrap();
    let serial = format!("file:{}", output.display());
    let arguments = [
        "run",
        "--kernel",
        guest.to_str().unwrap(),
        "--memory",
        "64M",
        "--serial",
        &serial,
    ];
    let ended = ferry::invoke(&arguments, LIMIT).unwrap();
    assert!(ended.status.success(), "{ended:?}");
    assert!(
        fs::read_to_string(output)
            .unwrap()
            .contains("hello from ferry guest")
    );
}

#[test]
fn the_dirtier_answers_and_its_audit_passes() {
    let mut ferry = dirtier::start(1);
    ferry.type_in("s").unwrap();
    ferry.serial().wait_for("dirtier: status", LIMIT).unwrap();
    audit(&mut ferry);
}

#[test]
fn a_paused_guest_is_silent_until_it_is_resumed() {
    let mut ferry = dirtier::start(1);
    ferry.ctl(&["ping"]).unwrap();
    ferry.ctl(&["pause"]).unwrap();
    ferry.type_in("s").unwrap();
    let silence = ferry
        .serial()
        .wait_for("dirtier: status", Duration::from_millis(300));
    assert!(silence.is_err(), "the guest ran while it was paused");
    ferry.ctl(&["resume"]).unwrap();
    ferry.serial().wait_for("dirtier: status", LIMIT).unwrap();
    audit(&mut ferry);
}

#[test]
fn shutdown_ends_the_monitor_and_its_socket() {
    let mut ferry = dirtier::start(1);
    assert!(ferry.api_socket().exists());
    ferry.ctl(&["shutdown-vmm"]).unwrap();
    assert_ends(&mut ferry);
}

#[test]
fn a_terminated_monitor_leaves_no_socket() {
    let folder = tempfile::tempdir().unwrap();
    let migration = Endpoint::Unix(folder.path().join("migration"));
    for mut ferry in [dirtier::start(2), Ferry::receive(&migration).unwrap()] {
        assert!(ferry.api_socket().exists());
        process::terminate(ferry.pid()).unwrap();
        ferry.wait(LIMIT).unwrap();
        assert!(!ferry.api_socket().exists());
    }
    assert_empty(folder.path());
}

fn assert_empty(folder: &Path) {
    let left: Vec<_> = fs::read_dir(folder).unwrap().collect();
    assert!(left.is_empty(), "left behind: {left:?}");
}

#[test]
fn the_monitor_needs_little_beyond_guest_memory() {
    let ferry = dirtier::start(1);
    let resident = ferry.resident().unwrap();
    assert!(
        resident.shared_kib >= 48 * 1024,
        "guest RAM is a memfd: {resident:?}"
    );
    assert!(
        resident.beyond_guest_kib() <= MONITOR_MOST_KIB,
        "{resident:?}"
    );
}

fn migrate(endpoint: &Endpoint, cpus: u32) {
    let mut source = dirtier::start(cpus);
    let mut destination = Ferry::receive(endpoint).unwrap();
    source.send_migration(endpoint, &PATIENT).unwrap();
    // The source process ends after it has handed over its guest.
    assert_ends(&mut source);
    assert_only_runs(&mut destination, &mut source);
    audit(&mut destination);
}

#[test]
fn a_guest_is_carried_over_tcp() {
    migrate(&Endpoint::free_tcp().unwrap(), 1);
}

#[test]
fn a_guest_of_two_vcpus_is_carried_over_a_unix_socket() {
    let folder = tempfile::tempdir().unwrap();
    migrate(&Endpoint::Unix(folder.path().join("migration")), 2);
    assert_empty(folder.path());
}

#[test]
fn a_paused_guest_stays_paused_at_the_destination() {
    let mut source = dirtier::start(2);
    source.ctl(&["pause"]).unwrap();
    let endpoint = Endpoint::free_tcp().unwrap();
    let mut destination = Ferry::receive(&endpoint).unwrap();
    source.send_migration(&endpoint, &PATIENT).unwrap();
    assert_ends(&mut source);
    let info = destination.ctl_json(&["info"]).unwrap();
    assert_eq!(info["state"], "Paused", "{info}");
    dirtier::assert_none_runs([&mut source, &mut destination]);
    destination.ctl(&["resume"]).unwrap();
    audit(&mut destination);
}

#[test]
fn a_reboot_starts_the_guest_again_in_the_same_monitor() {
    let mut ferry = dirtier::start(1);
    let mark = ferry.serial().mark();
    ferry.ctl(&["power-button"]).unwrap();
    ferry.ctl(&["pause"]).unwrap();
    ferry.ctl(&["reboot"]).unwrap();
    let info = ferry.ctl_json(&["info"]).unwrap();
    assert_eq!(info["state"], "Running", "{info}");
    ferry
        .serial()
        .wait_after(mark, "dirtier: ready", LIMIT)
        .unwrap();
    dirtier::assert_runs(&mut ferry);
    audit(&mut ferry);
}

#[test]
fn a_guest_that_arrived_cannot_be_rebooted_and_lives_on() {
    let endpoint = Endpoint::free_tcp().unwrap();
    let mut source = dirtier::start(1);
    let mut destination = Ferry::receive(&endpoint).unwrap();
    source.send_migration(&endpoint, &PATIENT).unwrap();
    let refused = dirtier::refusal(destination.ctl(&["reboot"]).unwrap_err());
    assert!(
        refused.contains("cannot be started again here"),
        "{refused}"
    );
    assert_only_runs(&mut destination, &mut source);
    audit(&mut destination);
}

/// Returns a command for the demo with a small guest and its temporary files in `folder`.
fn small_demo(folder: &Path) -> Command {
    let mut command = Command::new(paths::ferry().unwrap());
    let shape = ["--memory", "64M", "--hot", "8M", "--cold", "8M"];
    command.args(["demo", "--json", "--downtime-ms", "5000"]);
    command.args(shape).env("TMPDIR", folder);
    command
}

/// Returns the ids and command lines of the processes whose command lines contain `folder`.
fn processes_in(folder: &Path) -> Vec<(u32, String)> {
    let name = folder.display().to_string();
    let entries = fs::read_dir("/proc").unwrap().filter_map(Result::ok);
    let named = entries.filter_map(|entry| {
        let pid = entry.file_name().to_str()?.parse().ok()?;
        let line = fs::read_to_string(entry.path().join("cmdline")).ok()?;
        line.contains(&name).then(|| (pid, line.replace('\0', " ")))
    });
    named.collect()
}

#[test]
fn the_demo_is_verified_and_leaves_nothing() {
    let folder = tempfile::tempdir().unwrap();
    let ended = process::run(&mut small_demo(folder.path()), LIMIT).unwrap();
    assert!(ended.status.success(), "{ended:?}");
    let last = ended.stdout.lines().last().unwrap_or_default();
    assert!(last.contains(r#""verified":true"#), "{last}");
    assert_eq!(processes_in(folder.path()), []);
    assert_empty(folder.path());
}

#[test]
fn a_terminated_demo_leaves_no_process() {
    let folder = tempfile::tempdir().unwrap();
    let mut demo = Process::start(&mut small_demo(folder.path())).unwrap();
    demo.stdout().wait_for("demo/started", LIMIT).unwrap();
    assert!(!processes_in(folder.path()).is_empty());
    process::terminate(demo.pid()).unwrap();
    demo.wait(LIMIT).unwrap();
    let deadline = Instant::now() + Duration::from_secs(10);
    while !processes_in(folder.path()).is_empty() && Instant::now() < deadline {
        thread::sleep(Duration::from_millis(10));
    }
    let left = processes_in(folder.path());
    // Even if the test fails, no guest may keep running at full speed.
    left.iter()
        .for_each(|(pid, _)| process::terminate(*pid).unwrap());
    assert_eq!(left, []);
}
