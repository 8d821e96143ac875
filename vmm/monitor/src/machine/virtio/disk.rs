//! Image of a disk: opened with the access that the guest needs, and locked against a second writer.

use std::fs::{File, OpenOptions, TryLockError};
use std::io::{self, ErrorKind};
use std::os::unix::fs::{FileExt, FileTypeExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard, PoisonError};

use devices::virtio::Access;

use crate::config::ImageType;

/// Bytes of a sector of a virtio disk (virtio 1.3, 5.2.4).
const SECTOR_BYTES: u64 = 512;

/// Reasons why an image cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum DiskError {
    /// The image cannot be opened.
    #[error("{}: {source}{}", .path.display(), open_hint(.source, *.access))]
    Open {
        /// Path of the image.
        path: PathBuf,
        /// Access that the guest needs.
        access: Access,
        /// Error that the kernel returned.
        source: io::Error,
    },
    /// The image is neither a regular file nor a block device.
    #[error("{}: a disk is a raw image: a file, or a block device", .0.display())]
    Kind(PathBuf),
    /// The image has the header of a format other than raw.
    #[error(
        "{}: this is a {format} image, but a disk must be raw: convert it with `qemu-img convert -O raw {} NEW`, or \
         give image_type=raw if the guest itself wrote this header",
        .path.display(), .path.display()
    )]
    Format {
        /// Path of the image.
        path: PathBuf,
        /// Name of the format.
        format: &'static str,
    },
    /// The image is shorter than one sector.
    #[error("{}: an image of less than 512 bytes cannot be a disk", .0.display())]
    Empty(PathBuf),
    /// The last sector of the image is not complete.
    #[error(
        "{}: its {bytes} bytes are not a multiple of 512: `truncate -s %512 {}` fills the last sector with zeros",
        .path.display(), .path.display()
    )]
    Size {
        /// Path of the image.
        path: PathBuf,
        /// Size of the image in bytes.
        bytes: u64,
    },
    /// Another process, or another disk of this guest, has locked the image.
    #[error(
        "{}: another process {}; two guests that write to one disk destroy it",
        .path.display(),
        match .access {
            Access::ReadWrite => "has it open as a disk, or it is given twice here",
            Access::ReadOnly => "writes to it, or it is given twice here",
        }
    )]
    Locked {
        /// Path of the image.
        path: PathBuf,
        /// Access that the guest needs.
        access: Access,
    },
    /// The image cannot be locked or unlocked.
    #[error("{}: the image cannot be locked: {source}", .path.display())]
    Lock {
        /// Path of the image.
        path: PathBuf,
        /// Error that the kernel returned.
        source: io::Error,
    },
}

/// Returns the remedy for an image that cannot be opened.
fn open_hint(error: &io::Error, access: Access) -> &'static str {
    match (error.kind(), access) {
        (ErrorKind::PermissionDenied | ErrorKind::ReadOnlyFilesystem, Access::ReadWrite) => {
            "; if the guest only reads the disk, give it readonly=on"
        }
        _ => "",
    }
}

/// Open image. It is locked from the moment at which the guest may run with it until the guest ends or leaves.
#[derive(Debug)]
pub(super) struct DiskImage {
    path: PathBuf,
    access: Access,
    /// Duplicate of the descriptor that the device has. The lock belongs to the open file description, which both share
    /// (flock(2)).
    file: File,
    /// Whether the lock is held.
    held: Mutex<bool>,
}

impl DiskImage {
    /// Opens the image at `path` and checks its format and size. `declared` is the format that the user declared. Also
    /// returns the file for the device.
    pub(super) fn open(
        path: &Path,
        access: Access,
        declared: Option<ImageType>,
    ) -> Result<(Self, File), DiskError> {
        let failed = |source| DiskError::Open {
            path: path.into(),
            access,
            source,
        };
        // With O_NONBLOCK, opening a FIFO does not wait for a writer, and the check below rejects it.
        let file = OpenOptions::new()
            .read(true)
            .write(access == Access::ReadWrite)
            .custom_flags(libc::O_NONBLOCK)
            .open(path)
            .map_err(failed)?;
        let metadata = file.metadata().map_err(failed)?;
        let kind = metadata.file_type();
        if !kind.is_file() && !kind.is_block_device() {
            return Err(DiskError::Kind(path.into()));
        }
        if declared.is_none()
            && let Some(format) = probe_format(&file).map_err(failed)?
        {
            return Err(DiskError::Format {
                path: path.into(),
                format,
            });
        }
        let bytes = metadata.len();
        if kind.is_file() && bytes > SECTOR_BYTES && !bytes.is_multiple_of(SECTOR_BYTES) {
            return Err(DiskError::Size {
                path: path.into(),
                bytes,
            });
        }
        let image = Self {
            path: path.into(),
            access,
            file: file.try_clone().map_err(failed)?,
            held: Mutex::new(false),
        };
        Ok((image, file))
    }

    pub(super) fn path(&self) -> &Path {
        &self.path
    }

    /// Locks the image: exclusively if the guest writes to it, shared if it only reads. Has no effect if the image is
    /// locked.
    pub(super) fn lock(&self) -> Result<(), DiskError> {
        let mut held = self.held();
        if *held {
            return Ok(());
        }
        let taken = match self.access {
            Access::ReadWrite => self.file.try_lock(),
            Access::ReadOnly => self.file.try_lock_shared(),
        };
        taken.map_err(|error| match error {
            TryLockError::WouldBlock => DiskError::Locked {
                path: self.path.clone(),
                access: self.access,
            },
            TryLockError::Error(source) => DiskError::Lock {
                path: self.path.clone(),
                source,
            },
        })?;
        *held = true;
        Ok(())
    }

    /// Unlocks the image, so that another process can run the guest. Has no effect if the image is unlocked.
    pub(super) fn unlock(&self) -> Result<(), DiskError> {
        let mut held = self.held();
        self.file.unlock().map_err(|source| DiskError::Lock {
            path: self.path.clone(),
            source,
        })?;
        *held = false;
        Ok(())
    }

    /// Locks the flag that says whether the image lock is held.
    fn held(&self) -> MutexGuard<'_, bool> {
        self.held.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Formats other than raw: name, offset of the magic number, and magic number. Sources: QEMU docs/interop (qcow2, qed);
/// the specifications of VMDK 5.0 and VHDX (MS-VHDX 2.2.1); `VDI_IMAGE_SIGNATURE` of VirtualBox.
const FORMATS: [(&str, usize, &[u8]); 5] = [
    ("qcow2", 0, b"QFI\xfb"),
    ("QED", 0, b"QED\0"),
    ("VMDK", 0, b"KDMV"),
    ("VHDX", 0, b"vhdxfile"),
    ("VDI", 64, &0xbeda_107f_u32.to_le_bytes()),
];

/// Returns the format whose magic number the image has, or `None` if the image looks raw.
fn probe_format(file: &File) -> io::Result<Option<&'static str>> {
    let mut head = [0; 68];
    // A shorter file is probed as if zeros followed.
    let mut read = 0;
    while read < head.len() {
        match file.read_at(&mut head[read..], read as u64) {
            Ok(0) => break,
            Ok(count) => read += count,
            Err(error) if error.kind() == ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    let found = FORMATS
        .iter()
        .find(|(_, at, magic)| head[*at..].starts_with(magic));
    Ok(found.map(|(name, _, _)| *name))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn image(bytes: u64) -> tempfile::NamedTempFile {
        let file = tempfile::NamedTempFile::new().unwrap();
        file.as_file().set_len(bytes).unwrap();
        file
    }

    #[test]
    fn one_writer_or_many_readers() {
        let file = image(4096);
        let open = |access| DiskImage::open(file.path(), access, None).unwrap();
        let (writer, _) = open(Access::ReadWrite);
        let (other, _) = open(Access::ReadWrite);
        let (reader, _) = open(Access::ReadOnly);
        writer.lock().unwrap();
        writer.lock().unwrap();
        let error = other.lock().unwrap_err().to_string();
        assert!(error.contains("another process has it open"), "{error}");
        let error = reader.lock().unwrap_err().to_string();
        assert!(error.contains("another process writes to it"), "{error}");
        writer.unlock().unwrap();
        reader.lock().unwrap();
        let (second, _) = open(Access::ReadOnly);
        second.lock().unwrap();
        other.lock().unwrap_err();
        drop((reader, second));
        other.lock().unwrap();
    }

    #[test]
    fn the_lock_lasts_as_long_as_the_device_has_the_file() {
        let file = image(4096);
        let (first, device) = DiskImage::open(file.path(), Access::ReadWrite, None).unwrap();
        first.lock().unwrap();
        drop(first);
        let (second, _) = DiskImage::open(file.path(), Access::ReadWrite, None).unwrap();
        second.lock().unwrap_err();
        drop(device);
        second.lock().unwrap();
    }

    #[test]
    fn an_image_that_is_not_raw_or_not_whole_is_refused_with_what_to_do() {
        let head = |at: usize, magic: &[u8]| [&vec![0; at], magic, &[0; 1024]].concat();
        for (content, named) in [
            (head(0, b"QFI\xfb\0\0\0\x03"), "a qcow2 image"),
            (head(0, b"QED\0"), "a QED image"),
            (head(0, b"KDMV\x01"), "a VMDK image"),
            (head(0, b"vhdxfile"), "a VHDX image"),
            // Bytes that qemu-img writes.
            (head(64, &[0x7f, 0x10, 0xda, 0xbe]), "a VDI image"),
            (b"QFI\xfb".to_vec(), "a qcow2 image"),
            (vec![1; 513], "truncate -s %512"),
        ] {
            let file = image(0);
            std::fs::write(file.path(), content).unwrap();
            let error = DiskImage::open(file.path(), Access::ReadOnly, None).unwrap_err();
            assert!(error.to_string().contains(named), "{error}");
        }
        let written = image(0);
        std::fs::write(written.path(), head(0, b"QFI\xfb")[..1024].as_ref()).unwrap();
        DiskImage::open(written.path(), Access::ReadOnly, Some(ImageType::Raw)).unwrap();
        let whole = image(1024);
        DiskImage::open(whole.path(), Access::ReadOnly, None).unwrap();
    }

    #[test]
    fn what_is_no_image_is_named() {
        let absent = Path::new("/no/such/image");
        let error = DiskImage::open(absent, Access::ReadWrite, None).unwrap_err();
        assert!(
            error
                .to_string()
                .starts_with("/no/such/image: No such file"),
            "{error}"
        );
        for path in ["/dev/null", "/"] {
            let error = DiskImage::open(Path::new(path), Access::ReadOnly, None).unwrap_err();
            assert!(
                error.to_string().contains("a disk is a raw image"),
                "{error}"
            );
        }
    }
}
