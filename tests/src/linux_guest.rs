//! Builds the stock Linux guest: unmodified Debian cloud kernels and a busybox shell on the serial port.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use crate::initramfs::{self, Initramfs, InitramfsError};
use crate::kernels::{DebianKernel, ModuleError, Series};
use crate::paths::{self, Missing};
use crate::process::{self, ProcessError};
use crate::vmlinux::{self, VmlinuxError};

/// Kernel command line of a guest that runs from its initramfs.
pub const CMDLINE: &str = "console=ttyS0 panic=-1";

/// Kernel command line of a guest that loads the drivers of its devices and switches to its first disk.
pub const DISK_CMDLINE: &str = "console=ttyS0 panic=-1 root=/dev/vda";

/// Line that `/init` prints before the first prompt of the shell.
pub const READY: &str = "linux-guest: ready";

/// Init script of the initramfs. The shell has a controlling terminal, so that it prompts and echoes as for a person.
/// When the shell ends, init ends, too: the kernel panics, and `panic=-1` resets the machine at once.
const INIT: &str = "#!/bin/busybox sh
/bin/busybox mkdir -p /sbin /usr/bin /usr/sbin
/bin/busybox --install -s
mount -t proc proc /proc
mount -t sysfs sysfs /sys
mount -t devtmpfs devtmpfs /dev
if grep -q root=/dev/vda /proc/cmdline; then
    cd /modules/$(uname -r)
    for module in $(cat devices); do insmod $module.ko || echo \"linux-guest: no $module\"; done
    mkdir -p /root
    until [ -b /dev/vda ]; do sleep 0.1; done
    mount /dev/vda /root && mount -o move /dev /root/dev && exec switch_root /root /sbin/init
    echo \"linux-guest: no root\"
fi
echo \"linux-guest: ready $(uname -r)\"
exec setsid cttyhack sh
";

/// inittab of the disk. The disk has the files of the initramfs and a program for vsock. Its `/sbin/init` is busybox's,
/// so that `poweroff` and `reboot` shut the guest down in order.
const DISK_INITTAB: &str = "\
::sysinit:/etc/start
ttyS0::respawn:/bin/sh
::shutdown:/etc/stop
";

const DISK_START: &str = "#!/bin/sh
mount -t proc proc /proc
mount -t sysfs sysfs /sys
mount -t tmpfs tmpfs /tmp
ip link set lo up
echo \"linux-guest: ready $(uname -r) on a disk\"
";

/// Shutdown script. It stops all processes before it remounts the root file system read-only.
const DISK_STOP: &str = "#!/bin/sh
kill -TERM -1
sleep 0.3
kill -KILL -1
sync
mount -o remount,ro / || echo \"linux-guest: the root is busy\"
";

/// Modules on the disk, which are loaded, or loaded again, after the switch to the root file system.
const LOADED_ON_DISK: [&str; 3] = ["button", "evdev", "virtio_balloon"];

/// Size of the disk in bytes.
const DISK_BYTES: u64 = 32 << 20;

/// Why the guest could not be built.
#[derive(Debug, thiserror::Error)]
pub enum LinuxGuestError {
    /// A kernel has not been fetched.
    #[error(transparent)]
    Missing(#[from] Missing),
    /// A module of the kernel cannot be read.
    #[error(transparent)]
    Module(#[from] ModuleError),
    /// The initramfs cannot be built.
    #[error(transparent)]
    Initramfs(#[from] InitramfsError),
    /// The vmlinux cannot be extracted from a bzImage.
    #[error("the vmlinux of kernel {series}")]
    Vmlinux {
        /// The kernel.
        series: Series,
        /// The reason.
        source: VmlinuxError,
    },
    /// A program that builds the disk could not be run.
    #[error(transparent)]
    Process(#[from] ProcessError),
    /// A file cannot be written.
    #[error("{}: cannot be written", .path.display())]
    Write {
        /// The file.
        path: PathBuf,
        /// The error of the operating system.
        source: io::Error,
    },
}

/// Shell commands that load the modules for the power button.
pub const LOAD_BUTTON: &str =
    "for module in button evdev; do insmod /modules/$(uname -r)/$module.ko; done";

/// Writes `guest.cpio`, `root.img`, and a directory with `vmlinuz` and `vmlinux` for each kernel series into `folder`.
///
/// # Errors
/// Returns [`LinuxGuestError`] if a kernel or a program is missing, or a file cannot be written.
pub fn write(folder: &Path) -> Result<(), LinuxGuestError> {
    let mut initramfs = Initramfs::with_init(INIT)?;
    let mut loaded_again = Vec::new();
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
        let devices = kernel.device_modules()?;
        let names: Vec<&str> = devices.iter().map(|(name, _)| *name).collect();
        let order = format!("/modules/{}/devices", kernel.release);
        initramfs.text(&order, 0o644, &names.join(" "));
        for (name, content) in kernel.button_modules()?.into_iter().chain(devices) {
            let path = format!("/modules/{}/{name}.ko", kernel.release);
            initramfs.bytes(&path, 0o644, &content);
            if LOADED_ON_DISK.contains(&name) {
                loaded_again.push((path, content));
            }
        }
    }
    write_disk(&folder.join("root.img"), &loaded_again)?;
    let path = folder.join("guest.cpio");
    fs::write(&path, initramfs.finish()).map_err(|source| LinuxGuestError::Write { path, source })
}

/// Makes an ext4 image with busybox, a program for vsock, and the modules that are loaded from it.
fn write_disk(image: &Path, modules: &[(String, Vec<u8>)]) -> Result<(), LinuxGuestError> {
    let failed = |source| LinuxGuestError::Write {
        path: image.into(),
        source,
    };
    let tree = tempfile::tempdir().map_err(failed)?;
    let place = |name: &str| tree.path().join(name);
    for name in [
        "bin", "sbin", "usr/bin", "usr/sbin", "proc", "sys", "dev", "tmp", "run", "etc",
    ] {
        fs::create_dir_all(place(name)).map_err(failed)?;
    }
    fs::copy(initramfs::static_busybox()?, place("bin/busybox")).map_err(failed)?;
    fs::copy(paths::static_tool("vsock-echo")?, place("bin/vsock-echo")).map_err(failed)?;
    for (name, text) in [
        ("etc/inittab", DISK_INITTAB),
        ("etc/start", DISK_START),
        ("etc/stop", DISK_STOP),
    ] {
        fs::write(place(name), text).map_err(failed)?;
        let executable = std::os::unix::fs::PermissionsExt::from_mode(0o755);
        fs::set_permissions(place(name), executable).map_err(failed)?;
    }
    install_busybox(tree.path()).map_err(failed)?;
    for (path, content) in modules {
        let path = place(path.trim_start_matches('/'));
        fs::create_dir_all(path.parent().unwrap_or(tree.path())).map_err(failed)?;
        fs::write(path, content).map_err(failed)?;
    }
    // mkfs.ext4 keeps old contents that it does not overwrite.
    if image.exists() {
        fs::remove_file(image).map_err(failed)?;
    }
    let file = fs::File::create(image).map_err(failed)?;
    file.set_len(DISK_BYTES).map_err(failed)?;
    let mut make = Command::new("/sbin/mkfs.ext4");
    make.args(["-q", "-F", "-d"]).arg(tree.path()).arg(image);
    let made = process::run(&mut make, Duration::from_secs(60))?;
    if !made.status.success() {
        return Err(failed(io::Error::other(made.stderr)));
    }
    Ok(())
}

/// Makes a symbolic link for every applet, as `busybox --install -s` does.
fn install_busybox(root: &Path) -> io::Result<()> {
    let listed = Command::new(root.join("bin/busybox"))
        .arg("--list-full")
        .output()?;
    for applet in String::from_utf8_lossy(&listed.stdout).lines() {
        let link = root.join(applet);
        if !link.exists() {
            std::os::unix::fs::symlink("/bin/busybox", link)?;
        }
    }
    Ok(())
}

/// Files that [`write()`] writes, relative to its directory.
pub fn files() -> Vec<String> {
    let kernels = Series::ALL.into_iter().flat_map(|series| {
        ["vmlinuz", "vmlinux"]
            .into_iter()
            .map(move |kind| format!("{series}/{kind}"))
    });
    let rest = ["guest.cpio", "root.img"].map(str::to_owned);
    kernels.chain(rest).collect()
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
            "6.1/vmlinuz 6.1/vmlinux 6.12/vmlinuz 6.12/vmlinux guest.cpio root.img"
        );
    }
}
