//! The lab: a Debian kernel with a real KVM and nested paging, in emulation.
//!
//! QEMU emulates AMD's SVM with nested paging in software, so the lab works on any machine. Its
//! host is a kernel with an initramfs made here: `/init` loads kvm_amd, runs the given commands one
//! after the other, and says the exit status of each on the serial console between marks that no
//! command prints by chance.
//!
//! Three faults of QEMU 7.2's emulation shape it; with two processors guests hung, or took the lab host with
//! them:
//! - VMRUN leaves `exception_index` set after it injected an interrupt, and the next kick of that
//!   processor which is not an interrupt delivers the vector once more (the guest deadlocks in its
//!   interrupt handler). Such kicks come from other processors: there is only one.
//! - A processor can run an `int3` that another one has patched away meanwhile, and KVM patches the
//!   scheduler when the first guest comes and the last one goes. With one processor nobody else runs.
//! - VMRUN and #VMEXIT change `interrupt_request` without the lock, so that an interrupt can be lost. A
//!   timer that is armed for one shot at a time is then silent for ever; a periodic one rings again:
//!   hence `nohz=off highres=off`.

use std::fmt::Write;
use std::path::PathBuf;
use std::process::{Command, ExitStatus};
use std::time::{Duration, Instant};
use std::{fs, io};

use crate::initramfs::{Initramfs, InitramfsError};
use crate::kernels::{DebianKernel, ModuleError, Series};
use crate::paths::Missing;
use crate::process::{Process, ProcessError};

/// Why a lab run gave no result.
#[derive(Debug, thiserror::Error)]
pub enum LabError {
    /// The kernel was not fetched.
    #[error(transparent)]
    Missing(#[from] Missing),
    /// A module of the kernel cannot be read.
    #[error(transparent)]
    Module(#[from] ModuleError),
    /// The initramfs cannot be made.
    #[error(transparent)]
    Initramfs(#[from] InitramfsError),
    /// The initramfs cannot be written.
    #[error("the lab's folder cannot be written")]
    Write(#[from] io::Error),
    /// QEMU could not be run, or the time limit passed: its output is in the source.
    #[error("the lab host did not come to its end")]
    Qemu(#[from] ProcessError),
    /// QEMU ended, but the commands did not.
    #[error(
        "the lab host ended ({status}) before command {command:?} did; its console ends with:\n{tail}"
    )]
    Died {
        /// How QEMU ended.
        status: ExitStatus,
        /// The first command without an exit status.
        command: String,
        /// The last lines of the console, and of QEMU's own messages.
        tail: String,
    },
}

/// What one command did.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Outcome {
    /// The command as given.
    pub command: String,
    /// stdout and stderr, and whatever else reached the console meanwhile.
    pub output: String,
    /// Its exit status.
    pub status: i32,
}

impl Outcome {
    /// Whether the exit status was 0.
    pub fn succeeded(&self) -> bool {
        self.status == 0
    }
}

/// What a lab run did.
#[derive(Clone, Debug)]
pub struct Report {
    /// The lab host's kernel, as `uname -r` says it.
    pub release: String,
    /// One for each command, in their order.
    pub outcomes: Vec<Outcome>,
    /// All of the console.
    pub console: String,
    /// From QEMU's start to its end.
    pub took: Duration,
}

/// A lab run being prepared.
#[derive(Debug)]
pub struct Lab {
    series: Series,
    memory_mib: u32,
    limit: Duration,
    programs: Vec<(PathBuf, String)>,
    files: Vec<(PathBuf, String)>,
    commands: Vec<String>,
}

impl Lab {
    /// A lab host of this kernel series with 3 GiB, and two minutes for everything.
    pub fn new(series: Series) -> Self {
        Self {
            series,
            memory_mib: 3072,
            limit: Duration::from_secs(120),
            programs: Vec::new(),
            files: Vec::new(),
            commands: Vec::new(),
        }
    }

    /// Gives the lab host this much memory.
    #[must_use]
    pub fn memory_mib(mut self, memory_mib: u32) -> Self {
        self.memory_mib = memory_mib;
        self
    }

    /// Ends the run, as an error, after this time.
    #[must_use]
    pub fn limit(mut self, limit: Duration) -> Self {
        self.limit = limit;
        self
    }

    /// Puts a program and its shared libraries into the lab host.
    #[must_use]
    pub fn program(mut self, source: impl Into<PathBuf>, path: impl Into<String>) -> Self {
        self.programs.push((source.into(), path.into()));
        self
    }

    /// Puts a file into the lab host.
    #[must_use]
    pub fn file(mut self, source: impl Into<PathBuf>, path: impl Into<String>) -> Self {
        self.files.push((source.into(), path.into()));
        self
    }

    /// Runs this shell command in the lab host, after those given before it.
    #[must_use]
    pub fn command(mut self, command: impl Into<String>) -> Self {
        self.commands.push(command.into());
        self
    }

    /// Runs the commands and reports what each did; a command that fails is no error.
    ///
    /// # Errors
    /// [`LabError`] when something is missing, or the host did not run all commands to their ends.
    pub fn run(&self) -> Result<Report, LabError> {
        let kernel = DebianKernel::find(self.series)?;
        let folder = tempfile::tempdir()?;
        let initramfs = folder.path().join("lab.cpio");
        fs::write(&initramfs, self.initramfs(&kernel)?)?;
        let started = Instant::now();
        let mut qemu = Process::start(&mut self.qemu(&kernel, &initramfs))?;
        let ended = qemu.wait(self.limit)?;
        let outcomes = self
            .outcomes(&ended.stdout)
            .map_err(|command| LabError::Died {
                status: ended.status,
                command,
                tail: crate::console::tail(format!("{}{}", ended.stdout, ended.stderr).as_bytes()),
            })?;
        let took = started.elapsed();
        Ok(Report {
            release: kernel.release,
            outcomes,
            console: ended.stdout,
            took,
        })
    }

    /// QEMU's command line for this run.
    fn qemu(&self, kernel: &DebianKernel, initramfs: &std::path::Path) -> Command {
        let mut command = Command::new("qemu-system-x86_64");
        command
            .args(["-accel", "tcg,tb-size=512", "-cpu", CPU])
            .args(["-smp", "1", "-m", &self.memory_mib.to_string()])
            .arg("-kernel")
            .arg(&kernel.image)
            .arg("-initrd")
            .arg(initramfs)
            .args(["-append", COMMAND_LINE])
            .args([
                "-nographic",
                "-no-reboot",
                "-nodefaults",
                "-serial",
                "stdio",
            ]);
        command
    }

    fn initramfs(&self, kernel: &DebianKernel) -> Result<Vec<u8>, LabError> {
        let mut initramfs = Initramfs::with_init(&self.init())?;
        for (name, content) in kernel.kvm_modules()? {
            initramfs.bytes(&format!("/modules/{name}.ko"), 0o644, &content);
        }
        for (index, command) in self.commands.iter().enumerate() {
            initramfs.text(
                &format!("/commands/{index}"),
                0o644,
                &format!("{command}\n"),
            );
        }
        for (source, path) in &self.programs {
            initramfs.program(source, path)?;
        }
        for (source, path) in &self.files {
            initramfs.copy(source, path)?;
        }
        Ok(initramfs.finish())
    }

    fn init(&self) -> String {
        let mut script = INIT.to_owned();
        for index in 0..self.commands.len() {
            // Writing to a string cannot fail.
            let _ = writeln!(script, "run {index}");
        }
        script.push_str("reboot -f\n");
        script
    }

    /// Cuts the console into the outcomes, or names the first command that has none.
    fn outcomes(&self, console: &str) -> Result<Vec<Outcome>, String> {
        let mut outcomes = Vec::new();
        for (index, command) in self.commands.iter().enumerate() {
            let outcome = outcome(console, index).ok_or_else(|| command.clone())?;
            let (output, status) = outcome;
            outcomes.push(Outcome {
                command: command.clone(),
                output: output.to_owned(),
                status,
            });
        }
        Ok(outcomes)
    }
}

/// An EPYC less what QEMU 7.2 cannot emulate, and warns of.
const CPU: &str = "EPYC,+svm,+npt,-rdseed,-sha-ni,-fxsr-opt,-misalignsse,-3dnowprefetch,-osvw,\
                   -topoext,-nrip-save,-xsavec";

/// The lab host's. The module's documentation says why its timer is periodic.
const COMMAND_LINE: &str = "console=ttyS0 quiet panic=-1 mitigations=off nohz=off highres=off";

/// The beginning of `/init`. `reboot -f` ends QEMU because of its option `-no-reboot`. Kernel
/// messages below errors are kept off the console: they would stand in the middle of the output.
const INIT: &str = r#"#!/bin/busybox sh
/bin/busybox mkdir -p /sbin /usr/bin /usr/sbin
/bin/busybox --install -s
export PATH=/usr/local/bin:/bin:/sbin:/usr/bin:/usr/sbin HOME=/ TERM=dumb RUST_BACKTRACE=1
mount -t proc proc /proc
mount -t sysfs sysfs /sys
mount -t devtmpfs devtmpfs /dev
mkdir -p /dev/shm
mount -t tmpfs tmpfs /dev/shm
mount -t tmpfs tmpfs /tmp
mount -t tmpfs tmpfs /run
ip link set lo up
dmesg -n 3
for module in tun llc stp bridge irqbypass kvm kvm-amd; do
    insmod /modules/$module.ko || echo "lab: module $module cannot be loaded"
done
run() {
    printf '\n<<<lab begin %s>>>\n' "$1"
    setsid sh "/commands/$1" </dev/null 2>&1
    printf '\n<<<lab end %s status %s>>>\n' "$1" "$?"
}
"#;

/// Finds the output and the exit status between the marks of `/init`.
fn outcome(console: &str, index: usize) -> Option<(&str, i32)> {
    let (_, rest) = console.split_once(&format!("\n<<<lab begin {index}>>>\n"))?;
    let (output, rest) = rest.split_once(&format!("\n<<<lab end {index} status "))?;
    let (status, _) = rest.split_once(">>>")?;
    Some((output, status.parse().ok()?))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn lab() -> Lab {
        Lab::new(Series::V6_1).command("first").command("second")
    }

    #[test]
    fn outcomes_are_cut_from_the_console() {
        let console = "boot\n\n<<<lab begin 0>>>\none\ntwo\n\n<<<lab end 0 status 0>>>\n\
                       \n<<<lab begin 1>>>\n\n<<<lab end 1 status 137>>>\n";
        let outcomes = lab().outcomes(console).unwrap();
        assert_eq!(outcomes[0].output, "one\ntwo\n");
        assert!(outcomes[0].succeeded());
        assert_eq!((outcomes[1].output.as_str(), outcomes[1].status), ("", 137));
        assert!(!outcomes[1].succeeded());
    }

    #[test]
    fn a_command_without_its_end_is_named() {
        let console =
            "\n<<<lab begin 0>>>\n\n<<<lab end 0 status 0>>>\n\n<<<lab begin 1>>>\nKernel panic";
        assert_eq!(lab().outcomes(console), Err("second".to_owned()));
    }

    #[test]
    fn every_command_is_run_by_init() {
        let script = lab().init();
        assert!(script.ends_with("run 0\nrun 1\nreboot -f\n"), "{script}");
    }
}
