//! vhost-user disks of stock Debian guests with `qemu-storage-daemon` as the back end. Runs inside the lab.

use std::fs::{self, File};
use std::io::{Read, Write};
use std::os::unix::net::UnixListener;
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
use ferry_tests::paths;
use ferry_tests::process::{self, Process};

const MIB: u64 = 1 << 20;
const SERIES: &str = "6.12";
/// Contents of `/sys/bus/virtio/devices/*/status` for a device that works and one that needs a reset (virtio 1.2, 2.1).
const AT_WORK: &str = "0x0000000f";
const NEEDS_RESET: &str = "0x0000004f";

/// Temporary directory with disk images and the sockets of their back ends.
struct Images(tempfile::TempDir);

impl Images {
    /// Makes a directory with a copy of the root file system of the guest.
    fn new() -> Self {
        let images = Self(tempfile::tempdir().unwrap());
        fs::copy(paths::linux_guest("root.img").unwrap(), images.path("root")).unwrap();
        images
    }

    fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    fn sparse(&self, name: &str, bytes: u64) {
        File::create(self.path(name))
            .unwrap()
            .set_len(bytes)
            .unwrap();
    }

    /// Returns the `--disk` option for an image that ferry serves itself.
    fn option(&self, name: &str) -> String {
        format!("path={}", self.path(name).display())
    }

    /// Returns the `--disk` option for the socket of a back end.
    fn vhost_user(&self, name: &str) -> String {
        format!("vhost_user=on,socket={}", self.path(name).display())
    }

    /// Starts one daemon with a back end for each of `sockets`. It opens the image once.
    fn serve(&self, name: &str, sockets: &[&str]) -> Process {
        let mut command = Command::new("qemu-storage-daemon");
        let image = self.path(name);
        command.args([
            "--blockdev",
            &format!("driver=file,node-name=image,filename={}", image.display()),
        ]);
        for socket in sockets {
            let path = self.path(socket);
            command.args([
                "--export",
                &format!(
                    "type=vhost-user-blk,id={socket},node-name=image,addr.type=unix,addr.path={},writable=on",
                    path.display()
                ),
            ]);
        }
        let daemon = Process::start(&mut command).unwrap();
        let deadline = Instant::now() + SHELL_LIMIT;
        while !sockets.iter().all(|socket| self.path(socket).exists()) {
            let said = daemon.stderr().text();
            assert!(Instant::now() < deadline, "no socket of a back end: {said}");
            thread::sleep(Duration::from_millis(10));
        }
        daemon
    }

    fn root_is_whole(&self) {
        let mut check = Command::new("e2fsck");
        check.arg("-fn").arg(self.path("root"));
        let checked = process::run(&mut check, SHELL_LIMIT).unwrap();
        assert!(checked.status.success(), "{checked:?}");
    }

    /// Reads a file of the root file system with debugfs, without the guest.
    fn of_root(&self, file: &str) -> String {
        let mut read = Command::new("debugfs");
        read.args(["-R", &format!("cat {file}")])
            .arg(self.path("root"));
        process::run(&mut read, SHELL_LIMIT).unwrap().stdout
    }
}

fn machine(memory_mib: u32) -> Machine {
    Machine {
        kernel: paths::linux_guest(&format!("{SERIES}/vmlinux")).unwrap(),
        initramfs: Some(paths::linux_guest("guest.cpio").unwrap()),
        cmdline: DISK_CMDLINE.to_owned(),
        memory_mib,
        cpus: 1,
    }
}

/// Runs a shell command on the lab host. It must succeed.
fn host(command: &str) {
    let mut shell = Command::new("sh");
    let done = process::run(shell.args(["-c", command]), SHELL_LIMIT).unwrap();
    assert!(done.status.success(), "{command}: {done:?}");
}

fn switches_off(guest: LinuxShell) {
    guest.switches_itself_off("sync; mount -o remount,ro /; poweroff -f");
}

/// Returns the number of pages that back ends have dirtied, according to the dirty tracker.
fn dirtied_by_back_ends(ferry: &Ferry) -> u64 {
    let counters = ferry.ctl_json(&["counters"]).unwrap();
    let pages = &counters["tracker"]["dirtied_by_vhost_user_pages"];
    pages.as_u64().unwrap_or_else(|| panic!("{counters}"))
}

#[test]
fn a_guest_lives_on_a_disk_of_another_process() {
    let images = Images::new();
    images.sparse("data", 64 * MIB);
    let _root = images.serve("root", &["root.sock"]);
    let _data = images.serve("data", &["data.sock"]);
    let (root, data) = (
        images.vhost_user("root.sock"),
        images.vhost_user("data.sock"),
    );
    let options = ["--disk", &root, "--disk", &data];
    let mut guest = LinuxShell::boot(&machine(192), &options);
    guest.ask("mount | grep ' / '", "/dev/vda on / type ext4");
    let status = "cat /sys/bus/virtio/devices/virtio1/status";
    guest.ask(status, &format!("\n{AT_WORK}"));
    guest.ask("cat /sys/block/vdb/size", "\n131072");

    guest.ask(
        "yes ferry was here | head -c 1048576 > /witness; echo made: $?",
        "\nmade: 0",
    );
    guest.ask(
        "dd if=/witness of=/dev/vdb bs=64k conv=fsync; echo copied: $?",
        "\ncopied: 0",
    );
    // The guest has flushed the data, so the file on the host has it while the guest runs.
    let mut copied = vec![0; 1 << 20];
    let mut file = File::open(images.path("data")).unwrap();
    file.read_exact(&mut copied).unwrap();
    assert!(copied.starts_with(b"ferry was here\nferry was here\n"));

    // The driver can switch the write cache.
    let cache = "/sys/block/vdb/cache_type";
    guest.ask(
        &format!(
            "was=$(cat {cache}); echo 'write back' > {cache}; echo was $was, is $(cat {cache})"
        ),
        "\nwas write through, is write back",
    );

    // The monitor reconnects to both back ends.
    guest.ask("sync; echo synced", "\nsynced");
    let mark = guest.ferry.serial().mark();
    guest.ferry.ctl(&["reboot"]).unwrap();
    guest.is_ready(mark);

    // The back end is stopped and restarted while the guest sends requests.
    guest.ask(
        "(for i in 1 2 3 4 5 6; do dd if=/witness of=/dev/vdb bs=64k seek=32 conv=fsync; done; echo all written) 2>/dev/null &",
        "/ # ",
    );
    let mark = guest.ferry.serial().mark();
    for _ in 0..10 {
        guest.ferry.ctl(&["pause"]).unwrap();
        guest.ferry.ctl(&["resume"]).unwrap();
    }
    let serial = guest.ferry.serial();
    serial.wait_after(mark, "all written", SHELL_LIMIT).unwrap();
    guest.ask(
        "dd if=/dev/vdb bs=64k skip=32 count=16 2>/dev/null | cmp - /witness; echo same: $?",
        "\nsame: 0",
    );

    switches_off(guest);
    images.root_is_whole();
    let witness = images.of_root("/witness");
    assert_eq!(witness.len(), 1 << 20);
    assert!(copied == witness.as_bytes());
    let mut again = vec![0; 3 << 20];
    let mut file = File::open(images.path("data")).unwrap();
    file.read_exact(&mut again).unwrap();
    assert!(again[2 << 20..] == *witness.as_bytes());
}

#[test]
fn a_guest_goes_on_when_its_back_end_is_killed() {
    let images = Images::new();
    images.sparse("data", 64 * MIB);
    let mut data = images.serve("data", &["data.sock"]);
    let events = images.path("events");
    let (root, disk, monitor) = (
        images.option("root"),
        images.vhost_user("data.sock"),
        format!("path={}", events.display()),
    );
    let options = [
        "--disk",
        &root,
        "--disk",
        &disk,
        "--event-monitor",
        &monitor,
    ];
    let mut guest = LinuxShell::boot(&machine(192), &options);
    guest.ask(
        "(while :; do dd if=/dev/urandom of=/dev/vdb bs=64k count=16 conv=fsync 2>/dev/null; done) & sleep 1; echo writes",
        "\nwrites",
    );
    data.kill();

    let lost = format!(
        "_disk1: {}: the back end closed the connection",
        images.path("data.sock").display()
    );
    guest.ferry.messages().wait_for(&lost, SHELL_LIMIT).unwrap();
    let status = "cat /sys/bus/virtio/devices/virtio1/status";
    guest.ask(status, &format!("\n{NEEDS_RESET}"));
    guest.ask(
        "echo hello | dd of=/greeting conv=fsync 2>/dev/null; echo alive: $?",
        "\nalive: 0",
    );

    guest.ferry.ctl(&["pause"]).unwrap();
    guest.ferry.ctl(&["resume"]).unwrap();
    let refused = guest
        .ferry
        .send_migration(&Endpoint::free_tcp().unwrap(), &[])
        .unwrap_err()
        .to_string();
    assert!(
        refused.contains("_disk1: the back end is gone"),
        "{refused}"
    );
    let info = guest.ferry.ctl_json(&["info"]).unwrap();
    assert_eq!(info["state"], "Running", "{info}");
    let told = fs::read_to_string(&events).unwrap();
    let failed: Vec<_> = told
        .lines()
        .filter(|line| line.contains("device-failed"))
        .collect();
    assert_eq!(failed.len(), 1, "{told}");
    assert!(failed[0].contains("_disk1"), "{told}");

    guest.ferry.ctl(&["shutdown"]).unwrap();
    guest.ferry.ctl(&["delete"]).unwrap();
    guest.ferry.ctl(&["shutdown-vmm"]).unwrap();
    guest.ends();
}

#[test]
fn what_is_no_back_end_for_a_disk_is_refused_by_its_socket() {
    let images = Images::new();
    let kernel = paths::linux_guest(&format!("{SERIES}/vmlinux")).unwrap();
    let run = |socket: &str| {
        let disk = images.vhost_user(socket);
        let arguments = ["run", "--kernel", kernel.to_str().unwrap(), "--disk", &disk];
        let refused = ferry::invoke(&arguments, SHELL_LIMIT).unwrap();
        assert!(!refused.status.success(), "{refused:?}");
        refused.stderr
    };
    let refused = run("nobody.sock");
    assert!(refused.contains("nobody.sock"), "{refused}");
    assert!(
        refused.contains("start the vhost-user back end first"),
        "{refused}"
    );

    // A back end serves only one guest at a time.
    let _root = images.serve("root", &["root.sock"]);
    let disk = images.vhost_user("root.sock");
    let guest = LinuxShell::boot(&machine(192), &["--disk", &disk]);
    let refused = run("root.sock");
    assert!(refused.contains("no answer within 5 s"), "{refused}");
    switches_off(guest);
    images.root_is_whole();
}

/// Migrates a guest while the back end writes into its memory.
#[test]
fn a_guest_whose_back_end_writes_its_memory_is_carried() {
    let images = Images::new();
    let pattern: Vec<u8> = (0..2_097_152_u32).flat_map(u32::to_le_bytes).collect();
    fs::write(images.path("data"), &pattern).unwrap();
    // There are two back ends for one image, and only one of them serves at a time.
    let _data = images.serve("data", &["here.sock", "there.sock"]);
    let _root = images.serve("root", &["root-here.sock", "root-there.sock"]);
    let disks = |root: &str, data: &str| {
        [
            "--disk".to_owned(),
            images.vhost_user(root),
            "--disk".to_owned(),
            images.vhost_user(data),
        ]
    };
    let here = disks("root-here.sock", "here.sock");
    let here: Vec<&str> = here.iter().map(String::as_str).collect();
    let mut guest = LinuxShell::boot(&machine(192), &here);
    guest.ask(
        "(i=0; while :; do i=$((i+1)); echo $i >> /log; sync; done) & \
         (while :; do dd if=/dev/vdb bs=64k | md5sum >> /tmp/sums; echo 1 > /proc/sys/vm/drop_caches; done 2>/dev/null) &",
        "/ # ",
    );
    guest.ask("wc -l < /log; echo counted", "\ncounted");
    let rate = guest
        .ferry
        .ctl_json(&["dirty-rate", "--interval-ms", "3000"])
        .unwrap();
    let by_back_ends = rate["sources"]["vhost_user"].as_f64().unwrap_or_default();
    assert!(by_back_ends > 0.0, "{rate}");

    // A destination without one of the back ends is refused before the guest stops.
    let there = disks("root-there.sock", "there.sock");
    let there: Vec<&str> = there.iter().map(String::as_str).collect();
    let endpoint = Endpoint::free_tcp().unwrap();
    let without = Ferry::receive_with(&endpoint, &there[..2]).unwrap();
    let refused = guest
        .ferry
        .send_migration(&endpoint, &PATIENT)
        .unwrap_err()
        .to_string();
    let why = "the guest has _disk1 (a vhost-user disk of";
    assert!(refused.contains(why), "{refused}");
    drop(without);

    let endpoint = Endpoint::free_tcp().unwrap();
    let destination = Ferry::receive_with(&endpoint, &there).unwrap();
    let before = dirtied_by_back_ends(&guest.ferry);
    let source = &guest.ferry;
    let most = thread::scope(|scope| {
        let sending = scope.spawn(|| source.send_migration(&endpoint, &PATIENT));
        let mut most = before;
        while !sending.is_finished() {
            // The call fails when the source has ended.
            if let Ok(counters) = source.ctl_json(&["counters"]) {
                let pages = counters["tracker"]["dirtied_by_vhost_user_pages"].as_u64();
                most = most.max(pages.unwrap_or_default());
            }
            thread::sleep(Duration::from_millis(200));
        }
        // PATIENT compares the digests of all memory, so a difference would have failed the migration.
        sending.join().unwrap().unwrap();
        most
    });
    println!("{} pages by back ends while it was sent", most - before);
    assert!(most > before, "no page by a back end while it was sent");
    guest.ferry = destination;
    guest.ask("sleep 2; kill %1 %2; wait; echo stopped", "\nstopped");
    guest.ask(
        "echo sums: $(sort -u /tmp/sums | wc -l) $(awk '$1 != NR { bad = 1 } END { print \"log:\", bad + 0, (NR > 20) }' /log)",
        "\nsums: 1 log: 0 1",
    );
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
fn a_guest_stays_when_the_back_end_at_the_destination_is_lost() {
    let images = Images::new();
    images.sparse("data", 64 * MIB);
    images.sparse("other", 64 * MIB);
    let _here = images.serve("data", &["here.sock"]);
    let mut there = images.serve("other", &["there.sock"]);
    let root = images.option("root");
    let (here, elsewhere) = (
        images.vhost_user("here.sock"),
        images.vhost_user("there.sock"),
    );
    let mut guest = LinuxShell::boot(&machine(192), &["--disk", &root, "--disk", &here]);
    guest.ask(
        "(while :; do dd if=/dev/vdb of=/dev/null bs=64k count=64; echo 1 > /proc/sys/vm/drop_caches; done 2>/dev/null) &",
        "/ # ",
    );
    let endpoint = Endpoint::free_tcp().unwrap();
    let destination =
        Ferry::receive_with(&endpoint, &["--disk", &root, "--disk", &elsewhere]).unwrap();
    let source = &guest.ferry;
    let refused = thread::scope(|scope| {
        let sending = scope.spawn(|| source.send_migration(&endpoint, &PATIENT));
        let deadline = Instant::now() + SHELL_LIMIT;
        while source.phase().unwrap() != "rounds" {
            assert!(Instant::now() < deadline, "no round has begun");
        }
        there.kill();
        sending.join().unwrap().unwrap_err().to_string()
    });
    assert!(
        refused.contains("_disk1: the back end is gone"),
        "{refused}"
    );
    drop(destination);
    // The back end of the source was stopped for the last round, and serves again.
    guest.ask(
        "kill %1; wait; yes again | dd of=/dev/vdb bs=64k count=4 iflag=fullblock conv=fsync 2>/dev/null; echo written: $?",
        "\nwritten: 0",
    );
    switches_off(guest);
    let mut found = vec![0; 256 << 10];
    let mut file = File::open(images.path("data")).unwrap();
    file.read_exact(&mut found).unwrap();
    assert!(found.starts_with(b"again\nagain\n") && !found.contains(&0));
    let mut other = Vec::new();
    let mut file = File::open(images.path("other")).unwrap();
    file.read_to_end(&mut other).unwrap();
    assert!(other.iter().all(|byte| *byte == 0));
}

/// Back end without VHOST_F_LOG_ALL. It answers only the requests for its configuration, because the guest never uses
/// it.
fn back_end_without_a_log(socket: &Path) {
    const FEATURES: u64 = 1 << 32 | 1 << 30;
    const CONFIG: u64 = 1 << 9;
    let listener = UnixListener::bind(socket).unwrap();
    thread::spawn(move || {
        let (mut stream, _) = listener.accept().unwrap();
        let mut head = [0; 12];
        while stream.read_exact(&mut head).is_ok() {
            let [request, bytes] = [0, 8].map(|at| {
                let word = head[at..at + 4].try_into().unwrap();
                u32::from_ne_bytes(word)
            });
            let mut body = vec![0; usize::try_from(bytes).unwrap()];
            stream.read_exact(&mut body).unwrap();
            // Only GET_FEATURES, GET_PROTOCOL_FEATURES and GET_CONFIG need an answer.
            let answer = match request {
                1 => FEATURES.to_ne_bytes().to_vec(),
                15 => CONFIG.to_ne_bytes().to_vec(),
                24 => body,
                _ => continue,
            };
            let bytes = u32::try_from(answer.len()).unwrap();
            let message: Vec<u8> = [request, 1 | 4, bytes]
                .iter()
                .flat_map(|word| word.to_ne_bytes())
                .chain(answer)
                .collect();
            stream.write_all(&message).unwrap();
        }
    });
}

/// Asserts that the migration is refused before it starts. No process listens at the destination.
#[test]
fn a_guest_whose_back_end_cannot_log_is_not_sent() {
    let folder = tempfile::tempdir().unwrap();
    let socket = folder.path().join("mute.sock");
    back_end_without_a_log(&socket);
    let disk = format!("vhost_user=on,socket={}", socket.display());
    let machine = Machine {
        kernel: paths::guest("dirtier.elf").unwrap(),
        initramfs: None,
        cmdline: "cpus=1 memory=8M cold=4M serial=on".to_owned(),
        memory_mib: 64,
        cpus: 1,
    };
    let guest = Ferry::run_with(&machine, &["--disk", &disk]).unwrap();
    let nowhere = Endpoint::free_tcp().unwrap();
    let refused = guest.send_migration(&nowhere, &[]).unwrap_err().to_string();
    assert!(refused.contains("_disk0"), "{refused}");
    assert!(
        refused.contains("mute.sock: the back end lacks the feature VHOST_F_LOG_ALL"),
        "{refused}"
    );
    assert_eq!(guest.phase().unwrap(), "none");
    let info = guest.ctl_json(&["info"]).unwrap();
    assert_eq!(info["state"], "Running", "{info}");
}

/// The time to pause a guest is bounded even if its back end does not respond.
#[test]
fn a_back_end_that_stands_still_holds_nobody_up_for_ever() {
    let images = Images::new();
    images.sparse("data", 64 * MIB);
    let data = images.serve("data", &["data.sock"]);
    let (root, disk) = (images.option("root"), images.vhost_user("data.sock"));
    let mut guest = LinuxShell::boot(&machine(192), &["--disk", &root, "--disk", &disk]);
    host(&format!("kill -STOP {}", data.pid()));
    guest.ask(
        "(dd if=/dev/vdb of=/dev/null bs=64k count=16; echo never) & sleep 1; echo asked",
        "\nasked",
    );
    let began = Instant::now();
    guest.ferry.ctl(&["pause"]).unwrap();
    let took = began.elapsed();
    println!("paused after {took:?}");
    let busy = "data.sock: requests are still in flight after 10 s";
    guest.ferry.messages().wait_for(busy, SHELL_LIMIT).unwrap();
    guest.ferry.ctl(&["resume"]).unwrap();
    let status = "cat /sys/bus/virtio/devices/virtio1/status";
    guest.ask(status, &format!("\n{NEEDS_RESET}"));
    guest.ferry.ctl(&["shutdown-vmm"]).unwrap();
    guest.ends();
}
