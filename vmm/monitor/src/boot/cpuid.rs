//! CPUID of the guest: the features of the host as KVM offers them, restricted to a named [`baseline`], with the
//! topology of each vCPU.
//!
//! Source: Intel SDM volume 2, CPUID; AMD APM volume 3, appendix E.

pub mod baseline;
mod topology;

use kvm_bindings::{CpuId, KVM_MAX_CPUID_ENTRIES, kvm_cpuid_entry2};
use kvm_ioctls::Kvm;

/// KVM did not report the supported CPUID, or the CPUID of the guest is too large.
#[derive(Debug, thiserror::Error)]
#[error("CPUID: {0}")]
pub struct CpuidError(String);

/// Leaf 1, feature information.
const FEATURES: u32 = 1;
/// Leaf 1, ecx, and leaf 7, ecx: bits that show what the guest enabled in CR4. They are not features.
const OSXSAVE: u32 = 1 << 27;
const OSPKE: u32 = 1 << 4;
/// Leaf 1, ecx: the guest runs under a hypervisor.
const HYPERVISOR_PRESENT: u32 = 1 << 31;
/// Leaf 1, ecx: the TSC-deadline timer. The in-kernel local APIC has it, but KVM_GET_SUPPORTED_CPUID does not report
/// it.
const TSC_DEADLINE: u32 = 1 << 24;

/// CPUID of all vCPUs of a guest.
///
/// KVM_GET_SUPPORTED_CPUID is called once for all vCPUs, because it takes a millisecond on some hosts.
pub struct GuestCpuid {
    common: Vec<kvm_cpuid_entry2>,
    count: u32,
}

impl GuestCpuid {
    /// Builds the CPUID of a guest with `count` vCPUs.
    ///
    /// # Errors
    /// Returns [`CpuidError`] if KVM_GET_SUPPORTED_CPUID fails.
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

    /// Returns the CPUID of vCPU `index`.
    #[must_use]
    pub fn of_vcpu(&self, index: u32) -> Vec<kvm_cpuid_entry2> {
        let mut entries = self.common.clone();
        let count = self.count;
        topology::CpuPosition { index, count }.write(&mut entries);
        entries
    }

    /// Returns the CPUID of vCPU `index` as the argument of KVM_SET_CPUID2.
    ///
    /// # Errors
    /// Returns [`CpuidError`] if there are more entries than KVM accepts.
    pub fn for_kvm(&self, index: u32) -> Result<CpuId, CpuidError> {
        let entries = self.of_vcpu(index);
        CpuId::from_entries(&entries)
            .map_err(|_| CpuidError(format!("{} entries are too many", entries.len())))
    }
}

/// Returns the result of KVM_GET_SUPPORTED_CPUID.
fn supported(kvm: &Kvm) -> Result<CpuId, CpuidError> {
    kvm.get_supported_cpuid(KVM_MAX_CPUID_ENTRIES)
        .map_err(|error| CpuidError(format!("KVM_GET_SUPPORTED_CPUID: {error}")))
}

/// Leaf 1, edx, and leaf 0x80000001, ecx: bits that describe the topology of the guest. They are not features of the
/// host.
const HTT: u32 = 1 << 28;
const CMP_LEGACY: u32 = 1 << 1;

/// Reads the feature bits of one register of a leaf.
type RegisterReader = fn(&kvm_cpuid_entry2) -> u32;

/// Leaf, sub-leaf, register and name of every register that contains feature bits.
const FEATURE_REGISTERS: [(u32, u32, RegisterReader, &str); 14] = [
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

/// Returns the feature bits of `wanted` that this host does not offer, each as the name of a register and a mask. The
/// list is empty if a guest that started with the CPUID `wanted` can run here.
///
/// # Errors
/// Returns [`CpuidError`] if KVM_GET_SUPPORTED_CPUID fails.
pub fn missing_features(kvm: &Kvm, wanted: &[kvm_cpuid_entry2]) -> Result<Vec<String>, CpuidError> {
    let offered = supported(kvm)?;
    Ok(missing(offered.as_slice(), wanted))
}

/// Returns the bits of [`FEATURE_REGISTERS`] that are set in `wanted` and clear in `offered`.
fn missing(offered: &[kvm_cpuid_entry2], wanted: &[kvm_cpuid_entry2]) -> Vec<String> {
    let bits = |entries: &[kvm_cpuid_entry2], leaf, sub, register: RegisterReader| {
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
