//! The guest of `ferry bench devices`: an initramfs that measures its disk and its network and then powers off.

use std::fs;
use std::path::Path;

use crate::initramfs::Initramfs;
use crate::kernels::{DebianKernel, Series};
use crate::linux_guest::LinuxGuestError;
use crate::paths;

/// Init script of the guest. `ferry bench devices --help` describes what it does and prints.
const INIT: &str = "#!/bin/busybox sh
/bin/busybox mkdir -p /sbin /usr/bin /usr/sbin
/bin/busybox --install -s
mount -t proc proc /proc
mount -t sysfs sysfs /sys
mount -t devtmpfs devtmpfs /dev
cd /modules/$(uname -r)
for module in $(cat devices); do insmod $module.ko || echo \"ferry-bench: failed: no $module\"; done
arguments=
for word in $(cat /proc/cmdline); do
    case $word in
    ferry.address=*) ip link set eth0 up && ip addr add ${word#*=} dev eth0 ;;
    ferry.host=*) arguments=\"$arguments --host ${word#*=}\" ;;
    ferry.disk=*) arguments=\"$arguments --disk ${word#*=}\" ;;
    ferry.seconds=*) arguments=\"$arguments --seconds ${word#*=}\" ;;
    esac
done
until [ -b /dev/vda ]; do sleep 0.1; done
device-load $arguments
poweroff -f
";

/// Writes the initramfs. It holds the modules of all kernel series.
///
/// # Errors
/// Returns [`LinuxGuestError`] if a kernel or a program is missing, or a file cannot be written.
pub fn write(path: &Path) -> Result<(), LinuxGuestError> {
    let mut initramfs = Initramfs::with_init(INIT)?;
    initramfs.copy(&paths::static_tool("device-load")?, "/bin/device-load")?;
    for series in Series::ALL {
        let kernel = DebianKernel::find(series)?;
        let devices = kernel.device_modules()?;
        let names: Vec<&str> = devices.iter().map(|(name, _)| *name).collect();
        let order = format!("/modules/{}/devices", kernel.release);
        initramfs.text(&order, 0o644, &names.join(" "));
        for (name, content) in devices {
            initramfs.bytes(
                &format!("/modules/{}/{name}.ko", kernel.release),
                0o644,
                &content,
            );
        }
    }
    let source = |source| LinuxGuestError::Write {
        path: path.into(),
        source,
    };
    fs::write(path, initramfs.finish()).map_err(source)
}
