//! A whole Debian with its own kernel, initramfs and systemd, started by the commands in README.md. Runs inside the lab
//! as root.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use ferry_tests::host_net::host;
use ferry_tests::linux_shell::SHELL_LIMIT;
use ferry_tests::process::{self, Process};

const README: &str = include_str!("../../README.md");
/// Time limit for the boot from the initramfs to the login, which takes minutes in the lab.
const LOGIN_LIMIT: Duration = Duration::from_secs(300);

/// Returns the commands of the README, from making the file system to starting the guest.
fn readme_lines() -> String {
    let lines = README.lines();
    let lines = lines.skip_while(|line| !line.starts_with("    mkfs.ext4 "));
    let lines: Vec<&str> = lines.map_while(|line| line.strip_prefix("    ")).collect();
    assert!(
        lines.iter().any(|line| line.starts_with("ferry run ")),
        "{lines:?}"
    );
    lines.join("\n")
}

/// Puts the Debian that `tests/run fetch` made where the commands of the README expect it.
fn debian() -> tempfile::TempDir {
    let given = PathBuf::from(std::env::var_os("FERRY_DEBIAN").unwrap());
    let folder = tempfile::tempdir().unwrap();
    let tree = folder.path().join("tree");
    fs::create_dir(&tree).unwrap();
    let archive = given.join("tree.tar");
    host(&format!(
        "tar -xf {} -C {}",
        archive.display(),
        tree.display()
    ));
    // Reduces the memory to that of a guest in the lab.
    fs::remove_file(archive).unwrap();
    for file in ["vmlinuz", "initrd.img"] {
        fs::copy(given.join(file), folder.path().join(file)).unwrap();
    }
    folder
}

struct Debian(Process);

impl Debian {
    /// Types a command and waits for an answer that only the guest can have printed.
    fn ask(&mut self, command: &str, answer: &str) {
        let mark = self.0.stdout().mark();
        self.0.type_in(&format!("{command}\n")).unwrap();
        self.0
            .stdout()
            .wait_after(mark, answer, SHELL_LIMIT)
            .unwrap();
    }
}

fn is_whole(image: &Path) {
    let mut check = Command::new("e2fsck");
    let checked = process::run(check.arg("-fn").arg(image), SHELL_LIMIT).unwrap();
    let said = format!("{}{}", checked.stdout, checked.stderr);
    assert!(
        checked.status.success() && !said.contains("skipping journal"),
        "{said}"
    );
}

#[test]
fn debian_is_started_by_the_lines_of_the_readme() {
    let folder = debian();
    // Uses dash, because busybox's shell runs its own `ip`.
    let mut lines = Command::new("dash");
    lines
        .args(["-e", "-c", &readme_lines()])
        .current_dir(&folder);
    let mut guest = Debian(Process::start(&mut lines).unwrap());
    let login = guest.0.stdout().wait_for("debian login: ", LOGIN_LIMIT);
    login.unwrap_or_else(|error| panic!("{error}\n{}", guest.0.stderr().text()));
    guest.ask("root", ":~# ");
    guest.ask(
        "echo state: $(systemctl is-system-running --wait)",
        "state: running",
    );
    guest.ask("mount | grep ' / '", "/dev/vda on / type ext4 (rw");
    guest.ask("ping -c 3 10.0.0.1", "3 received");
    host("ping -c 3 10.0.0.2");
    guest.ask(
        "echo rng: $(cat /sys/class/misc/hw_random/rng_current)",
        "rng: virtio_rng",
    );
    guest.ask("systemctl poweroff", "reboot: Power down");
    let ended = guest.0.wait(SHELL_LIMIT).unwrap();
    assert!(ended.status.success(), "{ended:?}");
    is_whole(&folder.path().join("root.img"));
}
