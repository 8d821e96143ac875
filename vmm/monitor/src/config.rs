//! Configuration of a guest, in the JSON format of the Cloud Hypervisor API v1.
//!
//! A field that Ferry does not support is rejected with its path in the JSON and never ignored: a guest that silently
//! lacks a disk is worse than a guest that does not start.
//!
//! The types hold values and check them. They open no file and know no other part of the monitor.

mod devices;
mod net;
mod rate_limiter;

use std::fmt;
use std::os::fd::{AsRawFd, OwnedFd};
use std::path::{Path, PathBuf};

use serde::de::Visitor;
use serde::{Deserialize, Deserializer, Serialize};

pub use devices::{BalloonConfig, DevicesConfig, DiskConfig, ImageType, RngConfig, VsockConfig};
pub use net::{MacAddress, NetConfig};
pub use rate_limiter::{RateLimiterConfig, TokenBucket};

/// Configuration of one guest.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, expecting = "an object")]
pub struct VmConfig {
    /// vCPUs.
    #[serde(default)]
    pub cpus: CpusConfig,
    /// RAM.
    #[serde(default)]
    pub memory: MemoryConfig,
    /// Kernel, command line and initramfs.
    pub payload: PayloadConfig,
    /// Serial port COM1.
    #[serde(default)]
    pub serial: SerialConfig,
    /// Virtio block devices.
    #[serde(skip_serializing_if = "Vec::is_empty", default)]
    pub disks: Vec<DiskConfig>,
    /// Virtio network devices.
    #[serde(skip_serializing_if = "Vec::is_empty", default)]
    pub net: Vec<NetConfig>,
    /// Virtio entropy device.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub rng: Option<RngConfig>,
    /// Virtio socket device (vsock).
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub vsock: Option<VsockConfig>,
    /// Virtio memory balloon.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub balloon: Option<BalloonConfig>,
    /// Virtio console, in addition to the serial port.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub console: Option<SerialConfig>,
}

/// vCPUs of a guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, expecting = "an object")]
pub struct CpusConfig {
    /// Number of vCPUs that are present at boot.
    pub boot_vcpus: u32,
    /// Maximum number of vCPUs. Must equal `boot_vcpus`, because vCPUs cannot be hot-plugged.
    pub max_vcpus: u32,
}

impl CpusConfig {
    /// Returns a configuration with `count` vCPUs at boot and at most.
    #[must_use]
    pub fn of(count: u32) -> Self {
        Self {
            boot_vcpus: count,
            max_vcpus: count,
        }
    }
}

impl Default for CpusConfig {
    fn default() -> Self {
        Self::of(1)
    }
}

/// RAM of a guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, expecting = "an object")]
pub struct MemoryConfig {
    /// Bytes of RAM.
    #[serde(deserialize_with = "bytes")]
    pub size: u64,
    /// Whether the RAM is a memory file that another process can map, for example a vhost-user back end.
    #[serde(default = "enabled")]
    pub shared: bool,
    /// Whether the RAM consists of huge pages of 2 MiB.
    #[serde(default)]
    pub hugepages: bool,
}

/// Deserializes a number of bytes. If the JSON value is something else, the error says "expected a number of bytes".
pub(crate) fn bytes<'de, D: Deserializer<'de>>(deserializer: D) -> Result<u64, D::Error> {
    struct Bytes;
    impl Visitor<'_> for Bytes {
        type Value = u64;

        fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
            f.write_str("a number of bytes")
        }

        fn visit_u64<E>(self, value: u64) -> Result<u64, E> {
            Ok(value)
        }
    }
    deserializer.deserialize_u64(Bytes)
}

fn enabled() -> bool {
    true
}

impl Default for MemoryConfig {
    fn default() -> Self {
        Self {
            size: 512 << 20,
            shared: true,
            hugepages: false,
        }
    }
}

/// Files and parameters that a guest boots from.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, expecting = "an object")]
pub struct PayloadConfig {
    /// Path of the kernel: an ELF image with a PVH note, a vmlinux or a bzImage.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub kernel: Option<PathBuf>,
    /// Command line of the kernel.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub cmdline: Option<String>,
    /// Path of the initramfs.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub initramfs: Option<PathBuf>,
}

/// Host side of the serial port or of the virtio console.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, expecting = "an object")]
pub struct SerialConfig {
    /// Kind of the host side.
    pub mode: SerialMode,
    /// Path of the output file. Required if `mode` is `File`.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub file: Option<PathBuf>,
}

/// Kind of the host side of a serial port.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum SerialMode {
    /// Output is dropped, and there is no input.
    #[default]
    Null,
    /// Output goes to standard output, and input comes from standard input.
    Tty,
    /// Output is appended to a file, and there is no input.
    File,
}

/// A configuration that is not valid.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
#[error("{}{why}", prefix(.path))]
pub struct ConfigError {
    /// Path of the invalid field in the JSON, such as `memory.size`, or `.` for the whole document.
    pub path: String,
    /// Why the value is invalid.
    pub why: String,
}

impl ConfigError {
    fn new(path: impl Into<String>, why: impl Into<String>) -> Self {
        Self {
            path: path.into(),
            why: why.into(),
        }
    }
}

/// Returns the path as the beginning of an error message. An error of the whole document has no such beginning.
fn prefix(path: &str) -> String {
    match path {
        "." => String::new(),
        path => format!("{path}: "),
    }
}

impl VmConfig {
    /// Parses a configuration from JSON.
    ///
    /// # Errors
    /// Returns the path of the field and the reason if `json` is not JSON, has a field that Ferry does not support, or
    /// has a value of the wrong type. Values are not checked against each other: see [`Self::check`].
    pub fn from_json(json: &[u8]) -> Result<Self, ConfigError> {
        from_json(json)
    }

    /// Replaces the virtio devices by `devices`.
    #[must_use]
    pub fn with_devices(self, devices: DevicesConfig) -> Self {
        Self {
            disks: devices.disks,
            net: devices.net,
            rng: devices.rng,
            vsock: devices.vsock,
            balloon: devices.balloon,
            console: devices.console,
            ..self
        }
    }

    /// Returns the configuration of the virtio devices.
    #[must_use]
    pub fn devices(&self) -> DevicesConfig {
        DevicesConfig {
            disks: self.disks.clone(),
            net: self.net.clone(),
            rng: self.rng.clone(),
            vsock: self.vsock.clone(),
            balloon: self.balloon,
            console: self.console.clone(),
        }
    }

    /// Assigns the passed descriptors of taps to the interfaces that have neither `tap` nor `fds`, in order.
    ///
    /// # Errors
    /// Returns an error for `net` if descriptors were passed, but not as many as there are such interfaces.
    pub(crate) fn assign_taps(&mut self, passed: &[OwnedFd]) -> Result<(), ConfigError> {
        let has_no_tap = |net: &&mut NetConfig| net.tap.is_none() && net.fds.is_none();
        let nets: Vec<_> = self.net.iter_mut().filter(has_no_tap).collect();
        if !passed.is_empty() && nets.len() != passed.len() {
            return Err(ConfigError::new(
                "net",
                format!(
                    "{} descriptors were passed, but {} interfaces name no tap",
                    passed.len(),
                    nets.len()
                ),
            ));
        }
        for (net, descriptor) in nets.into_iter().zip(passed) {
            net.fds = Some(vec![descriptor.as_raw_fd()]);
        }
        Ok(())
    }

    /// Checks that the values of the configuration are valid and fit each other, without looking at the host.
    ///
    /// # Errors
    /// Returns the path and the reason of the first field that is invalid.
    pub fn check(&self) -> Result<(), ConfigError> {
        if self.cpus.max_vcpus != self.cpus.boot_vcpus {
            return Err(ConfigError::new(
                "cpus.max_vcpus",
                format!(
                    "{} is not {}, the number of boot_vcpus: there is no hotplug",
                    self.cpus.max_vcpus, self.cpus.boot_vcpus
                ),
            ));
        }
        self.devices().check(self.memory.size)?;
        self.check_shared()?;
        self.check_serial()
    }

    /// Checks that guest memory is shared if something needs it: a vhost-user back end maps it in its own process, and
    /// huge pages are always a shared memory file.
    fn check_shared(&self) -> Result<(), ConfigError> {
        let why = if self.memory.shared {
            return Ok(());
        } else if self.disks.iter().any(|disk| disk.vhost_user) {
            "a vhost-user back end has to map guest memory: leave it on"
        } else if self.memory.hugepages {
            "huge pages are always a shared memory file: leave it on"
        } else {
            return Ok(());
        };
        Err(ConfigError::new("memory.shared", why))
    }

    /// Checks that the serial port has a file if its mode needs one.
    fn check_serial(&self) -> Result<(), ConfigError> {
        match (self.serial.mode, &self.serial.file) {
            (SerialMode::File, None) => Err(ConfigError::new(
                "serial.file",
                "the mode File needs the file's path",
            )),
            _ => Ok(()),
        }
    }
}

impl PayloadConfig {
    /// Returns the path of the kernel.
    ///
    /// # Errors
    /// Returns a [`ConfigError`] for `payload.kernel` if no kernel is given.
    pub fn kernel(&self) -> Result<&Path, ConfigError> {
        self.kernel.as_deref().ok_or_else(|| {
            ConfigError::new(
                "payload.kernel",
                "a guest needs a kernel: an ELF image with a PVH note, a vmlinux or a bzImage",
            )
        })
    }
}

/// Deserializes a value from the JSON of the API.
///
/// # Errors
/// Returns the path of the field and the reason if `json` is not JSON, has an unknown field, or has a value of the
/// wrong type.
pub fn from_json<T: serde::de::DeserializeOwned>(json: &[u8]) -> Result<T, ConfigError> {
    let mut deserializer = serde_json::Deserializer::from_slice(json);
    let value =
        serde_path_to_error::deserialize(&mut deserializer).map_err(|error| ConfigError {
            path: match error.path().to_string().as_str() {
                // The input is not JSON, so that no field can be named.
                "?" => ".".into(),
                path => path.into(),
            },
            why: error.inner().to_string(),
        })?;
    deserializer.end().map_err(|error| ConfigError {
        path: ".".into(),
        why: error.to_string(),
    })?;
    Ok(value)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn passed_taps_go_to_the_interfaces_that_name_none() {
        let json = br#"{"payload":{"kernel":"/k"},"net":[{},{"tap":"t"},{}]}"#;
        let config = VmConfig::from_json(json).unwrap();
        let open = || std::fs::File::open("/dev/null").unwrap().into();
        let passed: [OwnedFd; 2] = [open(), open()];
        let mut given = config.clone();
        given.assign_taps(&passed).unwrap();
        let numbers: Vec<_> = given.net.iter().map(|net| net.fds.clone()).collect();
        let number = |index: usize| Some(vec![passed[index].as_raw_fd()]);
        assert_eq!(numbers, [number(0), None, number(1)]);
        for passed in [vec![open()], vec![open(), open(), open()]] {
            let error = config.clone().assign_taps(&passed).unwrap_err();
            assert_eq!(error.path, "net", "{error}");
        }
        let mut untouched = config.clone();
        untouched.assign_taps(&[]).unwrap();
        assert_eq!(untouched, config);
    }

    #[test]
    fn a_minimal_configuration_gets_the_defaults() {
        let config = VmConfig::from_json(br#"{"payload":{"kernel":"/k"}}"#).unwrap();
        assert_eq!(config.cpus, CpusConfig::of(1));
        assert_eq!(config.memory.size, 512 << 20);
        assert_eq!(config.payload.kernel, Some(PathBuf::from("/k")));
    }

    #[test]
    fn what_ferry_does_not_have_is_refused_by_path() {
        for (json, path) in [
            (r#"{"payload":{"kernel":"/k"},"fs":[]}"#, "fs"),
            (r#"{"payload":{"firmware":"/f"}}"#, "payload.firmware"),
            (
                r#"{"payload":{"kernel":"/k"},"memory":{"size":1,"zones":[]}}"#,
                "memory.zones",
            ),
            (
                r#"{"payload":{"kernel":"/k"},"memory":{"size":-1}}"#,
                "memory.size",
            ),
            (
                r#"{"payload":{"kernel":"/k"},"serial":{"mode":"Pty"}}"#,
                "serial.mode",
            ),
        ] {
            assert_eq!(VmConfig::from_json(json.as_bytes()).unwrap_err().path, path);
        }
        VmConfig::from_json(b"{").unwrap_err();
        VmConfig::from_json(br#"{"payload":{}} trailing"#).unwrap_err();
    }

    #[test]
    fn wrong_json_is_refused_in_words_of_json() {
        for (json, message) in [
            ("[]", "expected an object"),
            ("7", "expected an object"),
            (
                r#"{"payload":{},"memory":{"size":"1G"}}"#,
                "memory.size: invalid type: string \"1G\", expected a number of bytes",
            ),
            ("{}", "missing field `payload`"),
        ] {
            let error = VmConfig::from_json(json.as_bytes()).unwrap_err();
            let text = error.to_string();
            assert!(text.contains(message) && !text.starts_with('.'), "{text}");
        }
    }
}
