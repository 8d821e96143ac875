//! Initial registers of a vCPU.
//!
//! Sources: Xen docs/misc/pvh.pandoc (PVH: 32-bit protected mode, paging off, ebx = start info), Linux
//! Documentation/arch/x86/boot.rst (64-bit: long mode, identity mapping, rsi = boot_params), Intel SDM volume 3,
//! chapters 2.5 (control registers), 3.4.5 (segment descriptors) and 4.5 (paging).

use kvm_bindings::{KVM_MP_STATE_RUNNABLE, kvm_mp_state, kvm_regs, kvm_segment, kvm_sregs};
use kvm_ioctls::VcpuFd;
use vm_memory::{Address, Bytes, GuestAddress};

use super::BootError;
use crate::memory::GuestMemory;

const CR0_PE: u64 = 1;
const CR0_ET: u64 = 1 << 4;
const CR0_PG: u64 = 1 << 31;
const CR4_PAE: u64 = 1 << 5;
const EFER_LME: u64 = 1 << 8;
const EFER_LMA: u64 = 1 << 10;
/// Bit 1 of RFLAGS, which is always set.
const RFLAGS_RESERVED: u64 = 2;

/// Guest-physical address of the GDT.
const GDT: GuestAddress = GuestAddress(0x500);
/// Guest-physical addresses of the page tables: one PML4, one PDPT and [`IDENTITY_GIB`] page directories.
const PML4: GuestAddress = GuestAddress(0x9000);
const PDPT: GuestAddress = GuestAddress(0xa000);
const PAGE_DIRECTORIES: GuestAddress = GuestAddress(0xb000);
/// GiB of the identity mapping of the 64-bit protocol. It covers all memory that a kernel or an initramfs is loaded
/// into.
const IDENTITY_GIB: u64 = 4;
const PAGE_PRESENT_WRITABLE: u64 = 3;
const PAGE_HUGE: u64 = 1 << 7;

/// GDT of the 64-bit protocol: null, unused, `__BOOT_CS` (0x10) and `__BOOT_DS` (0x18).
const BOOT_GDT: [u64; 4] = [0, 0, 0x00af_9b00_0000_ffff, 0x00cf_9300_0000_ffff];

/// Writes page tables that map the first [`IDENTITY_GIB`] GiB to themselves with 2 MiB pages, and the GDT.
pub(super) fn write_page_tables(memory: &GuestMemory) -> Result<(), BootError> {
    let write = |value: u64, address: GuestAddress| {
        memory
            .write_obj(value, address)
            .map_err(|error| BootError::Memory(error.to_string()))
    };
    for (index, descriptor) in (0..).zip(BOOT_GDT) {
        write(descriptor, GDT.unchecked_add(index * 8))?;
    }
    write(PDPT.raw_value() | PAGE_PRESENT_WRITABLE, PML4)?;
    for gib in 0..IDENTITY_GIB {
        let directory = PAGE_DIRECTORIES.raw_value() + gib * 0x1000;
        write(
            directory | PAGE_PRESENT_WRITABLE,
            PDPT.unchecked_add(gib * 8),
        )?;
    }
    for index in 0..IDENTITY_GIB * 512 {
        let entry = (index << 21) | PAGE_HUGE | PAGE_PRESENT_WRITABLE;
        write(entry, PAGE_DIRECTORIES.unchecked_add(index * 8))?;
    }
    Ok(())
}

/// Sets the initial registers of one vCPU.
pub(super) struct FirstRegisters<'a> {
    vcpu: &'a VcpuFd,
    index: u32,
}

impl<'a> FirstRegisters<'a> {
    pub(super) fn new(vcpu: &'a VcpuFd, index: u32) -> Self {
        Self { vcpu, index }
    }

    /// Sets the start state of PVH: 32-bit protected mode without paging, flat segments, ebx = start info.
    ///
    /// eax is the index of the vCPU. PVH leaves eax undefined; kernels that ask for a direct start of their vCPUs read
    /// it.
    pub(super) fn pvh(
        &self,
        entry: GuestAddress,
        start_info: GuestAddress,
    ) -> Result<(), BootError> {
        let mut sregs = self.sregs()?;
        let code = segment(0x10, 0xb, OperandSize::Bits32);
        set_segments(&mut sregs, code, segment(0x18, 0x3, OperandSize::Bits32));
        sregs.cr0 = CR0_PE | CR0_ET;
        sregs.cr4 = 0;
        sregs.efer = 0;
        self.set(
            &sregs,
            &kvm_regs {
                rip: entry.raw_value(),
                rbx: start_info.raw_value(),
                rax: u64::from(self.index),
                rflags: RFLAGS_RESERVED,
                ..Default::default()
            },
        )
    }

    /// Sets the start state of the 64-bit protocol: long mode on the identity mapping of [`write_page_tables`], rsi =
    /// boot_params.
    pub(super) fn linux64(
        &self,
        entry: GuestAddress,
        boot_params: GuestAddress,
    ) -> Result<(), BootError> {
        let mut sregs = self.sregs()?;
        let code = segment(0x10, 0xb, OperandSize::Bits64);
        set_segments(&mut sregs, code, segment(0x18, 0x3, OperandSize::Bits32));
        sregs.gdt.base = GDT.raw_value();
        sregs.gdt.limit = 31;
        sregs.idt.base = 0;
        sregs.idt.limit = 0;
        sregs.cr0 = CR0_PE | CR0_ET | CR0_PG;
        sregs.cr3 = PML4.raw_value();
        sregs.cr4 = CR4_PAE;
        sregs.efer = EFER_LME | EFER_LMA;
        self.set(
            &sregs,
            &kvm_regs {
                rip: entry.raw_value(),
                rsi: boot_params.raw_value(),
                rflags: RFLAGS_RESERVED,
                ..Default::default()
            },
        )
    }

    fn sregs(&self) -> Result<kvm_sregs, BootError> {
        self.vcpu
            .get_sregs()
            .map_err(|source| self.error("KVM_GET_SREGS", source))
    }

    /// Sets the registers and makes the vCPU runnable.
    fn set(&self, sregs: &kvm_sregs, regs: &kvm_regs) -> Result<(), BootError> {
        self.vcpu
            .set_sregs(sregs)
            .map_err(|source| self.error("KVM_SET_SREGS", source))?;
        self.vcpu
            .set_regs(regs)
            .map_err(|source| self.error("KVM_SET_REGS", source))?;
        let runnable = kvm_mp_state {
            mp_state: KVM_MP_STATE_RUNNABLE,
        };
        self.vcpu
            .set_mp_state(runnable)
            .map_err(|source| self.error("KVM_SET_MP_STATE", source))
    }

    fn error(&self, call: &'static str, source: kvm_ioctls::Error) -> BootError {
        BootError::Registers {
            index: self.index,
            call,
            source,
        }
    }
}

/// Default operand size of a code segment.
enum OperandSize {
    Bits32,
    Bits64,
}

/// Returns a flat segment of 4 GiB. `kind` is the type field of the descriptor: 0xb for code, 0x3 for data.
fn segment(selector: u16, kind: u8, width: OperandSize) -> kvm_segment {
    let (db, l) = match width {
        OperandSize::Bits32 => (1, 0),
        OperandSize::Bits64 => (0, 1),
    };
    kvm_segment {
        base: 0,
        limit: 0xffff_ffff,
        selector,
        type_: kind,
        present: 1,
        dpl: 0,
        db,
        s: 1,
        l,
        g: 1,
        ..Default::default()
    }
}

/// Sets the code segment, all data segments and the task register.
fn set_segments(sregs: &mut kvm_sregs, code: kvm_segment, data: kvm_segment) {
    sregs.cs = code;
    for register in [
        &mut sregs.ds,
        &mut sregs.es,
        &mut sregs.fs,
        &mut sregs.gs,
        &mut sregs.ss,
    ] {
        *register = data;
    }
    // VM entry requires that TR is a busy TSS (type 0xb), even if the guest never switches tasks.
    sregs.tr = kvm_segment {
        limit: 0x67,
        type_: 0xb,
        present: 1,
        ..Default::default()
    };
}
