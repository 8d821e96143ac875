//! Writes the guest of `ferry bench devices`: `write-device-load FILE`.

use std::path::PathBuf;
use std::process::ExitCode;

use clap::Parser;
use ferry_tests::{device_load, errors};

/// Writes an initramfs for Debian's cloud kernels that works its disk and its network, for `ferry bench devices`.
#[derive(Parser)]
struct Arguments {
    /// The initramfs.
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
