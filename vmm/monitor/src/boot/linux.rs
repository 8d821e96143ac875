//! Linux's 64-bit boot protocol: the boot_params page ("zero page").
//!
//! Source: Linux Documentation/arch/x86/boot.rst, "64-bit BOOT PROTOCOL".

use linux_loader::bootparam::{boot_params, setup_header};
use linux_loader::configurator::linux::LinuxBootConfigurator;
use linux_loader::configurator::{BootConfigurator, BootParams};
use linux_loader::loader::KernelLoaderResult;
use vm_memory::{Address, GuestAddress};

use super::image::Initramfs;
use super::memory_map::memory_map;
use super::{BootError, acpi};
use crate::memory::GuestMemory;

/// Guest-physical address of boot_params. vCPU 0 starts with it in rsi.
pub(super) const BOOT_PARAMS: GuestAddress = GuestAddress(0x7000);

/// Offset of the 64-bit entry point from the start of the protected-mode code in a bzImage (boot.rst).
const BZIMAGE_ENTRY_64: u64 = 0x200;
/// Value of `type_of_loader` for a loader without an assigned number (boot.rst).
const LOADER_UNDEFINED: u8 = 0xff;
/// Values that a setup header must have if the loader creates it, as for a vmlinux (boot.rst).
const BOOT_FLAG: u16 = 0xaa55;
const HEADER_MAGIC: u32 = 0x5372_6448;

/// Returns the 64-bit entry point of the kernel.
pub(super) fn entry(kernel: &KernelLoaderResult) -> GuestAddress {
    match kernel.setup_header {
        Some(_) => GuestAddress(kernel.kernel_load.raw_value() + BZIMAGE_ENTRY_64),
        None => kernel.kernel_load,
    }
}

/// Writes boot_params. `header` is the setup header of a bzImage, and `None` for a vmlinux.
pub(super) fn write_boot_params(
    memory: &GuestMemory,
    header: Option<setup_header>,
    command_line: GuestAddress,
    initramfs: Option<Initramfs>,
) -> Result<(), BootError> {
    let mut params = boot_params {
        hdr: header.unwrap_or(setup_header {
            boot_flag: BOOT_FLAG,
            header: HEADER_MAGIC,
            kernel_alignment: 0x20_0000,
            ..Default::default()
        }),
        ..Default::default()
    };
    params.hdr.type_of_loader = LOADER_UNDEFINED;
    params.hdr.cmd_line_ptr = low(command_line.raw_value())?;
    if let Some(initramfs) = initramfs {
        params.hdr.ramdisk_image = low(initramfs.start.raw_value())?;
        params.hdr.ramdisk_size = low(initramfs.bytes)?;
    }
    params.acpi_rsdp_addr = acpi::RSDP.raw_value();
    for (slot, entry) in params.e820_table.iter_mut().zip(memory_map(memory)) {
        slot.addr = entry.start;
        slot.size = entry.bytes;
        slot.r#type = entry.kind as u32;
        params.e820_entries += 1;
    }
    LinuxBootConfigurator::write_bootparams(&BootParams::new(&params, BOOT_PARAMS), memory)
        .map_err(|error| BootError::Memory(error.to_string()))
}

/// Converts an address or a size to a 32-bit field of the setup header.
fn low(value: u64) -> Result<u32, BootError> {
    u32::try_from(value).map_err(|_| BootError::Memory(format!("{value:#x} is beyond 4 GiB")))
}
