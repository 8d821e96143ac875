//! The virtio devices in a guest's configuration.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use super::{ConfigError, NetConfig, RateLimiterConfig, SerialConfig, SerialMode, bytes};
use crate::socket_path::check_socket_path;

/// The virtio devices of a guest. Their order is the order in which the guest finds them.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct DevicesConfig {
    /// Disks.
    pub disks: Vec<DiskConfig>,
    /// Network interfaces.
    pub net: Vec<NetConfig>,
    /// An entropy device.
    pub rng: Option<RngConfig>,
    /// A socket device.
    pub vsock: Option<VsockConfig>,
    /// A memory balloon.
    pub balloon: Option<BalloonConfig>,
    /// A console beside the serial port.
    pub console: Option<SerialConfig>,
}

/// What an image is said to be.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum ImageType {
    /// The disk itself, whatever it begins with: a guest may have written what looks like another image.
    Raw,
}

/// A disk: over a raw image, or over a vhost-user back end.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, expecting = "an object")]
pub struct DiskConfig {
    /// The raw image: a file, or a block device. None for a vhost-user back end, which has its own.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub path: Option<PathBuf>,
    /// What the image is; one that looks like another kind is refused where nothing is said.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub image_type: Option<ImageType>,
    /// The guest may not write to it.
    #[serde(default)]
    pub readonly: bool,
    /// Its serial number, of which the guest reads 20 bytes; its device's name if none is given. A vhost-user back end
    /// tells the guest one of its own: there this is what both sides of a migration call the disk.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub id: Option<String>,
    /// How much it may move.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub rate_limiter_config: Option<RateLimiterConfig>,
    /// A vhost-user back end serves it.
    #[serde(skip_serializing_if = "std::ops::Not::not", default)]
    pub vhost_user: bool,
    /// The Unix socket on which that listens.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub vhost_socket: Option<PathBuf>,
}

/// An entropy device.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, expecting = "an object")]
pub struct RngConfig {
    /// Where the bytes come from: the kernel's generator.
    #[serde(default = "RngConfig::kernel")]
    pub src: PathBuf,
}

impl RngConfig {
    const SOURCES: [&str; 2] = ["/dev/urandom", "/dev/random"];

    fn kernel() -> PathBuf {
        Self::SOURCES[0].into()
    }
}

impl Default for RngConfig {
    fn default() -> Self {
        Self {
            src: Self::kernel(),
        }
    }
}

/// A socket device.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, expecting = "an object")]
pub struct VsockConfig {
    /// The guest's address: 3 or more.
    pub cid: u64,
    /// The Unix socket on which the host asks for connections to the guest.
    pub socket: PathBuf,
}

/// A memory balloon.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, expecting = "an object")]
pub struct BalloonConfig {
    /// Bytes that the guest is asked to give at once.
    #[serde(deserialize_with = "bytes")]
    pub size: u64,
    /// The guest may take pages back before it kills a process for want of memory.
    #[serde(default)]
    pub deflate_on_oom: bool,
    /// The guest says which of its pages hold nothing.
    #[serde(default)]
    pub free_page_reporting: bool,
}

impl BalloonConfig {
    /// [`Self::size`] in pages of 4 KiB.
    pub(crate) fn pages(self) -> u32 {
        u32::try_from(self.size / ept::PAGE_SIZE).unwrap_or(u32::MAX)
    }

    /// Finds a size that cannot be, in a guest with so much memory.
    pub(crate) fn check(self, path: &str, memory_bytes: u64) -> Result<(), ConfigError> {
        let size = self.size;
        if !size.is_multiple_of(ept::PAGE_SIZE) || size >= memory_bytes {
            let why = format!(
                "{size} bytes cannot be: whole pages of 4096, and less than the guest's {memory_bytes}"
            );
            return Err(ConfigError::new(path, why));
        }
        Ok(())
    }
}

impl DevicesConfig {
    /// Finds what cannot be, whatever the host has.
    ///
    /// # Errors
    /// The first such field, by its path.
    pub fn check(&self, memory_bytes: u64) -> Result<(), ConfigError> {
        for (index, disk) in self.disks.iter().enumerate() {
            disk.check(&format!("disks[{index}]"))?;
        }
        for (index, net) in self.net.iter().enumerate() {
            net.check(&format!("net[{index}]"))?;
        }
        self.check_rest(memory_bytes)
    }

    fn check_rest(&self, memory_bytes: u64) -> Result<(), ConfigError> {
        if let Some(rng) = &self.rng {
            let known = RngConfig::SOURCES.map(PathBuf::from);
            if !known.contains(&rng.src) {
                let why = "entropy comes from the kernel: /dev/urandom or /dev/random";
                return Err(ConfigError::new("rng.src", why));
            }
        }
        if let Some(balloon) = self.balloon {
            balloon.check("balloon.size", memory_bytes)?;
        }
        let Some(console) = &self.console else {
            return Ok(());
        };
        match (&console.mode, &console.file) {
            (SerialMode::Null, _) | (SerialMode::File, Some(_)) => Ok(()),
            (SerialMode::Tty, _) => Err(ConfigError::new(
                "console.mode",
                "the terminal is the serial port's: a console leads to a file, or nowhere",
            )),
            (SerialMode::File, None) => Err(ConfigError::new(
                "console.file",
                "the mode File needs the file's path",
            )),
        }
    }
}

impl DiskConfig {
    fn check(&self, path: &str) -> Result<(), ConfigError> {
        let limiter = self.rate_limiter_config.unwrap_or_default();
        limiter.check(&format!("{path}.rate_limiter_config"))?;
        match self.vhost_user {
            true => self.check_vhost_user(path),
            false if self.vhost_socket.is_some() => Err(ConfigError::new(
                format!("{path}.vhost_user"),
                "vhost_socket is a back end's: it goes with vhost_user",
            )),
            false if self.path.is_none() => Err(ConfigError::new(
                format!("{path}.path"),
                "a disk needs its image: a file, or a block device",
            )),
            false => Ok(()),
        }
    }

    /// What a back end has itself is not said here.
    fn check_vhost_user(&self, path: &str) -> Result<(), ConfigError> {
        let of_back_end = [
            ("path", self.path.is_some()),
            ("image_type", self.image_type.is_some()),
            ("readonly", self.readonly),
            ("rate_limiter_config", self.rate_limiter_config.is_some()),
        ];
        if let Some((field, _)) = of_back_end.iter().find(|(_, given)| *given) {
            return Err(ConfigError::new(
                format!("{path}.{field}"),
                "the vhost-user back end has the image, and says what may be done with it",
            ));
        }
        match &self.vhost_socket {
            Some(socket) => check_socket_path(socket)
                .map_err(|why| ConfigError::new(format!("{path}.vhost_socket"), why.to_string())),
            None => Err(ConfigError::new(
                format!("{path}.vhost_socket"),
                "a vhost-user disk needs the Unix socket of its back end",
            )),
        }
    }
}

#[cfg(test)]
mod tests {
    use devices::Rate;

    use super::super::{MacAddress, VmConfig};
    use super::*;

    fn read(devices: &str) -> Result<DevicesConfig, ConfigError> {
        let json = format!(r#"{{"payload":{{"kernel":"/k"}},{devices}}}"#);
        let devices = VmConfig::from_json(json.as_bytes())?.devices();
        devices.check(512 << 20)?;
        Ok(devices)
    }

    #[test]
    fn every_device_is_read_from_the_apis_json() {
        let devices = read(
            r#""disks":[{"path":"/d","readonly":true,"id":"root","rate_limiter_config":
                {"bandwidth":{"size":1000,"refill_time":500}}}],
               "net":[{"tap":"tap0","mac":"52:54:00:12:34:56","mtu":1500},{"fds":[5]}],
               "rng":{"src":"/dev/urandom"},"vsock":{"cid":3,"socket":"/s"},
               "balloon":{"size":4096,"free_page_reporting":true},"console":{"mode":"Null"}"#,
        )
        .unwrap();
        let limit = devices.disks[0].rate_limiter_config.unwrap().limit();
        assert_eq!(
            limit.bytes,
            Some(Rate {
                per_second: 2000,
                burst: 1000
            })
        );
        assert_eq!(
            devices.net[0].mac,
            MacAddress([0x52, 0x54, 0, 0x12, 0x34, 0x56])
        );
        assert_eq!(devices.net[1].mac.0[0] & 3, 2);
        assert_eq!(devices.balloon.unwrap().pages(), 1);
    }

    #[test]
    fn what_cannot_be_is_refused_by_path() {
        for (devices, path) in [
            (r#""disks":[{"readonly":true}]"#, "disks[0].path"),
            (r#""disks":[{"vhost_user":true}]"#, "disks[0].vhost_socket"),
            (
                r#""disks":[{"path":"/a","vhost_socket":"/s"}]"#,
                "disks[0].vhost_user",
            ),
            (
                r#""disks":[{"vhost_user":true,"vhost_socket":"/s","path":"/a"}]"#,
                "disks[0].path",
            ),
            (
                r#""disks":[{"vhost_user":true,"vhost_socket":"/s","readonly":true}]"#,
                "disks[0].readonly",
            ),
            (
                r#""disks":[{"vhost_user":true,"vhost_socket":"/s","rate_limiter_config":{}}]"#,
                "disks[0].rate_limiter_config",
            ),
            (
                r#""disks":[{"path":"/a","direct":true}]"#,
                "disks[0].direct",
            ),
            (
                r#""disks":[{"path":"/a"},{"path":"/b","rate_limiter_config":{"ops":{"size":0,"refill_time":1}}}]"#,
                "disks[1].rate_limiter_config.ops",
            ),
            (r#""net":[{}]"#, "net[0].tap"),
            (r#""net":[{"tap":"t","fds":[3]}]"#, "net[0].fds"),
            (r#""net":[{"fds":[3,4]}]"#, "net[0].fds"),
            (r#""net":[{"tap":"t","mac":"52:54"}]"#, "net[0].mac"),
            (
                r#""net":[{"tap":"t","mac":"01:00:00:00:00:01"}]"#,
                "net[0].mac",
            ),
            (r#""net":[{"tap":"t","mtu":10}]"#, "net[0].mtu"),
            (r#""rng":{"src":"/dev/zero"}"#, "rng.src"),
            (r#""vsock":{"cid":3}"#, "vsock"),
            (r#""balloon":{"size":4097}"#, "balloon.size"),
            (r#""balloon":{"size":536870912}"#, "balloon.size"),
            (r#""console":{"mode":"Tty"}"#, "console.mode"),
            (r#""console":{"mode":"File"}"#, "console.file"),
            (r#""pmem":[]"#, "pmem"),
        ] {
            assert_eq!(read(devices).unwrap_err().path, path, "{devices}");
        }
    }
}
