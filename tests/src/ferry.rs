//! Starts and controls processes of the program `ferry`, and kills those that a test leaves behind.

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

/// Time limit for a monitor to open its API socket, and for one API call.
const API_LIMIT: Duration = Duration::from_secs(20);
/// Time limit for `ferry ctl send-migration`.
const MIGRATION_LIMIT: Duration = Duration::from_secs(120);

/// Error of a `ferry` process or of a `ferry ctl` call.
#[derive(Debug, thiserror::Error)]
pub enum FerryError {
    /// The program has not been built.
    #[error(transparent)]
    Missing(#[from] Missing),
    /// The process could not be started or did not end.
    #[error(transparent)]
    Process(#[from] ProcessError),
    /// The temporary directory for the sockets cannot be made.
    #[error("no folder for ferry's sockets")]
    Folder(#[from] io::Error),
    /// The monitor did not open its socket in time.
    #[error(
        "ferry {verb} is not up after {limit:?} (still running: {running}); it says:\n{output}"
    )]
    NotUp {
        /// `run` or `receive`.
        verb: &'static str,
        /// The time limit.
        limit: Duration,
        /// Whether the process was still running.
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
        /// Its output.
        output: String,
    },
    /// The output of a `ferry ctl` call is not JSON.
    #[error("ferry ctl {call}: no JSON: {output:?}")]
    NoJson {
        /// The call with its arguments.
        call: String,
        /// Its output.
        output: String,
        /// The error of the JSON parser.
        source: serde_json::Error,
    },
}

/// Running `ferry run` or `ferry receive`. Dropping it kills the process and removes its sockets.
#[derive(Debug)]
pub struct Ferry {
    process: Process,
    program: PathBuf,
    folder: TempDir,
}

impl Ferry {
    /// Starts `ferry run` with the serial port of the guest on stdio, and waits for its API socket.
    ///
    /// # Errors
    /// Returns [`FerryError`] with the output of the process if it does not come up.
    pub fn run(machine: &Machine) -> Result<Self, FerryError> {
        Self::run_with(machine, &[])
    }

    /// Like [`Ferry::run`], with more options.
    ///
    /// # Errors
    /// Returns [`FerryError`] with the output of the process if it does not come up.
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

    /// Like [`Ferry::run_with`], in a new network namespace in which the shell commands in `prepare` run first.
    ///
    /// # Errors
    /// Returns [`FerryError`] with the output of the process if it does not come up.
    pub fn run_in_network(
        machine: &Machine,
        options: &[&str],
        prepare: &str,
    ) -> Result<Self, FerryError> {
        let program = paths::ferry()?;
        let command = process::apart(&program, Apart::MountsAndNetwork, prepare)?;
        Self::run_as(command, machine, options)
    }

    /// Starts `ferry run` without a guest and with more options, and waits for its API socket.
    ///
    /// # Errors
    /// Returns [`FerryError`] with the output of the process if it does not come up.
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

    /// Starts `ferry receive` with the serial port of the guest on stdio, and waits until it listens.
    ///
    /// # Errors
    /// Returns [`FerryError`] with the output of the process if it does not come up.
    pub fn receive(endpoint: &Endpoint) -> Result<Self, FerryError> {
        Self::receive_with(endpoint, &[])
    }

    /// Like [`Ferry::receive`], with more options.
    ///
    /// # Errors
    /// Returns [`FerryError`] with the output of the process if it does not come up.
    pub fn receive_with(endpoint: &Endpoint, options: &[&str]) -> Result<Self, FerryError> {
        let mut ferry = Self::start(|command, api| {
            command.args(["receive", &endpoint.to_string()]);
            command.args(options);
            command.args(["--serial", "stdio", "--api-socket"]).arg(api);
        })?;
        let step = Duration::from_millis(2);
        // The socket exists a moment before the monitor reports that it listens.
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

    /// Path of the API socket.
    pub fn api_socket(&self) -> PathBuf {
        self.folder.path().join("api")
    }

    /// Id of the process.
    pub fn pid(&self) -> u32 {
        self.process.pid()
    }

    /// Serial output of the guest and everything else that ferry writes to stdout.
    pub fn serial(&self) -> &Console {
        self.process.stdout()
    }

    /// Output of ferry on stderr.
    pub fn messages(&self) -> &Console {
        self.process.stderr()
    }

    /// Types into the serial port of the guest.
    ///
    /// # Errors
    /// Returns the error of the operating system.
    pub fn type_in(&mut self, text: &str) -> io::Result<()> {
        self.process.type_in(text)
    }

    /// Whether the process is still running.
    pub fn is_running(&mut self) -> bool {
        self.process.is_running()
    }

    /// Kills the process with SIGKILL, which stands for a crash of the monitor.
    pub fn kill(&mut self) {
        self.process.kill();
    }

    /// Waits for the process to end.
    ///
    /// # Errors
    /// Returns [`FerryError::Process`] if the process is still running at the deadline.
    pub fn wait(&mut self, limit: Duration) -> Result<Ended, FerryError> {
        Ok(self.process.wait(limit)?)
    }

    /// Returns the resident memory of the process.
    ///
    /// # Errors
    /// Returns the error of the operating system.
    pub fn resident(&self) -> io::Result<Resident> {
        Resident::of(self.pid())
    }

    /// Runs `ferry ctl --api-socket … CALL…`. A call that the monitor refuses is not an error.
    ///
    /// # Errors
    /// Returns [`FerryError::Process`] if the process cannot be started or does not end.
    pub fn try_ctl(&self, call: &[&str], limit: Duration) -> Result<Ended, FerryError> {
        let mut command = Command::new(&self.program);
        command
            .args(["ctl", "--api-socket"])
            .arg(self.api_socket())
            .args(call);
        Ok(process::run(&mut command, limit)?)
    }

    /// Runs a call that must succeed. Returns its output on stdout.
    ///
    /// # Errors
    /// Returns [`FerryError::Call`] with the output if the call fails.
    pub fn ctl(&self, call: &[&str]) -> Result<String, FerryError> {
        self.succeeding(call, API_LIMIT)
    }

    /// Runs a call that must succeed. Returns its output as JSON.
    ///
    /// # Errors
    /// Returns [`FerryError`] with the output if the call fails or its output is not JSON.
    pub fn ctl_json(&self, call: &[&str]) -> Result<Value, FerryError> {
        let output = self.ctl(call)?;
        let parsed = serde_json::from_str(&output);
        parsed.map_err(|source| FerryError::NoJson {
            call: call.join(" "),
            output,
            source,
        })
    }

    /// Returns the phase of the migration into or out of this process, by its name in the API.
    ///
    /// # Errors
    /// Returns [`FerryError`] with the output if the call fails or its output is not JSON.
    pub fn phase(&self) -> Result<String, FerryError> {
        let progress = self.ctl_json(&["migration-progress"])?;
        Ok(progress["phase"].as_str().unwrap_or_default().to_owned())
    }

    /// Sends the guest to `endpoint`, and returns when the destination owns it.
    ///
    /// # Errors
    /// Returns [`FerryError::Call`] with the message of `ferry ctl` if the migration fails.
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

/// Runs `ferry` with these arguments to its end. An exit status other than 0 is not an error.
///
/// # Errors
/// Returns [`FerryError`] if the process cannot be started or does not end.
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
