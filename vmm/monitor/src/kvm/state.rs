//! Saves the state of a stopped VM and its vCPUs, and restores it into a new VM.
//!
//! Only state that the host offers is saved. Model-specific registers that the destination refuses are reported in
//! [`Restored`]. Nested virtualization state is not saved, because guests are not given VMX or SVM. The state of guest
//! debugging (KVM_SET_GUEST_DEBUG) is not saved either.
//!
//! This file has `unsafe` code because kvm-ioctls cannot know the size of the host's XSAVE area.
#![allow(unsafe_code)]

use devices::SavedState;
use kvm_bindings::{
    CpuId, KVM_IRQCHIP_IOAPIC, KVM_IRQCHIP_PIC_MASTER, KVM_IRQCHIP_PIC_SLAVE,
    KVM_MAX_CPUID_ENTRIES, KVM_VCPUEVENT_VALID_NMI_PENDING, KVM_VCPUEVENT_VALID_SHADOW,
    KVM_VCPUEVENT_VALID_SIPI_VECTOR, Msrs, kvm_cpuid_entry2, kvm_debugregs, kvm_irqchip,
    kvm_lapic_state, kvm_mp_state, kvm_msr_entry, kvm_pit_state2, kvm_regs, kvm_sregs,
    kvm_vcpu_events, kvm_xcrs, kvm_xsave,
};
use kvm_ioctls::{Cap, Kvm, VcpuFd, VmFd};
use minicbor::{Decode, Encode};

use super::abi;

/// Reasons why KVM's state cannot be saved or restored.
#[derive(Debug, thiserror::Error)]
pub enum KvmStateError {
    /// KVM refused a call.
    #[error("{call}: {source}")]
    Kvm {
        /// Name of the ioctl.
        call: &'static str,
        /// Error that KVM returned.
        source: kvm_ioctls::Error,
    },
    /// A list has more entries than KVM accepts.
    #[error("{what}: {found} entries, at most {limit} are possible")]
    TooMany {
        /// Kind of the list: CPUID or MSR.
        what: &'static str,
        /// Number of entries.
        found: usize,
        /// Maximum number of entries.
        limit: usize,
    },
    /// The XSAVE area of the host is larger than 4 KiB.
    #[error(
        "the XSAVE area of this host takes {0} bytes; the state of guests with more than 4096 bytes cannot be saved yet"
    )]
    Xsave(i32),
}

pub(super) type Result<T> = std::result::Result<T, KvmStateError>;

/// Returns a function that converts the error of the ioctl `call`, for `map_err`.
pub(super) fn named(call: &'static str) -> impl Fn(kvm_ioctls::Error) -> KvmStateError {
    move |source| KvmStateError::Kvm { call, source }
}

/// Saved state of one vCPU.
#[derive(Debug, Encode, Decode)]
#[cbor(map)]
pub struct VcpuState {
    /// CPUID of the guest. It is restored first, because KVM checks the rest against it.
    #[n(0)]
    #[cbor(with = "abi::list")]
    pub cpuid: Vec<kvm_cpuid_entry2>,
    /// Control, segment and descriptor table registers.
    #[n(1)]
    #[cbor(with = "abi")]
    pub sregs: kvm_sregs,
    /// General-purpose registers.
    #[n(2)]
    #[cbor(with = "abi")]
    pub regs: kvm_regs,
    /// Floating-point and vector registers.
    #[n(3)]
    #[cbor(with = "abi")]
    pub xsave: kvm_xsave,
    /// Extended control registers.
    #[n(4)]
    #[cbor(with = "abi")]
    pub xcrs: kvm_xcrs,
    /// Model-specific registers that the host lists and allows to be read. The time stamp counter is not among them:
    /// it is in [`MachineTime`](super::time::MachineTime).
    #[n(5)]
    pub msrs: Vec<MsrValue>,
    /// Local APIC.
    #[n(6)]
    #[cbor(with = "abi")]
    pub lapic: kvm_lapic_state,
    /// Multiprocessing state: runnable, halted, or waiting for a SIPI.
    #[n(7)]
    #[cbor(with = "abi")]
    pub mp_state: kvm_mp_state,
    /// Pending exceptions, interrupts and NMIs.
    #[n(8)]
    #[cbor(with = "abi")]
    pub events: kvm_vcpu_events,
    /// Debug registers.
    #[n(9)]
    #[cbor(with = "abi")]
    pub debug: kvm_debugregs,
    /// Frequency of the time stamp counter in kHz.
    #[n(10)]
    pub tsc_khz: u32,
}

impl SavedState for VcpuState {
    const VERSION: u16 = 1;
}

/// Number and value of one model-specific register.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Encode, Decode)]
pub struct MsrValue {
    /// Number of the register.
    #[n(0)]
    pub index: u32,
    /// Contents of the register.
    #[n(1)]
    pub value: u64,
}

/// Saved state of the interrupt controllers and the timer, which all vCPUs share.
#[derive(Clone, Debug, Encode, Decode)]
#[cbor(map)]
pub struct MachineState {
    /// First 8259 interrupt controller.
    #[n(0)]
    #[cbor(with = "abi")]
    pub pic_master: kvm_irqchip,
    /// Second 8259 interrupt controller.
    #[n(1)]
    #[cbor(with = "abi")]
    pub pic_slave: kvm_irqchip,
    /// I/O APIC.
    #[n(2)]
    #[cbor(with = "abi")]
    pub ioapic: kvm_irqchip,
    /// 8254 interval timer.
    #[n(3)]
    #[cbor(with = "abi")]
    pub pit: kvm_pit_state2,
}

impl SavedState for MachineState {
    const VERSION: u16 = 1;
}

/// IA32_TIME_STAMP_COUNTER: Intel SDM volume 4, table 2-2.
pub(super) const MSR_TSC: u32 = 0x10;

/// State that a restore left out.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Restored {
    /// Numbers of the model-specific registers that KVM refused to set.
    pub refused_msrs: Vec<u32>,
}

/// Returns the numbers of the model-specific registers to save on this host, without the time stamp counter.
///
/// # Errors
/// Returns the error of KVM_GET_MSR_INDEX_LIST.
pub fn msr_indices(kvm: &Kvm) -> Result<Vec<u32>> {
    let list = kvm
        .get_msr_index_list()
        .map_err(named("KVM_GET_MSR_INDEX_LIST"))?;
    let mut indices = list.as_slice().to_vec();
    indices.retain(|index| *index != MSR_TSC);
    Ok(indices)
}

impl VcpuState {
    /// Reads the state of a stopped vCPU. `msr_indices` is the result of [`msr_indices`].
    ///
    /// # Errors
    /// Returns the error of the ioctl that failed.
    pub fn save(vcpu: &VcpuFd, msr_indices: &[u32]) -> Result<Self> {
        // KVM_GET_MP_STATE must come first, because it also processes pending SIPIs (api.rst, KVM_GET_MP_STATE).
        let mp_state = vcpu.get_mp_state().map_err(named("KVM_GET_MP_STATE"))?;
        Ok(Self {
            cpuid: vcpu
                .get_cpuid2(KVM_MAX_CPUID_ENTRIES)
                .map_err(named("KVM_GET_CPUID2"))?
                .as_slice()
                .to_vec(),
            sregs: vcpu.get_sregs().map_err(named("KVM_GET_SREGS"))?,
            regs: vcpu.get_regs().map_err(named("KVM_GET_REGS"))?,
            xsave: vcpu.get_xsave().map_err(named("KVM_GET_XSAVE"))?,
            xcrs: vcpu.get_xcrs().map_err(named("KVM_GET_XCRS"))?,
            msrs: read_msrs(vcpu, msr_indices)?,
            lapic: vcpu.get_lapic().map_err(named("KVM_GET_LAPIC"))?,
            mp_state,
            events: vcpu
                .get_vcpu_events()
                .map_err(named("KVM_GET_VCPU_EVENTS"))?,
            debug: vcpu.get_debug_regs().map_err(named("KVM_GET_DEBUGREGS"))?,
            tsc_khz: vcpu.get_tsc_khz().map_err(named("KVM_GET_TSC_KHZ"))?,
        })
    }

    /// Sets the CPUID and the TSC frequency of a new vCPU. Must be called before any other state is restored.
    ///
    /// # Errors
    /// Returns the error of the ioctl that failed, and [`KvmStateError::TooMany`] if the CPUID has too many entries.
    pub fn prepare(&self, vcpu: &VcpuFd) -> Result<()> {
        let cpuid = CpuId::from_entries(&self.cpuid).map_err(|_| KvmStateError::TooMany {
            what: "CPUID",
            found: self.cpuid.len(),
            limit: KVM_MAX_CPUID_ENTRIES,
        })?;
        vcpu.set_cpuid2(&cpuid).map_err(named("KVM_SET_CPUID2"))?;
        // The frequency must be set before registers that depend on it. If the TSC of the host has this frequency,
        // scaling is not needed.
        if vcpu.get_tsc_khz().map_err(named("KVM_GET_TSC_KHZ"))? != self.tsc_khz {
            vcpu.set_tsc_khz(self.tsc_khz)
                .map_err(named("KVM_SET_TSC_KHZ"))?;
        }
        Ok(())
    }

    /// Restores all state that [`Self::prepare`] does not set. The TSC of the vCPU must be restored before, because KVM
    /// programs the timer of the local APIC by it.
    ///
    /// # Errors
    /// Returns the error of the ioctl that failed, and [`KvmStateError::TooMany`] if there are too many registers.
    pub fn restore(&self, vcpu: &VcpuFd) -> Result<Restored> {
        vcpu.set_mp_state(self.mp_state)
            .map_err(named("KVM_SET_MP_STATE"))?;
        vcpu.set_regs(&self.regs).map_err(named("KVM_SET_REGS"))?;
        vcpu.set_sregs(&self.sregs)
            .map_err(named("KVM_SET_SREGS"))?;
        // SAFETY: `check_xsave` refused this host unless KVM reads at most the 4 KiB of `kvm_xsave`. It is called
        // before a VM gets vCPUs.
        unsafe { vcpu.set_xsave(&self.xsave) }.map_err(named("KVM_SET_XSAVE"))?;
        vcpu.set_xcrs(&self.xcrs).map_err(named("KVM_SET_XCRS"))?;
        vcpu.set_debug_regs(&self.debug)
            .map_err(named("KVM_SET_DEBUGREGS"))?;
        vcpu.set_lapic(&self.lapic)
            .map_err(named("KVM_SET_LAPIC"))?;
        let refused_msrs = write_msrs(vcpu, &self.msrs)?;
        let mut events = self.events;
        events.flags &= KVM_VCPUEVENT_VALID_NMI_PENDING
            | KVM_VCPUEVENT_VALID_SIPI_VECTOR
            | KVM_VCPUEVENT_VALID_SHADOW;
        vcpu.set_vcpu_events(&events)
            .map_err(named("KVM_SET_VCPU_EVENTS"))?;
        Ok(Restored { refused_msrs })
    }
}

/// Checks that the XSAVE area of this host fits [`VcpuState::xsave`].
///
/// # Errors
/// Returns [`KvmStateError::Xsave`] if the area is larger than 4 KiB.
pub fn check_xsave(vm: &VmFd) -> Result<()> {
    // The result is zero if the kernel does not support larger areas (api.rst, KVM_CAP_XSAVE2).
    let bytes = vm.check_extension_int(Cap::Xsave2);
    if bytes > 4096 {
        return Err(KvmStateError::Xsave(bytes));
    }
    Ok(())
}

/// Reads model-specific registers. Registers that the vCPU does not have are left out.
pub(super) fn read_msrs(vcpu: &VcpuFd, indices: &[u32]) -> Result<Vec<MsrValue>> {
    let mut values = Vec::with_capacity(indices.len());
    let mut rest = indices;
    while !rest.is_empty() {
        let entries: Vec<kvm_msr_entry> = rest
            .iter()
            .map(|index| kvm_msr_entry {
                index: *index,
                ..Default::default()
            })
            .collect();
        let mut msrs = msr_list(&entries)?;
        let read = vcpu.get_msrs(&mut msrs).map_err(named("KVM_GET_MSRS"))?;
        values.extend(msrs.as_slice()[..read].iter().map(|msr| MsrValue {
            index: msr.index,
            value: msr.data,
        }));
        // KVM stops at the first register that this vCPU does not have. It is skipped, because the guest cannot have it
        // either.
        rest = rest.get(read + 1..).unwrap_or(&[]);
    }
    Ok(values)
}

/// Writes model-specific registers. Returns the numbers of those that KVM refused.
pub(super) fn write_msrs(vcpu: &VcpuFd, values: &[MsrValue]) -> Result<Vec<u32>> {
    let mut refused = Vec::new();
    let mut rest = values;
    while !rest.is_empty() {
        let entries: Vec<kvm_msr_entry> = rest
            .iter()
            .map(|msr| kvm_msr_entry {
                index: msr.index,
                data: msr.value,
                ..Default::default()
            })
            .collect();
        let written = vcpu
            .set_msrs(&msr_list(&entries)?)
            .map_err(named("KVM_SET_MSRS"))?;
        refused.extend(rest.get(written).map(|msr| msr.index));
        rest = rest.get(written + 1..).unwrap_or(&[]);
    }
    Ok(refused)
}

fn msr_list(entries: &[kvm_msr_entry]) -> Result<Msrs> {
    Msrs::from_entries(entries).map_err(|_| KvmStateError::TooMany {
        what: "MSR",
        found: entries.len(),
        limit: kvm_bindings::KVM_MAX_MSR_ENTRIES,
    })
}

impl MachineState {
    /// Reads the state of a VM whose vCPUs are stopped.
    ///
    /// # Errors
    /// Returns the error of the ioctl that failed.
    pub fn save(vm: &VmFd) -> Result<Self> {
        Ok(Self {
            pic_master: get_irqchip(vm, KVM_IRQCHIP_PIC_MASTER)?,
            pic_slave: get_irqchip(vm, KVM_IRQCHIP_PIC_SLAVE)?,
            ioapic: get_irqchip(vm, KVM_IRQCHIP_IOAPIC)?,
            pit: vm.get_pit2().map_err(named("KVM_GET_PIT2"))?,
        })
    }

    /// Restores the state into a new VM.
    ///
    /// # Errors
    /// Returns the error of the ioctl that failed.
    pub fn restore(&self, vm: &VmFd) -> Result<()> {
        for (id, mut chip) in [
            (KVM_IRQCHIP_PIC_MASTER, self.pic_master),
            (KVM_IRQCHIP_PIC_SLAVE, self.pic_slave),
            (KVM_IRQCHIP_IOAPIC, self.ioapic),
        ] {
            // The chip ID in the saved state comes from the source and is not trusted.
            chip.chip_id = id;
            vm.set_irqchip(&chip).map_err(named("KVM_SET_IRQCHIP"))?;
        }
        vm.set_pit2(&self.pit).map_err(named("KVM_SET_PIT2"))
    }
}

fn get_irqchip(vm: &VmFd, chip_id: u32) -> Result<kvm_irqchip> {
    let mut chip = kvm_irqchip {
        chip_id,
        ..Default::default()
    };
    vm.get_irqchip(&mut chip)
        .map_err(named("KVM_GET_IRQCHIP"))?;
    Ok(chip)
}
