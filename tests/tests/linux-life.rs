//! Life cycle of a stock Debian guest with its root file system on a disk: it boots, reboots, obeys its power button,
//! and migrates with a device of every kind. Its writes persist, and its file system stays consistent. Runs inside the
//! lab as root.

use std::fs;
use std::io::{ErrorKind, Read};
use std::net::TcpStream;
use std::os::fd::AsRawFd;
use std::os::unix::net::{UnixListener, UnixStream};

use ferry_tests::dirtier::PATIENT;
use ferry_tests::endpoint::Endpoint;
use ferry_tests::ferry::{self, Ferry};
use ferry_tests::host_net::{Bridge, Conversation, HostTap, connect, echoes, host, pattern};
use ferry_tests::linux_disk::{Images, machine};
use ferry_tests::linux_shell::{LinuxShell, SHELL_LIMIT};
use ferry_tests::{paths, tap};

/// Shell commands that connect the guest to the network of the host.
const JOIN: &str = "ip addr add 10.7.0.2/24 dev eth0; ip link set eth0 up; ping -c 1 10.7.0.1";

/// Boots, reboots and powers off the guest within one monitor.
fn a_guest_starts_anew_and_obeys_its_power_button(series: &str) {
    let images = Images::with_root();
    let root = images.option("root");
    // The tap device is passed as a descriptor, and serves the guest after every reboot.
    let _tap = HostTap::with_address("ferry0", "10.7.0.1/24");
    let passed = tap::open("ferry0").unwrap();
    let net = format!("fd={}", passed.as_raw_fd());
    let options = ["--disk", &root, "--net", &net];
    let mut guest = LinuxShell::boot(&machine(series, 192, 4), &options);
    drop(passed);
    guest.ask("mount | grep ' / '", "/dev/vda on / type ext4");
    guest.sees_its_cpus_and_memory();
    guest.uses_every_cpu();
    guest.ask(JOIN, "1 packets received");
    // Starts a process that writes until the shutdown, and leaves dirty pages in the page cache.
    guest.ask(
        "echo first > /lives; touch /tmp/before; (while :; do echo again >> /busy; done) & echo noted",
        "\nnoted",
    );
    let pid = guest.ferry.pid();
    let mark = guest.ferry.serial().mark();
    guest.ferry.type_in("reboot\n").unwrap();
    guest.is_ready(mark);
    guest.sees_its_cpus_and_memory();
    guest.uses_every_cpu();
    assert_eq!(guest.ferry.ctl_json(&["ping"]).unwrap()["pid"], pid);
    guest.ask("cat /lives; tail -n 1 /busy", "\nfirst\r\nagain");
    guest.ask("ls /tmp/before", "No such file");
    guest.ask(JOIN, "1 packets received");
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

const BALLOON_KIB: u64 = 64 << 10;
const MEMORY_KIB: &str = "awk '/^MemTotal/ { print $2 }' /proc/meminfo";

/// Returns the device options of one side. Its files are named after the side.
fn options(images: &Images, side: &str, net: &str) -> Vec<String> {
    let named = |what: &str| images.path(&format!("{what}-{side}")).display().to_string();
    [
        ["--disk".to_owned(), images.option("root")],
        ["--disk".to_owned(), images.option("data")],
        ["--net".to_owned(), net.to_owned()],
        [
            "--vsock".to_owned(),
            format!("socket={},cid=7", named("vsock")),
        ],
        ["--balloon".to_owned(), "size=64M".to_owned()],
        ["--console".to_owned(), format!("file:{}", named("console"))],
    ]
    .into_iter()
    .flatten()
    .chain(["--rng".to_owned()])
    .collect()
}

/// Asserts that the peer has closed or reset the connection.
fn is_over(mut stream: UnixStream) {
    let mut byte = [0];
    match stream.read(&mut byte) {
        Ok(0) => {}
        Err(error) if error.kind() == ErrorKind::ConnectionReset => {}
        other => panic!("{other:?}"),
    }
}

/// Asserts that no other monitor can open the disks of a running guest.
fn another_guest_with_its_disk_is_refused(series: &str, images: &Images) {
    let kernel = paths::linux_guest(&format!("{series}/vmlinux")).unwrap();
    let kernel = kernel.to_str().unwrap();
    let data = images.option("data");
    let arguments = ["run", "--kernel", kernel, "--disk", &data];
    let refused = ferry::invoke(&arguments, SHELL_LIMIT).unwrap();
    let why = format!(
        "{}: another process has it open",
        images.path("data").display()
    );
    assert!(refused.stderr.contains(&why), "{refused:?}");
}

/// Tries to migrate to a destination without an entropy device, which must refuse the guest before it stops.
fn a_move_without_the_rng_is_refused(guest: &LinuxShell, images: &Images, net: &str) {
    let without = options(images, "refused", net);
    let without: Vec<&str> = without.iter().map(String::as_str).collect();
    let (rng, without) = without.split_last().unwrap();
    assert_eq!(*rng, "--rng");
    let endpoint = Endpoint::free_tcp().unwrap();
    let _without = Ferry::receive_with(&endpoint, without).unwrap();
    let refused = guest.ferry.send_migration(&endpoint, &PATIENT);
    let refused = refused.unwrap_err().to_string();
    let why = "the guest has _rng0 (an entropy device), the destination has no such device (--rng)";
    assert!(refused.contains(why), "{refused}");
}

fn a_guest_with_every_device_is_carried(series: &str) {
    let images = Images::with_root();
    images.sparse("data", 64 << 20);
    let _bridge = Bridge::new("ferrybr", "10.7.0.1/24", &["ferry0", "ferry1"]);
    let own = options(&images, "here", "tap=ferry0,mac=52:54:00:12:34:56");
    let own: Vec<&str> = own.iter().map(String::as_str).collect();
    let mut guest = LinuxShell::boot(&machine(series, 256, 2), &own);

    guest.uses_every_cpu();
    guest.counts("_balloon0", "inflated_pages", BALLOON_KIB / 4);
    let ballooned = guest.numbers(MEMORY_KIB)[0];
    guest.ask("echo on this side > /dev/hvc0; echo said: $?", "\nsaid: 0");
    guest.ask(JOIN, "1 packets received");
    guest.ask("nc -ll -p 9000 -e cat & sleep 1; echo serves", "\nserves");
    let tcp = TcpStream::connect("10.7.0.2:9000").unwrap();
    tcp.set_read_timeout(Some(SHELL_LIMIT)).unwrap();
    let conversation = Conversation::over(tcp);
    conversation.goes_on();
    guest.ask("vsock-echo listen 1 &", "vsock-echo: listening");
    let bytes = pattern(1 << 16);
    let old = connect(&images.path("vsock-here"), 1);
    old.set_read_timeout(Some(SHELL_LIMIT)).unwrap();
    echoes(old.try_clone().unwrap(), old.try_clone().unwrap(), &bytes);
    guest.ask("vsock-echo listen 2 &", "vsock-echo: listening");

    guest.ask(
        "(i=0; while :; do i=$((i+1)); echo $i >> /log; sync; done) & log=$!; \
         (while :; do dd if=/dev/urandom of=/dev/vdb bs=64k count=16 conv=fsync 2>/dev/null; done) & data=$!",
        "/ # ",
    );
    another_guest_with_its_disk_is_refused(series, &images);

    // The tap device of the destination is passed as a descriptor.
    let passed = tap::open("ferry1").unwrap();
    let net = format!("fd={}", passed.as_raw_fd());
    let other = options(&images, "there", &net);
    let other: Vec<&str> = other.iter().map(String::as_str).collect();
    a_move_without_the_rng_is_refused(&guest, &images, &net);
    conversation.goes_on();
    let endpoint = Endpoint::free_tcp().unwrap();
    let destination = Ferry::receive_with(&endpoint, &other).unwrap();
    drop(passed);
    guest.ferry.send_migration(&endpoint, &PATIENT).unwrap();
    let mut source = std::mem::replace(&mut guest.ferry, destination);
    let ended = source.wait(SHELL_LIMIT).unwrap();
    assert!(ended.status.success(), "{ended:?}");

    conversation.goes_on();
    conversation.ends();
    guest.ask(
        "kill $log $data; wait $log $data; echo stopped",
        "\nstopped",
    );
    guest.ask(
        "awk '$1 != NR { bad = 1 } END { print \"log:\", bad + 0, (NR > 20) }' /log",
        "\nlog: 0 1",
    );
    guest.ask("ping -c 2 10.7.0.1", "2 packets received");
    host("ping -c 2 10.7.0.2");
    assert!(guest.counter("_net0", "tx_frames") > 6);

    is_over(old);
    let serial = guest.ferry.serial();
    serial
        .wait_for("vsock-echo: Connection reset by peer", SHELL_LIMIT)
        .unwrap();
    // A process in the guest that waited for a connection still does.
    let new = connect(&images.path("vsock-there"), 2);
    new.set_read_timeout(Some(SHELL_LIMIT)).unwrap();
    echoes(new.try_clone().unwrap(), new, &bytes);
    let listener = UnixListener::bind(images.path("vsock-there_77")).unwrap();
    guest.ask(
        "vsock-echo connect 77 & sleep 1; echo connects",
        "\nconnects",
    );
    let (stream, _) = listener.accept().unwrap();
    echoes(stream.try_clone().unwrap(), stream, &bytes);

    guest.ask("head -c 64 /dev/hwrng | wc -c", "\n64");
    guest.ask("echo on the other > /dev/hvc0; echo said: $?", "\nsaid: 0");
    let console = |side| fs::read_to_string(images.path(&format!("console-{side}"))).unwrap();
    assert_eq!(console("here").trim(), "on this side");
    assert_eq!(console("there").trim(), "on the other");

    assert_eq!(guest.numbers(MEMORY_KIB)[0], ballooned);
    assert_eq!(guest.counter("_balloon0", "inflated_pages"), 0);
    guest.ask("rmmod virtio_balloon; echo gone: $?", "\ngone: 0");
    assert_eq!(guest.numbers(MEMORY_KIB)[0], ballooned + BALLOON_KIB);
    assert_eq!(
        guest.counter("_balloon0", "deflated_pages"),
        BALLOON_KIB / 4
    );
    guest.sees_its_cpus_and_memory();

    guest.switches_itself_off("poweroff");
    images.root_is_whole();
    let log = images.of_root("/log");
    let mut lines = log.lines().zip(1..);
    assert!(
        lines.all(|(line, number)| line == number.to_string()),
        "{log}"
    );
}

#[test]
fn a_6_1_guest_with_every_device_is_carried() {
    a_guest_with_every_device_is_carried("6.1");
}

#[test]
fn a_6_12_guest_with_every_device_is_carried() {
    a_guest_with_every_device_is_carried("6.12");
}
