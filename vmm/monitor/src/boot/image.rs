//! Loads the kernel and the initramfs from their files into guest memory.

use std::fs::File;
use std::io::{self, Read, Seek, SeekFrom};
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

use linux_loader::loader::{self, BzImage, Elf, KernelLoader, KernelLoaderResult, elf};
use vm_memory::{Address, Bytes, GuestAddress, GuestMemoryBackend};

use super::{BootError, KERNEL_MIN, elf_note};
use crate::memory::{GuestMemory, LOW_RAM_END};

/// An initramfs in memory.
#[derive(Clone, Copy, Debug)]
pub(super) struct Initramfs {
    pub(super) start: GuestAddress,
    pub(super) bytes: u64,
}

pub(super) fn open(what: &'static str, path: &Path) -> Result<File, BootError> {
    // A pipe must not have the monitor wait for its writer before it is seen to be none.
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

/// Where a bzImage ends once it has unpacked itself: `init_size` bytes from where it runs on, which is no lower than
/// `pref_address` (boot.rst; both are there from protocol version 2.10 on).
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

/// Where RAM ends below the hole below 4 GiB.
fn low_ram_end(memory: &GuestMemory) -> u64 {
    let end = memory.last_addr().raw_value().saturating_add(1);
    end.min(LOW_RAM_END)
}

/// The setup header's magic: Linux Documentation/arch/x86/boot.rst.
fn is_bzimage(file: &mut File) -> io::Result<bool> {
    let mut magic = [0; 4];
    file.seek(SeekFrom::Start(0x202))?;
    match file.read_exact(&mut magic) {
        Ok(()) => Ok(&magic == b"HdrS"),
        Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => Ok(false),
        Err(error) => Err(error),
    }
}

/// Puts the initramfs at the end of low RAM, as far from the kernel as it goes.
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_bzimage_needs_room_to_unpack_itself() {
        // Debian's 6.1: loaded at 1 MiB, it runs at 16 MiB.
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
