//! What every machine here stands on: a folder to work in, a stub made of its source, an emulator that ends in
//! time, and words as bytes.

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

/// Bytes of a page.
pub(super) const PAGE: u64 = 4096;

/// How long an emulator may take: what needs longer does not end at all.
pub(super) const EMULATOR_LIMIT: Duration = Duration::from_secs(120);

/// How long an assembler or a linker may take.
const TOOL_LIMIT: Duration = Duration::from_secs(30);

/// A program for the machine, in the words of its assembler and its linker.
pub(super) struct Stub<'a> {
    /// The source.
    pub(super) source: &'a str,
    /// The assembler and its options.
    pub(super) assembler: &'a [&'a str],
    /// What the source leaves to be defined: numbers by name.
    pub(super) symbols: &'a [(&'a str, u64)],
    /// The linker and its options.
    pub(super) linker: &'a [&'a str],
}

/// The folder that one scenario is played in. It goes when this is dropped.
pub(super) struct Folder(TempDir);

impl Folder {
    /// A new one, empty.
    pub(super) fn new() -> io::Result<Self> {
        tempfile::tempdir().map(Self)
    }

    /// Where a file is, or would be.
    pub(super) fn file(&self, name: &str) -> PathBuf {
        self.path().join(name)
    }

    /// Where it is.
    pub(super) fn path(&self) -> &Path {
        self.0.path()
    }

    /// Makes the file `stub`.
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

    /// Runs an emulator to its end, whatever its status is. One at a time, as each keeps a processor busy.
    pub(super) fn emulate(&self, emulator: &mut Command, limit: Duration) -> io::Result<Ended> {
        static TURN: Mutex<()> = Mutex::new(());
        let _turn = TURN.lock().unwrap_or_else(PoisonError::into_inner);
        self.run(emulator, limit)
    }

    /// Runs a program that must succeed.
    fn succeed(&self, program: &mut Command, limit: Duration) -> io::Result<()> {
        let ended = self.run(program, limit)?;
        if ended.status.success() {
            return Ok(());
        }
        Err(failure(&program.get_program().to_string_lossy(), &ended))
    }

    /// Runs a program in the folder to its end.
    fn run(&self, program: &mut Command, limit: Duration) -> io::Result<Ended> {
        process::run(program.current_dir(self.path()), limit).map_err(not_run)
    }
}

/// An error about a program that ended as it should not, with the last of what it said.
pub(super) fn failure(program: &str, ended: &Ended) -> Error {
    let said = said(&ended.stdout, &ended.stderr);
    Error::other(format!("{program}: {}{said}", ended.status))
}

/// An error about a program that did not start or did not end.
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

/// A program and its options, as a command.
pub(super) fn command(words: &[&str]) -> Command {
    let (program, options) = words.split_first().unwrap_or((&"", &[]));
    let mut command = Command::new(program);
    command.args(options);
    command
}

/// Refuses a scenario that no machine with this layout can play: tables that are not whole pages or do not fit,
/// too many probes, and probes that are not at a page's start or have more than `gpa_bits` bits.
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

/// An error about a scenario.
pub(super) fn unusable(what: String) -> Error {
    Error::new(
        ErrorKind::InvalidInput,
        format!("this machine cannot have {what}"),
    )
}

/// An error about an answer.
pub(super) fn senseless(what: String) -> Error {
    Error::new(ErrorKind::InvalidData, format!("no answer: {what}"))
}

/// An access, as all stubs number them.
pub(super) const fn access_code(access: Access) -> u64 {
    match access {
        Access::Read => 0,
        Access::Write => 1,
        Access::Execute => 2,
    }
}

/// Little-endian bytes.
pub(super) fn bytes(words: impl IntoIterator<Item = u64>) -> Vec<u8> {
    words.into_iter().flat_map(u64::to_le_bytes).collect()
}

/// Words of little-endian bytes; what is no whole word at their end is left out.
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
