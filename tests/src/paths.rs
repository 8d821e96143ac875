//! Finds the programs and files that were built or fetched for the tests.
//!
//! Environment variables can override every path, because the test programs also run inside the lab, where there is
//! neither a source tree nor a build directory.

use std::env;
use std::path::{Path, PathBuf};

/// A file that a test needs does not exist.
#[derive(Debug, thiserror::Error)]
#[error("{what} is missing: {}; {remedy}", .path.display())]
pub struct Missing {
    /// Description of the file.
    pub what: String,
    /// Path at which it was expected.
    pub path: PathBuf,
    /// Command or setting that provides the file.
    pub remedy: String,
}

/// Returns the directory of fetched and generated files: `FERRY_CACHE`, or `target/test-cache` in the source tree.
pub fn cache() -> PathBuf {
    from_variable("FERRY_CACHE").unwrap_or_else(|| source_tree().join("target/test-cache"))
}

/// Returns the program `ferry`: `FERRY_BIN`, or the one in the build directory of the running test program.
///
/// # Errors
/// Returns [`Missing`] if there is no such file.
pub fn ferry() -> Result<PathBuf, Missing> {
    let path = from_variable("FERRY_BIN").unwrap_or_else(|| beside_this_program("ferry"));
    existing(
        path,
        "the program ferry",
        "build it with `cargo build -p ferry`, or set FERRY_BIN to its path",
    )
}

/// Returns a program of this package, such as `kvm-probe`: in `FERRY_TOOLS`, or in the build directory of the running
/// program.
///
/// # Errors
/// Returns [`Missing`] if there is no such file.
pub fn tool(name: &str) -> Result<PathBuf, Missing> {
    let path = from_variable("FERRY_TOOLS")
        .map_or_else(|| beside_this_program(name), |folder| folder.join(name));
    existing(
        path,
        "a test tool",
        "build it with `cargo build -p ferry-tests`, or set FERRY_TOOLS to its directory",
    )
}

/// Returns a statically linked program of this package, for guests: in `FERRY_STATIC_TOOLS`, or in `static-tools` of
/// the cache.
///
/// # Errors
/// Returns [`Missing`] if there is no such file.
pub fn static_tool(name: &str) -> Result<PathBuf, Missing> {
    let folder =
        from_variable("FERRY_STATIC_TOOLS").unwrap_or_else(|| cache().join("static-tools"));
    existing(
        folder.join(name),
        "a program for guests",
        "`tests/run lab` builds it",
    )
}

/// Returns a guest program of the package `ferry-guest-images`: in `FERRY_GUESTS`, or in `guests` of the cache.
///
/// # Errors
/// Returns [`Missing`] if there is no such file.
pub fn guest(name: &str) -> Result<PathBuf, Missing> {
    let folder = from_variable("FERRY_GUESTS").unwrap_or_else(|| cache().join("guests"));
    existing(
        folder.join(name),
        "a guest program",
        "write them with `cargo run -p ferry-guest-images --bin write-images -- FOLDER` \
         and name the folder in FERRY_GUESTS, or let tests/run do both",
    )
}

/// Returns a file of the stock Linux guest (`vmlinuz`, `vmlinux`, `guest.cpio`): in `FERRY_LINUX_GUEST`, or in
/// `linux-guest` of the cache.
///
/// # Errors
/// Returns [`Missing`] if there is no such file.
pub fn linux_guest(name: &str) -> Result<PathBuf, Missing> {
    let folder = from_variable("FERRY_LINUX_GUEST").unwrap_or_else(|| cache().join("linux-guest"));
    existing(
        folder.join(name),
        "a part of the Linux guest",
        "`tests/run lab` prepares it",
    )
}

fn from_variable(name: &str) -> Option<PathBuf> {
    env::var_os(name)
        .filter(|value| !value.is_empty())
        .map(PathBuf::from)
}

fn source_tree() -> &'static Path {
    let package = Path::new(env!("CARGO_MANIFEST_DIR"));
    package.parent().unwrap_or(package)
}

/// Returns the path of a program in the build directory. Cargo puts test programs into its subdirectory `deps`.
fn beside_this_program(name: &str) -> PathBuf {
    let own = env::current_exe().unwrap_or_default();
    let folder = own.parent().unwrap_or(Path::new("."));
    let folder = if folder.ends_with("deps") {
        folder.parent().unwrap_or(folder)
    } else {
        folder
    };
    folder.join(name)
}

fn existing(path: PathBuf, what: &str, remedy: &str) -> Result<PathBuf, Missing> {
    if path.is_file() {
        return Ok(path);
    }
    Err(Missing {
        what: what.to_owned(),
        path,
        remedy: remedy.to_owned(),
    })
}
