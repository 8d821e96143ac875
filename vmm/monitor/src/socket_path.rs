//! Length limit of the path of a Unix socket.

use std::path::{Path, PathBuf};

/// Maximum bytes in the path of a Unix socket: `sun_path` without its terminating zero (unix(7)).
pub const SOCKET_PATH_MAX: usize = 107;

/// The path is too long for a Unix socket.
#[derive(Debug, thiserror::Error)]
#[error(
    "{}: a socket's path has at most {SOCKET_PATH_MAX} bytes, this one has {}",
    .0.display(), .0.as_os_str().len()
)]
pub struct SocketPathTooLong(pub PathBuf);

/// Checks that a Unix socket can have this path.
///
/// # Errors
/// Returns [`SocketPathTooLong`] if the path has more than [`SOCKET_PATH_MAX`] bytes.
pub fn check_socket_path(path: &Path) -> Result<(), SocketPathTooLong> {
    match path.as_os_str().len() {
        0..=SOCKET_PATH_MAX => Ok(()),
        _ => Err(SocketPathTooLong(path.into())),
    }
}
