//! The life of a stock Debian guest on its disk: it boots, switches itself off, starts anew, and obeys its power button;
//! what it wrote is there, and its file system is whole. Runs inside the lab.

use ferry_tests::linux_disk::{Images, machine};
use ferry_tests::linux_shell::LinuxShell;

fn boot(series: &str, cpus: u32, images: &Images) -> LinuxShell {
    let root = images.option("root");
    let mut guest = LinuxShell::boot(&machine(series, 192, cpus), &["--disk", &root]);
    guest.ask("mount | grep ' / '", "/dev/vda on / type ext4");
    guest.sees_its_cpus_and_memory();
    guest.uses_every_cpu();
    guest
}

fn a_guest_switches_itself_off(series: &str, cpus: u32) {
    let images = Images::with_root();
    let mut guest = boot(series, cpus, &images);
    // A writer that does not stop by itself, in a page cache that was not written back.
    guest.ask(
        "(while :; do echo again >> /busy; done) & echo here > /said; echo said: $?",
        "\nsaid: 0",
    );
    guest.switches_itself_off("poweroff");
    images.root_is_whole();
    assert_eq!(images.of_root("/said"), "here\n");
    let busy = images.of_root("/busy");
    assert!(busy.starts_with("again\n"), "{busy}");
}

#[test]
fn a_6_1_guest_with_four_vcpus_switches_itself_off() {
    a_guest_switches_itself_off("6.1", 4);
}

#[test]
fn a_6_12_guest_with_four_vcpus_switches_itself_off() {
    a_guest_switches_itself_off("6.12", 4);
}

/// Within one monitor.
fn a_guest_starts_anew_and_obeys_its_power_button(series: &str) {
    let images = Images::with_root();
    let mut guest = boot(series, 2, &images);
    guest.ask(
        "echo first > /lives; touch /tmp/before; echo noted",
        "\nnoted",
    );
    let pid = guest.ferry.pid();
    let mark = guest.ferry.serial().mark();
    guest.ferry.type_in("reboot\n").unwrap();
    guest.is_ready(mark);
    guest.sees_its_cpus_and_memory();
    guest.uses_every_cpu();
    assert!(guest.ferry.is_running());
    assert_eq!(guest.ferry.ctl_json(&["ping"]).unwrap()["pid"], pid);
    guest.ask("cat /lives", "\nfirst");
    guest.ask("ls /tmp/before", "No such file");
    guest.ask("dmesg | grep -c 'EXT4-fs.*recovery'", "\n0");
    guest.ask("echo second >> /lives; echo noted", "\nnoted");
    guest.obeys_its_power_button("poweroff");
    images.root_is_whole();
    assert_eq!(images.of_root("/lives"), "first\nsecond\n");
}

#[test]
fn a_6_1_guest_starts_anew_and_obeys_its_power_button() {
    a_guest_starts_anew_and_obeys_its_power_button("6.1");
}

#[test]
fn a_6_12_guest_starts_anew_and_obeys_its_power_button() {
    a_guest_starts_anew_and_obeys_its_power_button("6.12");
}
