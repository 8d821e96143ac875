//! Opens tap devices that a test passes to a monitor as file descriptors.
//!
//! It uses `unsafe` because a tap device is attached by an ioctl that has no safe interface.
#![allow(unsafe_code)]

use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::thread;

use rustix::io::{FdFlags, fcntl_setfd};
use rustix::thread::{UnshareFlags, unshare_unsafe};

/// Creates the tap device `name` in a new network namespace and opens it.
///
/// # Errors
/// Returns the error of the operating system.
pub fn open_apart(name: &str) -> io::Result<OwnedFd> {
    let name = name.to_owned();
    let apart = thread::spawn(move || {
        // SAFETY: only the network namespace of this thread changes; its descriptors stay shared.
        unsafe { unshare_unsafe(UnshareFlags::NEWNET)? };
        open(&name)
    });
    apart
        .join()
        .map_err(|_| io::Error::other("the thread that made the tap panicked"))?
}

/// Opens the existing tap device `name` with the flags that a monitor needs. Programs that are started from now on
/// inherit the descriptor under the same number.
///
/// # Errors
/// Returns the error of the operating system.
pub fn open(name: &str) -> io::Result<OwnedFd> {
    let file = File::options()
        .read(true)
        .write(true)
        .open("/dev/net/tun")?;
    // SAFETY: all fields of the structure may be zero.
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
