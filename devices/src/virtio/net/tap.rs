//! Host's side of a network device.

use std::io;
use std::os::fd::AsRawFd;

use rustix::io::Errno;

/// Offloads that the guest accepts for packets that it receives.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Offloads {
    /// The guest accepts packets without a checksum (`TUN_F_CSUM`).
    pub checksum: bool,
    /// The guest accepts large segments of TCP over IPv4 (`TUN_F_TSO4`).
    pub tso4: bool,
    /// The guest accepts large segments of TCP over IPv6 (`TUN_F_TSO6`).
    pub tso6: bool,
}

/// Tap interface. Each read(2) or write(2) moves one packet, which begins with the 12 bytes of `virtio_net_hdr_v1`.
///
/// The monitor opens the interface, because that takes ioctls: `IFF_TAP | IFF_NO_PI | IFF_VNET_HDR`, non-blocking, and
/// `TUNSETVNETHDRSZ` with 12 (Linux Documentation/networking/tuntap.rst, include/uapi/linux/if_tun.h).
pub trait Tap: AsRawFd + Send {
    /// Reads the next packet into `packet`, and returns its length in bytes.
    ///
    /// # Errors
    /// Returns the kernel's error, of kind [`io::ErrorKind::WouldBlock`] if there is no packet.
    fn receive(&self, packet: &mut [u8]) -> io::Result<usize>;

    /// Writes a packet.
    ///
    /// # Errors
    /// Returns the kernel's error, of kind [`io::ErrorKind::WouldBlock`] if the interface has no room.
    fn send(&self, packet: &[u8]) -> io::Result<()>;

    /// Sets the offloads that the guest accepts (`TUNSETOFFLOAD`).
    ///
    /// # Errors
    /// Returns the kernel's error.
    fn set_offloads(&self, offloads: Offloads) -> io::Result<()>;
}

/// Repeats `call` as long as a signal interrupts it.
pub(super) fn retried<T>(mut call: impl FnMut() -> io::Result<T>) -> io::Result<T> {
    loop {
        match call() {
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            result => return result,
        }
    }
}

/// Returns whether `error` means that there is no packet now. A tap whose interface is down returns EIO, and becomes
/// readable when it is up again.
pub(super) fn is_idle(error: &io::Error) -> bool {
    error.kind() == io::ErrorKind::WouldBlock
        || error.raw_os_error() == Some(Errno::IO.raw_os_error())
}
