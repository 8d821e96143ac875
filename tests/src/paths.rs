//! Where the tests find what was built or fetched for them.
//!
//! Everything can be said by an environment variable, because the same test programs also run
//! inside the lab, where there is neither a source tree nor a build folder.

use std::env;
use std::path::{Path, PathBuf};

/// Why something that a test needs was not found.
#[derive(Debug, thiserror::Error)]
#[error("{what} is missing: {}; {remedy}", .path.display())]
pub struct Missing {
    /// What was looked for, in words.
    pub what: String,
    /// Where it was looked for.
    pub path: PathBuf,
    /// What would mend it.
    pub remedy: String,
}

/// The folder of fetched and prepared things: `FERRY_CACHE`, or `target/test-cache` in the source tree.
pub fn cache() -> PathBuf {
    from_variable("FERRY_CACHE").unwrap_or_else(|| source_tree().join("target/test-cache"))
}

/// The program `ferry`: `FERRY_BIN`, or the one built beside the running test program.
///
/// # Errors
/// [`Missing`] when there is no such file.
pub fn ferry() -> Result<PathBuf, Missing> {
    let path = from_variable("FERRY_BIN").unwrap_or_else(|| beside_this_program("ferry"));
    existing(
        path,
        "the program ferry",
        "build it with `cargo build -p ferry-vmm`, or name it in FERRY_BIN",
    )
}

/// A program of this package, such as `kvm-probe`: beside the running program or in `FERRY_TOOLS`.
///
/// # Errors
/// [`Missing`] when there is no such file.
pub fn tool(name: &str) -> Result<PathBuf, Missing> {
    let path = from_variable("FERRY_TOOLS")
        .map_or_else(|| beside_this_program(name), |folder| folder.join(name));
    existing(
        path,
        "a test tool",
        "build it with `cargo build -p ferry-tests`, or name its folder in FERRY_TOOLS",
    )
}

/// A program of this package that was built without need of libraries, for guests: in `FERRY_STATIC_TOOLS`, or in the
/// cache's `static-tools`.
///
/// # Errors
/// [`Missing`] when there is no such file.
pub fn static_tool(name: &str) -> Result<PathBuf, Missing> {
    let folder =
        from_variable("FERRY_STATIC_TOOLS").unwrap_or_else(|| cache().join("static-tools"));
    existing(
        folder.join(name),
        "a program for guests",
        "`tests/run lab` builds it",
    )
}

/// A guest program of the package `ferry-guest-images`: in `FERRY_GUESTS`, or in the cache's `guests`.
///
/// # Errors
/// [`Missing`] when there is no such file.
pub fn guest(name: &str) -> Result<PathBuf, Missing> {
    let folder = from_variable("FERRY_GUESTS").unwrap_or_else(|| cache().join("guests"));
    existing(
        folder.join(name),
        "a guest program",
        "write them with `cargo run -p ferry-guest-images --bin write-images -- FOLDER` \
         and name the folder in FERRY_GUESTS, or let tests/run do both",
    )
}

/// A part of the stock Linux guest (`vmlinuz`, `vmlinux`, `guest.cpio`): in `FERRY_LINUX_GUEST`,
/// or in the cache's `linux-guest`.
///
/// # Errors
/// [`Missing`] when there is no such file.
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

/// Cargo puts test programs into `deps`, one folder below the programs.
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
