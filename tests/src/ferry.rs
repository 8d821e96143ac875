//! Drives processes of the program `ferry`, and makes sure that none is left over.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};
use std::{io, thread};

use serde_json::Value;
use tempfile::TempDir;

use crate::console::Console;
use crate::endpoint::Endpoint;
use crate::machine::Machine;
use crate::paths::{self, Missing};
use crate::process::{self, Apart, Ended, Process, ProcessError};
use crate::status::Resident;

/// How long a monitor may take until its API answers, and a call to be carried out.
const API_LIMIT: Duration = Duration::from_secs(20);
/// How long `ferry ctl send-migration` may take, at most.
const MIGRATION_LIMIT: Duration = Duration::from_secs(120);

/// Why a process of `ferry` did not do what was asked.
#[derive(Debug, thiserror::Error)]
pub enum FerryError {
    /// The program was not built.
    #[error(transparent)]
    Missing(#[from] Missing),
    /// The process did not start or did not end.
    #[error(transparent)]
    Process(#[from] ProcessError),
    /// No folder for its sockets.
    #[error("no folder for ferry's sockets")]
    Folder(#[from] io::Error),
    /// It did not come up.
    #[error(
        "ferry {verb} is not up after {limit:?} (still running: {running}); it says:\n{output}"
    )]
    NotUp {
        /// `run` or `receive`.
        verb: &'static str,
        /// How long it was given.
        limit: Duration,
        /// Whether it was still running.
        running: bool,
        /// Its output.
        output: String,
    },
    /// A `ferry ctl` call failed.
    #[error("ferry ctl {call}: status {status}:\n{output}")]
    Call {
        /// The call with its arguments.
        call: String,
        /// The exit status.
        status: String,
        /// What it said.
        output: String,
    },
    /// A `ferry ctl` call did not answer in JSON.
    #[error("ferry ctl {call}: no JSON: {output:?}")]
    NoJson {
        /// The call with its arguments.
        call: String,
        /// What it said.
        output: String,
        /// Where it is wrong.
        source: serde_json::Error,
    },
}

/// A running `ferry run` or `ferry receive`; killed when dropped, its sockets removed.
#[derive(Debug)]
pub struct Ferry {
    process: Process,
    program: PathBuf,
    folder: TempDir,
}

impl Ferry {
    /// `ferry run` with the guest's serial port on stdio; returns when its API is there.
    ///
    /// # Errors
    /// [`FerryError`] with what the process said.
    pub fn run(machine: &Machine) -> Result<Self, FerryError> {
        Self::run_with(machine, &[])
    }

    /// As [`Ferry::run`], with further options.
    ///
    /// # Errors
    /// [`FerryError`] with what the process said.
    pub fn run_with(machine: &Machine, options: &[&str]) -> Result<Self, FerryError> {
        Self::run_as(Command::new(paths::ferry()?), machine, options)
    }

    fn run_as(command: Command, machine: &Machine, options: &[&str]) -> Result<Self, FerryError> {
        let mut ferry = Self::start_as(command, |command, api| {
            run_options(command, machine);
            command
                .args(options)
                .args(["--serial", "stdio", "--api-socket"])
                .arg(api);
        })?;
        ferry.wait_up("run", |ferry| ferry.api_socket().exists())?;
        Ok(ferry)
    }

    /// As [`Ferry::run_with`], in a network of its own, in which the shell commands of `prepare` were run before.
    ///
    /// # Errors
    /// [`FerryError`] with what the process said.
    pub fn run_in_network(
        machine: &Machine,
        options: &[&str],
        prepare: &str,
    ) -> Result<Self, FerryError> {
        let program = paths::ferry()?;
        let command = process::apart(&program, Apart::MountsAndNetwork, prepare)?;
        Self::run_as(command, machine, options)
    }

    /// `ferry run` without a guest, with further options; returns when its API is there.
    ///
    /// # Errors
    /// [`FerryError`] with what the process said.
    pub fn empty(options: &[&str]) -> Result<Self, FerryError> {
        let mut ferry = Self::start(|command, api| {
            command
                .arg("run")
                .args(options)
                .arg("--api-socket")
                .arg(api);
        })?;
        ferry.wait_up("run", |ferry| ferry.api_socket().exists())?;
        Ok(ferry)
    }

    /// `ferry receive` with the guest's serial port on stdio; returns when it listens.
    ///
    /// # Errors
    /// [`FerryError`] with what the process said.
    pub fn receive(endpoint: &Endpoint) -> Result<Self, FerryError> {
        Self::receive_with(endpoint, &[])
    }

    /// As [`Ferry::receive`], with further options.
    ///
    /// # Errors
    /// [`FerryError`] with what the process said.
    pub fn receive_with(endpoint: &Endpoint, options: &[&str]) -> Result<Self, FerryError> {
        let mut ferry = Self::start(|command, api| {
            command.args(["receive", &endpoint.to_string()]);
            command.args(options);
            command.args(["--serial", "stdio", "--api-socket"]).arg(api);
        })?;
        let step = Duration::from_millis(2);
        // The socket is there a moment before the monitor says so.
        ferry.wait_up("receive", |ferry| {
            endpoint.wait_listening(step) && ferry.phase().is_ok_and(|phase| phase == "listening")
        })?;
        Ok(ferry)
    }

    fn start(describe: impl FnOnce(&mut Command, &Path)) -> Result<Self, FerryError> {
        Self::start_as(Command::new(paths::ferry()?), describe)
    }

    fn start_as(
        mut command: Command,
        describe: impl FnOnce(&mut Command, &Path),
    ) -> Result<Self, FerryError> {
        let folder = tempfile::tempdir()?;
        describe(&mut command, &folder.path().join("api"));
        Ok(Self {
            process: Process::start(&mut command)?,
            program: paths::ferry()?,
            folder,
        })
    }

    fn wait_up(
        &mut self,
        verb: &'static str,
        up: impl Fn(&Self) -> bool,
    ) -> Result<(), FerryError> {
        let deadline = Instant::now() + API_LIMIT;
        while !up(self) {
            let running = self.process.is_running();
            if !running || Instant::now() >= deadline {
                return Err(FerryError::NotUp {
                    verb,
                    limit: API_LIMIT,
                    running,
                    output: self.said(),
                });
            }
            thread::sleep(Duration::from_millis(1));
        }
        Ok(())
    }

    /// The API socket's path.
    pub fn api_socket(&self) -> PathBuf {
        self.folder.path().join("api")
    }

    /// The process id.
    pub fn pid(&self) -> u32 {
        self.process.pid()
    }

    /// The guest's serial output, and whatever else ferry writes to stdout.
    pub fn serial(&self) -> &Console {
        self.process.stdout()
    }

    /// What ferry writes to stderr.
    pub fn messages(&self) -> &Console {
        self.process.stderr()
    }

    /// Types into the guest's serial port.
    ///
    /// # Errors
    /// The system's error.
    pub fn type_in(&mut self, text: &str) -> io::Result<()> {
        self.process.type_in(text)
    }

    /// Whether the process is still running.
    pub fn is_running(&mut self) -> bool {
        self.process.is_running()
    }

    /// Kills the process, as a crash of the monitor would.
    pub fn kill(&mut self) {
        self.process.kill();
    }

    /// Waits for the process's end.
    ///
    /// # Errors
    /// [`FerryError::Process`] when it is still running at the deadline.
    pub fn wait(&mut self, limit: Duration) -> Result<Ended, FerryError> {
        Ok(self.process.wait(limit)?)
    }

    /// The process's resident memory.
    ///
    /// # Errors
    /// The system's error.
    pub fn resident(&self) -> io::Result<Resident> {
        Resident::of(self.pid())
    }

    /// `ferry ctl --api-socket … CALL…`, whatever its outcome.
    ///
    /// # Errors
    /// [`FerryError::Process`] when it does not come back.
    pub fn try_ctl(&self, call: &[&str], limit: Duration) -> Result<Ended, FerryError> {
        let mut command = Command::new(&self.program);
        command
            .args(["ctl", "--api-socket"])
            .arg(self.api_socket())
            .args(call);
        Ok(process::run(&mut command, limit)?)
    }

    /// A call that must succeed; returns its stdout.
    ///
    /// # Errors
    /// [`FerryError::Call`] with what it said.
    pub fn ctl(&self, call: &[&str]) -> Result<String, FerryError> {
        self.succeeding(call, API_LIMIT)
    }

    /// A call that must succeed and answer in JSON.
    ///
    /// # Errors
    /// [`FerryError`] with what it said.
    pub fn ctl_json(&self, call: &[&str]) -> Result<Value, FerryError> {
        let output = self.ctl(call)?;
        let parsed = serde_json::from_str(&output);
        parsed.map_err(|source| FerryError::NoJson {
            call: call.join(" "),
            output,
            source,
        })
    }

    /// The phase of the migration into or out of this process, as the API names it.
    ///
    /// # Errors
    /// [`FerryError`] with what it said.
    pub fn phase(&self) -> Result<String, FerryError> {
        let progress = self.ctl_json(&["migration-progress"])?;
        Ok(progress["phase"].as_str().unwrap_or_default().to_owned())
    }

    /// Sends the guest to `endpoint`; returns when it was handed over.
    ///
    /// # Errors
    /// [`FerryError::Call`] with the reason that reached the caller.
    pub fn send_migration(
        &self,
        endpoint: &Endpoint,
        options: &[&str],
    ) -> Result<String, FerryError> {
        let target = endpoint.to_string();
        let call: Vec<&str> = ["send-migration", &target]
            .into_iter()
            .chain(options.iter().copied())
            .collect();
        self.succeeding(&call, MIGRATION_LIMIT)
    }

    fn succeeding(&self, call: &[&str], limit: Duration) -> Result<String, FerryError> {
        let ended = self.try_ctl(call, limit)?;
        if ended.status.success() {
            return Ok(ended.stdout);
        }
        let output = format!("{}{}", ended.stdout, ended.stderr);
        Err(FerryError::Call {
            call: call.join(" "),
            status: ended.status.to_string(),
            output,
        })
    }

    fn said(&self) -> String {
        format!("{}{}", self.serial().text(), self.messages().text())
    }
}

/// Runs `ferry` with these arguments to its end, whatever its outcome.
///
/// # Errors
/// [`FerryError`] when it cannot be run or does not end.
pub fn invoke(arguments: &[&str], limit: Duration) -> Result<Ended, FerryError> {
    Ok(process::run(
        Command::new(paths::ferry()?).args(arguments),
        limit,
    )?)
}

fn run_options(command: &mut Command, machine: &Machine) {
    command.arg("run").arg("--kernel").arg(&machine.kernel);
    if let Some(initramfs) = &machine.initramfs {
        command.arg("--initramfs").arg(initramfs);
    }
    if !machine.cmdline.is_empty() {
        command.args(["--cmdline", &machine.cmdline]);
    }
    command.args(["--cpus", &machine.cpus.to_string()]);
    command.args(["--memory", &format!("{}M", machine.memory_mib)]);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_command_line_follows_the_machine() {
        let mut machine = Machine {
            kernel: "vmlinuz".into(),
            initramfs: Some("guest.cpio".into()),
            cmdline: "console=ttyS0".to_owned(),
            memory_mib: 256,
            cpus: 2,
        };
        let expected = "run --kernel vmlinuz --initramfs guest.cpio --cmdline console=ttyS0 --cpus 2 --memory 256M";
        assert_eq!(words(&machine), expected);
        (machine.initramfs, machine.cmdline) = (None, String::new());
        assert_eq!(
            words(&machine),
            "run --kernel vmlinuz --cpus 2 --memory 256M"
        );
    }

    fn words(machine: &Machine) -> String {
        let mut command = Command::new("ferry");
        run_options(&mut command, machine);
        let words: Vec<_> = command
            .get_args()
            .map(|word| word.to_string_lossy())
            .collect();
        words.join(" ")
    }
}
