//! Descriptors that whoever started this program left open for it, as `fd=N`.
//!
//! This file has `unsafe` for one thing that only numbers can say: that descriptor N is this program's to own.
#![allow(unsafe_code)]

use std::io;
use std::os::fd::{FromRawFd, OwnedFd};
use std::sync::Mutex;

use rustix::io::FdFlags;

/// Those that were taken: each is owned once.
static TAKEN: Mutex<Vec<i32>> = Mutex::new(Vec::new());

/// Takes descriptor `number`, which from now on is not inherited any further.
///
/// To be called before this program opens anything itself, so that what is open was left open for it.
///
/// # Errors
/// One of the three standard descriptors, one that was taken already, and one that is not open.
pub(super) fn take(number: i32) -> io::Result<OwnedFd> {
    if (0..=2).contains(&number) {
        return Err(io::Error::other("it is a standard descriptor"));
    }
    let mut taken = TAKEN.lock().unwrap_or_else(|error| error.into_inner());
    if taken.contains(&number) {
        return Err(io::Error::other("it was given twice"));
    }
    // SAFETY: fcntl takes any number, and says EBADF where it is no descriptor.
    if unsafe { libc::fcntl(number, libc::F_GETFD) } < 0 {
        return Err(io::Error::last_os_error());
    }
    taken.push(number);
    // SAFETY: it is open, nothing in this program has opened it, and it is handed out once.
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
