//! The virtio devices of `ferry run`, driven by stock Debian kernels. Runs inside the lab, as root: it makes taps
//! and mounts file systems there.

use std::fs::{self, File};
use std::io::{BufRead, BufReader, Read, Write};
use std::net::TcpStream;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::thread;
use std::time::{Duration, Instant};

use ferry_tests::dirtier::PATIENT;
use ferry_tests::endpoint::Endpoint;
use ferry_tests::ferry::{self, Ferry};
use ferry_tests::linux_guest::DISK_CMDLINE;
use ferry_tests::linux_shell::{LinuxShell, SHELL_LIMIT};
use ferry_tests::machine::Machine;
use ferry_tests::{paths, process};

const MIB: u64 = 1 << 20;
/// What is sent to a guest and comes back.
const ECHOED: usize = 64 << 20;
/// Twice [`ECHOED`] through two emulated kernels.
const ECHO_LIMIT: Duration = Duration::from_secs(60);

/// A folder with the images of a guest.
struct Images(tempfile::TempDir);

impl Images {
    /// With a copy of the guest's root file system.
    fn new() -> Self {
        let images = Self(tempfile::tempdir().unwrap());
        fs::copy(paths::linux_guest("root.img").unwrap(), images.path("root")).unwrap();
        images
    }

    fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    /// A sparse image.
    fn sparse(&self, name: &str, bytes: u64) -> PathBuf {
        let path = self.path(name);
        File::create(&path).unwrap().set_len(bytes).unwrap();
        path
    }

    fn option(&self, name: &str) -> String {
        format!("path={}", self.path(name).display())
    }

    /// The root file system is whole, as the file system's own tool says.
    fn root_is_whole(&self) {
        let mut check = Command::new("e2fsck");
        check.arg("-fn").arg(self.path("root"));
        let checked = process::run(&mut check, SHELL_LIMIT).unwrap();
        assert!(checked.status.success(), "{checked:?}");
    }

    /// A file of the root file system, read without the guest.
    fn of_root(&self, file: &str) -> String {
        let mut read = Command::new("debugfs");
        read.args(["-R", &format!("cat {file}")])
            .arg(self.path("root"));
        process::run(&mut read, SHELL_LIMIT).unwrap().stdout
    }
}

fn machine(series: &str, memory_mib: u32) -> Machine {
    Machine {
        kernel: paths::linux_guest(&format!("{series}/vmlinux")).unwrap(),
        initramfs: Some(paths::linux_guest("guest.cpio").unwrap()),
        cmdline: DISK_CMDLINE.to_owned(),
        memory_mib,
        cpus: 1,
    }
}

/// Runs a command of the lab host, which must succeed.
fn host(command: &str) {
    let mut shell = Command::new("sh");
    let done = process::run(shell.args(["-c", command]), SHELL_LIMIT).unwrap();
    assert!(done.status.success(), "{command}: {done:?}");
}

fn switches_off(mut guest: LinuxShell) {
    let command = "sync; mount -o remount,ro /; poweroff -f";
    guest.ask(command, "reboot: Power down");
    guest.ends();
}

/// Bytes that do not repeat within a transfer.
fn pattern() -> Vec<u8> {
    let mut state = 0x9e37_79b9_7f4a_7c15_u64;
    let mut bytes = Vec::with_capacity(ECHOED);
    while bytes.len() < ECHOED {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        bytes.extend_from_slice(&state.to_le_bytes());
    }
    bytes
}

/// Sends all of `bytes` and reads as much back, at the same time.
fn echoes(mut writer: impl Write + Send + 'static, mut reader: impl Read, bytes: &[u8]) {
    let outgoing = bytes.to_vec();
    let sender = thread::spawn(move || writer.write_all(&outgoing));
    let mut back = vec![0; bytes.len()];
    reader.read_exact(&mut back).unwrap();
    sender.join().unwrap().unwrap();
    let wrong = back.iter().zip(bytes).position(|(one, other)| one != other);
    assert_eq!(wrong, None, "the first byte that came back as another");
}

/// A tap of the lab host, removed at the end.
struct HostTap(&'static str);

impl HostTap {
    fn new(name: &'static str, address: &str) -> Self {
        host(&format!(
            "tunctl -t {name} && ip addr add {address} dev {name} && ip link set {name} up"
        ));
        Self(name)
    }
}

impl Drop for HostTap {
    fn drop(&mut self) {
        // One that is gone already is no matter.
        let _gone = Command::new("tunctl").args(["-d", self.0]).output();
    }
}

/// A file system that is soon full.
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

fn disks_keep_what_was_written_and_fail_by_request(series: &str) {
    let images = Images::new();
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
    let mut guest = LinuxShell::boot(&machine(series, 192), &options);

    guest.ask("mount | grep ' / '", "/dev/vda on / type ext4");
    guest.ask(
        "yes ferry was here | head -c 1048576 > /witness; echo made: $?",
        "\nmade: 0",
    );
    guest.ask("cp /witness /dev/vdb; sync; echo copied: $?", "\ncopied: 0");

    guest.ask("head -c 4 /dev/vde; echo; cat /sys/block/vde/ro", "\n1");
    guest.ask("echo x | dd of=/dev/vde; echo refused: $?", "\nrefused: 1");

    guest.ask(
        "cat /sys/class/misc/hw_random/rng_current; head -c 64 /dev/hwrng | wc -c",
        "\n64",
    );

    // A file that became too short, and a file system that became full.
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

    switches_off(guest);
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

/// Connects to a port of the guest, as Firecracker's and Cloud Hypervisor's users do.
fn connect(socket: &Path, port: u32) -> UnixStream {
    let mut stream = UnixStream::connect(socket).unwrap();
    writeln!(stream, "CONNECT {port}").unwrap();
    let mut answer = String::new();
    // The answer ends before anything that the guest sends.
    BufReader::with_capacity(1, stream.try_clone().unwrap())
        .read_line(&mut answer)
        .unwrap();
    assert!(answer.starts_with("OK "), "{answer:?}");
    stream
}

fn the_guest_is_reached_by_tap_and_vsock(series: &str) {
    let images = Images::new();
    let _tap = HostTap::new("ferry0", "10.7.0.1/24");
    let socket = images.path("vsock");
    let (root, vsock) = (
        images.option("root"),
        format!("socket={},cid=7", socket.display()),
    );
    let net = "tap=ferry0,mac=52:54:00:12:34:56";
    let options = ["--disk", &root, "--net", net, "--vsock", &vsock];
    let mut guest = LinuxShell::boot(&machine(series, 192), &options);

    guest.ask("cat /sys/class/net/eth0/address", "\n52:54:00:12:34:56");
    guest.ask(
        "ip addr add 10.7.0.2/24 dev eth0; ip link set eth0 up; ping -c 3 10.7.0.1",
        "3 packets received",
    );
    host("ping -c 3 10.7.0.2");
    let bytes = pattern();
    guest.ask("nc -ll -p 9000 -e cat & sleep 1; echo serves", "\nserves");
    let tcp = TcpStream::connect("10.7.0.2:9000").unwrap();
    tcp.set_read_timeout(Some(ECHO_LIMIT)).unwrap();
    let began = Instant::now();
    echoes(tcp.try_clone().unwrap(), tcp, &bytes);
    println!("64 MiB over TCP and back: {:?}", began.elapsed());

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

    switches_off(guest);
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

/// Touches 150 MiB of the guest's memory.
const FILL: &str = "dd if=/dev/zero of=/tmp/fill bs=1M count=150; echo filled: $?";

fn a_balloon_gives_memory_back(series: &str) {
    let images = Images::new();
    let root = images.option("root");
    let options = ["--disk", &root, "--balloon", "size=192M,deflate_on_oom=on"];
    let mut guest = LinuxShell::boot(&machine(series, 384), &options);
    let resident = |guest: &LinuxShell| guest.ferry.resident().unwrap().shared_kib / 1024;
    // Without its driver the guest has all of its memory, and fills it.
    guest.ask(
        "mount -o remount,size=90% /tmp; rmmod virtio_balloon; echo gone: $?",
        "\ngone: 0",
    );
    guest.ask(FILL, "\nfilled: 0");
    let full = resident(&guest);
    assert!(full >= 150, "{full} MiB are resident");
    guest.ask(
        "rm /tmp/fill; insmod /modules/$(uname -r)/virtio_balloon.ko; echo back: $?",
        "\nback: 0",
    );
    let deadline = Instant::now() + SHELL_LIMIT;
    while resident(&guest) + 100 > full {
        assert!(
            Instant::now() < deadline,
            "{full} MiB became {}",
            resident(&guest)
        );
        thread::sleep(Duration::from_millis(100));
    }
    println!("{full} MiB became {}", resident(&guest));
    // The guest can use what comes back.
    guest.ask("rmmod virtio_balloon; echo gone: $?", "\ngone: 0");
    guest.ask(FILL, "\nfilled: 0");
    switches_off(guest);
}

#[test]
fn a_balloon_of_6_1_gives_memory_back() {
    a_balloon_gives_memory_back("6.1");
}

#[test]
fn a_balloon_of_6_12_gives_memory_back() {
    a_balloon_gives_memory_back("6.12");
}

/// Its disks go with it, from one process to the other on one host, and nobody else gets them.
fn a_guest_that_writes_is_carried_with_its_disks(series: &str) {
    let images = Images::new();
    images.sparse("data", 64 * MIB);
    let (root, data) = (images.option("root"), images.option("data"));
    let devices = ["--disk", &root, "--disk", &data, "--rng"];
    let mut guest = LinuxShell::boot(&machine(series, 192), &devices);
    guest.ask(
        "(i=0; while :; do i=$((i+1)); echo $i >> /log; sync; done) & \
         (while :; do dd if=/dev/urandom of=/dev/vdb bs=64k count=16 conv=fsync 2>/dev/null; done) &",
        "/ # ",
    );

    let kernel = paths::linux_guest(&format!("{series}/vmlinux")).unwrap();
    let kernel = kernel.to_str().unwrap();
    let arguments = ["run", "--kernel", kernel, "--disk", &data];
    let refused = ferry::invoke(&arguments, SHELL_LIMIT).unwrap();
    let why = format!(
        "{}: another process has it open",
        images.path("data").display()
    );
    assert!(refused.stderr.contains(&why), "{refused:?}");

    // Without the rng the guest is refused before it stops.
    let endpoint = Endpoint::free_tcp().unwrap();
    let without = Ferry::receive_with(&endpoint, &devices[..4]).unwrap();
    let refused = guest
        .ferry
        .send_migration(&endpoint, &PATIENT)
        .unwrap_err()
        .to_string();
    let why = "the guest has _rng0 (an entropy device), for which nothing was given here";
    assert!(refused.contains(why), "{refused}");
    drop(without);

    let endpoint = Endpoint::free_tcp().unwrap();
    let destination = Ferry::receive_with(&endpoint, &devices).unwrap();
    guest.ask("wc -l < /log; echo counted", "\ncounted");
    guest.ferry.send_migration(&endpoint, &PATIENT).unwrap();
    guest.ferry = destination;
    guest.ask("sleep 2; kill %1 %2; wait; echo stopped", "\nstopped");
    guest.ask(
        "awk '$1 != NR { bad = 1 } END { print \"log:\", bad + 0, (NR > 20) }' /log",
        "\nlog: 0 1",
    );
    guest.ask("head -c 64 /dev/hwrng | wc -c", "\n64");
    switches_off(guest);
    images.root_is_whole();
    let log = images.of_root("/log");
    let right = log
        .lines()
        .zip(1..)
        .all(|(line, number)| line == number.to_string());
    assert!(right, "{log}");
}

#[test]
fn a_6_1_guest_that_writes_is_carried_with_its_disks() {
    a_guest_that_writes_is_carried_with_its_disks("6.1");
}

#[test]
fn a_6_12_guest_that_writes_is_carried_with_its_disks() {
    a_guest_that_writes_is_carried_with_its_disks("6.12");
}
