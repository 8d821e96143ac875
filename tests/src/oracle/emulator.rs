//! Shared parts of the machines: a working directory, an assembled stub, an emulator with a time limit, and conversions
//! between words and bytes.

use std::io::{self, Error, ErrorKind};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use tempfile::TempDir;

use crate::console::tail;
use crate::errors::chain;
use crate::oracle::{Access, Layout, Scenario};
use crate::process::{self, Ended, ProcessError};

/// Size of a page in bytes.
pub(super) const PAGE: u64 = 4096;

/// Time limit for an emulator. A run that takes longer hangs.
pub(super) const EMULATOR_LIMIT: Duration = Duration::from_secs(120);

/// Time limit for an assembler or a linker.
const TOOL_LIMIT: Duration = Duration::from_secs(30);

/// Program for the machine, as assembler source.
pub(super) struct Stub<'a> {
    /// The source.
    pub(super) source: &'a str,
    /// The assembler and its options.
    pub(super) assembler: &'a [&'a str],
    /// Symbols that the source leaves undefined, with their values.
    pub(super) symbols: &'a [(&'a str, u64)],
    /// The linker and its options.
    pub(super) linker: &'a [&'a str],
}

/// Temporary working directory of one scenario.
pub(super) struct Folder(TempDir);

impl Folder {
    /// Makes an empty directory.
    pub(super) fn new() -> io::Result<Self> {
        tempfile::tempdir().map(Self)
    }

    /// Returns the path of a file in the directory.
    pub(super) fn file(&self, name: &str) -> PathBuf {
        self.path().join(name)
    }

    /// Returns the path of the directory.
    pub(super) fn path(&self) -> &Path {
        self.0.path()
    }

    /// Assembles and links the program `stub`.
    pub(super) fn build(&self, stub: &Stub<'_>) -> io::Result<()> {
        std::fs::write(self.file("stub.s"), stub.source)?;
        let mut assembler = command(stub.assembler);
        for (name, value) in stub.symbols {
            assembler.args(["--defsym", &format!("{name}={value:#x}")]);
        }
        self.succeed(assembler.args(["-o", "stub.o", "stub.s"]), TOOL_LIMIT)?;
        let mut linker = command(stub.linker);
        self.succeed(linker.args(["-o", "stub", "stub.o"]), TOOL_LIMIT)
    }

    /// Runs an emulator to its end; any exit status is accepted. Threads of one process take turns, because each
    /// emulator keeps a processor busy.
    pub(super) fn emulate(&self, emulator: &mut Command, limit: Duration) -> io::Result<Ended> {
        static TURN: Mutex<()> = Mutex::new(());
        let _turn = TURN.lock().unwrap_or_else(PoisonError::into_inner);
        self.run(emulator, limit)
    }

    /// Runs a program that must end with status 0.
    fn succeed(&self, program: &mut Command, limit: Duration) -> io::Result<()> {
        let ended = self.run(program, limit)?;
        if ended.status.success() {
            return Ok(());
        }
        Err(failure(&program.get_program().to_string_lossy(), &ended))
    }

    /// Runs a program in the directory to its end.
    fn run(&self, program: &mut Command, limit: Duration) -> io::Result<Ended> {
        process::run(program.current_dir(self.path()), limit).map_err(not_run)
    }
}

/// Returns an error for a program that failed, with the last lines of its output.
pub(super) fn failure(program: &str, ended: &Ended) -> Error {
    let said = said(&ended.stdout, &ended.stderr);
    Error::other(format!("{program}: {}{said}", ended.status))
}

/// Returns an error for a program that did not start or did not end.
fn not_run(error: ProcessError) -> Error {
    match error {
        ProcessError::TimedOut {
            program,
            limit,
            stdout,
            stderr,
        } => {
            let said = said(&stdout, &stderr);
            let text = format!("{program} was still running after {limit:?}{said}");
            Error::new(ErrorKind::TimedOut, text)
        }
        ProcessError::Start { ref source, .. } | ProcessError::Wait { ref source, .. } => {
            Error::new(source.kind(), chain(&error))
        }
    }
}

fn said(stdout: &str, stderr: &str) -> String {
    format!(
        "\n--- stdout\n{}\n--- stderr\n{}",
        tail(stdout.as_bytes()),
        tail(stderr.as_bytes())
    )
}

/// Returns a command for a program and its options.
pub(super) fn command(words: &[&str]) -> Command {
    let (program, options) = words.split_first().unwrap_or((&"", &[]));
    let mut command = Command::new(program);
    command.args(options);
    command
}

/// Returns an error for a scenario that a machine with this layout cannot run: tables that are not whole pages or do
/// not fit, too many probes, and probes that are not page-aligned or have more than `gpa_bits` bits.
pub(super) fn check(
    scenario: &Scenario,
    layout: &Layout,
    most_probes: u64,
    gpa_bits: u32,
) -> io::Result<()> {
    let tables = scenario.tables.len() as u64;
    if tables > layout.tables_bytes || !tables.is_multiple_of(PAGE) {
        return Err(unusable(format!("{tables} bytes of tables")));
    }
    let probes = scenario.probes.len();
    if probes as u64 > most_probes {
        return Err(unusable(format!("{probes} probes")));
    }
    let mut gpas = scenario.probes.iter().map(|probe| probe.gpa);
    let misplaced = |&gpa: &u64| !gpa.is_multiple_of(PAGE) || gpa.checked_shr(gpa_bits) > Some(0);
    match gpas.find(misplaced) {
        Some(gpa) => Err(unusable(format!("a probe at {gpa:#x}"))),
        None => Ok(()),
    }
}

/// Returns an error for an invalid scenario.
pub(super) fn unusable(what: String) -> Error {
    Error::new(
        ErrorKind::InvalidInput,
        format!("this machine cannot have {what}"),
    )
}

/// Returns an error for an invalid answer.
pub(super) fn senseless(what: String) -> Error {
    Error::new(ErrorKind::InvalidData, format!("no answer: {what}"))
}

/// Returns the number of an access in all stubs.
pub(super) const fn access_code(access: Access) -> u64 {
    match access {
        Access::Read => 0,
        Access::Write => 1,
        Access::Execute => 2,
    }
}

/// Returns words as little-endian bytes.
pub(super) fn bytes(words: impl IntoIterator<Item = u64>) -> Vec<u8> {
    words.into_iter().flat_map(u64::to_le_bytes).collect()
}

/// Returns little-endian bytes as words, without an incomplete word at the end.
pub(super) fn words(bytes: &[u8]) -> Vec<u64> {
    let (words, _) = bytes.as_chunks();
    words.iter().copied().map(u64::from_le_bytes).collect()
}

/// A size from a memory map, which whatever runs this can count.
pub(super) fn size(bytes: u64) -> usize {
    usize::try_from(bytes).unwrap_or(usize::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn programs_that_fail_or_hang_say_why() {
        let folder = Folder::new().unwrap();
        let shell = |script| command(&["sh", "-c", script]);
        folder.succeed(&mut shell("true"), TOOL_LIMIT).unwrap();

        let mut failing = shell("echo no such thing >&2; exit 3");
        let error = folder.succeed(&mut failing, TOOL_LIMIT).unwrap_err();
        assert!(error.to_string().contains("no such thing"), "{error}");

        let mut hanging = shell("echo waiting; exec sleep 600");
        let error = folder
            .emulate(&mut hanging, Duration::from_millis(500))
            .unwrap_err();
        assert_eq!(error.kind(), ErrorKind::TimedOut);
        assert!(error.to_string().contains("waiting"), "{error}");

        let mut missing = command(&["no-such-program"]);
        let error = folder.succeed(&mut missing, TOOL_LIMIT).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::NotFound);
        assert!(error.to_string().contains("no-such-program"), "{error}");
    }
}
