//! Writes the files of the stock Linux guest into a directory: `write-linux-guest FOLDER`.

use std::path::PathBuf;
use std::process::ExitCode;

use clap::Parser;
use ferry_tests::{errors, linux_guest};

/// Writes Debian's cloud kernels, as bzImage and as vmlinux, and an initramfs with a shell.
#[derive(Parser)]
struct Arguments {
    /// Directory to write to. It is created if it does not exist.
    folder: PathBuf,
}

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    match linux_guest::write(&arguments.folder) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("write-linux-guest: {}", errors::chain(&error));
            ExitCode::FAILURE
        }
    }
}
