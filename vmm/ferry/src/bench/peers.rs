//! Command lines of the monitors that are measured.

use std::io::ErrorKind;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use crate::Failure;
use vmm::complain::complain;

/// Name of the QEMU binary if the command line names none.
const QEMU: &str = "qemu-system-x86_64";

/// Returns the QEMU binary to compare with: the one that the command line names, or the one in `PATH`. Prints a message and
/// returns `None` if QEMU is not installed.
///
/// # Errors
/// Returns an error if the named binary cannot be started.
pub(super) fn find_qemu(named: Option<&Path>) -> Result<Option<PathBuf>, Failure> {
    let program = named.unwrap_or(Path::new(QEMU));
    let mut command = Command::new(program);
    command
        .arg("--version")
        .stdout(Stdio::null())
        .stderr(Stdio::null());
    match command.status() {
        Ok(_) => Ok(Some(program.into())),
        Err(error) if named.is_none() && error.kind() == ErrorKind::NotFound => {
            complain(format_args!(
                "{QEMU} is not installed, so QEMU is not measured (--qemu FILE names another binary)"
            ));
            Ok(None)
        }
        Err(error) => Err(format!("--qemu {}: {error}", program.display()).into()),
    }
}

/// Returns the command line of QEMU's microvm with these machine properties and no default devices. Guest memory is a memfd,
/// so that /proc counts it separately from the memory of QEMU.
pub(super) fn qemu(program: &Path, properties: &str, memory: u64) -> Command {
    let mib = memory >> 20;
    let mut command = Command::new(program);
    command
        .arg("-M")
        .arg(format!("microvm,memory-backend=ram,{properties}"))
        // Without IA32_ARCH_CAPABILITIES: some KVMs offer it and refuse to set it, which ends QEMU.
        .args(["-accel", "kvm", "-cpu", "host,-arch-capabilities"])
        .args(["-smp", "1", "-m"])
        .arg(mib.to_string())
        .arg("-object")
        .arg(format!("memory-backend-memfd,id=ram,share=on,size={mib}M"))
        .args(["-nodefaults", "-no-user-config", "-display", "none"])
        .args(["-no-reboot", "-serial", "stdio"]);
    command
}

/// Returns the command line of `ferry run` with the serial port on standard output.
pub(super) fn ferry(program: &Path, memory: u64) -> Command {
    let mut command = Command::new(program);
    command.args(["run", "--serial", "stdio", "--memory"]);
    command.arg(memory.to_string());
    command
}
