//! The state of a KVM machine and its vCPUs: taken from a stopped guest, put into a new one.
//!
//! Only what the host offers is saved, and what it refuses on the way back is named, never skipped
//! silently: see [`Restored`]. Not saved at all: nested virtualisation state (guests are not given VMX or
//! SVM), and the state of KVM's debugging aids.
//!
//! This file has `unsafe` for one call: kvm-ioctls cannot know the size of the host's XSAVE area.
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
        /// The call's name in the kernel's documentation.
        call: &'static str,
        /// What KVM said.
        source: kvm_ioctls::Error,
    },
    /// A list that is longer than any that KVM makes.
    #[error("{what}: {found} entries, at most {limit} are possible")]
    TooMany {
        /// What there are too many of.
        what: &'static str,
        /// How many there are.
        found: usize,
        /// The most that can be.
        limit: usize,
    },
    /// The host's XSAVE area is not the fixed one of 4 KiB.
    #[error(
        "this host's XSAVE area takes {0} bytes; guests with more than 4096 cannot be carried yet"
    )]
    Xsave(i32),
}

pub(super) type Result<T> = std::result::Result<T, KvmStateError>;

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

/// What a restore had to leave out.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Restored {
    /// Model-specific registers that this host does not let be written.
    pub refused_msrs: Vec<u32>,
}

/// The model-specific registers that are worth saving on this host.
///
/// # Errors
/// KVM's.
pub fn msr_indices(kvm: &Kvm) -> Result<Vec<u32>> {
    let list = kvm
        .get_msr_index_list()
        .map_err(named("KVM_GET_MSR_INDEX_LIST"))?;
    let mut indices = list.as_slice().to_vec();
    indices.retain(|index| *index != MSR_TSC);
    Ok(indices)
}

impl VcpuState {
    /// Takes the state of a stopped vCPU. `msr_indices` as from [`msr_indices`].
    ///
    /// # Errors
    /// KVM's, by the name of the call.
    pub fn save(vcpu: &VcpuFd, msr_indices: &[u32]) -> Result<Self> {
        // The kernel wants the multiprocessing state read first: it also settles pending SIPIs
        // (api.rst, KVM_GET_MP_STATE).
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

    /// Makes a new vCPU's features and the speed of its time stamp counter those of the saved one: to be done before
    /// anything else of it is restored.
    ///
    /// # Errors
    /// KVM's, by the name of the call, and lists that are too long.
    pub fn prepare(&self, vcpu: &VcpuFd) -> Result<()> {
        let cpuid = CpuId::from_entries(&self.cpuid).map_err(|_| KvmStateError::TooMany {
            what: "CPUID",
            found: self.cpuid.len(),
            limit: KVM_MAX_CPUID_ENTRIES,
        })?;
        vcpu.set_cpuid2(&cpuid).map_err(named("KVM_SET_CPUID2"))?;
        // Before the registers that count in it. A host whose own counter is as fast need not scale.
        if vcpu.get_tsc_khz().map_err(named("KVM_GET_TSC_KHZ"))? != self.tsc_khz {
            vcpu.set_tsc_khz(self.tsc_khz)
                .map_err(named("KVM_SET_TSC_KHZ"))?;
        }
        Ok(())
    }

    /// Puts the rest of the state into a vCPU that is prepared, and whose time stamp counter was restored: KVM sets
    /// the timer of its local APIC by it.
    ///
    /// # Errors
    /// KVM's, by the name of the call, and lists that are too long.
    pub fn restore(&self, vcpu: &VcpuFd) -> Result<Restored> {
        vcpu.set_mp_state(self.mp_state)
            .map_err(named("KVM_SET_MP_STATE"))?;
        vcpu.set_regs(&self.regs).map_err(named("KVM_SET_REGS"))?;
        vcpu.set_sregs(&self.sregs)
            .map_err(named("KVM_SET_SREGS"))?;
        // SAFETY: `check_xsave` made sure, before a guest was made on this host, that the kernel reads
        // no more than the 4 KiB of `kvm_xsave`.
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

/// Refuses hosts whose vCPU state has more vector state than a [`VcpuState`] carries.
///
/// # Errors
/// The XSAVE area is larger than 4 KiB.
pub fn check_xsave(vm: &VmFd) -> Result<()> {
    // Zero where the kernel does not know of larger ones (api.rst, KVM_CAP_XSAVE2).
    let bytes = vm.check_extension_int(Cap::Xsave2);
    if bytes > 4096 {
        return Err(KvmStateError::Xsave(bytes));
    }
    Ok(())
}

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
        // KVM stops at the first that this vCPU does not have: left out, as the guest cannot have it.
        rest = rest.get(read + 1..).unwrap_or(&[]);
    }
    Ok(values)
}

/// Returns the registers that KVM would not write.
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
    /// Takes the state of a machine whose vCPUs are stopped.
    ///
    /// # Errors
    /// KVM's, by the name of the call.
    pub fn save(vm: &VmFd) -> Result<Self> {
        Ok(Self {
            pic_master: get_irqchip(vm, KVM_IRQCHIP_PIC_MASTER)?,
            pic_slave: get_irqchip(vm, KVM_IRQCHIP_PIC_SLAVE)?,
            ioapic: get_irqchip(vm, KVM_IRQCHIP_IOAPIC)?,
            pit: vm.get_pit2().map_err(named("KVM_GET_PIT2"))?,
        })
    }

    /// Puts the state into a new machine.
    ///
    /// # Errors
    /// KVM's, by the name of the call.
    pub fn restore(&self, vm: &VmFd) -> Result<()> {
        for (id, mut chip) in [
            (KVM_IRQCHIP_PIC_MASTER, self.pic_master),
            (KVM_IRQCHIP_PIC_SLAVE, self.pic_slave),
            (KVM_IRQCHIP_IOAPIC, self.ioapic),
        ] {
            // A stream does not get to say which chip it means.
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
