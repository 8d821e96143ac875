//! Writes the guest of `ferry bench devices`: `write-device-load FILE`.

use std::path::PathBuf;
use std::process::ExitCode;

use clap::Parser;
use ferry_tests::{device_load, errors};

/// Writes the initramfs that `ferry bench devices` boots with a Debian cloud kernel.
#[derive(Parser)]
struct Arguments {
    /// File to write the initramfs to.
    file: PathBuf,
}

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    match device_load::write(&arguments.file) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("write-device-load: {}", errors::chain(&error));
            ExitCode::FAILURE
        }
    }
}
