//! Disks of a stock Linux guest whose root file system is on a virtio disk, and checks of them after the guest has
//! ended.

use std::fs::{self, File};
use std::path::PathBuf;
use std::process::Command;

use crate::linux_guest::DISK_CMDLINE;
use crate::linux_shell::SHELL_LIMIT;
use crate::machine::Machine;
use crate::{paths, process};

/// Returns a guest with the vmlinux of this series. Its initramfs loads the drivers and switches to the first disk.
///
/// # Panics
/// Panics if the guest has not been prepared.
#[must_use]
pub fn machine(series: &str, memory_mib: u32, cpus: u32) -> Machine {
    Machine {
        kernel: paths::linux_guest(&format!("{series}/vmlinux")).unwrap(),
        initramfs: Some(paths::linux_guest("guest.cpio").unwrap()),
        cmdline: DISK_CMDLINE.to_owned(),
        memory_mib,
        cpus,
    }
}

/// Temporary directory with the disk images of a guest.
#[derive(Debug)]
pub struct Images(tempfile::TempDir);

impl Images {
    /// Makes a directory with a copy of the root file system, named `root`.
    ///
    /// # Panics
    /// Panics if the file system has not been prepared or cannot be copied.
    #[must_use]
    pub fn with_root() -> Self {
        let images = Self(tempfile::tempdir().unwrap());
        fs::copy(paths::linux_guest("root.img").unwrap(), images.path("root")).unwrap();
        images
    }

    /// Returns the path of a file in the directory.
    #[must_use]
    pub fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    /// Creates a sparse image.
    ///
    /// # Panics
    /// Panics if the image cannot be created.
    pub fn sparse(&self, name: &str, bytes: u64) {
        File::create(self.path(name))
            .unwrap()
            .set_len(bytes)
            .unwrap();
    }

    /// Returns the value of a `--disk` option for the image.
    #[must_use]
    pub fn option(&self, name: &str) -> String {
        format!("path={}", self.path(name).display())
    }

    /// Asserts that the root file system was unmounted and is consistent, according to e2fsck.
    ///
    /// # Panics
    /// Panics if it was not unmounted or has errors.
    pub fn root_is_whole(&self) {
        let mut check = Command::new("e2fsck");
        check.arg("-fn").arg(self.path("root"));
        let checked = process::run(&mut check, SHELL_LIMIT).unwrap();
        assert!(checked.status.success(), "{checked:?}");
        // With a journal to replay, e2fsck has not checked the file system.
        let said = format!("{}{}", checked.stdout, checked.stderr);
        assert!(!said.contains("skipping journal recovery"), "{said}");
    }

    /// Reads a file of the root file system with debugfs, without the guest.
    ///
    /// # Panics
    /// Panics if the file cannot be read.
    #[must_use]
    pub fn of_root(&self, file: &str) -> String {
        let mut read = Command::new("debugfs");
        read.args(["-R", &format!("cat {file}")])
            .arg(self.path("root"));
        process::run(&mut read, SHELL_LIMIT).unwrap().stdout
    }
}
