//! Loading a kernel and starting it: PVH for ELF images that have its note, Linux's 64-bit protocol for
//! bzImages and for ELF images that have not.
//!
//! ```text
//! 0x0_0500  GDT                          0x0_9000  page tables (64-bit protocol only)
//! 0x0_6000  hvm_start_info, modules,     0x2_0000  command line
//!           memory map (PVH only)        0x9_fc00  hole up to 1 MiB, as on a PC
//! 0x0_7000  boot_params (64-bit only)    0xe_0000  ACPI tables; generation ID and reset
//!                                                  vector at the end
//!                                        1 MiB     kernel; initramfs at the end of low RAM
//! ```

mod acpi;
mod cpuid;
mod elf_note;
mod linux;
mod pvh;
mod registers;
mod reset_vector;

use std::fs::File;
use std::io::{self, Read, Seek, SeekFrom};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use kvm_ioctls::VcpuFd;
use linux_loader::cmdline::Cmdline;
use linux_loader::loader::{
    self, BzImage, Elf, KernelLoader, KernelLoaderResult,
    elf::{self, PvhBootCapability},
    load_cmdline,
};
use rustix::rand::GetRandomFlags;
use vm_memory::{Address, Bytes, GuestAddress, GuestMemoryBackend};

use crate::memory::{GuestMemory, LOW_RAM_END};

pub use acpi::{AcpiHardware, VirtioMmioResources};
pub use cpuid::{CpuidError, GuestCpuid, baseline, missing_features};

const COMMAND_LINE: GuestAddress = GuestAddress(0x2_0000);
/// Room for the command line, its closing zero included: what x86 Linux takes at most (COMMAND_LINE_SIZE
/// in arch/x86/include/asm/setup.h).
const COMMAND_LINE_CAPACITY: usize = 2048;
/// Usable RAM ends here below 1 MiB: above are, on a PC, the EBDA, video memory and the BIOS.
const EBDA_START: u64 = 0x9_fc00;
/// The firmware area begins here and ends at 1 MiB; the memory map says that it is reserved.
const FIRMWARE_START: u64 = 0xe_0000;
/// Kernels are loaded from here on.
const KERNEL_MIN: u64 = 0x10_0000;

/// Why a guest could not be booted.
#[derive(Debug, thiserror::Error)]
pub enum BootError {
    /// A file that cannot be read.
    #[error("{what} {}: {source}", path.display())]
    File {
        /// "kernel" or "initramfs".
        what: &'static str,
        /// Which file.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// The kernel file is neither ELF nor bzImage.
    #[error(
        "kernel {}: neither an ELF image nor a bzImage (it begins with {begins:02x?})", path.display()
    )]
    Format {
        /// Which file.
        path: PathBuf,
        /// Its first bytes.
        begins: [u8; 4],
    },
    /// The kernel file has no bytes.
    #[error("kernel {} is empty", .0.display())]
    Empty(PathBuf),
    /// The kernel file is an ELF image of something else.
    #[error(
        "kernel {}: an ELF image, but no kernel: it is a program, or begins below 1 MiB; an ELF image with a \
         PVH note, a vmlinux or a bzImage is wanted",
        .0.display()
    )]
    NoKernel(PathBuf),
    /// The kernel file is broken or does not fit.
    #[error("kernel {}: {why}", path.display())]
    Kernel {
        /// Which file.
        path: PathBuf,
        /// What is wrong.
        why: String,
    },
    /// The kernel needs more room than there is.
    #[error(
        "kernel {}: it unpacks itself up to {end:#x}, beyond the guest's memory; give the guest more", path.display()
    )]
    KernelSize {
        /// Which file.
        path: PathBuf,
        /// Where the memory that it needs first ends.
        end: u64,
    },
    /// The initramfs does not fit behind the kernel.
    #[error(
        "initramfs {}: its {bytes} bytes do not fit the guest's memory behind the kernel, which ends \
         at {kernel_end:#x}; give the guest more memory", path.display()
    )]
    InitramfsSize {
        /// Which file.
        path: PathBuf,
        /// Its size.
        bytes: u64,
        /// Where the kernel ends.
        kernel_end: u64,
    },
    /// The command line is too long or not ASCII.
    #[error("command line: {0}")]
    CommandLine(String),
    /// Guest memory that should be there is not.
    #[error("boot structures: {0}")]
    Memory(String),
    /// KVM refused the first registers.
    #[error("vcpu{index}: {call}: {source}")]
    Registers {
        /// Which vCPU.
        index: u32,
        /// The call's name in the kernel's documentation.
        call: &'static str,
        /// What KVM said.
        source: kvm_ioctls::Error,
    },
}

/// What to boot.
#[derive(Clone, Debug)]
pub struct Payload {
    /// An ELF image or a bzImage.
    pub kernel: PathBuf,
    /// A file for the kernel to unpack as its first root.
    pub initramfs: Option<PathBuf>,
    /// The kernel's command line.
    pub command_line: String,
}

/// How the loaded kernel wants to be entered.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Entry {
    /// By the PVH protocol at this address.
    Pvh(GuestAddress),
    /// By Linux's 64-bit protocol at this address.
    Linux64(GuestAddress),
}

/// A kernel in memory with its boot structures: what the first registers depend on.
#[derive(Clone, Copy, Debug)]
pub struct Loaded {
    /// Where and how vCPU 0 begins.
    pub entry: Entry,
    /// Where the other vCPUs begin, if the kernel wants them started directly; otherwise they wait for
    /// INIT and SIPI.
    pub direct_start: Option<GuestAddress>,
}

/// An initramfs in memory.
#[derive(Clone, Copy, Debug)]
struct Initramfs {
    start: GuestAddress,
    bytes: u64,
}

/// Loads `payload` into `memory` and writes the boot structures, and the tables that describe `platform`.
///
/// # Errors
/// A file that cannot be read, is no kernel or does not fit; the file is named.
pub fn load(
    memory: &GuestMemory,
    payload: &Payload,
    hardware: &AcpiHardware<'_>,
) -> Result<Loaded, BootError> {
    let mut file = open("kernel", &payload.kernel)?;
    let kernel = load_kernel(memory, &payload.kernel, &mut file)?;
    let initramfs = match &payload.initramfs {
        Some(path) => Some(load_initramfs(memory, path, &kernel)?),
        None => None,
    };
    write_command_line(memory, &payload.command_line)?;
    acpi::write(memory, hardware)?;
    change_generation_id(memory)?;
    reset_vector::write(memory)?;
    let direct_start = elf_note::direct_start(&mut file)
        .map_err(|source| file_error("kernel", &payload.kernel, source))?;
    let entry = match (kernel.pvh_boot_cap, kernel.setup_header) {
        (PvhBootCapability::PvhEntryPresent(entry), _) => {
            pvh::write_start_info(memory, COMMAND_LINE, initramfs)?;
            Entry::Pvh(entry)
        }
        (_, header) => {
            linux::write_boot_params(memory, header, COMMAND_LINE, initramfs)?;
            Entry::Linux64(linux::entry(&kernel))
        }
    };
    Ok(Loaded {
        entry,
        direct_start,
    })
}

/// Sets the registers with which vCPU `index` of a loaded kernel begins. CPUID is set already.
///
/// # Errors
/// KVM's, by the name of the call.
pub fn start_registers(
    memory: &GuestMemory,
    vcpu: &VcpuFd,
    index: u32,
    loaded: &Loaded,
) -> Result<(), BootError> {
    let registers = registers::FirstRegisters::new(vcpu, index);
    match (index, loaded.entry, loaded.direct_start) {
        (0, Entry::Pvh(entry), _) => registers.pvh(entry, pvh::START_INFO),
        (0, Entry::Linux64(entry), _) => {
            registers::write_page_tables(memory)?;
            registers.linux64(entry, linux::BOOT_PARAMS)
        }
        (_, Entry::Pvh(_), Some(entry)) => registers.pvh(entry, pvh::START_INFO),
        // It waits for INIT and SIPI, as KVM made it.
        _ => Ok(()),
    }
}

fn open(what: &'static str, path: &Path) -> Result<File, BootError> {
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

fn file_error(what: &'static str, path: &Path, source: io::Error) -> BootError {
    BootError::File {
        what,
        path: path.to_owned(),
        source,
    }
}

fn load_kernel(
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
fn load_initramfs(
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

fn write_command_line(memory: &GuestMemory, text: &str) -> Result<(), BootError> {
    let error = |error: &dyn std::fmt::Display| BootError::CommandLine(error.to_string());
    let mut line = Cmdline::new(COMMAND_LINE_CAPACITY).map_err(|e| error(&e))?;
    line.insert_str(text).map_err(|_| {
        BootError::CommandLine(format!(
            "its {} bytes are too many, or not all ASCII: at most {} are possible",
            text.len(),
            COMMAND_LINE_CAPACITY - 1
        ))
    })?;
    load_cmdline(memory, COMMAND_LINE, &line).map_err(|e| error(&e))
}

/// Gives the guest in `memory` a generation ID that no guest had before.
///
/// # Errors
/// No random bytes, or no such memory.
pub fn change_generation_id(memory: &GuestMemory) -> Result<(), BootError> {
    memory
        .write_slice(&new_generation_id()?, acpi::GENERATION_ID)
        .map_err(|error| BootError::Memory(error.to_string()))
}

/// A generation ID that no guest had before: 16 random bytes.
fn new_generation_id() -> Result<[u8; 16], BootError> {
    let mut id = [0; 16];
    let filled = rustix::rand::getrandom(&mut id, GetRandomFlags::empty());
    match filled {
        Ok(16) => Ok(id),
        Ok(bytes) => Err(BootError::Memory(format!("{bytes} random bytes, not 16"))),
        Err(error) => Err(BootError::Memory(format!("random bytes: {error}"))),
    }
}

/// A range of memory as the guest is told of it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct MapEntry {
    start: u64,
    bytes: u64,
    kind: MapKind,
}

/// The kinds of memory, by their numbers in both protocols' maps (ACPI 6.5, table 15.4).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
enum MapKind {
    Ram = 1,
    Reserved = 2,
}

/// The memory map: RAM without the hole below 1 MiB, in which the firmware area is reserved.
fn memory_map(memory: &GuestMemory) -> Vec<MapEntry> {
    use vm_memory::GuestMemoryRegion;
    let entry = |start, end: u64, kind| MapEntry {
        start,
        bytes: end - start,
        kind,
    };
    let mut map = vec![
        entry(0, EBDA_START, MapKind::Ram),
        entry(FIRMWARE_START, KERNEL_MIN, MapKind::Reserved),
    ];
    for region in memory.iter() {
        let end = region.start_addr().raw_value() + region.len();
        let start = region.start_addr().raw_value().max(KERNEL_MIN);
        map.push(entry(start, end, MapKind::Ram));
    }
    map
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::memory::{Backing, GuestRam};

    #[test]
    fn the_memory_map_has_the_hole_below_4_gib_and_reserves_the_firmware_area() {
        let map = |gib: u64| {
            let ram = GuestRam::new(gib << 30, Backing::Memfd).unwrap();
            let map = memory_map(ram.memory());
            let rows = map.iter().map(|e| (e.start, e.start + e.bytes, e.kind));
            rows.collect::<Vec<_>>()
        };
        let low = [
            (0, 0x9_fc00, MapKind::Ram),
            (0xe_0000, 0x10_0000, MapKind::Reserved),
        ];
        let below = (0x10_0000, 3 << 30, MapKind::Ram);
        assert_eq!(map(3), [&low[..], &[below]].concat());
        let above = (4 << 30, 6 << 30, MapKind::Ram);
        assert_eq!(map(5), [&low[..], &[below, above]].concat());
    }

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

    #[test]
    fn no_two_generation_ids_are_the_same() {
        let ram = GuestRam::new(2 << 20, Backing::Memfd).unwrap();
        let mut seen = [[0_u8; 16]; 3];
        for id in &mut seen {
            change_generation_id(ram.memory()).unwrap();
            ram.memory().read_slice(id, GuestAddress(0xf_f000)).unwrap();
        }
        assert!(seen.iter().all(|id| *id != [0; 16]));
        assert!(seen[0] != seen[1] && seen[1] != seen[2] && seen[0] != seen[2]);
    }
}
