//! Finds Debian's cloud kernels, which `tests/run fetch` downloads and unpacks, and reads their modules.

use std::fmt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;
use std::{fs, io};

use crate::paths::{self, Missing};
use crate::process::{self, ProcessError};

/// Modules of a KVM host with tap devices and bridges, in load order.
const MODULES: [(&str, &str); 7] = [
    ("tun", "kernel/drivers/net/tun.ko"),
    ("llc", "kernel/net/llc/llc.ko"),
    ("stp", "kernel/net/802/stp.ko"),
    ("bridge", "kernel/net/bridge/bridge.ko"),
    ("irqbypass", "kernel/virt/lib/irqbypass.ko"),
    ("kvm", "kernel/arch/x86/kvm/kvm.ko"),
    ("kvm-amd", "kernel/arch/x86/kvm/kvm-amd.ko"),
];

/// Modules for the power button of a guest, in load order.
const BUTTON_MODULES: [(&str, &str); 2] = [
    ("button", "kernel/drivers/acpi/button.ko"),
    ("evdev", "kernel/drivers/input/evdev.ko"),
];

/// Modules for the virtio devices of a guest, in load order. Some kernels have some of them built in.
const DEVICE_MODULES: [(&str, &str); 13] = [
    ("virtio_ring", "kernel/drivers/virtio/virtio_ring.ko"),
    ("virtio", "kernel/drivers/virtio/virtio.ko"),
    ("virtio_mmio", "kernel/drivers/virtio/virtio_mmio.ko"),
    ("virtio_blk", "kernel/drivers/block/virtio_blk.ko"),
    ("failover", "kernel/net/core/failover.ko"),
    ("net_failover", "kernel/drivers/net/net_failover.ko"),
    ("virtio_net", "kernel/drivers/net/virtio_net.ko"),
    ("virtio-rng", "kernel/drivers/char/hw_random/virtio-rng.ko"),
    ("vsock", "kernel/net/vmw_vsock/vsock.ko"),
    (
        "vmw_vsock_virtio_transport_common",
        "kernel/net/vmw_vsock/vmw_vsock_virtio_transport_common.ko",
    ),
    (
        "vmw_vsock_virtio_transport",
        "kernel/net/vmw_vsock/vmw_vsock_virtio_transport.ko",
    ),
    ("virtio_balloon", "kernel/drivers/virtio/virtio_balloon.ko"),
    ("virtio_console", "kernel/drivers/char/virtio_console.ko"),
];

/// Name and content of a module.
pub type Module = (&'static str, Vec<u8>);

/// Kernel series of the lab.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Series {
    /// The default kernel of Debian 12.
    V6_1,
    /// The newest kernel in the archive of Debian 12. It has KVM_PRE_FAULT_MEMORY and guest_memfd.
    V6_12,
}

impl Series {
    /// All series.
    pub const ALL: [Self; 2] = [Self::V6_1, Self::V6_12];

    /// Returns the name: `6.1` or `6.12`.
    pub fn name(self) -> &'static str {
        match self {
            Self::V6_1 => "6.1",
            Self::V6_12 => "6.12",
        }
    }
}

impl fmt::Display for Series {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

impl std::str::FromStr for Series {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let known = Self::ALL.into_iter().find(|series| series.name() == text);
        known.ok_or_else(|| format!("{text:?} is no kernel series of the lab: 6.1 or 6.12"))
    }
}

/// Why a module could not be read.
#[derive(Debug, thiserror::Error)]
pub enum ModuleError {
    /// The module is not in the unpacked package.
    #[error(transparent)]
    Missing(#[from] Missing),
    /// The module cannot be read.
    #[error("{}: cannot be read", .path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// The error of the operating system.
        source: io::Error,
    },
    /// The module is compressed and cannot be decompressed.
    #[error("{}: cannot be decompressed: {reason}", .path.display())]
    Decompress {
        /// The file.
        path: PathBuf,
        /// The message of xz.
        reason: String,
    },
    /// The decompressor could not be run.
    #[error(transparent)]
    Process(#[from] ProcessError),
}

/// Unpacked kernel package.
#[derive(Clone, Debug)]
pub struct DebianKernel {
    /// Kernel release, as `uname -r` prints it.
    pub release: String,
    /// Path of the bzImage.
    pub image: PathBuf,
    modules: PathBuf,
}

impl DebianKernel {
    /// Finds the kernel of a series in the cache.
    ///
    /// # Errors
    /// Returns [`Missing`] if the kernel has not been fetched.
    pub fn find(series: Series) -> Result<Self, Missing> {
        let root = paths::cache().join("kernels").join(series.name());
        Self::in_folder(&root).ok_or_else(|| Missing {
            what: format!("Debian's cloud kernel {series}"),
            path: root,
            remedy: "`tests/run fetch` fetches it".to_owned(),
        })
    }

    fn in_folder(root: &Path) -> Option<Self> {
        let names = fs::read_dir(root.join("boot"))
            .ok()?
            .flatten()
            .map(|entry| entry.file_name());
        let mut releases =
            names.filter_map(|name| Some(name.to_str()?.strip_prefix("vmlinuz-")?.to_owned()));
        let release = releases.next()?;
        let image = root.join("boot").join(format!("vmlinuz-{release}"));
        let modules = root.join("lib/modules").join(&release);
        Some(Self {
            release,
            image,
            modules,
        })
    }

    /// Returns the modules for the virtio devices of a guest, in load order, without those that are built in.
    ///
    /// # Errors
    /// Returns [`ModuleError`] if a module is missing or cannot be read.
    pub fn device_modules(&self) -> Result<Vec<Module>, ModuleError> {
        let path = self.modules.join("modules.builtin");
        let built_in =
            fs::read_to_string(&path).map_err(|source| ModuleError::Read { path, source })?;
        let is_loaded = |path: &str| !built_in.lines().any(|line| line == path);
        let wanted = DEVICE_MODULES.iter().filter(|(_, path)| is_loaded(path));
        self.modules(&wanted.copied().collect::<Vec<_>>())
    }

    /// Returns the modules of a KVM host, in load order.
    ///
    /// # Errors
    /// Returns [`ModuleError`] if a module is missing or cannot be read.
    pub fn kvm_modules(&self) -> Result<Vec<Module>, ModuleError> {
        self.modules(&MODULES)
    }

    /// Modules for the power button of a guest, in load order.
    ///
    /// # Errors
    /// Returns [`ModuleError`] if a module is missing or cannot be read.
    pub fn button_modules(&self) -> Result<Vec<Module>, ModuleError> {
        self.modules(&BUTTON_MODULES)
    }

    fn modules(&self, wanted: &[(&'static str, &'static str)]) -> Result<Vec<Module>, ModuleError> {
        wanted
            .iter()
            .map(|(name, path)| Ok((*name, self.module(path)?)))
            .collect()
    }

    fn module(&self, path: &str) -> Result<Vec<u8>, ModuleError> {
        let plain = self.modules.join(path);
        if plain.is_file() {
            return fs::read(&plain).map_err(|source| ModuleError::Read {
                path: plain,
                source,
            });
        }
        let packed = self.modules.join(format!("{path}.xz"));
        if packed.is_file() {
            return decompressed(packed);
        }
        let remedy =
            "remove the kernel's folder and fetch it again with `tests/run fetch`".to_owned();
        Err(Missing {
            what: "a kernel module".to_owned(),
            path: plain,
            remedy,
        }
        .into())
    }
}

fn decompressed(path: PathBuf) -> Result<Vec<u8>, ModuleError> {
    let folder = tempfile::tempdir().map_err(|source| ModuleError::Read {
        path: std::env::temp_dir(),
        source,
    })?;
    let target = folder.path().join("module");
    let mut shell = Command::new("sh");
    shell
        .args(["-c", "exec xz -dc -- \"$1\" > \"$2\"", "xz"])
        .arg(&path)
        .arg(&target);
    let ended = process::run(&mut shell, Duration::from_secs(60))?;
    if !ended.status.success() {
        return Err(ModuleError::Decompress {
            path,
            reason: ended.stderr,
        });
    }
    fs::read(target).map_err(|source| ModuleError::Read { path, source })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_series_reads_as_it_is_written() {
        for series in Series::ALL {
            assert_eq!(series.to_string().parse(), Ok(series));
        }
        assert!("5.10".parse::<Series>().is_err());
    }

    #[test]
    fn an_unpacked_package_is_found_by_its_image() {
        let root = tempfile::tempdir().unwrap();
        assert!(DebianKernel::in_folder(root.path()).is_none());
        fs::create_dir(root.path().join("boot")).unwrap();
        fs::write(root.path().join("boot/vmlinuz-6.1.0-9-x"), b"").unwrap();
        fs::write(root.path().join("boot/config-6.1.0-9-x"), b"").unwrap();
        let kernel = DebianKernel::in_folder(root.path()).unwrap();
        assert_eq!(kernel.release, "6.1.0-9-x");
        let error = kernel.kvm_modules().unwrap_err();
        assert!(error.to_string().contains("tun.ko"), "{error}");
    }

    #[test]
    fn a_packed_module_is_unpacked() {
        let root = tempfile::tempdir().unwrap();
        let path = root.path().join("x.ko.xz");
        let made = Command::new("sh")
            .arg("-c")
            .arg(format!("printf module | xz > '{}'", path.display()))
            .status()
            .unwrap();
        assert!(made.success());
        assert_eq!(decompressed(path.clone()).unwrap(), b"module");
        fs::write(&path, b"no xz at all").unwrap();
        assert!(matches!(
            decompressed(path),
            Err(ModuleError::Decompress { .. })
        ));
    }
}
