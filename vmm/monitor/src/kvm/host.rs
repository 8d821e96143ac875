//! Opens /dev/kvm and checks the capabilities that Ferry needs. Error messages name what is missing and the remedy.

use std::io;
use std::path::{Path, PathBuf};

use kvm_bindings::{
    KVM_API_VERSION, KVM_DIRTY_LOG_INITIALLY_SET, KVM_DIRTY_LOG_MANUAL_PROTECT_ENABLE,
};
use kvm_ioctls::{Cap, Kvm};

use super::dirty_log::DirtyLogMode;

/// Path of the KVM device.
pub const KVM_DEVICE: &str = "/dev/kvm";

/// Reasons why guests cannot run on this host. Each message names the remedy.
#[derive(Debug, thiserror::Error)]
pub enum HostError {
    /// The device node does not exist.
    #[error(
        "{} does not exist: this kernel has no KVM, or its module is not loaded; load kvm_intel or \
         kvm_amd and enable virtualisation in the firmware (or nested virtualisation, in a guest)",
        .0.display()
    )]
    NoDevice(PathBuf),
    /// The user has no permission to open the device node.
    #[error(
        "{} may not be opened by this user: add the user to the group that owns it (usually kvm) or \
         run as root",
        .0.display()
    )]
    NoPermission(PathBuf),
    /// The device node cannot be opened.
    #[error("{} cannot be used: {source}; is it the KVM device?", path.display())]
    Unusable {
        /// Path of the device node.
        path: PathBuf,
        /// Error that the kernel returned.
        source: io::Error,
    },
    /// The file is not the KVM device.
    #[error(
        "{} is not the KVM device: remove what is there and let the kernel make it (load kvm_intel or \
         kvm_amd)",
        .0.display()
    )]
    NotKvm(PathBuf),
    /// KVM has an API version other than 12, which all monitors use.
    #[error("KVM has API version {0}, but version {KVM_API_VERSION} is needed: use another kernel")]
    ApiVersion(i32),
    /// KVM lacks a capability that Ferry needs.
    #[error("this KVM lacks {name}, which Ferry needs {why}; a newer kernel has it")]
    Capability {
        /// Name of the capability in the documentation of the kernel.
        name: &'static str,
        /// Purpose of the capability.
        why: &'static str,
    },
    /// KVM does not support the requested mode of its dirty log.
    #[error(
        "this KVM does not support the dirty log mode {0}; use `auto` to let Ferry choose a mode"
    )]
    DirtyLog(DirtyLogMode),
}

/// KVM of this host, after a check of the capabilities that Ferry needs.
#[derive(Debug)]
pub struct Host {
    kvm: Kvm,
}

/// Capabilities that Ferry needs: capability, name and purpose.
const NEEDED: [(Cap, &str, &str); 5] = [
    (
        Cap::UserMemory,
        "KVM_CAP_USER_MEMORY",
        "to give a guest its memory",
    ),
    (
        Cap::ImmediateExit,
        "KVM_CAP_IMMEDIATE_EXIT",
        "to stop a vCPU without a race",
    ),
    (Cap::Irqchip, "KVM_CAP_IRQCHIP", "for interrupt controllers"),
    (Cap::Irqfd, "KVM_CAP_IRQFD", "for device interrupts"),
    (
        Cap::ExtCpuid,
        "KVM_CAP_EXT_CPUID",
        "to give a guest its CPU features",
    ),
];

impl Host {
    /// Opens [`KVM_DEVICE`] and checks the capabilities that Ferry needs.
    ///
    /// # Errors
    /// Returns a [`HostError`] if the device cannot be opened, is not KVM, or lacks a capability.
    pub fn open() -> Result<Self, HostError> {
        Self::open_at(Path::new(KVM_DEVICE))
    }

    /// Opens the KVM device at `path`. Tests use other paths.
    fn open_at(path: &Path) -> Result<Self, HostError> {
        let kvm = Kvm::new_with_path(c_path(path)?).map_err(|error| open_error(path, error))?;
        match kvm.get_api_version() {
            -1 => return Err(HostError::NotKvm(path.to_owned())),
            version if u32::try_from(version) == Ok(KVM_API_VERSION) => {}
            version => return Err(HostError::ApiVersion(version)),
        }
        for (capability, name, why) in NEEDED {
            if !kvm.check_extension(capability) {
                return Err(HostError::Capability { name, why });
            }
        }
        Ok(Self { kvm })
    }

    /// Returns the open KVM device.
    #[must_use]
    pub fn kvm(&self) -> &Kvm {
        &self.kvm
    }

    /// Returns the maximum number of vCPUs of one guest that KVM supports.
    #[must_use]
    pub fn max_vcpus(&self) -> usize {
        self.kvm.get_max_vcpus()
    }

    /// Returns the dirty log mode `wanted`, or the best supported mode if `wanted` is `None`.
    ///
    /// # Errors
    /// Returns [`HostError::DirtyLog`] if KVM does not support the mode `wanted`.
    pub fn dirty_log(&self, wanted: Option<DirtyLogMode>) -> Result<DirtyLogMode, HostError> {
        let flags = self.kvm.check_extension_raw(libc::c_ulong::from(
            kvm_bindings::KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2,
        ));
        let flags = u32::try_from(flags).unwrap_or(0);
        let offered = |mode| match mode {
            DirtyLogMode::Get => true,
            DirtyLogMode::GetClear => flags & KVM_DIRTY_LOG_MANUAL_PROTECT_ENABLE != 0,
            DirtyLogMode::InitiallySet => flags & KVM_DIRTY_LOG_INITIALLY_SET != 0,
        };
        match wanted {
            Some(mode) if offered(mode) => Ok(mode),
            Some(mode) => Err(HostError::DirtyLog(mode)),
            None => Ok(DirtyLogMode::BEST_FIRST
                .into_iter()
                .find(|mode| offered(*mode))
                .unwrap_or(DirtyLogMode::Get)),
        }
    }
}

fn c_path(path: &Path) -> Result<std::ffi::CString, HostError> {
    std::ffi::CString::new(path.as_os_str().as_encoded_bytes()).map_err(|source| {
        HostError::Unusable {
            path: path.to_owned(),
            source: source.into(),
        }
    })
}

/// Returns the error for a KVM device that could not be opened.
fn open_error(path: &Path, error: kvm_ioctls::Error) -> HostError {
    let source = io::Error::from(error);
    match source.kind() {
        io::ErrorKind::NotFound => HostError::NoDevice(path.to_owned()),
        io::ErrorKind::PermissionDenied => HostError::NoPermission(path.to_owned()),
        _ => HostError::Unusable {
            path: path.to_owned(),
            source,
        },
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_host_without_kvm_is_told_what_is_missing() {
        let error = Host::open_at(Path::new("/nonexistent/kvm")).unwrap_err();
        assert!(matches!(error, HostError::NoDevice(_)));
        assert!(
            error.to_string().contains("load kvm_intel or kvm_amd"),
            "{error}"
        );
    }

    #[test]
    fn another_device_is_not_taken_for_kvm() {
        let error = Host::open_at(Path::new("/dev/null")).unwrap_err();
        assert!(matches!(error, HostError::NotKvm(_)), "{error}");
    }
}
