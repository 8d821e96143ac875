//! Debian's cloud kernels, as `tests/run` fetched and unpacked them.

use std::fmt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;
use std::{fs, io};

use crate::paths::{self, Missing};
use crate::process::{self, ProcessError};

/// The modules that make a KVM host with taps and bridges, in the order of loading.
const MODULES: [(&str, &str); 7] = [
    ("tun", "kernel/drivers/net/tun.ko"),
    ("llc", "kernel/net/llc/llc.ko"),
    ("stp", "kernel/net/802/stp.ko"),
    ("bridge", "kernel/net/bridge/bridge.ko"),
    ("irqbypass", "kernel/virt/lib/irqbypass.ko"),
    ("kvm", "kernel/arch/x86/kvm/kvm.ko"),
    ("kvm-amd", "kernel/arch/x86/kvm/kvm-amd.ko"),
];

/// The modules by which a guest hears of its power button, in the order of loading.
const BUTTON_MODULES: [(&str, &str); 2] = [
    ("button", "kernel/drivers/acpi/button.ko"),
    ("evdev", "kernel/drivers/input/evdev.ko"),
];

/// The modules of a guest's virtio devices, in the order of loading. Some kernels have some of them built in.
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

/// A module's name and content.
pub type Module = (&'static str, Vec<u8>);

/// The kernel series that the lab knows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Series {
    /// Debian 12's own kernel.
    V6_1,
    /// The newest in Debian 12's archive: has KVM_PRE_FAULT_MEMORY and guest_memfd.
    V6_12,
}

impl Series {
    /// All of them.
    pub const ALL: [Self; 2] = [Self::V6_1, Self::V6_12];

    /// As it is written: `6.1`, `6.12`.
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
    /// It is not in the unpacked package.
    #[error(transparent)]
    Missing(#[from] Missing),
    /// It is there but cannot be read.
    #[error("{}: cannot be read", .path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// The system's reason.
        source: io::Error,
    },
    /// It is compressed and cannot be decompressed.
    #[error("{}: cannot be decompressed: {reason}", .path.display())]
    Decompress {
        /// The file.
        path: PathBuf,
        /// What xz says.
        reason: String,
    },
    /// The decompressor did not run.
    #[error(transparent)]
    Process(#[from] ProcessError),
}

/// An unpacked kernel package.
#[derive(Clone, Debug)]
pub struct DebianKernel {
    /// Its release, as `uname -r` says it.
    pub release: String,
    /// The bzImage.
    pub image: PathBuf,
    modules: PathBuf,
}

impl DebianKernel {
    /// Finds the kernel of a series in the cache.
    ///
    /// # Errors
    /// [`Missing`] with the folder and what fetches it.
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

    /// The modules of a guest's virtio devices, in the order of loading, less those that are built in.
    ///
    /// # Errors
    /// [`ModuleError`] with the module's path.
    pub fn device_modules(&self) -> Result<Vec<Module>, ModuleError> {
        let path = self.modules.join("modules.builtin");
        let built_in =
            fs::read_to_string(&path).map_err(|source| ModuleError::Read { path, source })?;
        let is_loaded = |path: &str| !built_in.lines().any(|line| line == path);
        let wanted = DEVICE_MODULES.iter().filter(|(_, path)| is_loaded(path));
        self.modules(&wanted.copied().collect::<Vec<_>>())
    }

    /// The modules of a KVM host as name and content, in the order of loading.
    ///
    /// # Errors
    /// [`ModuleError`] with the module's path.
    pub fn kvm_modules(&self) -> Result<Vec<Module>, ModuleError> {
        self.modules(&MODULES)
    }

    /// The modules by which a guest hears of its power button, in the order of loading.
    ///
    /// # Errors
    /// [`ModuleError`] with the module's path.
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
