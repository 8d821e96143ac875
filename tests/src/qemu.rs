//! Runs QEMU for comparisons: a microvm with the same PVH guest, migrated live over TCP on the loopback interface with
//! multifd.

use std::net::SocketAddr;
use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};
use std::{fmt, io, thread};

use serde_json::{Value, json};
use tempfile::TempDir;

use crate::console::Console;
use crate::machine::Machine;
use crate::process::{Ended, Process, ProcessError};
use crate::qmp::{Qmp, QmpError};

/// Number of multifd connections.
pub const CHANNELS: u32 = 2;
/// Time limit for the destination to run a guest that has arrived.
const START_LIMIT: Duration = Duration::from_secs(30);

/// Error of a QEMU process or of its migration.
#[derive(Debug, thiserror::Error)]
pub enum QemuError {
    /// The process could not be started or did not end.
    #[error(transparent)]
    Process(#[from] ProcessError),
    /// The QMP connection failed.
    #[error("{source}; QEMU says: {stderr}")]
    Qmp {
        /// The error of the connection.
        source: QmpError,
        /// Output of QEMU on stderr.
        stderr: String,
    },
    /// The temporary directory for the QMP socket cannot be made.
    #[error("no folder for QEMU's control socket")]
    Folder(#[from] io::Error),
    /// An answer lacks a field.
    #[error("QEMU's answer has no {field}: {answer}")]
    Field {
        /// The field.
        field: &'static str,
        /// The complete answer.
        answer: Value,
    },
    /// The migration failed.
    #[error("the migration ended as {0}")]
    Migration(Value),
    /// The migration was still running at its deadline.
    #[error("the migration is not complete after {0:?}")]
    Overdue(Duration),
}

/// Migration limits of QEMU.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Limits {
    /// Default settings of QEMU: at most 128 MiB/s and a downtime of at most 300 ms.
    Defaults,
    /// No limit on the bandwidth, and this limit on the downtime.
    Downtime(Duration),
}

impl Limits {
    /// Returns the migration parameters of QEMU, or none for the default settings.
    fn parameters(self) -> Value {
        /// 1 TiB/s, which is more than any machine reaches.
        const UNLIMITED: u64 = 1 << 40;
        match self {
            Self::Defaults => json!({}),
            Self::Downtime(limit) => {
                let milliseconds = u64::try_from(limit.as_millis()).unwrap_or(u64::MAX);
                json!({"downtime-limit": milliseconds, "max-bandwidth": UNLIMITED})
            }
        }
    }
}

/// Figures of one migration.
#[derive(Clone, Copy, Debug)]
pub struct Migrated {
    /// Time from the command to the event `completed`, by the clock of the test.
    pub wall: Duration,
    /// `total-time` as QEMU reports it.
    pub total: Duration,
    /// `downtime` as QEMU reports it.
    pub downtime: Duration,
    /// Bytes sent, as QEMU reports them.
    pub bytes: u64,
}

/// Role of a QEMU process.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Side {
    Source,
    Destination,
}

/// Running QEMU process.
#[derive(Debug)]
pub struct Qemu {
    process: Process,
    qmp: Qmp,
    _folder: TempDir,
}

impl Qemu {
    /// Starts QEMU with a guest.
    ///
    /// # Errors
    /// Returns [`QemuError`] with the messages of QEMU if it does not start.
    pub fn start(machine: &Machine) -> Result<Self, QemuError> {
        Self::launch(machine, Side::Source)
    }

    /// Starts QEMU as the destination of [`Qemu::migrate`].
    ///
    /// # Errors
    /// Returns [`QemuError`] with the messages of QEMU if it does not start.
    pub fn start_incoming(machine: &Machine) -> Result<Self, QemuError> {
        Self::launch(machine, Side::Destination)
    }

    fn launch(machine: &Machine, side: Side) -> Result<Self, QemuError> {
        let folder = tempfile::tempdir()?;
        let socket = folder.path().join("qmp");
        let mut process = Process::start(&mut command(machine, &socket, side))?;
        match Qmp::connect(&socket, Duration::from_secs(10)) {
            Ok(qmp) => Ok(Self {
                process,
                qmp,
                _folder: folder,
            }),
            Err(source) => {
                process.kill();
                Err(QemuError::Qmp {
                    source,
                    stderr: process.stderr().text(),
                })
            }
        }
    }

    /// Serial output of the guest.
    pub fn serial(&self) -> &Console {
        self.process.stdout()
    }

    /// Types into the serial port of the guest.
    ///
    /// # Errors
    /// Returns the error of the operating system.
    pub fn type_in(&mut self, text: &str) -> io::Result<()> {
        self.process.type_in(text)
    }

    /// Waits for the process to end after its guest has ended.
    ///
    /// # Errors
    /// Returns [`QemuError`] if the process is still running at the deadline.
    pub fn wait(&mut self, limit: Duration) -> Result<Ended, QemuError> {
        Ok(self.process.wait(limit)?)
    }

    /// Migrates the running guest to `destination` and returns the figures of the migration.
    ///
    /// # Errors
    /// Returns [`QemuError::Overdue`] if the migration is not complete within `patience`, or another [`QemuError`] if a
    /// side refuses or the migration fails.
    pub fn migrate(
        &mut self,
        destination: &mut Self,
        limits: Limits,
        patience: Duration,
    ) -> Result<Migrated, QemuError> {
        let address = destination.listen()?;
        self.set_multifd()?;
        self.call("migrate-set-parameters", &limits.parameters())?;
        let started = Instant::now();
        self.call("migrate", &json!({"uri": format!("tcp:{address}")}))?;
        self.wait_completed(patience)?;
        let wall = started.elapsed();
        destination.wait_running()?;
        let report = self.call("query-migrate", &json!({}))?;
        Ok(Migrated {
            wall,
            total: Duration::from_millis(number(&report, "total-time", &report["total-time"])?),
            downtime: Duration::from_millis(number(&report, "downtime", &report["downtime"])?),
            bytes: number(&report, "ram.transferred", &report["ram"]["transferred"])?,
        })
    }

    /// Sets the capabilities and parameters that must be equal on both sides.
    fn set_multifd(&mut self) -> Result<(), QemuError> {
        let on = |name| json!({"capability": name, "state": true});
        let capabilities = json!({"capabilities": [on("multifd"), on("events")]});
        self.call("migrate-set-capabilities", &capabilities)?;
        self.call(
            "migrate-set-parameters",
            &json!({"multifd-channels": CHANNELS}),
        )?;
        Ok(())
    }

    /// Lets the destination listen on a free port that QEMU chooses.
    fn listen(&mut self) -> Result<SocketAddr, QemuError> {
        self.set_multifd()?;
        self.call("migrate-incoming", &json!({"uri": "tcp:127.0.0.1:0"}))?;
        let answer = self.call("query-migrate", &json!({}))?;
        let address = &answer["socket-address"][0];
        let text = match (address["host"].as_str(), address["port"].as_str()) {
            (Some(host), Some(port)) => format!("{host}:{port}"),
            _ => String::new(),
        };
        text.parse().map_err(|_| QemuError::Field {
            field: "socket-address",
            answer,
        })
    }

    fn wait_completed(&mut self, patience: Duration) -> Result<(), QemuError> {
        let deadline = Instant::now() + patience;
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            let event = match self.qmp.event(left) {
                Ok(event) => event,
                Err(_) if Instant::now() >= deadline => return Err(QemuError::Overdue(patience)),
                Err(source) => return Err(self.failed(source)),
            };
            if event["event"] != "MIGRATION" {
                continue;
            }
            match event["data"]["status"].as_str() {
                Some("completed") => return Ok(()),
                Some("failed" | "cancelled") => return Err(QemuError::Migration(event)),
                _ => {}
            }
        }
    }

    /// Waits until the destination serves the serial port. Input that is typed earlier is lost.
    fn wait_running(&mut self) -> Result<(), QemuError> {
        let deadline = Instant::now() + START_LIMIT;
        loop {
            let answer = self.call("query-status", &json!({}))?;
            if answer["running"] == true {
                return Ok(());
            }
            if Instant::now() >= deadline {
                return Err(QemuError::Migration(answer));
            }
            thread::sleep(Duration::from_millis(1));
        }
    }

    fn call(&mut self, command: &str, arguments: &Value) -> Result<Value, QemuError> {
        self.qmp
            .execute(command, arguments)
            .map_err(|source| self.failed(source))
    }

    fn failed(&self, source: QmpError) -> QemuError {
        QemuError::Qmp {
            source,
            stderr: self.process.stderr().text(),
        }
    }
}

/// Returns the command line of QEMU. The microvm has the devices that the guest needs: serial port, PIC and PIT, and no
/// ACPI.
fn command(machine: &Machine, socket: &Path, side: Side) -> Command {
    let mut command = Command::new("qemu-system-x86_64");
    command
        .args(["-M", "microvm,acpi=off", "-enable-kvm"])
        .args([
            "-smp",
            &machine.cpus.to_string(),
            "-m",
            &machine.memory_mib.to_string(),
        ])
        .arg("-kernel")
        .arg(&machine.kernel)
        .args([
            "-nodefaults",
            "-display",
            "none",
            "-no-reboot",
            "-serial",
            "stdio",
        ])
        .args(["-device", "isa-debug-exit,iobase=0xf4,iosize=1"])
        .args([
            "-qmp",
            &format!("unix:{},server=on,wait=off", socket.display()),
        ]);
    if let Some(initramfs) = &machine.initramfs {
        command.arg("-initrd").arg(initramfs);
    }
    if side == Side::Destination {
        command.args(["-incoming", "defer"]);
    }
    command
}

fn number(answer: &Value, field: &'static str, value: &Value) -> Result<u64, QemuError> {
    value.as_u64().ok_or_else(|| QemuError::Field {
        field,
        answer: answer.clone(),
    })
}

impl fmt::Display for Migrated {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mib = self.bytes >> 20;
        write!(
            f,
            "{:?} (downtime {:?}, {mib} MiB)",
            self.wall, self.downtime
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn machine() -> Machine {
        Machine {
            kernel: "guest.elf".into(),
            initramfs: None,
            cmdline: "cpus=1".to_owned(),
            memory_mib: 64,
            cpus: 1,
        }
    }

    fn words(side: Side) -> Vec<String> {
        let command = command(&machine(), Path::new("socket"), side);
        command
            .get_args()
            .map(|word| word.to_string_lossy().into_owned())
            .collect()
    }

    #[test]
    fn only_the_destination_waits_for_a_guest() {
        assert!(!words(Side::Source).contains(&"-incoming".to_owned()));
        let mut destination = words(Side::Destination);
        assert_eq!(
            destination.split_off(destination.len() - 2),
            ["-incoming", "defer"]
        );
        assert_eq!(destination, words(Side::Source));
    }

    #[test]
    fn a_kernel_that_is_not_there_is_told_in_qemus_words() {
        let error = Qemu::start(&machine()).unwrap_err().to_string();
        assert!(error.contains("guest.elf"), "{error}");
    }
}
