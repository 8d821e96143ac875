//! Errors of virtio devices.

use std::io;

use devices::virtio::{VhostUserError, VirtioError, VsockError};
use devices::{BusError, MmioSpace};

use super::{DiskError, TapError};

/// Reasons why a virtio device cannot be opened, attached, saved or restored.
#[derive(Debug, thiserror::Error)]
pub enum DevicesError {
    /// The image of a disk cannot be used.
    #[error("disk {0}")]
    Disk(#[from] DiskError),
    /// A vhost-user back end cannot be connected, or lacks a feature.
    #[error("vhost-user disk {0}")]
    VhostUser(#[from] VhostUserError),
    /// A vhost-user back end of an attached device failed.
    #[error("{name}: {source}")]
    BackEnd {
        /// Name of the device.
        name: String,
        /// Error of the back end.
        source: VhostUserError,
    },
    /// A tap cannot be used.
    #[error("network interface: {0}")]
    Tap(#[from] TapError),
    /// The Unix socket of the socket device cannot be created.
    #[error("vsock: {0}")]
    Vsock(#[from] VsockError),
    /// The output file of the console cannot be opened.
    #[error("console {path}: {source}")]
    Console {
        /// Path of the file.
        path: String,
        /// Error that the kernel returned.
        source: io::Error,
    },
    /// There are more devices than interrupt lines.
    #[error("{name}: at most {most} virtio devices are possible")]
    TooMany {
        /// Name of the first device without an interrupt line.
        name: String,
        /// Maximum number of devices.
        most: u32,
    },
    /// The host refused a resource of a device.
    #[error("{name}: {what}: {source}")]
    Host {
        /// Name of the device.
        name: String,
        /// Name of the resource or of the ioctl.
        what: &'static str,
        /// Error that the kernel returned.
        source: io::Error,
    },
    /// A device cannot be created, saved or restored.
    #[error(transparent)]
    Virtio(#[from] VirtioError),
    /// The register windows of two devices overlap.
    #[error(transparent)]
    Bus(#[from] BusError<MmioSpace>),
}
