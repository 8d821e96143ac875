//! A tap opened here, to be passed to a monitor.
//!
//! It has `unsafe` because a tap is attached by an ioctl, for which there is no safe interface.
#![allow(unsafe_code)]

use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::thread;

use rustix::io::{FdFlags, fcntl_setfd};
use rustix::thread::{UnshareFlags, unshare_unsafe};

/// Makes a tap `name` in a network of its own, and opens it. Nothing else is in that network.
///
/// # Errors
/// The system's.
pub fn open_apart(name: &str) -> io::Result<OwnedFd> {
    let name = name.to_owned();
    let apart = thread::spawn(move || {
        // SAFETY: this thread leaves its network, which nobody else shares with it by its descriptors.
        unsafe { unshare_unsafe(UnshareFlags::NEWNET)? };
        open(&name)
    });
    apart
        .join()
        .map_err(|_| io::Error::other("the thread that made the tap panicked"))?
}

/// Opens the tap `name`, which is there already, as a monitor wants it. The programs that are started from now on get it,
/// by the same number.
///
/// # Errors
/// The system's.
pub fn open(name: &str) -> io::Result<OwnedFd> {
    let file = File::options()
        .read(true)
        .write(true)
        .open("/dev/net/tun")?;
    // SAFETY: zeros are valid in all of its fields.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    for (place, byte) in request.ifr_name.iter_mut().zip(name.bytes()) {
        *place = byte.cast_signed();
    }
    let flags = libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR;
    request.ifr_ifru.ifru_flags = flags.try_into().map_err(io::Error::other)?;
    // SAFETY: the kernel reads and writes one `struct ifreq`.
    let done = unsafe { libc::ioctl(file.as_raw_fd(), libc::TUNSETIFF, &raw mut request) };
    if done < 0 {
        return Err(io::Error::last_os_error());
    }
    fcntl_setfd(&file, FdFlags::empty())?;
    Ok(file.into())
}
