//! Structures of the PVH boot protocol.
//!
//! Source: Xen public/arch-x86/hvm/start_info.h.

use linux_loader::configurator::pvh::PvhBootConfigurator;
use linux_loader::configurator::{BootConfigurator, BootParams};
use linux_loader::loader::elf::start_info::{
    XEN_HVM_START_MAGIC_VALUE, hvm_memmap_table_entry, hvm_modlist_entry, hvm_start_info,
};
use vm_memory::{Address, GuestAddress};

use super::image::Initramfs;
use super::memory_map::memory_map;
use super::{BootError, acpi};
use crate::memory::GuestMemory;

/// Guest-physical address of hvm_start_info. Every vCPU that is started directly has it in ebx.
pub(super) const START_INFO: GuestAddress = GuestAddress(0x6000);
/// Guest-physical address of the module list.
const MODULES: GuestAddress = GuestAddress(0x6040);
/// Guest-physical address of the memory map.
const MEMORY_MAP: GuestAddress = GuestAddress(0x6080);

/// Writes hvm_start_info, the memory map and, if there is an initramfs, the module list.
pub(super) fn write_start_info(
    memory: &GuestMemory,
    command_line: GuestAddress,
    initramfs: Option<Initramfs>,
) -> Result<(), BootError> {
    let map: Vec<hvm_memmap_table_entry> = memory_map(memory)
        .into_iter()
        .map(|entry| hvm_memmap_table_entry {
            addr: entry.start,
            size: entry.bytes,
            type_: entry.kind as u32,
            reserved: 0,
        })
        .collect();
    let modules: Vec<hvm_modlist_entry> = initramfs
        .iter()
        .map(|initramfs| hvm_modlist_entry {
            paddr: initramfs.start.raw_value(),
            size: initramfs.bytes,
            ..Default::default()
        })
        .collect();
    let info = hvm_start_info {
        magic: XEN_HVM_START_MAGIC_VALUE,
        version: 1,
        nr_modules: u32::from(initramfs.is_some()),
        modlist_paddr: if modules.is_empty() {
            0
        } else {
            MODULES.raw_value()
        },
        cmdline_paddr: command_line.raw_value(),
        rsdp_paddr: acpi::RSDP.raw_value(),
        memmap_paddr: MEMORY_MAP.raw_value(),
        memmap_entries: u32::try_from(map.len()).unwrap_or(0),
        ..Default::default()
    };
    let mut params = BootParams::new(&info, START_INFO);
    params.set_sections(&map, MEMORY_MAP);
    if !modules.is_empty() {
        params.set_modules(&modules, MODULES);
    }
    PvhBootConfigurator::write_bootparams(&params, memory)
        .map_err(|error| BootError::Memory(error.to_string()))
}
