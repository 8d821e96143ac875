//! Writes the guest programs to ELF files, for use with other monitors.
//!
//!     cargo run -p ferry-guest-images --bin write-images -- DIR

use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::{env, fs};

fn main() -> ExitCode {
    let mut arguments = env::args_os().skip(1);
    let (Some(directory), None) = (arguments.next(), arguments.next()) else {
        eprintln!(
            "usage: write-images DIR\nWrites hello.elf, dirtier.elf and ring-attacker.elf into DIR."
        );
        return ExitCode::from(2);
    };
    let directory = PathBuf::from(directory);
    for (name, image) in [
        ("hello.elf", guest_images::HELLO),
        ("dirtier.elf", guest_images::DIRTIER),
        ("ring-attacker.elf", guest_images::RING_ATTACKER),
    ] {
        if let Err(reason) = write(&directory, name, image) {
            eprintln!("write-images: {reason}");
            return ExitCode::FAILURE;
        }
    }
    ExitCode::SUCCESS
}

fn write(directory: &Path, name: &str, image: &[u8]) -> Result<(), String> {
    let path = directory.join(name);
    fs::create_dir_all(directory).map_err(|error| {
        format!(
            "cannot create the directory {}: {error}",
            directory.display()
        )
    })?;
    fs::write(&path, image).map_err(|error| format!("cannot write {}: {error}", path.display()))?;
    println!("{} ({} bytes)", path.display(), image.len());
    Ok(())
}
