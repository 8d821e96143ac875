//! Tests of the lab itself, on which the other tests rely. They run on any machine.

use std::path::PathBuf;
use std::process::Command;
use std::time::Duration;

use ferry_tests::kernels::Series;
use ferry_tests::lab::{Lab, LabError};
use ferry_tests::linux_guest::{CMDLINE, READY};
use ferry_tests::paths;
use ferry_tests::process::Process;

/// Time limit for a boot. It takes seconds on an idle machine, and longer on a busy one.
const BOOT_LIMIT: Duration = Duration::from_secs(120);

fn probe(series: Series) {
    let program = PathBuf::from(env!("CARGO_BIN_EXE_kvm-probe"));
    let report = Lab::new(series)
        .program(program, "/bin/kvm-probe")
        .command("kvm-probe")
        .command("echo to stdout; echo to stderr >&2; exit 7")
        .run()
        .unwrap_or_else(|error| panic!("{}", ferry_tests::errors::chain(&error)));
    assert!(
        report.release.starts_with(&format!("{series}.")),
        "{}",
        report.release
    );
    let [probe, other] = report.outcomes.as_slice() else {
        panic!("two commands: {report:?}")
    };
    assert!(probe.succeeded(), "{}", probe.output);
    for line in [
        &*format!("kernel: {}", report.release),
        "kvm_amd/parameters/npt: Y",
        "kvm/parameters/tdp_mmu: Y",
    ] {
        assert!(
            probe.output.lines().any(|found| found == line),
            "no {line:?}:\n{}",
            probe.output
        );
    }
    assert_eq!(
        (other.status, other.output.as_str()),
        (7, "to stdout\nto stderr\n")
    );
}

#[test]
fn kernel_6_1_is_a_kvm_host_with_nested_paging() {
    probe(Series::V6_1);
}

#[test]
fn kernel_6_12_is_a_kvm_host_with_nested_paging() {
    probe(Series::V6_12);
}

#[test]
fn a_lab_host_that_dies_names_the_command() {
    let run = Lab::new(Series::V6_1)
        .command("true")
        .command("reboot -f")
        .command("echo never")
        .run();
    match run.unwrap_err() {
        LabError::Died { command, .. } => assert_eq!(command, "reboot -f"),
        other => panic!("{other:?}"),
    }
}

#[test]
fn a_run_that_takes_too_long_is_ended() {
    let run = Lab::new(Series::V6_1)
        .limit(Duration::from_secs(1))
        .command("sleep 600")
        .run();
    assert!(matches!(run, Err(LabError::Qemu(_))), "{run:?}");
}

/// Boots the files of the Linux guest in QEMU, with the same command line and without ACPI and PCI. If this works and
/// `ferry run` fails, the monitor is at fault and not the guest.
fn boots_in_qemu(kernel: &str) {
    let mut command = Command::new("qemu-system-x86_64");
    command
        .args([
            "-M",
            "microvm,acpi=off",
            "-accel",
            "tcg",
            "-m",
            "512",
            "-append",
            CMDLINE,
        ])
        .arg("-kernel")
        .arg(paths::linux_guest(kernel).unwrap())
        .arg("-initrd")
        .arg(paths::linux_guest("guest.cpio").unwrap())
        .args([
            "-nodefaults",
            "-display",
            "none",
            "-no-reboot",
            "-serial",
            "stdio",
        ]);
    let mut guest = Process::start(&mut command).unwrap();
    guest.stdout().wait_for(READY, BOOT_LIMIT).unwrap();
    guest.stdout().wait_for("/ # ", BOOT_LIMIT).unwrap();
    guest.type_in("echo $((6*7)) is the answer\n").unwrap();
    guest
        .stdout()
        .wait_for("\n42 is the answer", BOOT_LIMIT)
        .unwrap();
}

#[test]
fn the_linux_guest_boots_from_a_bzimage() {
    boots_in_qemu("6.1/vmlinuz");
    boots_in_qemu("6.12/vmlinuz");
}

#[test]
fn the_linux_guest_boots_from_a_vmlinux() {
    boots_in_qemu("6.1/vmlinux");
    boots_in_qemu("6.12/vmlinux");
}
