//! Tap interface of the host, opened and configured for a virtio network device.
//!
//! This file has `unsafe` code because taps are configured by ioctls without a safe wrapper, and because a descriptor
//! that was passed to the process is known only by its number.
//!
//! Interface: Linux Documentation/networking/tuntap.rst, include/uapi/linux/if_tun.h.
#![allow(unsafe_code)]

use std::fs::{File, OpenOptions};
use std::io::{self, ErrorKind, Read, Write};
use std::mem::size_of;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::os::raw::{c_int, c_short, c_uint, c_ulong};
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

use devices::virtio::{Offloads, Tap};
use vmm_sys_util::ioctl::{ioctl_with_mut_ref, ioctl_with_ref, ioctl_with_val};

/// Device through which taps are opened.
const TUN_DEVICE: &str = "/dev/net/tun";
/// IFNAMSIZ: maximum bytes of an interface name with its terminating zero.
const NAME_BYTES: usize = 16;
/// Bytes of `virtio_net_hdr_v1`, which precedes each packet.
const HEADER_BYTES: c_int = 12;
/// Flags of the tap: Ethernet frames, no packet information, and a virtio-net header.
const FLAGS: c_int = libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR;

/// Reasons why a tap cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum TapError {
    /// The name is not a valid interface name.
    #[error("{0:?} is no name of an interface: a name has 1 to 15 bytes, without / and spaces")]
    Name(String),
    /// There is no interface with this name. The monitor does not create interfaces.
    #[error(
        "there is no interface {0}: create it with `ip tuntap add {0} mode tap` and `ip link set {0} up`"
    )]
    Absent(String),
    /// The interface is not a tap.
    #[error("the interface {0} is no tap: create one with `ip tuntap add NAME mode tap`")]
    Kind(String),
    /// The device /dev/net/tun cannot be opened.
    #[error("{TUN_DEVICE}: {source}{}", device_hint(.source))]
    Device {
        /// Error that the kernel returned.
        source: io::Error,
    },
    /// The monitor could not attach to the tap.
    #[error("the tap {name}: {source}{}", attach_hint(.source))]
    Attach {
        /// Name of the tap.
        name: String,
        /// Error that the kernel returned.
        source: io::Error,
    },
    /// The descriptor is not open, or is not a tap.
    #[error("descriptor {fd}: {why}")]
    Descriptor {
        /// Number of the descriptor.
        fd: RawFd,
        /// Why it cannot be used.
        why: String,
    },
    /// A tap could not be configured.
    #[error("{call}: {source}")]
    SetUp {
        /// Name of the call that failed.
        call: &'static str,
        /// Error that the kernel returned.
        source: io::Error,
    },
}

/// Returns the remedy if [`TUN_DEVICE`] cannot be opened.
fn device_hint(error: &io::Error) -> &'static str {
    match error.kind() {
        ErrorKind::NotFound => "; load the kernel module tun",
        ErrorKind::PermissionDenied => "; run as root, or pass an open tap with fd=N",
        _ => "",
    }
}

/// Returns the remedy if a tap cannot be attached.
fn attach_hint(error: &io::Error) -> &'static str {
    match error.raw_os_error() {
        Some(libc::EBUSY) => "; another process uses it, or it is given twice",
        Some(libc::EPERM) => {
            "; it belongs to another user: `ip tuntap add NAME mode tap user USER` creates a tap of USER"
        }
        Some(libc::EINVAL) => "; it was created with other flags, such as multi_queue",
        _ => "",
    }
}

/// `struct ifreq` with the fields that the ioctls of taps use.
#[repr(C)]
struct InterfaceRequest {
    name: [u8; NAME_BYTES],
    flags: c_short,
    rest: [u8; 22],
}

const _: () = assert!(size_of::<InterfaceRequest>() == 40);

impl InterfaceRequest {
    fn new() -> Self {
        Self {
            name: [0; NAME_BYTES],
            flags: 0,
            rest: [0; 22],
        }
    }
}

/// Open tap.
#[derive(Debug)]
pub(super) struct HostTap(File);

impl HostTap {
    /// Attaches to the existing tap `name`.
    pub(super) fn open(name: &str) -> Result<Self, TapError> {
        Self::check_exists(name)?;
        let mut request = InterfaceRequest::new();
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .custom_flags(libc::O_NONBLOCK)
            .open(TUN_DEVICE)
            .map_err(|source| TapError::Device { source })?;
        request.name[..name.len()].copy_from_slice(name.as_bytes());
        request.flags = c_short::try_from(FLAGS).unwrap_or_default();
        // SAFETY: the kernel reads and writes one `struct ifreq`, and `request` has its layout.
        let done = unsafe { ioctl_with_mut_ref(&file, libc::TUNSETIFF as c_ulong, &mut request) };
        result(done).map_err(|source| TapError::Attach {
            name: name.into(),
            source,
        })?;
        Self::set_up(file)
    }

    /// Checks that the tap `name` exists, without attaching to it.
    pub(super) fn check_exists(name: &str) -> Result<(), TapError> {
        let valid = (1..NAME_BYTES).contains(&name.len())
            && !name.contains(|c: char| c == '/' || c.is_whitespace() || c == '\0')
            && !matches!(name, "." | "..");
        if !valid {
            return Err(TapError::Name(name.into()));
        }
        // If the interface does not exist, TUNSETIFF by root would create it.
        let interface = Path::new("/sys/class/net").join(name);
        if !interface.exists() {
            return Err(TapError::Absent(name.into()));
        }
        if !interface.join("tun_flags").exists() {
            return Err(TapError::Kind(name.into()));
        }
        Ok(())
    }

    /// Duplicates the descriptor `fd` of an open tap, which the process inherited or received. `fd` stays open, so that
    /// a guest can be started again.
    pub(super) fn passed(fd: RawFd) -> Result<Self, TapError> {
        let failed = |why: String| TapError::Descriptor { fd, why };
        // SAFETY: duplicating a number that is not an open descriptor returns an error and has no other effect.
        let copy = unsafe { libc::fcntl(fd, libc::F_DUPFD_CLOEXEC, 3) };
        let copy = result(copy)
            .map_err(|error| failed(format!("{error}; was it passed to this process?")))?;
        // SAFETY: the kernel has just created this descriptor, and nothing else owns it.
        let file = File::from(unsafe { OwnedFd::from_raw_fd(copy) });
        let mut request = InterfaceRequest::new();
        // SAFETY: the kernel writes one `struct ifreq`, and `request` has its layout.
        let done = unsafe { ioctl_with_mut_ref(&file, libc::TUNGETIFF as c_ulong, &mut request) };
        result(done).map_err(|_| failed("it is no tap".into()))?;
        let flags = c_int::from(request.flags);
        if flags & FLAGS != FLAGS {
            return Err(failed(
                "it must be opened with IFF_TAP, IFF_NO_PI and IFF_VNET_HDR".into(),
            ));
        }
        let set_up = |source| TapError::SetUp {
            call: "O_NONBLOCK",
            source,
        };
        rustix::io::ioctl_fionbio(&file, true).map_err(|error| set_up(error.into()))?;
        Self::set_up(file)
    }

    /// Sets the length of the virtio-net header.
    fn set_up(file: File) -> Result<Self, TapError> {
        // SAFETY: the kernel reads one int from a valid reference.
        let done =
            unsafe { ioctl_with_ref(&file, libc::TUNSETVNETHDRSZ as c_ulong, &HEADER_BYTES) };
        result(done).map_err(|source| TapError::SetUp {
            call: "TUNSETVNETHDRSZ",
            source,
        })?;
        Ok(Self(file))
    }
}

/// Converts the return value of an ioctl to a result.
fn result(returned: c_int) -> io::Result<c_int> {
    if returned < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(returned)
}

impl AsRawFd for HostTap {
    fn as_raw_fd(&self) -> RawFd {
        self.0.as_raw_fd()
    }
}

impl Tap for HostTap {
    fn receive(&self, packet: &mut [u8]) -> io::Result<usize> {
        (&self.0).read(packet)
    }

    fn send(&self, packet: &[u8]) -> io::Result<()> {
        match (&self.0).write(packet)? {
            all if all == packet.len() => Ok(()),
            part => Err(io::Error::other(format!(
                "the tap took {part} bytes of a packet of {}",
                packet.len()
            ))),
        }
    }

    fn set_offloads(&self, offloads: Offloads) -> io::Result<()> {
        let flag = |wanted: bool, bit: c_uint| if wanted { bit } else { 0 };
        let bits = flag(offloads.checksum, libc::TUN_F_CSUM)
            | flag(offloads.tso4, libc::TUN_F_TSO4)
            | flag(offloads.tso6, libc::TUN_F_TSO6);
        // SAFETY: the argument is an integer; the kernel does not access memory of this process.
        let done = unsafe { ioctl_with_val(&self.0, libc::TUNSETOFFLOAD as c_ulong, bits.into()) };
        result(done).map(drop)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_no_tap_is_refused_by_name() {
        for (name, why) in [
            ("", "no name"),
            ("an/interface", "no name"),
            ("sixteen-bytes-xx", "no name"),
            ("ferry-absent", "ip tuntap add ferry-absent mode tap"),
            ("lo", "no tap"),
        ] {
            let error = HostTap::open(name).unwrap_err().to_string();
            assert!(error.contains(why), "{name:?}: {error}");
        }
    }

    #[test]
    fn a_descriptor_that_is_no_tap_is_refused() {
        let file = File::open("/dev/null").unwrap();
        let error = HostTap::passed(file.as_raw_fd()).unwrap_err().to_string();
        assert!(error.contains("it is no tap"), "{error}");
        let error = HostTap::passed(1_000_000).unwrap_err().to_string();
        assert!(error.contains("descriptor 1000000"), "{error}");
    }
}
