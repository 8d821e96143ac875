//! Builds the guest programs with the compiler that builds this crate.
//!
//! Cargo cannot build a bare-metal program and a hosted library for the same target in one package,
//! so this script calls `rustc` directly. RUSTFLAGS of the outer build (coverage, sanitizers,
//! `target-cpu`) do not reach the guests, because only Cargo reads that variable.

use std::env;
use std::path::{Path, PathBuf};
use std::process::{Command, exit};

/// Target of the guest programs, which are x86-64 on any host. A stable toolchain ships `core` for
/// this target. The guests use nothing of Linux.
const TARGET: &str = "x86_64-unknown-linux-gnu";

/// Sources of the guests, and modules that they share with the library.
const SOURCES: [&str; 5] = [
    "guests",
    "src/dirtier",
    "src/interface.rs",
    "src/memory.rs",
    "build.rs",
];

fn main() {
    for source in SOURCES {
        println!("cargo::rerun-if-changed={source}");
    }
    for guest in ["hello", "dirtier", "ring-attacker"] {
        if let Err(reason) = build(guest) {
            eprintln!("guest program `{guest}` was not built: {reason}");
            exit(1);
        }
    }
}

/// Compiles the guest program `guest` to an ELF file in OUT_DIR.
fn build(guest: &str) -> Result<(), String> {
    let output = directory("OUT_DIR")?.join(format!("{guest}.elf"));
    let guests = directory("CARGO_MANIFEST_DIR")?.join("guests");
    let status = compiler(guest, &guests, &output)?
        .status()
        .map_err(|error| format!("the compiler could not be started: {error}"))?;
    if status.success() {
        Ok(())
    } else {
        Err(format!("the compiler ended with {status}"))
    }
}

/// Returns the directory that an environment variable of Cargo names.
fn directory(variable: &str) -> Result<PathBuf, String> {
    env::var_os(variable)
        .map(PathBuf::from)
        .ok_or_else(|| format!("{variable} is not set"))
}

/// Returns the command line that compiles a guest program.
fn compiler(guest: &str, guests: &Path, output: &Path) -> Result<Command, String> {
    let rustc = env::var_os("RUSTC").ok_or("RUSTC is not set")?;
    let mut command = Command::new(rustc);
    command
        .arg(guests.join(guest).join("main.rs"))
        .args([
            "--crate-name",
            &guest.replace('-', "_"),
            "--crate-type",
            "bin",
            "--edition",
            "2024",
        ])
        .args(["--target", TARGET, "-o"])
        .arg(output)
        .args(codegen_flags())
        .args(linker_flags(&guests.join("link.ld")));
    Ok(command)
}

/// Returns the code generation flags.
///
/// The red zone is off because exception handlers run on the interrupted stack. There is one codegen
/// unit so that the hot loop is inlined.
fn codegen_flags() -> impl Iterator<Item = &'static str> {
    [
        "opt-level=3",
        "panic=abort",
        "relocation-model=static",
        "code-model=small",
        "no-redzone=yes",
        "target-feature=+crt-static",
        "codegen-units=1",
        "debuginfo=0",
        "strip=debuginfo",
    ]
    .into_iter()
    .flat_map(|flag| ["-C", flag])
}

/// Returns the flags that link a static program without a C library, at fixed addresses.
fn linker_flags(script: &Path) -> impl Iterator<Item = String> {
    [
        "linker=cc".to_owned(),
        "link-arg=-nostartfiles".to_owned(),
        "link-arg=-nostdlib".to_owned(),
        "link-arg=-static".to_owned(),
        "link-arg=-no-pie".to_owned(),
        "link-arg=-Wl,--build-id=none".to_owned(),
        "link-arg=-Wl,-z,max-page-size=4096".to_owned(),
        format!("link-arg=-Wl,-T,{}", script.display()),
    ]
    .into_iter()
    .flat_map(|flag| ["-C".to_owned(), flag])
}
