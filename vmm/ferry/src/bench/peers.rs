//! The programs that Ferry is measured beside.

use std::io::ErrorKind;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use crate::Failure;
use vmm::complain::complain;

/// What is looked for where none is named.
const QEMU: &str = "qemu-system-x86_64";

/// The QEMU to compare with: the one that is named, or the usual one where it is installed. Says on standard error that
/// there is none.
///
/// # Errors
/// The one that is named cannot be started.
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
                "{QEMU} is not installed: it is left out; --qemu names another"
            ));
            Ok(None)
        }
        Err(error) => Err(format!("--qemu {}: {error}", program.display()).into()),
    }
}

/// QEMU's microvm with these properties, as lean as it can be made: nothing in it that nobody asked for. Its memory is
/// a memory file, so that it can be told from QEMU's own.
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

/// `ferry run` of this program, whose guest's serial port is its standard output.
pub(super) fn ferry(program: &Path, memory: u64) -> Command {
    let mut command = Command::new(program);
    command.args(["run", "--serial", "stdio", "--memory"]);
    command.arg(memory.to_string());
    command
}
