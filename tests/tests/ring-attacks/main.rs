//! A guest attacks the rings and registers of every virtio device. Each device must refuse the attack, and all others
//! must keep working. Needs root or the right to create namespaces, because the network of the guest is a new
//! namespace.
//!
//! `expected` repeats the list of attacks, so that an attack that the guest leaves out is a failure, too.

mod expected;

use std::fs;
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::thread;
use std::time::{Duration, Instant};

use expected::{NET_DROPPED, PARTICULAR, assert_same, expected, reported};
use ferry_tests::dirtier::{LIMIT, assert_ends};
use ferry_tests::ferry::Ferry;
use ferry_tests::machine::Machine;
use ferry_tests::paths;
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};

/// Time limit for about 750 attacks with a check of every device after each. They take 15 s on an idle native host.
const ATTACK_LIMIT: Duration = Duration::from_secs(280);
/// Upper limit for the memory of the monitor beyond guest RAM, with six devices and the largest packets and lists.
const MONITOR_MOST_KIB: u64 = 16 * 1024;

/// Names of the device threads.
const WORKERS: [&str; 6] = [
    "_balloon0",
    "_console0",
    "_disk0",
    "_net0",
    "_rng0",
    "_vsock0",
];

/// Directory with the host side of the devices.
struct Host(tempfile::TempDir);

/// Number of connections to open. The device accepts 1024 at a time.
const CROWD: usize = 1000;
const SECTORS: u64 = 64;
const SECTOR_BYTES: usize = 512;
/// Sectors that the regular operations of the guest write.
const WRITTEN_SECTORS: std::ops::Range<u64> = 8..16;
/// Shell commands that set up a tap device whose host side answers ARP, and the usual limit on descriptors. They work
/// with the tools of Debian and with busybox in the lab.
const NETWORK: &str = "ulimit -Sn 1024 && mount -t sysfs sysfs /sys && ip link set lo up \
    && { ip tuntap add attacked mode tap 2>/dev/null || tunctl -t attacked; } \
    && { echo 1 >/proc/sys/net/ipv6/conf/attacked/disable_ipv6 || true; } 2>/dev/null \
    && ip addr add 10.99.0.1/24 dev attacked && ip link set attacked up";

impl Host {
    /// Makes a disk image in which every 64-bit word is the number of its sector.
    fn new() -> Self {
        let host = Self(tempfile::tempdir().unwrap());
        let image: Vec<u8> = (0..SECTORS)
            .flat_map(|sector| sector.to_le_bytes().repeat(SECTOR_BYTES / 8))
            .collect();
        fs::write(host.path("disk"), image).unwrap();
        host
    }

    fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    fn run(&self) -> Ferry {
        let machine = Machine {
            kernel: paths::guest("ring-attacker.elf").unwrap(),
            initramfs: None,
            cmdline: "hold".to_owned(),
            memory_mib: 64,
            cpus: 1,
        };
        let disk = format!("path={}", self.path("disk").display());
        let vsock = format!("socket={}", self.path("vsock").display());
        let console = format!("file:{}", self.path("console").display());
        let options = [
            ["--disk", &disk],
            ["--net", "tap=attacked"],
            ["--vsock", &vsock],
            ["--balloon", "size=0,free_page_reporting=on"],
            ["--console", &console],
        ];
        let options: Vec<&str> = options.into_iter().flatten().chain(["--rng"]).collect();
        Ferry::run_in_network(&machine, &options, NETWORK).unwrap_or_else(|error| panic!("{error}"))
    }

    /// Asserts that the disk is unchanged except for the sectors that the guest wrote on purpose.
    fn assert_disk_is_whole(&self) {
        let image = fs::read(self.path("disk")).unwrap();
        assert_eq!(image.len() as u64, SECTORS * SECTOR_BYTES as u64);
        for (sector, bytes) in (0..).zip(image.chunks(SECTOR_BYTES)) {
            let words: Vec<u64> = bytes
                .as_chunks()
                .0
                .iter()
                .map(|word| u64::from_le_bytes(*word))
                .collect();
            let first = words[0];
            assert!(
                words.iter().all(|word| *word == first),
                "sector {sector} is of two writers"
            );
            if WRITTEN_SECTORS.contains(&sector) {
                assert_eq!(first >> 32, 0x5249_4e47, "sector {sector}: {first:#x}");
            } else {
                assert_eq!(first, sector, "sector {sector}");
            }
        }
    }

    /// Asserts that the console has every line that the guest printed on purpose, in order.
    fn assert_console_is_whole(&self, lines: u32) {
        let output = fs::read_to_string(self.path("console")).unwrap();
        let printed: Vec<&str> = output.lines().filter(|l| l.starts_with("line ")).collect();
        let meant: Vec<String> = (1..=lines).map(|n| format!("line {n:08}")).collect();
        assert_eq!(printed, meant);
        let enormous = output.lines().filter(|line| line.len() > 1000);
        let lengths: Vec<usize> = enormous.map(str::len).collect();
        assert_eq!(lengths, [(1 << 20) - 1], "the one enormous line");
    }
}

/// Returns the last line of the guest: `NAME: attacks=N unexpected=N operations=KIND:N,…`.
fn verdict(serial: &str) -> &str {
    let line = serial.lines().find(|line| line.starts_with(VERDICT));
    line.unwrap_or_else(|| panic!("no verdict in {serial}"))
}

const VERDICT: &str = "ring-attacker: attacks=";

/// Returns the number after `name` in the verdict.
fn number(verdict: &str, name: &str) -> u32 {
    let (_, rest) = verdict.split_once(name).unwrap();
    let digits = rest.split(|c: char| !c.is_ascii_digit()).next();
    digits.unwrap_or_default().parse().unwrap()
}

/// Waits for the verdict of the guest. Fails if the guest reports that it cannot start or that it panicked.
fn wait_for_verdict(ferry: &Ferry) {
    let deadline = Instant::now() + ATTACK_LIMIT;
    let step = Duration::from_millis(500);
    while ferry.serial().wait_for(VERDICT, step).is_err() {
        // The monitor answers API calls during the attacks.
        ferry
            .ctl(&["ping"])
            .unwrap_or_else(|error| panic!("{error}"));
        let said = ferry.serial().text();
        for trouble in ["cannot start", "PANIC", "EXCEPTION"] {
            assert!(!said.contains(trouble), "{said}");
        }
        assert!(Instant::now() < deadline, "no verdict: {said}");
    }
}

/// Returns the names and states of all threads (proc(5)).
fn threads(pid: u32) -> Vec<(String, String)> {
    let tasks = fs::read_dir(format!("/proc/{pid}/task")).unwrap();
    tasks
        .filter_map(|task| {
            let stat = fs::read_to_string(task.ok()?.path().join("stat")).ok()?;
            let (name, rest) = stat.split_once('(')?.1.rsplit_once(')')?;
            let state = rest.split_whitespace().next()?;
            Some((name.to_owned(), state.to_owned()))
        })
        .collect()
}

/// Asserts that all device threads exist and that all threads of the process sleep. It reads their states many times in
/// a row, so that a busy loop is noticed, and gives threads time to fall asleep.
fn assert_all_wait(ferry: &Ferry) {
    const LOOKS: u32 = 20;
    let deadline = Instant::now() + LIMIT;
    let mut in_a_row = 0;
    while in_a_row < LOOKS {
        let now = threads(ferry.pid());
        for worker in WORKERS {
            let is_there = now.iter().any(|(name, _)| name == worker);
            assert!(is_there, "no thread {worker}: {now:?}");
        }
        let waiting = now.iter().all(|(_, state)| state == "S");
        in_a_row = if waiting { in_a_row + 1 } else { 0 };
        assert!(
            Instant::now() < deadline,
            "some thread never waits: {now:?}"
        );
        thread::sleep(Duration::from_millis(5));
    }
}

/// Asserts the device counters after the attacks.
fn assert_counted(ferry: &Ferry) {
    let counters = ferry.ctl_json(&["counters"]).unwrap();
    let counted = |device: &str, name: &str| {
        let value = counters[device][name].as_u64();
        value.unwrap_or_else(|| panic!("no {device} {name} in {counters}"))
    };
    let (_, _, failed) = PARTICULAR[0];
    assert_eq!(counted("_disk0", "errors"), failed.len() as u64);
    let unsent = counted("_net0", "tx_dropped");
    assert_eq!(unsent, NET_DROPPED.len() as u64);
    assert!(counted("_net0", "rx_dropped") >= 1, "{counters}");
    assert_eq!(counted("_balloon0", "errors"), 0);
    assert_eq!(counted("_console0", "lost_bytes"), 0);
    assert_eq!(counted("_vsock0", "connections"), 0);
}

/// Opens nearly as many connections from the host as the device accepts. Returns them, so that they stay open.
fn crowd(host: &Host) -> Vec<UnixStream> {
    let limit = getrlimit(Resource::Nofile);
    let raised = Rlimit {
        current: limit.maximum,
        ..limit
    };
    setrlimit(Resource::Nofile, raised).unwrap();
    let connect = |_| UnixStream::connect(host.path("vsock")).unwrap();
    (0..CROWD).map(connect).collect()
}

fn descriptors(pid: u32) -> usize {
    fs::read_dir(format!("/proc/{pid}/fd")).unwrap().count()
}

/// Connections of one device must not use up the descriptors that the monitor needs.
fn assert_answers_in_a_crowd(ferry: &Ferry, host: &Host) {
    let crowd = crowd(host);
    let deadline = Instant::now() + LIMIT;
    while descriptors(ferry.pid()) < CROWD {
        assert!(Instant::now() < deadline, "{}", descriptors(ferry.pid()));
        ferry
            .ctl(&["ping"])
            .unwrap_or_else(|error| panic!("{error}"));
    }
    ferry
        .ctl(&["info"])
        .unwrap_or_else(|error| panic!("{error}"));
    drop(crowd);
}

#[test]
fn every_device_refuses_what_it_must_and_the_others_work_on() {
    let host = Host::new();
    let mut ferry = host.run();
    // The guest is paused and resumed in the middle of the attacks.
    ferry.serial().wait_for("attack ", LIMIT).unwrap();
    ferry.ctl(&["pause"]).unwrap();
    assert_all_wait(&ferry);
    ferry.ctl(&["resume"]).unwrap();
    wait_for_verdict(&ferry);
    // All lines before the last one are complete.
    assert_same(&reported(&ferry.serial().text()), &expected());

    ferry.ctl(&["ping"]).unwrap();
    assert_eq!(ferry.ctl_json(&["info"]).unwrap()["state"], "Running");
    assert_counted(&ferry);
    assert_answers_in_a_crowd(&ferry, &host);
    // The vCPU thread must not run, because the guest polls its serial port.
    ferry.ctl(&["pause"]).unwrap();
    assert_all_wait(&ferry);
    let resident = ferry.resident().unwrap();
    assert!(
        resident.beyond_guest_kib() <= MONITOR_MOST_KIB,
        "{resident:?}"
    );
    ferry.ctl(&["resume"]).unwrap();
    assert!(ferry.is_running());

    ferry.type_in("q").unwrap();
    let serial = assert_ends(&mut ferry);
    let verdict = verdict(&serial);
    assert_eq!(number(verdict, "attacks=") as usize, expected().len());
    assert_eq!(number(verdict, "unexpected="), 0, "{verdict}");
    assert!(!verdict.contains("ended early"), "{verdict}");
    let said = ferry.messages().text();
    assert!(!said.contains("panicked"), "{said}");
    host.assert_disk_is_whole();
    host.assert_console_is_whole(number(verdict, "console:"));
    assert!(!host.path("vsock").exists(), "the socket is left behind");
}
