//! The configuration of a guest, in the JSON of the Cloud Hypervisor API v1.
//!
//! Only what Ferry has is here. A field that is not is refused with its path, never ignored: a guest that
//! silently lacks a disk is worse than one that does not start.

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

/// A guest.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, expecting = "an object")]
pub struct VmConfig {
    /// Its processors.
    #[serde(default)]
    pub cpus: CpusConfig,
    /// Its memory.
    #[serde(default)]
    pub memory: MemoryConfig,
    /// What it boots.
    pub payload: PayloadConfig,
    /// Its serial port.
    #[serde(default)]
    pub serial: SerialConfig,
    /// Its disks.
    #[serde(skip_serializing_if = "Vec::is_empty", default)]
    pub disks: Vec<DiskConfig>,
    /// Its network interfaces.
    #[serde(skip_serializing_if = "Vec::is_empty", default)]
    pub net: Vec<NetConfig>,
    /// Its entropy device.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub rng: Option<RngConfig>,
    /// Its socket device.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub vsock: Option<VsockConfig>,
    /// Its memory balloon.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub balloon: Option<BalloonConfig>,
    /// Its virtio console.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub console: Option<SerialConfig>,
}

/// Processors of a guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, expecting = "an object")]
pub struct CpusConfig {
    /// vCPUs that it starts with.
    pub boot_vcpus: u32,
    /// vCPUs that it may have: the same, there is no hotplug.
    pub max_vcpus: u32,
}

impl CpusConfig {
    /// `count` vCPUs.
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

/// Memory of a guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, expecting = "an object")]
pub struct MemoryConfig {
    /// Bytes.
    #[serde(deserialize_with = "bytes")]
    pub size: u64,
    /// Backed by a memory file that another process could map.
    #[serde(default = "yes")]
    pub shared: bool,
    /// Backed by huge pages of 2 MiB.
    #[serde(default)]
    pub hugepages: bool,
}

/// Reads a number of bytes: its errors say that one is expected.
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

fn yes() -> bool {
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

/// What a guest boots.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, expecting = "an object")]
pub struct PayloadConfig {
    /// An ELF image with a PVH note, a vmlinux or a bzImage.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub kernel: Option<PathBuf>,
    /// The kernel's command line.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub cmdline: Option<String>,
    /// The first root of the kernel.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub initramfs: Option<PathBuf>,
}

/// Where a serial port's output goes and its input comes from.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, expecting = "an object")]
pub struct SerialConfig {
    /// The other end.
    pub mode: SerialMode,
    /// The file, for `File`.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub file: Option<PathBuf>,
}

/// The other end of a serial port.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum SerialMode {
    /// Output is dropped, there is no input.
    #[default]
    Null,
    /// Standard output and standard input.
    Tty,
    /// Output goes to a file, there is no input.
    File,
}

/// A configuration that cannot be.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
#[error("{}{why}", prefix(.path))]
pub struct ConfigError {
    /// The field's path in the JSON, such as `memory.size`; `.` for the whole.
    pub path: String,
    /// What is wrong with it.
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

fn prefix(path: &str) -> String {
    match path {
        "." => String::new(),
        path => format!("{path}: "),
    }
}

impl VmConfig {
    /// Reads a configuration.
    ///
    /// # Errors
    /// Not JSON, a field that Ferry does not have, a value that cannot be; with the field's path.
    pub fn from_json(json: &[u8]) -> Result<Self, ConfigError> {
        from_json(json)
    }

    /// Its virtio devices.
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

    /// Has each interface that names no tap use the next of `passed`, by its number.
    ///
    /// # Errors
    /// Not as many were passed as there are such interfaces.
    pub(crate) fn give_taps(&mut self, passed: &[OwnedFd]) -> Result<(), ConfigError> {
        let without = |net: &&mut NetConfig| net.tap.is_none() && net.fds.is_none();
        let nets: Vec<_> = self.net.iter_mut().filter(without).collect();
        if !passed.is_empty() && nets.len() != passed.len() {
            return Err(ConfigError::new(
                "net",
                format!(
                    "{} descriptors came with the call, for {} interfaces that name no tap",
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

/// Reads any of the API's JSON.
///
/// # Errors
/// Not JSON, an unknown field, a wrong value; with the field's path.
pub fn from_json<T: serde::de::DeserializeOwned>(json: &[u8]) -> Result<T, ConfigError> {
    let mut deserializer = serde_json::Deserializer::from_slice(json);
    let value =
        serde_path_to_error::deserialize(&mut deserializer).map_err(|error| ConfigError {
            path: match error.path().to_string().as_str() {
                // It is no JSON at all.
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
        given.give_taps(&passed).unwrap();
        let numbers: Vec<_> = given.net.iter().map(|net| net.fds.clone()).collect();
        let number = |index: usize| Some(vec![passed[index].as_raw_fd()]);
        assert_eq!(numbers, [number(0), None, number(1)]);
        for passed in [vec![open()], vec![open(), open(), open()]] {
            let error = config.clone().give_taps(&passed).unwrap_err();
            assert_eq!(error.path, "net", "{error}");
        }
        let mut untouched = config.clone();
        untouched.give_taps(&[]).unwrap();
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
        for (json, said) in [
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
            assert!(text.contains(said) && !text.starts_with('.'), "{text}");
        }
    }
}
