//! Loads the kernel and the initramfs from their files into guest memory.

use std::fs::File;
use std::io::{self, Read, Seek, SeekFrom};
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

use linux_loader::loader::{self, BzImage, Elf, KernelLoader, KernelLoaderResult, elf};
use vm_memory::{Address, Bytes, GuestAddress, GuestMemoryBackend};

use super::{BootError, KERNEL_MIN, elf_note};
use crate::memory::{GuestMemory, LOW_RAM_END};

/// Location of the initramfs in guest memory.
#[derive(Clone, Copy, Debug)]
pub(super) struct Initramfs {
    pub(super) start: GuestAddress,
    pub(super) bytes: u64,
}

/// Loads the kernel at or above [`KERNEL_MIN`] and checks that it fits low RAM.
pub(super) fn load_kernel(
    memory: &GuestMemory,
    path: &Path,
    file: &mut File,
) -> Result<KernelLoaderResult, BootError> {
    let mut begins = [0; 4];
    let read = file
        .read(&mut begins)
        .map_err(|source| file_error("kernel", path, source))?;
    if read == 0 {
        return Err(BootError::Empty(path.to_owned()));
    }
    let elf = read == 4 && &begins == b"\x7fELF";
    if !elf && !is_bzimage(file).map_err(|source| file_error("kernel", path, source))? {
        return Err(BootError::Format {
            path: path.to_owned(),
            begins,
        });
    }
    if elf && elf_note::is_program(file).map_err(|source| file_error("kernel", path, source))? {
        return Err(BootError::NoKernel(path.to_owned()));
    }
    let loaded = if elf {
        Elf::load(memory, None, file, Some(GuestAddress(KERNEL_MIN)))
    } else {
        BzImage::load(memory, None, file, Some(GuestAddress(KERNEL_MIN)))
    };
    let mut loaded = loaded.map_err(|error| match error {
        loader::Error::Elf(elf::Error::InvalidEntryAddress) => BootError::NoKernel(path.to_owned()),
        error => BootError::Kernel {
            path: path.to_owned(),
            why: error.to_string(),
        },
    })?;
    loaded.kernel_end = loaded.kernel_end.max(unpacked_end(&loaded));
    if loaded.kernel_end > low_ram_end(memory) {
        return Err(BootError::KernelSize {
            path: path.to_owned(),
            end: loaded.kernel_end,
        });
    }
    Ok(loaded)
}

/// Loads the initramfs at the end of low RAM, as far from the kernel as possible.
pub(super) fn load_initramfs(
    memory: &GuestMemory,
    path: &Path,
    kernel: &KernelLoaderResult,
) -> Result<Initramfs, BootError> {
    let mut file = open("initramfs", path)?;
    let bytes = file
        .metadata()
        .map_err(|source| file_error("initramfs", path, source))?
        .len();
    let too_large = || BootError::InitramfsSize {
        path: path.to_owned(),
        bytes,
        kernel_end: kernel.kernel_end,
    };
    let mut end = low_ram_end(memory);
    if let Some(header) = kernel.setup_header {
        end = end.min(u64::from(header.initrd_addr_max) + 1);
    }
    let start = end.checked_sub(bytes).ok_or_else(too_large)? & !0xfff;
    if start < kernel.kernel_end.max(KERNEL_MIN) {
        return Err(too_large());
    }
    let count = usize::try_from(bytes).map_err(|_| too_large())?;
    memory
        .read_exact_volatile_from(GuestAddress(start), &mut file, count)
        .map_err(|error| file_error("initramfs", path, io::Error::other(error)))?;
    Ok(Initramfs {
        start: GuestAddress(start),
        bytes,
    })
}

/// Opens a kernel or initramfs file for reading. Anything but a regular file is rejected.
pub(super) fn open(what: &'static str, path: &Path) -> Result<File, BootError> {
    // With O_NONBLOCK, opening a FIFO does not wait for a writer, and the check below rejects it.
    let file = File::options()
        .read(true)
        .custom_flags(libc::O_NONBLOCK)
        .open(path)
        .map_err(|source| file_error(what, path, source))?;
    let kind = file
        .metadata()
        .map_err(|source| file_error(what, path, source))?;
    if !kind.is_file() {
        return Err(file_error(
            what,
            path,
            io::Error::other("not a regular file"),
        ));
    }
    Ok(file)
}

pub(super) fn file_error(what: &'static str, path: &Path, source: io::Error) -> BootError {
    BootError::File {
        what,
        path: path.to_owned(),
        source,
    }
}

/// Returns the end of the memory that a bzImage needs to unpack itself: `init_size` bytes from its run-time address,
/// which is at least `pref_address` (boot.rst; both fields exist since protocol version 2.10). Returns 0 for other
/// images.
fn unpacked_end(loaded: &KernelLoaderResult) -> u64 {
    match loaded.setup_header {
        Some(header) if header.version >= 0x20a => loaded
            .kernel_load
            .raw_value()
            .max(header.pref_address)
            .saturating_add(header.init_size.into()),
        _ => 0,
    }
}

/// Returns the end of the RAM below the hole that ends at 4 GiB.
fn low_ram_end(memory: &GuestMemory) -> u64 {
    let end = memory.last_addr().raw_value().saturating_add(1);
    end.min(LOW_RAM_END)
}

/// Returns true if the file has the magic number of a setup header (Linux Documentation/arch/x86/boot.rst).
fn is_bzimage(file: &mut File) -> io::Result<bool> {
    let mut magic = [0; 4];
    file.seek(SeekFrom::Start(0x202))?;
    match file.read_exact(&mut magic) {
        Ok(()) => Ok(&magic == b"HdrS"),
        Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => Ok(false),
        Err(error) => Err(error),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_bzimage_needs_room_to_unpack_itself() {
        // The bzImage of Debian 6.1 is loaded at 1 MiB and runs at 16 MiB.
        let mut loaded = KernelLoaderResult {
            kernel_load: GuestAddress(KERNEL_MIN),
            setup_header: Some(linux_loader::bootparam::setup_header {
                version: 0x20f,
                pref_address: 16 << 20,
                init_size: 46 << 20,
                ..Default::default()
            }),
            ..Default::default()
        };
        assert_eq!(unpacked_end(&loaded), 62 << 20);
        loaded.kernel_load = GuestAddress(32 << 20);
        assert_eq!(unpacked_end(&loaded), 78 << 20);
        if let Some(header) = &mut loaded.setup_header {
            (header.pref_address, header.init_size) = (u64::MAX, u32::MAX);
        }
        assert_eq!(unpacked_end(&loaded), u64::MAX);
        loaded.setup_header = None;
        assert_eq!(unpacked_end(&loaded), 0);
    }
}
