//! The lab: an emulated KVM host. It is a Debian kernel with kvm_amd and nested paging, run by QEMU.
//!
//! QEMU emulates AMD SVM with nested paging in software, so the lab runs on any machine. The host boots from an
//! initramfs that this module builds. Its `/init` loads kvm_amd, runs the given commands one after the other, and
//! prints the exit status of each on the serial console, between marks that no command prints by chance.
//!
//! The host has one processor and a periodic timer because of three faults in the emulation of QEMU 7.2. With two
//! processors, guests hung or crashed the host:
//! - VMRUN leaves `exception_index` set after it injected an interrupt. The next kick of the processor that is not an
//!   interrupt delivers the vector again, and the guest deadlocks in its interrupt handler. Only other processors send
//!   such kicks.
//! - A processor can execute an `int3` that another processor has already patched away. KVM patches the scheduler when
//!   the first guest starts and the last one ends.
//! - VMRUN and #VMEXIT change `interrupt_request` without the lock, so an interrupt can be lost. A one-shot timer never
//!   fires again then, but a periodic timer does: hence `nohz=off highres=off`.

use std::fmt::Write;
use std::path::PathBuf;
use std::process::{Command, ExitStatus};
use std::time::{Duration, Instant};
use std::{fs, io};

use crate::initramfs::{Initramfs, InitramfsError};
use crate::kernels::{DebianKernel, ModuleError, Series};
use crate::paths::Missing;
use crate::process::{Process, ProcessError};

/// Why a lab run has no result.
#[derive(Debug, thiserror::Error)]
pub enum LabError {
    /// The kernel has not been fetched.
    #[error(transparent)]
    Missing(#[from] Missing),
    /// A module of the kernel cannot be read.
    #[error(transparent)]
    Module(#[from] ModuleError),
    /// The initramfs cannot be built.
    #[error(transparent)]
    Initramfs(#[from] InitramfsError),
    /// The initramfs cannot be written.
    #[error("the lab's folder cannot be written")]
    Write(#[from] io::Error),
    /// QEMU could not be run, or did not end before the time limit. The source has its output.
    #[error("the lab host did not come to its end")]
    Qemu(#[from] ProcessError),
    /// QEMU ended before all commands did.
    #[error(
        "the lab host ended ({status}) before command {command:?} did; its console ends with:\n{tail}"
    )]
    Died {
        /// Exit status of QEMU.
        status: ExitStatus,
        /// The first command without an exit status.
        command: String,
        /// Last lines of the console and of QEMU's messages.
        tail: String,
    },
}

/// Result of one command.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Outcome {
    /// The command.
    pub command: String,
    /// Output on stdout and stderr, and everything else that the console printed in the meantime.
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

/// Result of a lab run.
#[derive(Clone, Debug)]
pub struct Report {
    /// Kernel release of the lab host, as `uname -r` prints it.
    pub release: String,
    /// Results of the commands, in order.
    pub outcomes: Vec<Outcome>,
    /// Complete output of the serial console.
    pub console: String,
    /// Time from the start of QEMU to its end.
    pub took: Duration,
}

/// Builder for a lab run.
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
    /// Returns a builder for a host with this kernel, 3 GiB of memory and a time limit of two minutes.
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

    /// Sets the memory of the lab host.
    #[must_use]
    pub fn memory_mib(mut self, memory_mib: u32) -> Self {
        self.memory_mib = memory_mib;
        self
    }

    /// Sets the time limit of the whole run.
    #[must_use]
    pub fn limit(mut self, limit: Duration) -> Self {
        self.limit = limit;
        self
    }

    /// Copies a program and its shared libraries into the lab host.
    #[must_use]
    pub fn program(mut self, source: impl Into<PathBuf>, path: impl Into<String>) -> Self {
        self.programs.push((source.into(), path.into()));
        self
    }

    /// Copies a file into the lab host.
    #[must_use]
    pub fn file(mut self, source: impl Into<PathBuf>, path: impl Into<String>) -> Self {
        self.files.push((source.into(), path.into()));
        self
    }

    /// Adds a shell command to run in the lab host, after those added before.
    #[must_use]
    pub fn command(mut self, command: impl Into<String>) -> Self {
        self.commands.push(command.into());
        self
    }

    /// Boots the lab host and runs the commands. A command that fails is not an error.
    ///
    /// # Errors
    /// Returns [`LabError`] if a file is missing, or if the host did not run all commands to their ends.
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

    /// Returns the command line of QEMU.
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

    /// Parses the outcomes from the console. Returns the first command without one as an error.
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

/// CPU model: an EPYC without the features that QEMU 7.2 cannot emulate and warns of.
const CPU: &str = "EPYC,+svm,+npt,-rdseed,-sha-ni,-fxsr-opt,-misalignsse,-3dnowprefetch,-osvw,\
                   -topoext,-nrip-save,-xsavec";

/// Kernel command line of the lab host. The documentation of the module says why the timer is periodic.
const COMMAND_LINE: &str = "console=ttyS0 quiet panic=-1 mitigations=off nohz=off highres=off";

/// First part of `/init`. `reboot -f` ends QEMU because of its option `-no-reboot`. Kernel messages below the level of
/// errors stay off the console, where they would interrupt the output of the commands.
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

/// Returns the output and the exit status between the marks of `/init`.
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
