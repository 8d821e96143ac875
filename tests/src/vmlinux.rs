//! Extracts the vmlinux from a bzImage.
//!
//! The setup header (Linux `Documentation/arch/x86/boot.rst`, protocol 2.08 and later) holds the offset of the
//! compressed kernel in the protected-mode part. The first bytes of this payload identify its compression. The last
//! four bytes are the uncompressed size, which decompressors do not expect.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;
use std::{fs, io};

use crate::process::{self, ProcessError};

const SETUP_SECTS: usize = 0x1f1;
const HEADER_MAGIC: usize = 0x202;
const VERSION: usize = 0x206;
const PAYLOAD_OFFSET: usize = 0x248;
const PAYLOAD_LENGTH: usize = 0x24c;
/// First version of the boot protocol with the fields for the payload.
const OLDEST: u16 = 0x0208;
const SECTOR: usize = 512;
/// Size of the uncompressed size at the end of the payload in bytes.
const SIZE_FIELD: usize = 4;

/// Compressions of Debian's kernels: the first bytes of the payload and the program that decompresses it.
const COMPRESSIONS: [(&[u8], &str); 4] = [
    (b"\xfd7zXZ\0", "xz"),
    (b"\x28\xb5\x2f\xfd", "zstd"),
    // The legacy frame format, which the build of the kernel uses.
    (b"\x02\x21\x4c\x18", "lz4"),
    (b"\x1f\x8b", "gzip"),
];

/// Why the vmlinux could not be extracted.
#[derive(Debug, thiserror::Error)]
pub enum VmlinuxError {
    /// The image or the result cannot be read or written.
    #[error("{}: cannot be read or written", .path.display())]
    File {
        /// The file.
        path: PathBuf,
        /// The error of the operating system.
        source: io::Error,
    },
    /// The file is not a bzImage of protocol 2.08 or later.
    #[error("no bzImage of boot protocol 2.08 or later: {0}")]
    NoImage(&'static str),
    /// The compression of the payload is unknown.
    #[error("the payload starts with {0:02x?}, which is neither xz, zstd, lz4 nor gzip")]
    UnknownCompression(Vec<u8>),
    /// The decompressor refused the payload.
    #[error("{program} refuses the payload: {reason}")]
    Decompress {
        /// The program.
        program: &'static str,
        /// Its message.
        reason: String,
    },
    /// The decompressed payload is not an ELF file.
    #[error("the payload holds no ELF file; it starts with {0:02x?}")]
    NoElf(Vec<u8>),
    /// The decompressor could not be run.
    #[error(transparent)]
    Process(#[from] ProcessError),
}

/// Extracts the vmlinux from the bzImage `image` to the file `target`.
///
/// # Errors
/// Returns [`VmlinuxError`] if the image or its compression is not supported. `target` does not exist then.
pub fn extract(image: &Path, target: &Path) -> Result<(), VmlinuxError> {
    let bytes = fs::read(image).map_err(|source| file(image, source))?;
    let payload = payload(&bytes)?;
    let program = decompressor(payload)?;
    let packed = target.with_extension("packed");
    fs::write(&packed, payload).map_err(|source| file(&packed, source))?;
    let outcome = decompress(program, &packed, target).and_then(|()| check_elf(target));
    // The file is temporary; failing to remove it does not change the result.
    let _ = fs::remove_file(&packed);
    if outcome.is_err() {
        let _ = fs::remove_file(target);
    }
    outcome
}

fn payload(image: &[u8]) -> Result<&[u8], VmlinuxError> {
    if image.len() < SECTOR * 2 || &image[HEADER_MAGIC..HEADER_MAGIC + 4] != b"HdrS" {
        return Err(VmlinuxError::NoImage("no HdrS at 0x202"));
    }
    if u16::from_le_bytes([image[VERSION], image[VERSION + 1]]) < OLDEST {
        return Err(VmlinuxError::NoImage("an older protocol"));
    }
    // Zero means four, for compatibility with old boot loaders.
    let sectors = match image[SETUP_SECTS] {
        0 => 4,
        count => usize::from(count),
    };
    let protected_mode = (sectors + 1) * SECTOR;
    let start = protected_mode.saturating_add(field(image, PAYLOAD_OFFSET)?);
    let length = field(image, PAYLOAD_LENGTH)?.saturating_sub(SIZE_FIELD);
    let end = start.saturating_add(length);
    image
        .get(start..end)
        .ok_or(VmlinuxError::NoImage("the payload lies outside the file"))
}

fn field(image: &[u8], at: usize) -> Result<usize, VmlinuxError> {
    let bytes = image
        .get(at..at + 4)
        .and_then(|bytes| bytes.try_into().ok());
    let value = u32::from_le_bytes(bytes.ok_or(VmlinuxError::NoImage("the header is cut"))?);
    usize::try_from(value).map_err(|_| VmlinuxError::NoImage("the payload lies outside the file"))
}

fn decompressor(payload: &[u8]) -> Result<&'static str, VmlinuxError> {
    let mut known = COMPRESSIONS.iter();
    known
        .find(|(magic, _)| payload.starts_with(magic))
        .map(|(_, program)| *program)
        .ok_or_else(|| VmlinuxError::UnknownCompression(payload.iter().take(8).copied().collect()))
}

fn decompress(program: &'static str, packed: &Path, target: &Path) -> Result<(), VmlinuxError> {
    let mut shell = Command::new("sh");
    shell
        .args(["-c", "exec \"$1\" -dc < \"$2\" > \"$3\"", "sh", program])
        .arg(packed)
        .arg(target);
    let ended = process::run(&mut shell, Duration::from_secs(120))?;
    if ended.status.success() {
        return Ok(());
    }
    Err(VmlinuxError::Decompress {
        program,
        reason: ended.stderr,
    })
}

fn check_elf(target: &Path) -> Result<(), VmlinuxError> {
    let bytes = fs::read(target).map_err(|source| file(target, source))?;
    if bytes.starts_with(b"\x7fELF") {
        return Ok(());
    }
    Err(VmlinuxError::NoElf(bytes.into_iter().take(8).collect()))
}

fn file(path: &Path, source: io::Error) -> VmlinuxError {
    VmlinuxError::File {
        path: path.to_owned(),
        source,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Returns a bzImage with two setup sectors and this payload.
    fn image(payload: &[u8]) -> Vec<u8> {
        let mut image = vec![0; 3 * SECTOR + 16];
        image[SETUP_SECTS] = 2;
        image[HEADER_MAGIC..HEADER_MAGIC + 4].copy_from_slice(b"HdrS");
        image[VERSION..VERSION + 2].copy_from_slice(&[15, 2]);
        image[PAYLOAD_OFFSET] = 16;
        let length = u32::try_from(payload.len() + SIZE_FIELD).unwrap();
        image[PAYLOAD_LENGTH..PAYLOAD_LENGTH + 4].copy_from_slice(&length.to_le_bytes());
        image.extend_from_slice(payload);
        image.extend_from_slice(&[0xaa; SIZE_FIELD]);
        image
    }

    fn packed(program: &str, text: &str) -> Vec<u8> {
        let script = format!("printf '{text}' | {program} -c");
        let output = Command::new("sh").args(["-c", &script]).output().unwrap();
        assert!(output.status.success());
        output.stdout
    }

    #[test]
    fn every_compression_comes_back() {
        let folder = tempfile::tempdir().unwrap();
        let (source, target) = (folder.path().join("bzImage"), folder.path().join("vmlinux"));
        for program in ["xz", "zstd", "lz4 -l", "gzip"] {
            fs::write(&source, image(&packed(program, "\\177ELF of a kernel"))).unwrap();
            extract(&source, &target).unwrap();
            assert_eq!(
                fs::read(&target).unwrap(),
                b"\x7fELF of a kernel",
                "{program}"
            );
        }
    }

    #[test]
    fn what_is_no_image_is_refused_with_the_reason() {
        assert!(matches!(payload(b"short"), Err(VmlinuxError::NoImage(_))));
        let mut old = image(b"");
        old[VERSION..VERSION + 2].copy_from_slice(&[7, 2]);
        assert!(matches!(
            payload(&old),
            Err(VmlinuxError::NoImage("an older protocol"))
        ));
        let mut cut = image(b"12345678");
        cut.truncate(cut.len() - 8);
        assert!(matches!(payload(&cut), Err(VmlinuxError::NoImage(_))));
    }

    #[test]
    fn an_unknown_payload_leaves_nothing_behind() {
        let folder = tempfile::tempdir().unwrap();
        let (source, target) = (folder.path().join("bzImage"), folder.path().join("vmlinux"));
        fs::write(&source, image(b"something else")).unwrap();
        let error = extract(&source, &target).unwrap_err();
        assert!(
            matches!(error, VmlinuxError::UnknownCompression(_)),
            "{error}"
        );
        fs::write(&source, image(&packed("xz", "no elf"))).unwrap();
        let error = extract(&source, &target).unwrap_err();
        assert!(matches!(error, VmlinuxError::NoElf(_)), "{error}");
        assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 1);
    }
}
