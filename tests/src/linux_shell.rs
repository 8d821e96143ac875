//! A stock Linux guest at its shell, which is asked by typing.

use std::time::Duration;

use crate::ferry::Ferry;
use crate::linux_guest::READY;
use crate::machine::Machine;

/// A guest of an emulated host boots in about ten seconds; a busy machine needs more.
pub const BOOT_LIMIT: Duration = Duration::from_secs(100);
/// How long the answer to a question may take.
pub const SHELL_LIMIT: Duration = Duration::from_secs(30);

/// A guest at its shell.
#[derive(Debug)]
pub struct LinuxShell {
    /// Its monitor.
    pub ferry: Ferry,
}

impl LinuxShell {
    /// Boots a guest and waits for its shell; what fails, panics.
    ///
    /// # Panics
    /// No monitor, no shell.
    #[must_use]
    pub fn boot(machine: &Machine, options: &[&str]) -> Self {
        let shell = Self {
            ferry: Ferry::run_with(machine, options).unwrap(),
        };
        shell.is_ready(0);
        shell
    }

    /// Waits for the shell in the output behind `mark`.
    ///
    /// # Panics
    /// It does not come.
    pub fn is_ready(&self, mark: usize) {
        let serial = self.ferry.serial();
        serial.wait_after(mark, READY, BOOT_LIMIT).unwrap();
        serial.wait_after(mark, "/ # ", SHELL_LIMIT).unwrap();
    }

    /// Types a command and waits for what only the guest can have computed.
    ///
    /// # Panics
    /// It does not come.
    pub fn ask(&mut self, command: &str, answer: &str) {
        self.ask_patiently(command, answer, SHELL_LIMIT);
    }

    /// As [`Self::ask`], for what takes longer.
    ///
    /// # Panics
    /// It does not come.
    pub fn ask_patiently(&mut self, command: &str, answer: &str, limit: Duration) {
        let mark = self.ferry.serial().mark();
        self.ferry.type_in(&format!("{command}\n")).unwrap();
        let serial = self.ferry.serial();
        serial.wait_after(mark, answer, limit).unwrap();
    }

    /// Waits for the end of the guest and of its monitor.
    ///
    /// # Panics
    /// It does not end, or not well.
    pub fn ends(mut self) {
        let ended = self.ferry.wait(SHELL_LIMIT).unwrap();
        assert!(ended.status.success(), "{ended:?}");
    }
}
