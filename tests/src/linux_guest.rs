//! The stock Linux guest: Debian's cloud kernels as they are, and a busybox shell on the serial port.

use std::io;
use std::path::{Path, PathBuf};
use std::{fs, iter};

use crate::initramfs::{Initramfs, InitramfsError};
use crate::kernels::{DebianKernel, ModuleError, Series};
use crate::paths::Missing;
use crate::vmlinux::{self, VmlinuxError};

/// The command line that it is started with.
pub const CMDLINE: &str = "console=ttyS0 panic=-1";

/// What its `/init` prints before the shell's first prompt.
pub const READY: &str = "linux-guest: ready";

/// The shell gets a terminal of its own, so that it prompts and echoes as for a person. When it
/// ends, so does init; the kernel panics, and `panic=-1` resets the machine at once.
const INIT: &str = "#!/bin/busybox sh
/bin/busybox mkdir -p /sbin /usr/bin /usr/sbin
/bin/busybox --install -s
mount -t proc proc /proc
mount -t sysfs sysfs /sys
mount -t devtmpfs devtmpfs /dev
echo \"linux-guest: ready $(uname -r)\"
exec setsid cttyhack sh
";

/// Why the guest could not be prepared.
#[derive(Debug, thiserror::Error)]
pub enum LinuxGuestError {
    /// A kernel was not fetched.
    #[error(transparent)]
    Missing(#[from] Missing),
    /// A module of the kernel cannot be read.
    #[error(transparent)]
    Module(#[from] ModuleError),
    /// The initramfs cannot be made.
    #[error(transparent)]
    Initramfs(#[from] InitramfsError),
    /// No vmlinux can be had from a bzImage.
    #[error("the vmlinux of kernel {series}")]
    Vmlinux {
        /// The kernel.
        series: Series,
        /// Why not.
        source: VmlinuxError,
    },
    /// A file cannot be written.
    #[error("{}: cannot be written", .path.display())]
    Write {
        /// The file.
        path: PathBuf,
        /// The system's reason.
        source: io::Error,
    },
}

/// What loads the modules by which it hears of its power button.
pub const LOAD_BUTTON: &str =
    "for module in button evdev; do insmod /modules/$(uname -r)/$module.ko; done";

/// Writes `guest.cpio`, and `vmlinuz` and `vmlinux` in a folder named by the series, into `folder`.
///
/// # Errors
/// [`LinuxGuestError`] naming what is missing.
pub fn write(folder: &Path) -> Result<(), LinuxGuestError> {
    let mut initramfs = Initramfs::with_init(INIT)?;
    for series in Series::ALL {
        let kernel = DebianKernel::find(series)?;
        let place = folder.join(series.name());
        let failed = |path: &Path| {
            let path = path.to_owned();
            |source| LinuxGuestError::Write { path, source }
        };
        fs::create_dir_all(&place).map_err(failed(&place))?;
        let image = place.join("vmlinuz");
        fs::copy(&kernel.image, &image).map_err(failed(&image))?;
        vmlinux::extract(&image, &place.join("vmlinux"))
            .map_err(|source| LinuxGuestError::Vmlinux { series, source })?;
        for (name, content) in kernel.button_modules()? {
            let path = format!("/modules/{}/{name}.ko", kernel.release);
            initramfs.bytes(&path, 0o644, &content);
        }
    }
    let path = folder.join("guest.cpio");
    fs::write(&path, initramfs.finish()).map_err(|source| LinuxGuestError::Write { path, source })
}

/// The files of a folder that [`write()`] wrote, as paths relative to it.
pub fn files() -> Vec<String> {
    let kernels = Series::ALL.into_iter().flat_map(|series| {
        ["vmlinuz", "vmlinux"]
            .into_iter()
            .map(move |kind| format!("{series}/{kind}"))
    });
    kernels.chain(iter::once("guest.cpio".to_owned())).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_mark_is_what_init_prints() {
        assert!(INIT.contains(&format!("echo \"{READY} ")));
    }

    #[test]
    fn every_kernel_comes_in_both_forms() {
        assert_eq!(
            files().join(" "),
            "6.1/vmlinuz 6.1/vmlinux 6.12/vmlinuz 6.12/vmlinux guest.cpio"
        );
    }
}
