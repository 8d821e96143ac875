//! Stock, unmodified Debian kernels as guests of `ferry run`. Runs inside the lab: the native
//! host's KVM emulates ring 0 and knows too few instructions for them.

use std::time::Duration;

use ferry_tests::ferry::Ferry;
use ferry_tests::linux_guest::{CMDLINE, READY};
use ferry_tests::machine::Machine;
use ferry_tests::paths;

/// A guest of an emulated host boots in about ten seconds; a busy machine needs more.
const BOOT_LIMIT: Duration = Duration::from_secs(100);
const SHELL_LIMIT: Duration = Duration::from_secs(30);

fn linux(kernel: &str, cpus: u32) -> Ferry {
    let machine = Machine {
        kernel: paths::linux_guest(kernel).unwrap(),
        initramfs: Some(paths::linux_guest("guest.cpio").unwrap()),
        cmdline: CMDLINE.to_owned(),
        memory_mib: 256,
        cpus,
    };
    let ferry = Ferry::run(&machine).unwrap();
    ferry.serial().wait_for(READY, BOOT_LIMIT).unwrap();
    ferry.serial().wait_for("/ # ", SHELL_LIMIT).unwrap();
    ferry
}

/// Types a command and waits for what only the guest can have computed.
fn ask(ferry: &mut Ferry, command: &str, answer: &str) {
    let mark = ferry.serial().mark();
    ferry.type_in(&format!("{command}\n")).unwrap();
    ferry
        .serial()
        .wait_after(mark, answer, SHELL_LIMIT)
        .unwrap();
}

/// To the shell, through a sum and a list of CPUs, and shut down from inside.
fn boots_to_its_shell(kernel: &str, cpus: u32) {
    let mut ferry = linux(kernel, cpus);
    ask(
        &mut ferry,
        "echo $((6*7)) is the answer",
        "\n42 is the answer",
    );
    ask(
        &mut ferry,
        "echo cpus: $(nproc)",
        &format!("\ncpus: {cpus}"),
    );
    ferry.type_in("reboot -f\n").unwrap();
    let ended = ferry.wait(SHELL_LIMIT).unwrap();
    assert!(ended.status.success(), "{ended:?}");
}

#[test]
fn bzimage_6_1_boots_to_its_shell_and_shuts_down() {
    boots_to_its_shell("6.1/vmlinuz", 1);
}

#[test]
fn bzimage_6_12_boots_to_its_shell_and_shuts_down() {
    boots_to_its_shell("6.12/vmlinuz", 1);
}

#[test]
fn vmlinux_6_1_boots_to_its_shell_and_shuts_down() {
    boots_to_its_shell("6.1/vmlinux", 1);
}

#[test]
fn vmlinux_6_12_boots_to_its_shell_and_shuts_down() {
    boots_to_its_shell("6.12/vmlinux", 1);
}
