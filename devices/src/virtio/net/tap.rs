//! The host's side of a network device.

use std::io;
use std::os::fd::AsRawFd;

use rustix::io::Errno;

/// What the guest leaves to the host in packets that it receives.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Offloads {
    /// Packets may come without a checksum (`TUN_F_CSUM`).
    pub checksum: bool,
    /// TCP over IPv4 may come in large segments (`TUN_F_TSO4`).
    pub tso4: bool,
    /// TCP over IPv6 may come in large segments (`TUN_F_TSO6`).
    pub tso6: bool,
}

/// A tap interface: packets go in and out by read(2) and write(2), each with the 12 bytes of
/// `virtio_net_hdr_v1` before it.
///
/// The monitor opens it, because that takes ioctls: `IFF_TAP | IFF_NO_PI | IFF_VNET_HDR`, non-blocking,
/// `TUNSETVNETHDRSZ` 12 (Linux Documentation/networking/tuntap.rst, include/uapi/linux/if_tun.h).
pub trait Tap: AsRawFd + Send {
    /// Reads the next packet into `packet`, and returns its length.
    ///
    /// # Errors
    /// The kernel's; [`io::ErrorKind::WouldBlock`] when there is none.
    fn receive(&self, packet: &mut [u8]) -> io::Result<usize>;

    /// Writes a packet.
    ///
    /// # Errors
    /// The kernel's; [`io::ErrorKind::WouldBlock`] when there is no room.
    fn send(&self, packet: &[u8]) -> io::Result<()>;

    /// Says what the guest can take (`TUNSETOFFLOAD`).
    ///
    /// # Errors
    /// The kernel's.
    fn set_offloads(&self, offloads: Offloads) -> io::Result<()>;
}

/// Calls again what a signal interrupted.
pub(super) fn retried<T>(mut call: impl FnMut() -> io::Result<T>) -> io::Result<T> {
    loop {
        match call() {
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            result => return result,
        }
    }
}

/// Whether there is nothing to read now, or nobody to read from: a tap whose interface is down reads as
/// EIO, and is tried again when it has something.
pub(super) fn is_idle(error: &io::Error) -> bool {
    error.kind() == io::ErrorKind::WouldBlock
        || error.raw_os_error() == Some(Errno::IO.raw_os_error())
}
