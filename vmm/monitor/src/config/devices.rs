//! Virtio devices in a guest's configuration.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use super::{ConfigError, NetConfig, RateLimiterConfig, SerialConfig, SerialMode, bytes};
use crate::socket_path::check_socket_path;

/// Configuration of the virtio devices of a guest, in the order in which the guest enumerates them.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct DevicesConfig {
    /// Block devices.
    pub disks: Vec<DiskConfig>,
    /// Network devices.
    pub net: Vec<NetConfig>,
    /// Entropy device.
    pub rng: Option<RngConfig>,
    /// Socket device (vsock).
    pub vsock: Option<VsockConfig>,
    /// Memory balloon.
    pub balloon: Option<BalloonConfig>,
    /// Console, in addition to the serial port.
    pub console: Option<SerialConfig>,
}

/// Format of a disk image, as declared by the user.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum ImageType {
    /// Raw: the bytes of the image are the bytes of the disk. The image is not probed, because a guest may have written
    /// data that looks like the header of another format.
    Raw,
}

/// Configuration of a disk, which is served from a raw image or by a vhost-user back end.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, expecting = "an object")]
pub struct DiskConfig {
    /// Path of the raw image, a file or a block device. `None` for a vhost-user disk, whose back end opens the image.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub path: Option<PathBuf>,
    /// Format of the image. If it is not given, an image with the header of a format other than raw is rejected.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub image_type: Option<ImageType>,
    /// Whether the disk is read-only for the guest.
    #[serde(default)]
    pub readonly: bool,
    /// Serial number of the disk, of which the guest reads at most 20 bytes. The default is the name of the device. A
    /// vhost-user back end reports a serial number of its own; there, `id` is the name by which both sides of a
    /// migration recognize the disk.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub id: Option<String>,
    /// Limits of bandwidth and of requests.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub rate_limiter_config: Option<RateLimiterConfig>,
    /// Whether a vhost-user back end serves the disk.
    #[serde(skip_serializing_if = "std::ops::Not::not", default)]
    pub vhost_user: bool,
    /// Path of the Unix socket on which the vhost-user back end listens.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub vhost_socket: Option<PathBuf>,
}

/// Configuration of the entropy device.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, expecting = "an object")]
pub struct RngConfig {
    /// Source of the random bytes. Only the kernel's generator is supported: `/dev/urandom` or `/dev/random`.
    #[serde(default = "RngConfig::kernel")]
    pub src: PathBuf,
}

impl RngConfig {
    const SOURCES: [&str; 2] = ["/dev/urandom", "/dev/random"];

    /// Returns the path of the kernel's generator.
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

/// Configuration of the socket device.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, expecting = "an object")]
pub struct VsockConfig {
    /// Context ID (CID) of the guest, 3 or higher.
    pub cid: u64,
    /// Path of the Unix socket to which processes on the host connect to reach the guest. The monitor creates it.
    pub socket: PathBuf,
}

/// Configuration of the memory balloon.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, expecting = "an object")]
pub struct BalloonConfig {
    /// Bytes of memory that the guest is asked to give up when it boots.
    #[serde(deserialize_with = "bytes")]
    pub size: u64,
    /// Whether the guest may deflate the balloon before its OOM killer ends a process.
    #[serde(default)]
    pub deflate_on_oom: bool,
    /// Whether the guest reports free pages, so that the host can reclaim them.
    #[serde(default)]
    pub free_page_reporting: bool,
}

impl BalloonConfig {
    /// Returns [`Self::size`] in pages of 4 KiB.
    pub(crate) fn pages(self) -> u32 {
        u32::try_from(self.size / ept::PAGE_SIZE).unwrap_or(u32::MAX)
    }

    /// Checks the size of the balloon against `memory_bytes`, the bytes of guest memory. `path` is the path of the
    /// field in error messages.
    pub(crate) fn check(self, path: &str, memory_bytes: u64) -> Result<(), ConfigError> {
        let size = self.size;
        if !size.is_multiple_of(ept::PAGE_SIZE) || size >= memory_bytes {
            let why = format!(
                "{size} bytes is not a valid size: it must be a multiple of 4096 and less than the guest's {memory_bytes} bytes"
            );
            return Err(ConfigError::new(path, why));
        }
        Ok(())
    }
}

impl DevicesConfig {
    /// Checks that the values are valid, without looking at the host. `memory_bytes` is the size of guest memory.
    ///
    /// # Errors
    /// Returns the path and the reason of the first field that is invalid.
    pub fn check(&self, memory_bytes: u64) -> Result<(), ConfigError> {
        for (index, disk) in self.disks.iter().enumerate() {
            disk.check(&format!("disks[{index}]"))?;
        }
        for (index, net) in self.net.iter().enumerate() {
            net.check(&format!("net[{index}]"))?;
        }
        self.check_rest(memory_bytes)
    }

    /// Checks the devices of which a guest has at most one.
    fn check_rest(&self, memory_bytes: u64) -> Result<(), ConfigError> {
        if let Some(rng) = &self.rng {
            let known = RngConfig::SOURCES.map(PathBuf::from);
            if !known.contains(&rng.src) {
                let why =
                    "the only source of entropy is the kernel: use /dev/urandom or /dev/random";
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
                "only the serial port can use the terminal: the mode of a console is File or Null",
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
                "vhost_socket is the socket of a vhost-user back end: it needs vhost_user",
            )),
            false if self.path.is_none() => Err(ConfigError::new(
                format!("{path}.path"),
                "a disk needs an image: the path of a file or of a block device",
            )),
            false => Ok(()),
        }
    }

    /// Checks a disk that a vhost-user back end serves. The back end opens the image and decides how it may be used, so
    /// that fields about the image are rejected.
    fn check_vhost_user(&self, path: &str) -> Result<(), ConfigError> {
        let image_fields = [
            ("path", self.path.is_some()),
            ("image_type", self.image_type.is_some()),
            ("readonly", self.readonly),
            ("rate_limiter_config", self.rate_limiter_config.is_some()),
        ];
        if let Some((field, _)) = image_fields.iter().find(|(_, given)| *given) {
            return Err(ConfigError::new(
                format!("{path}.{field}"),
                "this is decided by the vhost-user back end, which opens the image: leave the field out",
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
