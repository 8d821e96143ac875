//! Baseline of `ferry bench start`: boots a PVH guest with the fewest KVM ioctls, one vCPU and a serial port for output.
//! The overhead of a monitor is its time and memory beyond this baseline.
//!
//! This file uses `unsafe` for one call, KVM_SET_USER_MEMORY_REGION, which lets the guest write to host memory.
#![allow(unsafe_code)]

use std::fs::File;
use std::io::{self, Write};
use std::path::Path;

use kvm_bindings::kvm_userspace_memory_region;
use kvm_bindings::{KVM_MAX_CPUID_ENTRIES, kvm_pit_config, kvm_regs, kvm_segment};
use kvm_ioctls::{Kvm, VcpuExit, VcpuFd, VmFd};
use linux_loader::loader::elf::{Elf, PvhBootCapability};
use linux_loader::loader::{KernelLoader, KernelLoaderResult};
use rustix::fs::{MemfdFlags, ftruncate, memfd_create};
use vm_memory::{
    Bytes, FileOffset, GuestAddress, GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion,
};

use crate::Failure;
use crate::arguments::bench::BareStartArguments;

/// Guest-physical address of the three pages that KVM needs on Intel hosts (KVM_SET_TSS_ADDR).
const TSS_ADDRESS: usize = 0xfffb_d000;
// Guest-physical addresses of the PVH boot data, below the kernel at 1 MiB.
const START_INFO: u64 = 0x6000;
const MEMORY_MAP: u64 = 0x7000;
const COMMAND_LINE: u64 = 0x8000;
/// Data port of COM1.
const SERIAL: u16 = 0x3f8;
/// I/O port to which the guest writes its exit status.
const DEBUG_EXIT: u16 = 0xf4;

/// Boots the guest and runs it until it exits. Returns its exit status.
pub(super) fn bare_start(arguments: &BareStartArguments) -> Result<u8, Failure> {
    let kvm = Kvm::new()?;
    let vm = kvm.create_vm()?;
    let memory = memory(arguments.memory)?;
    set_memory_slot(&vm, &memory)?;
    vm.set_tss_address(TSS_ADDRESS)?;
    vm.create_irq_chip()?;
    vm.create_pit2(kvm_pit_config::default())?;
    let mut vcpu = vm.create_vcpu(0)?;
    vcpu.set_cpuid2(&kvm.get_supported_cpuid(KVM_MAX_CPUID_ENTRIES)?)?;
    let entry = load(&memory, &arguments.kernel)?;
    write_start_info(&memory, arguments.memory, &arguments.cmdline)?;
    set_registers(&vcpu, entry)?;
    run(&mut vcpu)
}

/// Allocates guest memory as a shared memfd, as the measured monitors do.
fn memory(bytes: u64) -> Result<GuestMemoryMmap, Failure> {
    let file = memfd_create("guest-ram", MemfdFlags::CLOEXEC)?;
    ftruncate(&file, bytes)?;
    let backing = FileOffset::new(File::from(file), 0);
    let range = (GuestAddress(0), usize::try_from(bytes)?, Some(backing));
    Ok(GuestMemoryMmap::from_ranges_with_files([range])?)
}

/// Registers guest memory as memory slot 0.
fn set_memory_slot(vm: &VmFd, memory: &GuestMemoryMmap) -> Result<(), Failure> {
    let host = memory.get_host_address(GuestAddress(0))?;
    let region = kvm_userspace_memory_region {
        memory_size: memory.iter().map(GuestMemoryRegion::len).sum(),
        userspace_addr: host as u64,
        ..Default::default()
    };
    // SAFETY: the range is the mapping of `memory`, which outlives the vCPU, and no Rust reference points into it.
    unsafe { vm.set_user_memory_region(region)? };
    Ok(())
}

/// Loads the kernel and returns its PVH entry point.
fn load(memory: &GuestMemoryMmap, kernel: &Path) -> Result<u64, Failure> {
    let mut file = File::open(kernel)?;
    let loaded: KernelLoaderResult = Elf::load(memory, None, &mut file, None)?;
    match loaded.pvh_boot_cap {
        PvhBootCapability::PvhEntryPresent(entry) => Ok(entry.0),
        _ => Err(format!("{} has no PVH entry", kernel.display()).into()),
    }
}

/// Writes `hvm_start_info` with a memory map of one entry (Xen, public/arch-x86/hvm/start_info.h).
fn write_start_info(
    memory: &GuestMemoryMmap,
    bytes: u64,
    command_line: &str,
) -> Result<(), Failure> {
    const MAGIC: u32 = 0x336e_c578;
    const RAM: u64 = 1;
    memory.write_slice(command_line.as_bytes(), GuestAddress(COMMAND_LINE))?;
    for (word, value) in (0..).zip([0, bytes, RAM]) {
        memory.write_obj::<u64>(value, GuestAddress(MEMORY_MAP + 8 * word))?;
    }
    // Magic and version 1, flags and number of modules, module list, command line, RSDP, memory map, number of its entries.
    let fields = [
        u64::from(MAGIC) | 1 << 32,
        0,
        0,
        COMMAND_LINE,
        0,
        MEMORY_MAP,
        1,
    ];
    for (word, value) in (0..).zip(fields) {
        memory.write_obj::<u64>(value, GuestAddress(START_INFO + 8 * word))?;
    }
    Ok(())
}

/// Sets the PVH start state: protected mode, flat segments, paging off.
fn set_registers(vcpu: &VcpuFd, entry: u64) -> Result<(), Failure> {
    let flat = |selector, type_| kvm_segment {
        limit: u32::MAX,
        selector,
        type_,
        present: 1,
        db: 1,
        s: 1,
        g: 1,
        ..Default::default()
    };
    let mut sregs = vcpu.get_sregs()?;
    sregs.cs = flat(0x10, 11);
    let data = flat(0x18, 3);
    (sregs.ds, sregs.es, sregs.fs, sregs.gs, sregs.ss) = (data, data, data, data, data);
    sregs.cr0 |= 1;
    vcpu.set_sregs(&sregs)?;
    vcpu.set_regs(&kvm_regs {
        rip: entry,
        rbx: START_INFO,
        rflags: 2,
        ..Default::default()
    })?;
    Ok(())
}

/// Runs the vCPU until the guest writes its exit status.
fn run(vcpu: &mut VcpuFd) -> Result<u8, Failure> {
    let mut stdout = io::stdout().lock();
    loop {
        match vcpu.run()? {
            VcpuExit::IoOut(SERIAL, data) => {
                stdout.write_all(data)?;
                stdout.flush()?;
            }
            VcpuExit::IoOut(DEBUG_EXIT, data) => return Ok(data.first().copied().unwrap_or(1)),
            VcpuExit::IoIn(_, data) => data.fill(0xff),
            VcpuExit::IoOut(..) => {}
            other => {
                return Err(format!("unexpected exit of the vCPU: {other:?}").into());
            }
        }
    }
}
