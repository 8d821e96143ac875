//! File descriptors that the parent process leaves open for this program, which options name as `fd=N`.
//!
//! This file uses `unsafe` because only the caller can guarantee that nothing else in the program owns descriptor N.
#![allow(unsafe_code)]

use std::io;
use std::os::fd::{FromRawFd, OwnedFd};
use std::sync::Mutex;

use rustix::io::FdFlags;

/// Numbers of the descriptors that were taken. Each has exactly one owner.
static TAKEN: Mutex<Vec<i32>> = Mutex::new(Vec::new());

/// Takes ownership of the inherited descriptor `number` and sets its close-on-exec flag.
///
/// Must be called before this program opens a file, so that an open descriptor is known to be inherited.
///
/// # Errors
/// Returns an error if `number` is one of the three standard descriptors, was taken before, or is not open.
pub(super) fn take(number: i32) -> io::Result<OwnedFd> {
    if (0..=2).contains(&number) {
        return Err(io::Error::other(
            "it is a standard descriptor: pass number 3 or higher",
        ));
    }
    let mut taken = TAKEN.lock().unwrap_or_else(|error| error.into_inner());
    if taken.contains(&number) {
        return Err(io::Error::other("the descriptor is named twice"));
    }
    // SAFETY: F_GETFD reads no memory, and it returns EBADF for a number that is not an open descriptor.
    if unsafe { libc::fcntl(number, libc::F_GETFD) } < 0 {
        return Err(io::Error::last_os_error());
    }
    taken.push(number);
    // SAFETY: the descriptor is open, this program has not opened it itself, and `TAKEN` makes sure that it is taken once.
    let descriptor = unsafe { OwnedFd::from_raw_fd(number) };
    rustix::io::fcntl_setfd(&descriptor, FdFlags::CLOEXEC)?;
    Ok(descriptor)
}

#[cfg(test)]
mod tests {
    use std::fs::File;
    use std::os::fd::IntoRawFd;

    use super::*;

    #[test]
    fn a_descriptor_is_taken_once_and_only_if_it_is_open() {
        let number = File::open("/dev/null").unwrap().into_raw_fd();
        let descriptor = take(number).unwrap();
        take(number).unwrap_err();
        drop(descriptor);
        take(1).unwrap_err();
        assert_eq!(take(1 << 20).unwrap_err().raw_os_error(), Some(libc::EBADF));
        assert_eq!(take(-1).unwrap_err().raw_os_error(), Some(libc::EBADF));
    }
}
