//! A guest that attacks the rings and registers of every virtio device: each refuses it, and all others work on. As
//! root, or as somebody who may make namespaces: the guest's network is one of its own.
//!
//! What is expected is written here a second time, so that an attack that is not made is a failure, too.

use std::collections::BTreeMap;
use std::fs;
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::thread;
use std::time::{Duration, Instant};

use ferry_tests::dirtier::{LIMIT, assert_ends};
use ferry_tests::ferry::Ferry;
use ferry_tests::machine::Machine;
use ferry_tests::paths;
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};

/// Some 750 attacks, after each of which every device works; 15 s on an idle native host.
const ATTACK_LIMIT: Duration = Duration::from_secs(280);
/// What the monitor may need beyond guest RAM with six devices, the largest packets and lists included.
const MONITOR_MOST_KIB: u64 = 16 * 1024;

/// Devices, in the order in which they are found, and their queues by number.
const DEVICES: [(&str, &[&str]); 6] = [
    ("block", &["requests"]),
    ("net", &["receive", "transmit"]),
    ("rng", &["requests"]),
    ("vsock", &["receive", "transmit", "events"]),
    ("balloon", &["inflate", "deflate", "reporting"]),
    ("console", &["receive", "transmit"]),
];
/// The threads of the devices.
const WORKERS: [&str; 6] = [
    "_balloon0",
    "_console0",
    "_disk0",
    "_net0",
    "_rng0",
    "_vsock0",
];

/// Attacks on every queue, all of which need a reset.
const EVERY_QUEUE: [&str; 30] = [
    "chain-next-is-itself",
    "chain-cycle-of-three",
    "chain-next-out-of-range",
    "chain-next-is-the-largest",
    "head-out-of-range",
    "head-is-the-largest",
    "available-index-too-far",
    "available-index-backwards",
    "length-is-the-largest",
    "length-is-none",
    "address-behind-memory",
    "address-across-the-end",
    "address-in-the-hole",
    "address-of-registers",
    "address-wraps",
    "address-of-the-last-page",
    "address-above-physical",
    "readable-behind-writable",
    "table-in-a-table",
    "table-of-odd-length",
    "table-of-no-length",
    "table-of-65536",
    "table-behind-memory",
    "table-across-the-end",
    "table-wraps",
    "table-of-registers",
    "table-cycle",
    "table-next-out-of-range",
    "chain-longer-than-any-queue",
    "length-sum-above-4-gib",
];
/// On every queue but that for events of sockets, which are looked at only when there is one.
const WRONG_DIRECTION: &str = "wrong-direction";

/// Attacks on the first queue of each device while it is set up, which need a reset.
const FIRST_QUEUE: [&str; 16] = [
    "table-ring-behind-memory",
    "table-ring-across-the-end",
    "table-ring-unaligned",
    "table-ring-wraps",
    "table-ring-in-registers",
    "available-ring-behind-memory",
    "available-ring-across-the-end",
    "available-ring-unaligned",
    "available-ring-wraps",
    "available-ring-in-registers",
    "used-ring-behind-memory",
    "used-ring-across-the-end",
    "used-ring-unaligned",
    "used-ring-wraps",
    "used-ring-in-registers",
    "ready-without-addresses",
];
/// Attacks on the first queue of each device, of which nothing comes.
const FIRST_QUEUE_IGNORED: [&str; 5] = [
    "size-is-none",
    "size-is-no-power-of-two",
    "size-above-the-most",
    "size-above-16-bits",
    "ready-before-the-features",
];

/// Attacks on the registers of each device, of which nothing comes.
const DEVICE_IGNORED: [&str; 27] = [
    "features-never-offered",
    "features-without-version-1",
    "features-above-64-bits",
    "driver-ok-without-features-ok",
    "features-ok-without-driver",
    "status-of-unknown-bits",
    "notified-before-driver-ok",
    "status-written-backwards",
    "status-needs-reset-written",
    "status-written-again",
    "reset-again-and-again",
    "live-queue-size",
    "live-queue-addresses",
    "live-queue-ready-again",
    "live-features",
    "live-no-features",
    "registers-read-in-odd-widths",
    "registers-written-in-odd-widths",
    "registers-that-are-not",
    "registers-to-read-written",
    "registers-to-write-read",
    "queue-that-is-not",
    "notified-queue-that-is-not",
    "interrupt-acknowledged-that-is-not",
    "config-written",
    "config-beyond-its-end",
    "accesses-across-the-page",
];
/// Attacks on each device at work: what comes of them.
const DEVICE_OTHER: [(&str, &str); 4] = [
    ("event-index-of-nonsense", "served"),
    ("queue-taken-back-under-load", "quiet"),
    ("reset-under-load", "quiet"),
    ("rings-rewritten-under-load", "survived"),
];

/// Attacks that only one kind of device knows: where, what comes of them, which.
const PARTICULAR: [(&str, &str, &[&str]); 18] = [
    (
        "device=block",
        "io-error",
        &[
            "read-behind-the-end",
            "read-across-the-end",
            "read-at-the-largest",
            "read-whose-bytes-wrap",
            "read-of-half-a-sector",
            "read-of-nothing",
            "read-of-a-megabyte-too-much",
            "write-behind-the-end",
            "write-across-the-end",
            "write-at-the-largest",
            "write-of-half-a-sector",
            "discard-behind-the-end",
            "discard-that-wraps",
            "discard-of-the-most",
            "discard-good-then-bad",
            "discard-of-too-many",
            "discard-of-half-a-range",
            "discard-of-nothing",
            "zeroes-behind-the-end",
            "zeroes-good-then-bad",
            "identification-too-short",
        ],
    ),
    (
        "device=block",
        "unsupported",
        &[
            "type-unknown",
            "discard-of-unknown-flags",
            "zeroes-of-unknown-flags",
        ],
    ),
    (
        "device=block",
        "needs-reset",
        &["header-too-short", "status-alone"],
    ),
    ("device=block", "served", &["header-in-pieces"]),
    (
        "device=net queue=transmit",
        "needs-reset",
        &["net-header-too-short"],
    ),
    ("device=net queue=transmit", "dropped", &NET_DROPPED),
    (
        "device=net queue=receive",
        "dropped",
        &["receive-buffer-too-small"],
    ),
    (
        "device=vsock queue=transmit",
        "needs-reset",
        &[
            "packet-header-too-short",
            "packet-shorter-than-it-says",
            "packet-of-4-gib-as-it-says",
        ],
    ),
    (
        "device=vsock queue=transmit",
        "connection-reset",
        &[
            "operation-none",
            "operation-unknown",
            "type-of-socket-unknown",
            "data-without-connection",
            "port-the-largest",
        ],
    ),
    (
        "device=vsock queue=transmit",
        "dropped",
        &[
            "packet-of-another-guest",
            "packet-of-the-host",
            "packet-to-nobody",
            "reset-of-nothing",
        ],
    ),
    (
        "device=vsock queue=transmit",
        "served",
        &["flood-without-room"],
    ),
    (
        "device=balloon queue=inflate",
        "needs-reset",
        &[
            "page-behind-memory",
            "page-of-registers",
            "page-the-largest",
            "pages-good-then-bad",
            "page-number-in-half",
            "pages-too-many",
            "pages-of-a-megabyte",
        ],
    ),
    (
        "device=balloon queue=inflate",
        "served",
        &["page-again-and-again"],
    ),
    (
        "device=balloon queue=deflate",
        "served",
        &["taken-back-that-is-not"],
    ),
    (
        "device=balloon queue=reporting",
        "served",
        &["report-of-a-part-of-a-page"],
    ),
    ("device=rng", "served", &["table-without-the-feature"]),
    (
        "device=rng",
        "served",
        &["entropy-of-a-megabyte", "entropy-of-all-memory"],
    ),
    (
        "device=console queue=transmit",
        "served",
        &["output-of-a-megabyte"],
    ),
];
/// Packets that are not sent, as is counted.
const NET_DROPPED: [&str; 8] = [
    "net-header-alone",
    "frame-too-short",
    "frame-too-long",
    "frame-of-a-megabyte",
    "segmentation-unknown",
    "segments-of-no-size",
    "checksum-outside",
    "net-header-of-ones",
];

/// Attack and target, with what comes of it.
type Outcomes = BTreeMap<String, String>;

/// The other devices work, and the attacked one does after a reset.
fn lived_on(outcome: &str) -> String {
    format!("outcome={outcome} others={} again=yes", DEVICES.len() - 1)
}

fn expected() -> Outcomes {
    let mut all = Outcomes::new();
    let mut expect = |attack: &str, target: &str, outcome: &str| {
        let key = format!("attack {attack} {target}");
        let before = all.insert(key, lived_on(outcome));
        assert_eq!(before, None, "{attack} {target} is expected twice");
    };
    for (device, queues) in DEVICES {
        let target = |queue: &str| format!("device={device} queue={queue}");
        for queue in queues {
            for attack in EVERY_QUEUE {
                expect(attack, &target(queue), "needs-reset");
            }
            if *queue != "events" {
                expect(WRONG_DIRECTION, &target(queue), "needs-reset");
            }
        }
        for attack in FIRST_QUEUE {
            expect(attack, &target(queues[0]), "needs-reset");
        }
        for attack in FIRST_QUEUE_IGNORED {
            expect(attack, &target(queues[0]), "ignored");
        }
        for attack in DEVICE_IGNORED {
            expect(attack, &format!("device={device}"), "ignored");
        }
        for (attack, outcome) in DEVICE_OTHER {
            expect(attack, &format!("device={device}"), outcome);
        }
    }
    for (target, outcome, attacks) in PARTICULAR {
        for attack in attacks {
            expect(attack, target, outcome);
        }
    }
    all
}

/// What the guest says of its attacks.
fn reported(serial: &str) -> Outcomes {
    let mut all = Outcomes::new();
    for line in serial.lines().filter(|line| line.starts_with("attack ")) {
        let (attack, outcome) = line
            .split_once(" outcome=")
            .unwrap_or_else(|| panic!("an attack without an outcome: {line}"));
        let before = all.insert(attack.to_owned(), format!("outcome={outcome}"));
        assert_eq!(before, None, "twice: {line}");
    }
    all
}

fn assert_same(found: &Outcomes, expected: &Outcomes) {
    let (mut wrong, mut missing) = (Vec::new(), Vec::new());
    for (attack, outcome) in found {
        match expected.get(attack) {
            Some(known) if known == outcome => {}
            Some(known) => wrong.push(format!("{attack}: {outcome}, expected {known}")),
            None => wrong.push(format!("{attack}: is not expected")),
        }
    }
    for attack in expected
        .keys()
        .filter(|attack| !found.contains_key(*attack))
    {
        missing.push(format!("{attack}: was not made"));
    }
    let count = wrong.len() + missing.len();
    let all = [wrong, missing].concat().join("\n");
    assert_eq!(count, 0, "wrong or missing:\n{all}");
}

/// What the guest's devices are on the host's side.
struct Host(tempfile::TempDir);

/// A device takes 1024 connections at once.
const CROWD: usize = 1000;
const SECTORS: u64 = 64;
const SECTOR_BYTES: usize = 512;
/// The sectors that the guest's own operations write.
const WRITTEN_SECTORS: std::ops::Range<u64> = 8..16;
/// A network of the guest and an ARP that answers; and no more descriptors than are usual. The tools are those of
/// Debian, or of the lab's busybox.
const NETWORK: &str = "ulimit -Sn 1024 && mount -t sysfs sysfs /sys && ip link set lo up \
    && { ip tuntap add attacked mode tap 2>/dev/null || tunctl -t attacked; } \
    && { echo 1 >/proc/sys/net/ipv6/conf/attacked/disable_ipv6 || true; } 2>/dev/null \
    && ip addr add 10.99.0.1/24 dev attacked && ip link set attacked up";

impl Host {
    /// With a disk whose every 64-bit word is its sector's number.
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

    /// The disk holds what it held, but where the guest wrote what it meant to.
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

    /// Every line that the guest meant to print on the console is there, in order.
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

/// The last line of the guest: `NAME: attacks=N unexpected=N operations=KIND:N,…`.
fn verdict(serial: &str) -> &str {
    let line = serial.lines().find(|line| line.starts_with(VERDICT));
    line.unwrap_or_else(|| panic!("no verdict in {serial}"))
}

const VERDICT: &str = "ring-attacker: attacks=";

/// The number behind `name` in the verdict.
fn number(verdict: &str, name: &str) -> u32 {
    let (_, rest) = verdict.split_once(name).unwrap();
    let digits = rest.split(|c: char| !c.is_ascii_digit()).next();
    digits.unwrap_or_default().parse().unwrap()
}

/// A device that does not work, or that a guest cannot start with, is said in the first line.
fn wait_for_verdict(ferry: &Ferry) {
    let deadline = Instant::now() + ATTACK_LIMIT;
    let step = Duration::from_millis(500);
    while ferry.serial().wait_for(VERDICT, step).is_err() {
        // It answers while it is under attack.
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

/// Names and states of all threads (proc(5)).
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

/// All devices' threads are there, and all of the process's wait: looked at many times in a row, so that none of them
/// goes round and round. A thread that is about to wait gets the time for it.
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

/// What the devices counted of the attacks.
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

/// Nearly as many connections as the device takes, from the host's side. Returned, so that they last.
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

/// Whoever fills a device with connections takes no descriptor away that the monitor needs.
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
    // In the middle of it the machine stands, and goes on.
    ferry.serial().wait_for("attack ", LIMIT).unwrap();
    ferry.ctl(&["pause"]).unwrap();
    assert_all_wait(&ferry);
    ferry.ctl(&["resume"]).unwrap();
    wait_for_verdict(&ferry);
    // All lines before the last are whole.
    assert_same(&reported(&ferry.serial().text()), &expected());

    ferry.ctl(&["ping"]).unwrap();
    assert_eq!(ferry.ctl_json(&["info"]).unwrap()["state"], "Running");
    assert_counted(&ferry);
    assert_answers_in_a_crowd(&ferry, &host);
    // Without the vCPU, which listens to its serial port.
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
