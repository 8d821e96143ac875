//! Rate limits and huge-page memory of a stock Debian guest. Runs inside the lab as root.

use std::fs;
use std::net::TcpStream;
use std::thread;
use std::time::{Duration, Instant};

use ferry_tests::ferry::Ferry;
use ferry_tests::host_net::{HostTap, echoes, host, pattern};
use ferry_tests::linux_disk::{Images, machine};
use ferry_tests::linux_shell::{LinuxShell, SHELL_LIMIT};
use serde_json::{Value, json};

const MIB: u64 = 1 << 20;
/// Rate limit of the disk: bytes per second, which is also the size of the token bucket.
const DISK_RATE: u64 = 4 * MIB;
/// Rate limit of the network interface in bytes per second for each direction. The token bucket has half that size.
const NET_RATE: u64 = 2 * MIB;
/// Largest packet with segmentation offload: the maximum of the IP length field and an Ethernet header.
const PACKET_MOST: u64 = 65_535 + 14;

/// Returns the shortest time for transferring `bytes`. The bucket is full at the beginning, and the last operation can
/// start as soon as one token is there.
fn least(bytes: u64, rate: u64, burst: u64, operation: u64) -> Duration {
    Duration::from_millis((bytes - burst - operation) * 1000 / rate)
}

/// Boots a guest with this memory and these devices in its configuration.
fn boot(images: &Images, memory: &Value, mut config: Value) -> LinuxShell {
    let mib = memory["size"].as_u64().unwrap() / MIB;
    let machine = machine("6.12", mib.try_into().unwrap(), 1);
    config["memory"] = memory.clone();
    config["payload"] = json!({
        "kernel": machine.kernel,
        "initramfs": machine.initramfs,
        "cmdline": machine.cmdline,
    });
    config["serial"] = json!({ "mode": "Tty" });
    let file = images.path("config.json");
    fs::write(&file, config.to_string()).unwrap();
    let ferry = Ferry::empty(&["--config", file.to_str().unwrap()]).unwrap();
    LinuxShell::of(ferry, &machine)
}

#[test]
fn a_limited_disk_and_interface_keep_their_rates_and_go_on_afterwards() {
    let images = Images::with_root();
    images.sparse("data", 64 * MIB);
    let _tap = HostTap::with_address("ferry0", "10.7.0.1/24");
    let bandwidth = |size: u64, refill_time: u64| json!({ "bandwidth": { "size": size, "refill_time": refill_time } });
    let devices = json!({
        "disks": [
            { "path": images.path("root") },
            { "path": images.path("data"), "rate_limiter_config": bandwidth(DISK_RATE, 1000) },
        ],
        "net": [{ "tap": "ferry0", "rate_limiter_config": bandwidth(NET_RATE / 2, 500) }],
    });
    let mut guest = boot(&images, &json!({ "size": 192 * MIB }), devices);

    let operation = 1024 * guest.numbers("cat /sys/block/vdb/queue/max_sectors_kb")[0];
    for transfer in [
        "dd if=/dev/vdb of=/dev/null bs=1M count=16",
        "dd if=/dev/zero of=/dev/vdb bs=1M count=16 conv=fsync",
    ] {
        let began = Instant::now();
        guest.ask(&format!("{transfer}; echo moved: $?"), "\nmoved: 0");
        let (took, least) = (
            began.elapsed(),
            least(16 * MIB, DISK_RATE, DISK_RATE, operation),
        );
        println!("{transfer}: {took:?}, at least {least:?}");
        assert!(took >= least, "{transfer}: {took:?}, at least {least:?}");
    }
    guest.ask(
        "dd if=/dev/vdb of=/dev/null bs=4k count=1 skip=8000; echo answers: $?",
        "\nanswers: 0",
    );

    guest.ask(
        "ip addr add 10.7.0.2/24 dev eth0; ip link set eth0 up; ping -c 1 10.7.0.1",
        "1 packets received",
    );
    guest.ask("nc -ll -p 9000 -e cat & sleep 1; echo serves", "\nserves");
    let bytes = pattern(6 << 20);
    let tcp = TcpStream::connect("10.7.0.2:9000").unwrap();
    tcp.set_read_timeout(Some(SHELL_LIMIT)).unwrap();
    let began = Instant::now();
    echoes(tcp.try_clone().unwrap(), &tcp, &bytes);
    let (took, least) = (
        began.elapsed(),
        least(6 * MIB, NET_RATE, NET_RATE / 2, PACKET_MOST),
    );
    println!("6 MiB over TCP and back: {took:?}, at least {least:?}");
    assert!(took >= least, "{took:?}, at least {least:?}");
    drop(tcp);
    host("ping -c 2 10.7.0.2");
    guest.ask("ping -c 2 10.7.0.1", "2 packets received");
    guest.switches_itself_off("poweroff");
    images.root_is_whole();
}

/// Huge page pool of the host. Dropping it releases the pages.
struct HugePages;

impl HugePages {
    const COUNT: &str = "/proc/sys/vm/nr_hugepages";

    fn reserve(number: u64) -> Self {
        fs::write(Self::COUNT, number.to_string()).unwrap();
        let got = fs::read_to_string(Self::COUNT).unwrap();
        assert_eq!(got.trim(), number.to_string(), "huge pages of the host");
        Self
    }

    fn of_host(field: &str) -> u64 {
        let text = fs::read_to_string("/proc/meminfo").unwrap();
        let line = text.lines().find(|line| line.starts_with(field)).unwrap();
        line[field.len() + 1..].trim().parse().unwrap()
    }
}

impl Drop for HugePages {
    fn drop(&mut self) {
        // The host can fail to release pages, which is harmless.
        let _kept = fs::write(Self::COUNT, "0");
    }
}

/// Longer than the guest takes to refill the pages that were released.
const STANDS: Duration = Duration::from_secs(4);

const FILL: &str = "dd if=/dev/urandom of=/tmp/one bs=1M count=1; for i in $(seq 150); do cat /tmp/one; done > /tmp/fill; \
                    cmp -n 1048576 /tmp/one /tmp/fill; echo filled: $?";

/// Waits until this number of huge pages is free on the host.
fn gives_back(least: u64) {
    let deadline = Instant::now() + SHELL_LIMIT;
    loop {
        let free = HugePages::of_host("HugePages_Free:");
        if free >= least {
            return;
        }
        assert!(Instant::now() < deadline, "{free} free pages of {least}");
        thread::sleep(Duration::from_millis(100));
    }
}

#[test]
fn a_guest_in_huge_pages_gives_back_whole_ones() {
    let pages = 160;
    let _reserved = HugePages::reserve(pages);
    let images = Images::with_root();
    let memory = json!({ "size": 320 * MIB, "hugepages": true });
    let devices = json!({
        "disks": [{ "path": images.path("root") }],
        "balloon": { "size": 32 * MIB, "free_page_reporting": true },
    });
    let mut guest = boot(&images, &memory, devices);
    guest.counts("_balloon0", "inflated_pages", 32 * MIB / 4096);
    guest.ask(
        "mount -o remount,size=90% /tmp; echo grown: $?",
        "\ngrown: 0",
    );
    guest.ask(FILL, "\nfilled: 0");
    let free = HugePages::of_host("HugePages_Free:");
    guest.ask("rm /tmp/fill; echo empty: $?", "\nempty: 0");
    gives_back(free + 50);
    // The guest can use the memory that returns from the balloon.
    guest.ask(FILL, "\nfilled: 0");
    assert_eq!(guest.counter("_balloon0", "errors"), 0);

    // If another process has taken the huge pages in the meantime, the guest blocks until some are free.
    guest.ask("rm /tmp/fill; echo empty: $?", "\nempty: 0");
    gives_back(free + 50);
    let used = pages - HugePages::of_host("HugePages_Free:");
    fs::write(HugePages::COUNT, used.to_string()).unwrap();
    let mark = guest.ferry.serial().mark();
    guest.ferry.type_in(&format!("{FILL}\n")).unwrap();
    let serial = guest.ferry.serial();
    serial.wait_after(mark, "\nfilled:", STANDS).unwrap_err();
    fs::write(HugePages::COUNT, pages.to_string()).unwrap();
    serial.wait_after(mark, "\nfilled: 0", SHELL_LIMIT).unwrap();
    guest.switches_itself_off("poweroff");
    images.root_is_whole();
    assert_eq!(HugePages::of_host("HugePages_Free:"), pages);
}
