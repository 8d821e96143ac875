//! The virtio devices of `ferry run` with the drivers of stock Debian kernels. Runs inside the lab as root, because it
//! creates tap devices and mounts file systems.

use std::fs::{self, File};
use std::io::Read;
use std::net::TcpStream;
use std::os::unix::net::UnixListener;
use std::path::PathBuf;
use std::process::Command;
use std::thread;
use std::time::{Duration, Instant};

use ferry_tests::guest_memory::{GuestMemory, PAGE};
use ferry_tests::host_net::{HostTap, connect, echoes, host, pattern};
use ferry_tests::linux_disk::{Images, machine};
use ferry_tests::linux_shell::{LinuxShell, SHELL_LIMIT};

const MIB: u64 = 1 << 20;
/// Number of bytes that are sent to a guest and echoed.
const ECHOED: usize = 64 << 20;
/// Time limit for sending [`ECHOED`] bytes both ways through two emulated kernels.
const ECHO_LIMIT: Duration = Duration::from_secs(60);

/// Mount point of a small file system on the host, which fills up soon.
struct SmallFileSystem(PathBuf);

impl SmallFileSystem {
    fn new(place: PathBuf, bytes: u64) -> Self {
        fs::create_dir(&place).unwrap();
        host(&format!(
            "mount -t tmpfs -o size={bytes} small {}",
            place.display()
        ));
        Self(place)
    }
}

impl Drop for SmallFileSystem {
    fn drop(&mut self) {
        let _gone = Command::new("umount").arg("-l").arg(&self.0).output();
    }
}

/// Asserts that the counters of the device agree with the statistics of the guest, which count requests and sectors of
/// 512 bytes (Linux Documentation/block/stat.rst).
fn the_disk_was_counted_as_the_guest_did(guest: &mut LinuxShell) {
    guest.ask(
        "dd if=/dev/vdb of=/dev/null bs=1M skip=16 count=4; echo looked: $?",
        "\nlooked: 0",
    );
    let stat = guest.numbers("cat /sys/block/vdb/stat");
    let counted = ["read_ops", "read_bytes", "write_ops", "write_bytes"]
        .map(|name| guest.counter("_disk1", name));
    assert_eq!(
        counted,
        [stat[0], stat[2] * 512, stat[4], stat[6] * 512],
        "{stat:?}"
    );
    assert!(counted[1] >= 4 * MIB && counted[3] == MIB, "{counted:?}");
    let metrics = guest.ferry.ctl(&["metrics"]).unwrap();
    let line = format!(
        "ferry_device_counter_total{{device=\"_disk1\",counter=\"write_bytes\"}} {}\n",
        counted[3]
    );
    assert!(metrics.contains(&line), "{metrics}");
}

fn disks_keep_what_was_written_and_fail_by_request(series: &str) {
    let images = Images::with_root();
    images.sparse("data", 64 * MIB);
    fs::write(images.path("fixed"), [b'f'; 4096]).unwrap();
    images.sparse("short", 64 * MIB);
    let small = SmallFileSystem::new(images.path("small"), 4 * MIB);
    images.sparse("small/disk", 64 * MIB);
    let options: Vec<String> = ["root", "data", "short", "small/disk"]
        .iter()
        .map(|name| images.option(name))
        .chain([format!("{},readonly=on", images.option("fixed"))])
        .flat_map(|disk| ["--disk".to_owned(), disk])
        .chain(["--rng".to_owned()])
        .collect();
    let options: Vec<&str> = options.iter().map(String::as_str).collect();
    let mut guest = LinuxShell::boot(&machine(series, 192, 1), &options);

    guest.sees_its_cpus_and_memory();
    guest.ask("mount | grep ' / '", "/dev/vda on / type ext4");
    guest.ask(
        "yes ferry was here | head -c 1048576 > /witness; echo made: $?",
        "\nmade: 0",
    );
    guest.ask("cp /witness /dev/vdb; sync; echo copied: $?", "\ncopied: 0");

    the_disk_was_counted_as_the_guest_did(&mut guest);

    guest.ask("head -c 4 /dev/vde; echo; cat /sys/block/vde/ro", "\n1");
    guest.ask("echo x | dd of=/dev/vde; echo refused: $?", "\nrefused: 1");

    guest.ask(
        "cat /sys/class/misc/hw_random/rng_current; head -c 64 /dev/hwrng | wc -c",
        "\n64",
    );

    // I/O errors: an image that was truncated, and a host file system that is full.
    File::options()
        .write(true)
        .open(images.path("short"))
        .and_then(|file| file.set_len(8 * MIB))
        .unwrap();
    guest.ask("dd if=/dev/vdc bs=1M count=4 | wc -c", "\n4194304");
    guest.ask(
        "dd if=/dev/vdc of=/dev/null bs=1M skip=32 count=1; echo short: $?",
        "\nshort: 1",
    );
    guest.ask(
        "dd if=/dev/zero of=/dev/vdd bs=1M count=16 conv=fsync; echo full: $?",
        "\nfull: 1",
    );
    let info = guest.ferry.ctl_json(&["info"]).unwrap();
    assert_eq!(info["state"], "Running", "{info}");
    guest.ask("cmp /witness /witness; echo alive: $?", "\nalive: 0");

    guest.switches_itself_off("poweroff");
    drop(small);
    images.root_is_whole();
    let witness = images.of_root("/witness");
    assert_eq!(witness.len(), 1 << 20);
    assert!(witness.starts_with("ferry was here\nferry was here\n"));
    let mut copied = vec![0; 1 << 20];
    let mut data = File::open(images.path("data")).unwrap();
    data.read_exact(&mut copied).unwrap();
    assert!(copied == witness.as_bytes());
    assert_eq!(fs::read(images.path("fixed")).unwrap(), [b'f'; 4096]);
}

#[test]
fn disks_of_6_1_keep_what_was_written_and_fail_by_request() {
    disks_keep_what_was_written_and_fail_by_request("6.1");
}

#[test]
fn disks_of_6_12_keep_what_was_written_and_fail_by_request() {
    disks_keep_what_was_written_and_fail_by_request("6.12");
}

/// Asserts that the counters of the device agree with those of the tap. A packet can pass between two readings.
fn the_interface_was_counted_as_its_tap_did(guest: &LinuxShell, tap: &HostTap) {
    for (of_device, of_tap, least) in [
        ("rx_frames", "tx_packets", 6),
        ("tx_frames", "rx_packets", 6),
        ("rx_bytes", "tx_bytes", ECHOED as u64),
        ("tx_bytes", "rx_bytes", ECHOED as u64),
    ] {
        let before = guest.counter("_net0", of_device);
        let counted = tap.counted(of_tap);
        let after = guest.counter("_net0", of_device);
        assert!(
            before <= counted && counted <= after && least < counted,
            "{of_device}: {before}, then {of_tap} {counted}, then {after}"
        );
    }
}

fn the_guest_is_reached_by_tap_and_vsock(series: &str) {
    let images = Images::with_root();
    let tap = HostTap::with_address("ferry0", "10.7.0.1/24");
    let socket = images.path("vsock");
    let (root, vsock) = (
        images.option("root"),
        format!("socket={},cid=7", socket.display()),
    );
    let net = "tap=ferry0,mac=52:54:00:12:34:56";
    let options = ["--disk", &root, "--net", net, "--vsock", &vsock];
    let mut guest = LinuxShell::boot(&machine(series, 192, 1), &options);

    guest.ask("cat /sys/class/net/eth0/address", "\n52:54:00:12:34:56");
    guest.ask(
        "ip addr add 10.7.0.2/24 dev eth0; ip link set eth0 up; ping -c 3 10.7.0.1",
        "3 packets received",
    );
    host("ping -c 3 10.7.0.2");
    let bytes = pattern(ECHOED);
    guest.ask("nc -ll -p 9000 -e cat & sleep 1; echo serves", "\nserves");
    let tcp = TcpStream::connect("10.7.0.2:9000").unwrap();
    tcp.set_read_timeout(Some(ECHO_LIMIT)).unwrap();
    let began = Instant::now();
    echoes(tcp.try_clone().unwrap(), tcp, &bytes);
    println!("64 MiB over TCP and back: {:?}", began.elapsed());
    the_interface_was_counted_as_its_tap_did(&guest, &tap);

    guest.ask("vsock-echo listen 1234 &", "vsock-echo: listening");
    let mark = guest.ferry.serial().mark();
    let stream = connect(&socket, 1234);
    stream.set_read_timeout(Some(ECHO_LIMIT)).unwrap();
    let began = Instant::now();
    echoes(
        stream.try_clone().unwrap(),
        stream.try_clone().unwrap(),
        &bytes,
    );
    println!("64 MiB over vsock and back: {:?}", began.elapsed());
    stream.shutdown(std::net::Shutdown::Write).unwrap();
    let serial = guest.ferry.serial();
    serial
        .wait_after(mark, "vsock-echo: 67108864 bytes", SHELL_LIMIT)
        .unwrap();

    let listener = UnixListener::bind(images.path("vsock_77")).unwrap();
    guest.ask(
        "vsock-echo connect 77 & sleep 1; echo connects",
        "\nconnects",
    );
    let (stream, _) = listener.accept().unwrap();
    echoes(stream.try_clone().unwrap(), stream, &bytes[..65536]);

    guest.switches_itself_off("poweroff");
    assert!(!socket.exists());
    images.root_is_whole();
}

#[test]
fn a_6_1_guest_is_reached_by_tap_and_vsock() {
    the_guest_is_reached_by_tap_and_vsock("6.1");
}

#[test]
fn a_6_12_guest_is_reached_by_tap_and_vsock() {
    the_guest_is_reached_by_tap_and_vsock("6.12");
}

/// 16 bytes that every page of the 150 MiB file `/tmp/fill` contains, and no other page.
const LINE: &[u8] = b"ferry was here!\n";
const FILL: &str = "yes 'ferry was here!' | head -c 1048576 > /tmp/line; \
                    for i in $(seq 150); do cat /tmp/line; done > /tmp/fill; echo filled: $?";
const FILLED_MIB: u64 = 150;
const EMPTY: &str = "rm /tmp/fill /tmp/line; echo empty: $?";
const BALLOON_PAGES: u64 = 192 * MIB / PAGE;

fn resident_mib(guest: &LinuxShell) -> u64 {
    guest.ferry.resident().unwrap().shared_kib / 1024
}

/// Waits until at least 100 MiB less than `full` are resident.
fn shrinks_from(full: u64, guest: &LinuxShell) {
    let deadline = Instant::now() + SHELL_LIMIT;
    while resident_mib(guest) + 100 > full {
        let now = resident_mib(guest);
        assert!(Instant::now() < deadline, "{full} MiB became {now}");
        thread::sleep(Duration::from_millis(100));
    }
    println!("{full} MiB became {}", resident_mib(guest));
}

/// Sets the target size of the balloon in pages, and waits until the guest reports that size.
fn resize(guest: &LinuxShell, pages: u64) {
    let balloon = (pages * PAGE).to_string();
    guest.ferry.ctl(&["resize", "--balloon", &balloon]).unwrap();
    let deadline = Instant::now() + SHELL_LIMIT;
    let left = || guest.ferry.ctl_json(&["info"]).unwrap()["memory_actual_size"].as_u64();
    while left() != Some(512 * MIB - pages * PAGE) {
        assert!(Instant::now() < deadline, "{:?} are left", left());
        thread::sleep(Duration::from_millis(100));
    }
}

fn a_balloon_gives_memory_back(series: &str) {
    let images = Images::with_root();
    let root = images.option("root");
    let balloon = "size=192M,deflate_on_oom=on,free_page_reporting=on";
    // The guest does not zero pages that it gives to the balloon. If they are zero afterwards, the host discarded them.
    let mut machine = machine(series, 512, 1);
    machine.cmdline += " init_on_alloc=0";
    let mut guest = LinuxShell::boot(&machine, &["--disk", &root, "--balloon", balloon]);
    guest.counts("_balloon0", "inflated_pages", BALLOON_PAGES);
    guest.ask(
        "mount -o remount,size=90% /tmp; echo grown: $?",
        "\ngrown: 0",
    );

    // Free page reporting: the guest reports free pages, and the host discards them without a balloon.
    guest.ask(FILL, "\nfilled: 0");
    let full = resident_mib(&guest);
    let [inflated, reported] =
        ["inflated_pages", "reported_pages"].map(|name| guest.counter("_balloon0", name));
    guest.ask(EMPTY, "\nempty: 0");
    shrinks_from(full, &guest);
    assert_eq!(guest.counter("_balloon0", "inflated_pages"), inflated);
    guest.counts("_balloon0", "reported_pages", reported + 100 * MIB / PAGE);

    // After the driver is unbound, the guest has all of its memory, and fills it.
    guest.ask("rmmod virtio_balloon; echo gone: $?", "\ngone: 0");
    guest.ask(FILL, "\nfilled: 0");
    let full = resident_mib(&guest);
    assert!(full >= FILLED_MIB, "{full} MiB are resident");
    guest.ask(EMPTY, "\nempty: 0");
    let memory = GuestMemory::of(guest.ferry.pid()).unwrap();
    let stale = memory.pages_with(LINE).unwrap();
    assert!(
        stale.len() as u64 >= FILLED_MIB * MIB / PAGE,
        "{} pages have what was written",
        stale.len()
    );
    let inflated = guest.counter("_balloon0", "inflated_pages");
    guest.ask(
        "insmod /modules/$(uname -r)/virtio_balloon.ko; echo back: $?",
        "\nback: 0",
    );
    guest.counts("_balloon0", "inflated_pages", inflated + BALLOON_PAGES);
    shrinks_from(full, &guest);
    let gone = memory.absent(&stale).unwrap();
    assert!(gone.len() as u64 >= 100 * MIB / PAGE, "{}", gone.len());

    // Pages that return from the balloon have lost their contents, and the guest can use them.
    let deflated = guest.counter("_balloon0", "deflated_pages");
    for pages in [BALLOON_PAGES / 3, 0] {
        resize(&guest, pages);
        let least = deflated + BALLOON_PAGES - pages;
        guest.counts("_balloon0", "deflated_pages", least);
    }
    let back = memory.pages_with(LINE).unwrap();
    assert_eq!(back.intersection(&gone).next(), None);
    guest.ask(FILL, "\nfilled: 0");
    assert_eq!(guest.counter("_balloon0", "errors"), 0);
    guest.switches_itself_off("poweroff");
}

#[test]
fn a_balloon_of_6_1_gives_memory_back() {
    a_balloon_gives_memory_back("6.1");
}

#[test]
fn a_balloon_of_6_12_gives_memory_back() {
    a_balloon_gives_memory_back("6.12");
}
