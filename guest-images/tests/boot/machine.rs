//! Guest programs in QEMU, with each accelerator that the host supports.

use std::fs::{self, OpenOptions};
use std::io::{BufRead, BufReader, ErrorKind, Read, Write};
use std::path::PathBuf;
use std::process::{Child, ChildStdin, Command, Stdio};
use std::sync::mpsc::{Receiver, channel};
use std::thread;
use std::time::{Duration, Instant};

use guest_images::{DIRTIER, HELLO, RING_ATTACKER};

/// Time limit of a guest. It is long enough for a busy host.
const PATIENCE: Duration = Duration::from_secs(50);

/// Accelerator of QEMU.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Accelerator {
    /// KVM of the host.
    Kvm,
    /// Emulation by QEMU.
    Tcg,
}

/// Calls `test` with every accelerator and prints its name. Emulation is always available.
pub(crate) fn everywhere(test: impl Fn(Accelerator)) {
    let kvm = OpenOptions::new().read(true).write(true).open("/dev/kvm");
    match kvm {
        Ok(_) => {
            println!("host: QEMU with KVM");
            test(Accelerator::Kvm);
        }
        Err(error) => println!("host: no QEMU with KVM, /dev/kvm cannot be opened: {error}"),
    }
    println!("host: QEMU with emulation");
    test(Accelerator::Tcg);
}

/// A guest program that runs in QEMU.
pub(crate) struct Guest {
    child: Child,
    input: ChildStdin,
    lines: Receiver<String>,
    seen: Vec<String>,
    until: Instant,
}

/// Output and exit status of a guest that has ended.
#[derive(Debug)]
pub(crate) struct Ended {
    /// All lines that it printed.
    pub(crate) lines: Vec<String>,
    /// Byte that it wrote to the debug exit.
    pub(crate) status: u8,
}

impl Guest {
    /// Starts the dirtier.
    pub(crate) fn dirtier(accelerator: Accelerator, memory_mib: u32, command_line: &str) -> Self {
        Self::start(accelerator, ("dirtier", DIRTIER), memory_mib, command_line)
    }

    /// Starts the program `hello`.
    pub(crate) fn hello(accelerator: Accelerator, memory_mib: u32, command_line: &str) -> Self {
        Self::start(accelerator, ("hello", HELLO), memory_mib, command_line)
    }

    /// Starts the ring attacker.
    pub(crate) fn ring_attacker(accelerator: Accelerator, command_line: &str) -> Self {
        let image = ("ring-attacker", RING_ATTACKER);
        Self::start(accelerator, image, 64, command_line)
    }

    fn start(
        accelerator: Accelerator,
        image: (&str, &[u8]),
        memory_mib: u32,
        command_line: &str,
    ) -> Self {
        let mut child = qemu(accelerator, image, memory_mib, command_line)
            .spawn()
            .unwrap_or_else(|error| match error.kind() {
                ErrorKind::NotFound => panic!(
                    "qemu-system-x86_64 is not installed: these tests boot real guests, install \
                     it (Debian: apt-get install qemu-system-x86)"
                ),
                _ => panic!("qemu-system-x86_64 cannot be started: {error}"),
            });
        let (sender, lines) = channel();
        let output = BufReader::new(child.stdout.take().unwrap());
        thread::spawn(move || {
            output
                .lines()
                .map_while(Result::ok)
                .try_for_each(|l| sender.send(l))
        });
        let input = child.stdin.take().unwrap();
        Self {
            child,
            input,
            lines,
            seen: Vec::new(),
            until: Instant::now() + PATIENCE,
        }
    }

    /// Returns the next line, or `None` if the guest has ended.
    pub(crate) fn line(&mut self) -> Option<String> {
        let left = self.until.saturating_duration_since(Instant::now());
        match self.lines.recv_timeout(left) {
            Ok(line) => {
                self.seen.push(line.clone());
                Some(line)
            }
            Err(_) if left.is_zero() || Instant::now() >= self.until => {
                panic!(
                    "the guest did nothing for too long; it printed {:#?}",
                    self.seen
                )
            }
            Err(_) => None,
        }
    }

    /// Sends bytes to the serial port.
    pub(crate) fn send(&mut self, bytes: &[u8]) {
        self.input.write_all(bytes).unwrap();
        self.input.flush().unwrap();
    }

    /// Waits until the guest ends.
    pub(crate) fn end(mut self) -> Ended {
        while self.line().is_some() {}
        let code = self.child.wait().unwrap().code();
        let mut complaints = String::new();
        self.child
            .stderr
            .take()
            .unwrap()
            .read_to_string(&mut complaints)
            .unwrap();
        // isa-debug-exit makes QEMU exit with twice the byte plus one.
        let status = code
            .filter(|code| code % 2 == 1)
            .and_then(|code| u8::try_from(code / 2).ok());
        let status = status.unwrap_or_else(|| {
            panic!(
                "no debug exit: {code:?}, printed {:#?}, QEMU says: {complaints}",
                self.seen
            )
        });
        Ended {
            lines: std::mem::take(&mut self.seen),
            status,
        }
    }
}

impl Drop for Guest {
    fn drop(&mut self) {
        // The guest is still running only if a test failed.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn qemu(
    accelerator: Accelerator,
    (name, image): (&str, &[u8]),
    memory_mib: u32,
    command_line: &str,
) -> Command {
    let mut command = Command::new("qemu-system-x86_64");
    command
        .args(["-M", "microvm,acpi=off,auto-kernel-cmdline=off", "-accel"])
        .arg(match accelerator {
            Accelerator::Kvm => "kvm",
            Accelerator::Tcg => "tcg",
        })
        .args([
            "-m",
            &memory_mib.to_string(),
            "-append",
            command_line,
            "-kernel",
        ])
        .arg(on_disk(name, image))
        .args([
            "-nodefaults",
            "-no-user-config",
            "-display",
            "none",
            "-no-reboot",
        ])
        .args([
            "-serial",
            "stdio",
            "-device",
            "isa-debug-exit,iobase=0xf4,iosize=4",
        ])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped());
    command
}

/// Writes an image to a file for QEMU. Tests run concurrently, so that each writes its own file and
/// renames it.
fn on_disk(name: &str, image: &[u8]) -> PathBuf {
    let path = PathBuf::from(env!("CARGO_TARGET_TMPDIR")).join(format!("{name}.elf"));
    let thread = format!("{:?}", thread::current().id()).replace(['(', ')'], "-");
    let own = path.with_extension(format!("{}-{thread}", std::process::id()));
    fs::write(&own, image).unwrap();
    fs::rename(&own, &path).unwrap();
    path
}
