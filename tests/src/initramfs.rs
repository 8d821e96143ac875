//! Builds initramfs images for the lab and for the stock Linux guest: busybox and the files that the caller adds.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;
use std::{fs, io};

use crate::cpio::Archive;
use crate::process::{self, ProcessError};

/// Paths of busybox in Debian's package busybox-static.
const BUSYBOX: [&str; 3] = [
    "/usr/bin/busybox",
    "/bin/busybox",
    "/usr/bin/busybox-static",
];

/// Why an initramfs could not be built.
#[derive(Debug, thiserror::Error)]
pub enum InitramfsError {
    /// A source file cannot be read.
    #[error("{}: cannot be put into the initramfs", .path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// The error of the operating system.
        source: io::Error,
    },
    /// The shared libraries of a program cannot be listed.
    #[error("the libraries of {} cannot be listed", .path.display())]
    Libraries {
        /// The program.
        path: PathBuf,
        /// The error of `ldd`.
        source: ProcessError,
    },
    /// A program needs a shared library that is not installed.
    #[error("{} needs a library that is not installed: {line}", .path.display())]
    MissingLibrary {
        /// The program.
        path: PathBuf,
        /// The line of `ldd` that names the library.
        line: String,
    },
    /// There is no static busybox on this machine.
    #[error("no static busybox in {BUSYBOX:?}; install the package busybox-static")]
    NoBusybox,
}

/// Initramfs under construction.
#[derive(Clone, Debug, Default)]
pub struct Initramfs {
    archive: Archive,
    placed: BTreeSet<String>,
}

impl Initramfs {
    /// Returns an initramfs with `/bin/busybox`, `/dev/console` and this text as `/init`.
    ///
    /// # Errors
    /// Returns [`InitramfsError`] if there is no static busybox.
    pub fn with_init(script: &str) -> Result<Self, InitramfsError> {
        let mut new = Self::default();
        for folder in ["/proc", "/sys", "/dev", "/tmp", "/run"] {
            new.folder(folder);
        }
        new.archive.character_device("dev/console", 5, 1);
        new.placed.insert("dev/console".to_owned());
        new.copy(&static_busybox()?, "/bin/busybox")?;
        new.text("/init", 0o755, script);
        Ok(new)
    }

    /// Adds a text file at `path`, and its parent directories.
    pub fn text(&mut self, path: &str, permissions: u32, text: &str) {
        self.bytes(path, permissions, text.as_bytes());
    }

    /// Adds a file at `path`, and its parent directories. If the path exists already, it stays as it is.
    pub fn bytes(&mut self, path: &str, permissions: u32, content: &[u8]) {
        let Some(path) = self.claim(path) else { return };
        self.archive.file(&path, permissions, content);
    }

    /// Copies a file with its permissions to `path`.
    ///
    /// # Errors
    /// Returns [`InitramfsError::Read`] if the file cannot be read.
    pub fn copy(&mut self, source: &Path, path: &str) -> Result<(), InitramfsError> {
        use std::os::unix::fs::PermissionsExt;
        let failed = |error| InitramfsError::Read {
            path: source.to_owned(),
            source: error,
        };
        let content = fs::read(source).map_err(failed)?;
        let permissions = fs::metadata(source).map_err(failed)?.permissions().mode() & 0o777;
        self.bytes(path, permissions, &content);
        Ok(())
    }

    /// Copies a program to `path`, and its shared libraries to the paths that they have on this machine.
    ///
    /// # Errors
    /// Returns [`InitramfsError`] if the program or one of its libraries is missing.
    pub fn program(&mut self, source: &Path, path: &str) -> Result<(), InitramfsError> {
        self.copy(source, path)?;
        for library in libraries(source)? {
            let place = library.display().to_string();
            self.copy(&library, &place)?;
        }
        Ok(())
    }

    /// Closes the archive and returns its bytes. They are not compressed.
    pub fn finish(self) -> Vec<u8> {
        self.archive.finish()
    }

    fn folder(&mut self, path: &str) {
        if let Some(path) = self.claim(path) {
            self.archive.directory(&path);
        }
    }

    /// Adds the parent directories of `path` and reserves the path. Returns `None` if it is reserved already.
    fn claim(&mut self, path: &str) -> Option<String> {
        let path = path.trim_start_matches('/').to_owned();
        for (index, _) in path.match_indices('/') {
            if self.placed.insert(path[..index].to_owned()) {
                self.archive.directory(&path[..index]);
            }
        }
        self.placed.insert(path.clone()).then_some(path)
    }
}

/// Finds a busybox that is linked statically.
pub(crate) fn static_busybox() -> Result<PathBuf, InitramfsError> {
    let mut candidates = BUSYBOX
        .iter()
        .map(PathBuf::from)
        .filter(|path| path.is_file());
    candidates
        .find(|path| libraries(path).is_ok_and(|list| list.is_empty()))
        .ok_or(InitramfsError::NoBusybox)
}

/// Returns the shared libraries of a program, with its interpreter. A static program has none.
fn libraries(program: &Path) -> Result<Vec<PathBuf>, InitramfsError> {
    let listed = process::run(Command::new("ldd").arg(program), Duration::from_secs(20)).map_err(
        |source| InitramfsError::Libraries {
            path: program.to_owned(),
            source,
        },
    )?;
    if let Some(line) = listed
        .stdout
        .lines()
        .find(|line| line.contains("not found"))
    {
        let line = line.trim().to_owned();
        return Err(InitramfsError::MissingLibrary {
            path: program.to_owned(),
            line,
        });
    }
    Ok(listed.stdout.lines().filter_map(library).collect())
}

/// Returns the path in a line of `ldd`: `libc.so.6 => /lib/x86_64-linux-gnu/libc.so.6 (0x…)`, or
/// `/lib64/ld-linux-x86-64.so.2 (0x…)`.
fn library(line: &str) -> Option<PathBuf> {
    let line = line.trim();
    let path = line.split_once("=> ").map_or(line, |(_, path)| path);
    let path = path.split(" (").next()?;
    path.starts_with('/').then(|| PathBuf::from(path))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn libraries_of_a_dynamic_program_are_found() {
        let own = std::env::current_exe().unwrap();
        let names: Vec<String> = libraries(&own)
            .unwrap()
            .iter()
            .map(|path| path.display().to_string())
            .collect();
        assert!(
            names.iter().any(|name| name.contains("libc.so")),
            "{names:?}"
        );
        assert!(
            names.iter().any(|name| name.contains("ld-linux")),
            "{names:?}"
        );
    }

    #[test]
    fn a_path_is_placed_once_and_its_parents_first() {
        let mut initramfs = Initramfs::default();
        initramfs.text("/a/b/c", 0o644, "one");
        initramfs.text("/a/b/c", 0o644, "two");
        assert_eq!(
            initramfs.placed.iter().collect::<Vec<_>>(),
            ["a", "a/b", "a/b/c"]
        );
        let bytes = initramfs.finish();
        assert!(bytes.windows(3).any(|window| window == b"one"));
        assert!(!bytes.windows(3).any(|window| window == b"two"));
    }

    #[test]
    fn a_missing_file_is_named() {
        let error = Initramfs::default()
            .copy(Path::new("/no/such"), "/x")
            .unwrap_err();
        assert!(error.to_string().contains("/no/such"), "{error}");
    }
}
