//! A stock Linux guest that lives on a disk, and what is found on it when the guest has ended.

use std::fs::{self, File};
use std::path::PathBuf;
use std::process::Command;

use crate::linux_guest::DISK_CMDLINE;
use crate::linux_shell::SHELL_LIMIT;
use crate::machine::Machine;
use crate::{paths, process};

/// A vmlinux of this series, whose initramfs loads the drivers and goes over to its first disk.
///
/// # Panics
/// It was not prepared.
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

/// A folder with the images of a guest.
#[derive(Debug)]
pub struct Images(tempfile::TempDir);

impl Images {
    /// With a copy of the guest's root file system, named `root`.
    ///
    /// # Panics
    /// It was not prepared, or there is no room for it.
    #[must_use]
    pub fn with_root() -> Self {
        let images = Self(tempfile::tempdir().unwrap());
        fs::copy(paths::linux_guest("root.img").unwrap(), images.path("root")).unwrap();
        images
    }

    /// Where the file `name` of the folder is.
    #[must_use]
    pub fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    /// A sparse image.
    ///
    /// # Panics
    /// It cannot be made.
    pub fn sparse(&self, name: &str, bytes: u64) {
        File::create(self.path(name))
            .unwrap()
            .set_len(bytes)
            .unwrap();
    }

    /// The value of an option that names the image.
    #[must_use]
    pub fn option(&self, name: &str) -> String {
        format!("path={}", self.path(name).display())
    }

    /// The root file system was left in order and is whole, as the file system's own tool says.
    ///
    /// # Panics
    /// It is not.
    pub fn root_is_whole(&self) {
        let mut check = Command::new("e2fsck");
        check.arg("-fn").arg(self.path("root"));
        let checked = process::run(&mut check, SHELL_LIMIT).unwrap();
        assert!(checked.status.success(), "{checked:?}");
        // What stands in a journal was not looked at.
        let said = format!("{}{}", checked.stdout, checked.stderr);
        assert!(!said.contains("skipping journal recovery"), "{said}");
    }

    /// A file of the root file system, read without the guest.
    ///
    /// # Panics
    /// It cannot be read.
    #[must_use]
    pub fn of_root(&self, file: &str) -> String {
        let mut read = Command::new("debugfs");
        read.args(["-R", &format!("cat {file}")])
            .arg(self.path("root"));
        process::run(&mut read, SHELL_LIMIT).unwrap().stdout
    }
}
