//! Where the source tree, the build directory and the cache are, and the commands that every step starts from.

use std::path::{Path, PathBuf, absolute};
use std::process::Command;
use std::{env, fs, io};

/// Directories that the steps read and write; all paths are absolute.
pub(crate) struct Places {
    /// The workspace. It is also the current directory of this process.
    pub(crate) root: PathBuf,
    /// Cargo's build directory: `CARGO_TARGET_DIR`, or `target`.
    pub(crate) target: PathBuf,
    /// Fetched kernels, prepared guests and logs: `FERRY_CACHE`, or `target/test-cache`.
    pub(crate) cache: PathBuf,
    /// One log file for each step of this run.
    pub(crate) logs: PathBuf,
}

impl Places {
    /// Finds the directories, enters the workspace and empties the directory of the logs.
    ///
    /// # Errors
    /// Returns the error of the file system if a directory cannot be made or entered.
    pub(crate) fn find() -> io::Result<Self> {
        let package = Path::new(env!("CARGO_MANIFEST_DIR"));
        let root = package.ancestors().nth(2).unwrap_or(package).to_owned();
        env::set_current_dir(&root)?;
        let target = from_variable("CARGO_TARGET_DIR", "target")?;
        let cache = from_variable("FERRY_CACHE", "target/test-cache")?;
        let logs = cache.join("logs");
        if logs.exists() {
            fs::remove_dir_all(&logs)?;
        }
        fs::create_dir_all(&logs)?;
        Ok(Self {
            root,
            target,
            cache,
            logs,
        })
    }

    /// The release build of the program `ferry`, which the whole-system tests run.
    pub(crate) fn ferry(&self) -> PathBuf {
        self.target.join("release/ferry")
    }

    /// The directory of the bare-metal guest programs.
    pub(crate) fn guests(&self) -> PathBuf {
        self.cache.join("guests")
    }

    /// Returns a command with the environment that the tests read their paths from.
    pub(crate) fn command(&self, program: impl AsRef<Path>) -> Command {
        let mut command = Command::new(program.as_ref());
        command
            .env("CARGO_TARGET_DIR", &self.target)
            .env("CARGO_TERM_COLOR", "never")
            .env("FERRY_BIN", self.ferry())
            .env("FERRY_CACHE", &self.cache)
            .env("FERRY_GUESTS", self.guests())
            .env("RUST_BACKTRACE", "1");
        command
    }

    /// Returns a command for cargo. `words` are separated by spaces.
    pub(crate) fn cargo(&self, words: &str) -> Command {
        let mut command = self.command("cargo");
        command.args(words.split_whitespace());
        command
    }

    /// Returns a command for a program of the package `ferry-tests` or `ferry-guest-images`.
    pub(crate) fn tool(&self, name: &str) -> Command {
        self.command(self.target.join("debug").join(name))
    }
}

/// Cargo resolves a relative `CARGO_TARGET_DIR` against the directory that it is started in: here, the workspace.
fn from_variable(name: &str, default: &str) -> io::Result<PathBuf> {
    let value = env::var_os(name).filter(|value| !value.is_empty());
    absolute(value.unwrap_or_else(|| default.into()))
}
