//! Unix sockets that listen at a path, and the file at that path.

use std::io;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};

use super::EndpointError;
use crate::socket_path::check_socket_path;

/// The file of a Unix socket. Dropping it removes the file, unless another file has replaced it.
#[derive(Debug)]
pub struct SocketFile {
    pub(super) path: PathBuf,
    /// Device and inode of the file.
    identity: Option<(u64, u64)>,
}

/// Listens on a new Unix socket at `path`. A socket file whose process is gone is replaced.
///
/// # Errors
/// Returns [`EndpointError::Taken`] if a process listens at `path` or something else is there,
/// [`EndpointError::PathTooLong`] if the path is too long, and the result of `failed` for an error of the system.
pub fn listen_unix<E: From<EndpointError>>(
    path: &Path,
    failed: impl Fn(io::Error) -> E,
) -> Result<(UnixListener, SocketFile), E> {
    check_socket_path(path).map_err(EndpointError::from)?;
    remove_dead_socket(path)?;
    let listener = UnixListener::bind(path).map_err(failed)?;
    let file = SocketFile {
        path: path.to_owned(),
        identity: identity(path),
    };
    Ok((listener, file))
}

fn identity(path: &Path) -> Option<(u64, u64)> {
    let metadata = std::fs::symlink_metadata(path).ok()?;
    Some((metadata.dev(), metadata.ino()))
}

fn remove_dead_socket(path: &Path) -> Result<(), EndpointError> {
    let taken = |why| EndpointError::Taken {
        path: path.to_owned(),
        why,
    };
    if let Ok(metadata) = std::fs::symlink_metadata(path) {
        if !metadata.file_type().is_socket() {
            return Err(taken(
                "there is something else at this path; choose another, or remove it",
            ));
        }
        if UnixStream::connect(path).is_ok() {
            return Err(taken(
                "the socket is in use by another process; choose another path",
            ));
        }
        std::fs::remove_file(path)
            .map_err(|_| taken("a dead socket is in the way and cannot be removed"))?;
    }
    Ok(())
}

impl SocketFile {
    pub(super) fn remove(&self) {
        if self.identity.is_some() && identity(&self.path) == self.identity {
            // This fails only if the file is gone already.
            let _gone = std::fs::remove_file(&self.path);
        }
    }
}

impl Drop for SocketFile {
    fn drop(&mut self) {
        self.remove();
    }
}
