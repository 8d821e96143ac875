//! Loads a kernel into guest memory and sets the initial registers of the vCPUs.
//!
//! ELF images with a PVH note are entered by the PVH protocol. bzImages, and ELF images without the note, are entered
//! by Linux's 64-bit boot protocol. Guest memory is then laid out as follows:
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
mod error;
mod image;
mod linux;
mod memory_map;
mod pvh;
mod registers;
mod reset_vector;

use std::path::PathBuf;

use kvm_ioctls::VcpuFd;
use linux_loader::cmdline::Cmdline;
use linux_loader::loader::{elf::PvhBootCapability, load_cmdline};
use rustix::rand::GetRandomFlags;
use vm_memory::{Bytes, GuestAddress};

use crate::memory::GuestMemory;

pub use acpi::{AcpiHardware, VirtioMmioResources};
pub use cpuid::{CpuidError, GuestCpuid, baseline, missing_features};
pub use error::BootError;

/// Guest-physical address of the command line.
const COMMAND_LINE: GuestAddress = GuestAddress(0x2_0000);
/// Capacity for the command line in bytes, including its terminating zero: the maximum of x86 Linux (COMMAND_LINE_SIZE
/// in arch/x86/include/asm/setup.h).
const COMMAND_LINE_CAPACITY: usize = 2048;
/// End of the usable RAM below 1 MiB. On a PC, the EBDA, video memory and the BIOS follow.
const EBDA_START: u64 = 0x9_fc00;
/// Start of the firmware area, which ends at 1 MiB and is reserved in the memory map.
const FIRMWARE_START: u64 = 0xe_0000;
/// Lowest guest-physical address at which a kernel is loaded.
const KERNEL_MIN: u64 = 0x10_0000;

/// Files and parameters to boot a guest from.
#[derive(Clone, Debug)]
pub struct Payload {
    /// Path of the kernel: an ELF image or a bzImage.
    pub kernel: PathBuf,
    /// Path of the initramfs.
    pub initramfs: Option<PathBuf>,
    /// Command line of the kernel.
    pub command_line: String,
}

/// Entry point of a loaded kernel, with the boot protocol.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum KernelEntry {
    /// Entry address for the PVH protocol.
    Pvh(GuestAddress),
    /// Entry address for the 64-bit boot protocol of Linux.
    Linux64(GuestAddress),
}

/// Kernel in guest memory, with the boot structures that its protocol needs.
#[derive(Clone, Copy, Debug)]
pub struct LoadedKernel {
    /// Entry point of vCPU 0.
    pub entry: KernelEntry,
    /// Entry point of the other vCPUs, if the kernel asks for a direct start (see `elf_note`). Otherwise they wait for
    /// INIT and SIPI.
    pub direct_start: Option<GuestAddress>,
}

/// Loads the kernel and the initramfs of `payload` into `memory`, and writes the boot structures and the ACPI tables
/// that describe `hardware`.
///
/// # Errors
/// Returns a [`BootError`] with the path of the file if a file cannot be read, is not a kernel, or does not fit guest
/// memory.
pub fn load(
    memory: &GuestMemory,
    payload: &Payload,
    hardware: &AcpiHardware<'_>,
) -> Result<LoadedKernel, BootError> {
    let mut file = image::open("kernel", &payload.kernel)?;
    let kernel = image::load_kernel(memory, &payload.kernel, &mut file)?;
    let initramfs = match &payload.initramfs {
        Some(path) => Some(image::load_initramfs(memory, path, &kernel)?),
        None => None,
    };
    write_command_line(memory, &payload.command_line)?;
    acpi::write(memory, hardware)?;
    change_generation_id(memory)?;
    reset_vector::write(memory)?;
    let direct_start = elf_note::direct_start(&mut file)
        .map_err(|source| image::file_error("kernel", &payload.kernel, source))?;
    let entry = match (kernel.pvh_boot_cap, kernel.setup_header) {
        (PvhBootCapability::PvhEntryPresent(entry), _) => {
            pvh::write_start_info(memory, COMMAND_LINE, initramfs)?;
            KernelEntry::Pvh(entry)
        }
        (_, header) => {
            linux::write_boot_params(memory, header, COMMAND_LINE, initramfs)?;
            KernelEntry::Linux64(linux::entry(&kernel))
        }
    };
    Ok(LoadedKernel {
        entry,
        direct_start,
    })
}

/// Sets the initial registers of vCPU `index` for a loaded kernel. The CPUID of the vCPU must be set already.
///
/// # Errors
/// Returns [`BootError::Registers`] with the name of the ioctl if KVM rejects a register, and [`BootError::Memory`] if
/// the page tables cannot be written.
pub fn start_registers(
    memory: &GuestMemory,
    vcpu: &VcpuFd,
    index: u32,
    loaded: &LoadedKernel,
) -> Result<(), BootError> {
    let registers = registers::FirstRegisters::new(vcpu, index);
    match (index, loaded.entry, loaded.direct_start) {
        (0, KernelEntry::Pvh(entry), _) => registers.pvh(entry, pvh::START_INFO),
        (0, KernelEntry::Linux64(entry), _) => {
            registers::write_page_tables(memory)?;
            registers.linux64(entry, linux::BOOT_PARAMS)
        }
        (_, KernelEntry::Pvh(_), Some(entry)) => registers.pvh(entry, pvh::START_INFO),
        // The vCPU waits for INIT and SIPI, the initial state that KVM gives it.
        _ => Ok(()),
    }
}

/// Writes the command line with its terminating zero to [`COMMAND_LINE`].
fn write_command_line(memory: &GuestMemory, text: &str) -> Result<(), BootError> {
    let error = |error: &dyn std::fmt::Display| BootError::CommandLine(error.to_string());
    let mut line = Cmdline::new(COMMAND_LINE_CAPACITY).map_err(|e| error(&e))?;
    line.insert_str(text).map_err(|_| {
        BootError::CommandLine(format!(
            "its {} bytes are too many, or not all ASCII: at most {} bytes are possible",
            text.len(),
            COMMAND_LINE_CAPACITY - 1
        ))
    })?;
    load_cmdline(memory, COMMAND_LINE, &line).map_err(|e| error(&e))
}

/// Writes a new generation ID to guest memory. No guest had this ID before.
///
/// # Errors
/// Returns [`BootError::Memory`] if the kernel returns no random bytes, or `memory` does not contain the ID.
pub fn change_generation_id(memory: &GuestMemory) -> Result<(), BootError> {
    memory
        .write_slice(&new_generation_id()?, acpi::GENERATION_ID)
        .map_err(|error| BootError::Memory(error.to_string()))
}

/// Returns 16 random bytes for a generation ID.
fn new_generation_id() -> Result<[u8; 16], BootError> {
    let mut id = [0; 16];
    let filled = rustix::rand::getrandom(&mut id, GetRandomFlags::empty());
    match filled {
        Ok(16) => Ok(id),
        Ok(bytes) => Err(BootError::Memory(format!("{bytes} random bytes, not 16"))),
        Err(error) => Err(BootError::Memory(format!("random bytes: {error}"))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::memory::{Backing, GuestRam};

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
