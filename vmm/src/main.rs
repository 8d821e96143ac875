//! The program `ferry`.

use std::process::ExitCode;

fn main() -> ExitCode {
    vmm::cli::main()
}
