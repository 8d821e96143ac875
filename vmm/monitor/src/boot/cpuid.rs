//! The CPU features that a guest sees: the host's as KVM offers them, restricted to a named [`baseline`], made each
//! vCPU's own.
//!
//! Source: Intel SDM volume 2, CPUID; AMD APM volume 3, appendix E.

pub mod baseline;
mod topology;

use kvm_bindings::{CpuId, KVM_MAX_CPUID_ENTRIES, kvm_cpuid_entry2};
use kvm_ioctls::Kvm;

/// CPUID could not be asked for or built.
#[derive(Debug, thiserror::Error)]
#[error("CPUID: {0}")]
pub struct CpuidError(String);

const FEATURES: u32 = 1;
/// Leaf 1, ecx, and leaf 7, ecx: what the guest itself has switched on, not features.
const OSXSAVE: u32 = 1 << 27;
const OSPKE: u32 = 1 << 4;
const HYPERVISOR_PRESENT: u32 = 1 << 31;
/// Leaf 1, ecx: the TSC-deadline timer, which KVM's local APIC has though it does not say so here.
const TSC_DEADLINE: u32 = 1 << 24;

/// What the vCPUs of a guest see on one host.
///
/// KVM is asked once for all of them: on some hosts its answer takes a millisecond.
pub struct GuestCpuid {
    common: Vec<kvm_cpuid_entry2>,
    count: u32,
}

impl GuestCpuid {
    /// Of a guest with `count` vCPUs.
    ///
    /// # Errors
    /// KVM's.
    pub fn new(kvm: &Kvm, count: u32) -> Result<Self, CpuidError> {
        let mut common = supported(kvm)?.as_slice().to_vec();
        for entry in &mut common {
            if entry.function == FEATURES {
                entry.ecx |= HYPERVISOR_PRESENT | TSC_DEADLINE;
            }
        }
        baseline::restrict(&mut common);
        Ok(Self { common, count })
    }

    /// What vCPU `index` sees.
    #[must_use]
    pub fn of_vcpu(&self, index: u32) -> Vec<kvm_cpuid_entry2> {
        let mut entries = self.common.clone();
        let count = self.count;
        topology::CpuPosition { index, count }.write(&mut entries);
        entries
    }

    /// The same, for `KVM_SET_CPUID2`.
    ///
    /// # Errors
    /// More entries than KVM takes.
    pub fn for_kvm(&self, index: u32) -> Result<CpuId, CpuidError> {
        let entries = self.of_vcpu(index);
        CpuId::from_entries(&entries)
            .map_err(|_| CpuidError(format!("{} entries are too many", entries.len())))
    }
}

fn supported(kvm: &Kvm) -> Result<CpuId, CpuidError> {
    kvm.get_supported_cpuid(KVM_MAX_CPUID_ENTRIES)
        .map_err(|error| CpuidError(format!("KVM_GET_SUPPORTED_CPUID: {error}")))
}

/// Leaf 1, edx, and leaf 0x80000001, ecx: topology, which is the guest's own.
const HTT: u32 = 1 << 28;
const CMP_LEGACY: u32 = 1 << 1;

/// A register of a leaf.
type Register = fn(&kvm_cpuid_entry2) -> u32;

/// Leaves, sub-leaves and registers that are nothing but feature bits.
const FEATURE_REGISTERS: [(u32, u32, Register, &str); 14] = [
    (
        1,
        0,
        |e| e.ecx & !(HYPERVISOR_PRESENT | TSC_DEADLINE | OSXSAVE),
        "leaf 1 ecx",
    ),
    (1, 0, |e| e.edx & !HTT, "leaf 1 edx"),
    (7, 0, |e| e.ebx, "leaf 7 ebx"),
    (7, 0, |e| e.ecx & !OSPKE, "leaf 7 ecx"),
    (7, 0, |e| e.edx, "leaf 7 edx"),
    (0xd, 0, |e| e.eax, "leaf 0xd eax"),
    (0xd, 1, |e| e.eax & 0xf, "leaf 0xd.1 eax"),
    (7, 1, |e| e.eax, "leaf 7.1 eax"),
    (7, 1, |e| e.edx, "leaf 7.1 edx"),
    (0x4000_0001, 0, |e| e.eax, "leaf 0x40000001 eax"),
    (
        0x8000_0001,
        0,
        |e| e.ecx & !CMP_LEGACY,
        "leaf 0x80000001 ecx",
    ),
    (0x8000_0001, 0, |e| e.edx, "leaf 0x80000001 edx"),
    (0x8000_0008, 0, |e| e.ebx, "leaf 0x80000008 ebx"),
    (0x8000_0021, 0, |e| e.eax, "leaf 0x80000021 eax"),
];

/// The features in `wanted` that this host cannot give, each as register and bits: empty if a guest that
/// saw `wanted` can go on here.
///
/// # Errors
/// KVM's.
pub fn missing_features(kvm: &Kvm, wanted: &[kvm_cpuid_entry2]) -> Result<Vec<String>, CpuidError> {
    let offered = supported(kvm)?;
    Ok(missing(offered.as_slice(), wanted))
}

fn missing(offered: &[kvm_cpuid_entry2], wanted: &[kvm_cpuid_entry2]) -> Vec<String> {
    let bits = |entries: &[kvm_cpuid_entry2], leaf, sub, register: Register| {
        entries
            .iter()
            .find(|e| e.function == leaf && e.index == sub)
            .map_or(0, register)
    };
    FEATURE_REGISTERS
        .iter()
        .filter_map(|(leaf, sub, register, name)| {
            let lacking =
                bits(wanted, *leaf, *sub, *register) & !bits(offered, *leaf, *sub, *register);
            (lacking != 0).then(|| format!("{name} bits {lacking:#x}"))
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_feature_that_the_host_lacks_is_named() {
        let offered = [kvm_cpuid_entry2 {
            function: 7,
            ebx: 0b0101,
            ..Default::default()
        }];
        let wanted = [kvm_cpuid_entry2 {
            function: 7,
            ebx: 0b0111,
            ..Default::default()
        }];
        assert_eq!(missing(&offered, &wanted), ["leaf 7 ebx bits 0x2"]);
        assert!(missing(&wanted, &offered).is_empty());
        assert!(missing(&wanted, &wanted).is_empty());
    }
}
