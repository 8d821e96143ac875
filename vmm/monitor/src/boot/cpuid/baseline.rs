//! The baseline `migratable-v1`: the CPUID bits of the host that a guest may see.
//!
//! It is an allow list, so that a feature which was not considered is not exposed. A feature is on the list if
//! [`VcpuState`](crate::kvm::state::VcpuState) contains all of its state: in the general registers, in the first 4 KiB
//! of the XSAVE area, or in model-specific registers that KVM lists. The following features are not on the list, even
//! if KVM offers them:
//!
//! - VMX, SVM, SEV and SGX: the state of nested guests and enclaves is not saved.
//! - AMX, CET, supervisor protection keys and FRED: their state lies beyond 4 KiB of the XSAVE area, or KVM_GET_XSAVE
//!   omits it.
//! - Performance counters, processor trace, branch records, IBS and resource control: they count events of one host.
//! - Invariant TSC: the guarantee would not hold across a migration to a host with another counter.
//! - TSX and MPX: newer processors of the same line no longer have them.
//! - MONITOR and MWAIT in all forms: an idle vCPU would wait on the processor of the host, without an exit.
//!
//! A later baseline gets a new name: a guest keeps the CPUID that it started with for as long as it runs.
//!
//! Sources: Intel SDM volume 2, CPUID; AMD APM volume 3, appendix E; Linux Documentation/virt/kvm/x86/cpuid.rst.

use kvm_bindings::kvm_cpuid_entry2;

/// Name of the baseline.
pub const NAME: &str = "migratable-v1";

/// Masks of the bits of one CPUID leaf that are exposed. If `index` is `None`, they apply to all sub-leaves.
struct LeafMask {
    function: u32,
    index: Option<u32>,
    eax: u32,
    ebx: u32,
    ecx: u32,
    edx: u32,
}

/// Exposes all bits of a register.
const ALL: u32 = u32::MAX;

/// Returns a mask with the bits of all `ranges` set. Both ends of a range are inclusive.
const fn bits(ranges: &[(u32, u32)]) -> u32 {
    let (mut mask, mut at) = (0, 0);
    while at < ranges.len() {
        let (mut bit, last) = ranges[at];
        while bit <= last {
            mask |= 1 << bit;
            bit += 1;
        }
        at += 1;
    }
    mask
}

/// Returns the masks of a leaf. `registers` are the masks for eax, ebx, ecx and edx.
const fn leaf(function: u32, index: Option<u32>, registers: [u32; 4]) -> LeafMask {
    let [eax, ebx, ecx, edx] = registers;
    LeafMask {
        function,
        index,
        eax,
        ebx,
        ecx,
        edx,
    }
}

/// Exposes a leaf completely: it describes the processor and contains no feature bits.
const fn whole(function: u32) -> LeafMask {
    leaf(function, None, [ALL; 4])
}

/// State components of XCR0 that are exposed: x87, SSE, AVX, AVX-512 and user protection keys. They fit 4 KiB.
const STATE_COMPONENTS: u32 = bits(&[(0, 2), (5, 7), (9, 9)]);

/// Leaf 1, edx, and the bits of it that leaf 0x80000001 of AMD repeats. Serial number, debug store, thermal and ACPI
/// bits are left out.
const BASIC_EDX: u32 = bits(&[(0, 9), (11, 17), (19, 19), (23, 28)]);
const REPEATED_EDX: u32 = bits(&[(0, 9), (12, 17), (23, 24)]);

/// Masks of the leaves of the baseline, without [`AMD_EXTENDED`]. A leaf that is not listed is cleared.
const LEAVES: [LeafMask; 24] = [
    whole(0),
    leaf(
        1,
        None,
        [
            ALL,
            ALL,
            bits(&[(0, 1), (9, 9), (12, 13), (17, 17), (19, 31)]),
            BASIC_EDX,
        ],
    ),
    whole(2),
    whole(4),
    // ARAT: the APIC timer runs in all power states.
    leaf(6, None, [bits(&[(2, 2)]), 0, 0, 0]),
    leaf(
        7,
        Some(0),
        [
            ALL,
            bits(&[
                (0, 1),
                (3, 3),
                (5, 10),
                (13, 13),
                (16, 21),
                (23, 24),
                (28, 31),
            ]),
            bits(&[
                (1, 4),
                (6, 6),
                (8, 12),
                (14, 14),
                (16, 16),
                (22, 22),
                (25, 25),
                (27, 28),
            ]),
            bits(&[
                (4, 4),
                (8, 8),
                (10, 10),
                (14, 14),
                (23, 23),
                (26, 29),
                (31, 31),
            ]),
        ],
    ),
    leaf(
        7,
        Some(1),
        [
            bits(&[(4, 5), (10, 12), (23, 23)]),
            0,
            0,
            bits(&[(4, 5), (14, 14)]),
        ],
    ),
    // Mitigations that are controlled by bits of IA32_SPEC_CTRL.
    leaf(7, Some(2), [0, 0, 0, bits(&[(0, 5)])]),
    whole(0xb),
    leaf(0xd, Some(0), [STATE_COMPONENTS, ALL, ALL, 0]),
    // XSAVEOPT, XSAVEC, XGETBV with ECX = 1, XSAVES; no supervisor state.
    leaf(0xd, Some(1), [bits(&[(0, 3)]), ALL, 0, 0]),
    whole(0x1f),
    whole(0x4000_0000),
    // Paravirtual features of KVM: clocks, asynchronous page faults, steal time, PV_EOI, spinlocks, TLB flushes, IPIs,
    // yields.
    leaf(
        0x4000_0001,
        None,
        [
            bits(&[(0, 1), (3, 7), (9, 14), (24, 24)]),
            0,
            0,
            // Hints, of which KVM reports none.
            0,
        ],
    ),
    whole(0x8000_0000),
    leaf(
        0x8000_0001,
        None,
        [
            ALL,
            ALL,
            bits(&[(0, 1), (4, 8), (11, 11), (16, 16), (21, 22)]),
            REPEATED_EDX | bits(&[(11, 11), (20, 20), (22, 22), (25, 27), (29, 31)]),
        ],
    ),
    whole(0x8000_0002),
    whole(0x8000_0003),
    whole(0x8000_0004),
    whole(0x8000_0005),
    whole(0x8000_0006),
    leaf(
        0x8000_0008,
        None,
        [
            ALL,
            bits(&[
                (0, 0),
                (2, 2),
                (9, 9),
                (12, 12),
                (14, 15),
                (17, 19),
                (24, 26),
                (28, 28),
            ]),
            ALL,
            0,
        ],
    ),
    whole(0x8000_001d),
    whole(0x8000_001e),
];

/// Leaf 0x80000021 of AMD: mitigations, and properties that all processors of that line have.
const AMD_EXTENDED: LeafMask = leaf(
    0x8000_0021,
    None,
    [bits(&[(0, 0), (2, 2), (6, 6), (8, 8), (27, 29)]), 0, 0, 0],
);

/// Clears all bits of `entries` that are not in the baseline.
pub(super) fn restrict(entries: &mut [kvm_cpuid_entry2]) {
    for entry in entries.iter_mut() {
        let allowed = allowed(entry);
        entry.eax &= allowed[0];
        entry.ebx &= allowed[1];
        entry.ecx &= allowed[2];
        entry.edx &= allowed[3];
    }
    shrink_xsave_area(entries);
}

/// Returns the masks for eax, ebx, ecx and edx of `entry`.
fn allowed(entry: &kvm_cpuid_entry2) -> [u32; 4] {
    // Sub-leaf `n` of leaf 0xd, from 2 on, describes state component `n`.
    if entry.function == 0xd && entry.index >= 2 {
        let component = 1_u32.checked_shl(entry.index).unwrap_or(0);
        return match STATE_COMPONENTS & component {
            0 => [0; 4],
            _ => [ALL; 4],
        };
    }
    LEAVES
        .iter()
        .chain([&AMD_EXTENDED])
        .find(|leaf| {
            leaf.function == entry.function && leaf.index.is_none_or(|index| index == entry.index)
        })
        .map_or([0; 4], |leaf| [leaf.eax, leaf.ebx, leaf.ecx, leaf.edx])
}

/// Corrects the size of the XSAVE area in leaf 0xd: the area ends with the last component that is left. The components
/// keep their offsets.
fn shrink_xsave_area(entries: &mut [kvm_cpuid_entry2]) {
    /// Bytes of the legacy area and the header (Intel SDM volume 1, 13.4).
    const LEAST: u32 = 576;
    let end = entries
        .iter()
        .filter(|entry| entry.function == 0xd && entry.index >= 2)
        .map(|entry| entry.ebx.saturating_add(entry.eax))
        .fold(LEAST, u32::max);
    for entry in entries.iter_mut() {
        if entry.function == 0xd && entry.index == 0 && entry.ecx != 0 {
            entry.ecx = end;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn entry(function: u32, index: u32, registers: [u32; 4]) -> kvm_cpuid_entry2 {
        let [eax, ebx, ecx, edx] = registers;
        kvm_cpuid_entry2 {
            function,
            index,
            eax,
            ebx,
            ecx,
            edx,
            ..Default::default()
        }
    }

    /// Restricts an entry of `function` in which every bit is set, and returns its registers.
    fn full(function: u32, index: u32) -> [u32; 4] {
        let mut entries = [entry(function, index, [ALL; 4])];
        restrict(&mut entries);
        let [e] = entries;
        [e.eax, e.ebx, e.ecx, e.edx]
    }

    /// Leaf, sub-leaf, register (0 = eax), bit, and name of the feature in the manuals.
    type NamedFeature = (u32, u32, usize, u32, &'static str);

    #[test]
    fn no_feature_is_given_whose_state_is_not_carried() {
        let withheld: [NamedFeature; 26] = [
            (1, 0, 2, 3, "MONITOR"),
            (1, 0, 2, 5, "VMX"),
            (1, 0, 2, 15, "PDCM"),
            (1, 0, 3, 21, "DS"),
            (7, 0, 1, 2, "SGX"),
            (7, 0, 1, 4, "HLE"),
            (7, 0, 1, 11, "RTM"),
            (7, 0, 1, 14, "MPX"),
            (7, 0, 1, 25, "Intel PT"),
            (7, 0, 2, 5, "WAITPKG"),
            (7, 0, 2, 7, "CET_SS"),
            (7, 0, 2, 31, "PKS"),
            (7, 0, 3, 19, "Arch LBR"),
            (7, 0, 3, 20, "CET_IBT"),
            (7, 0, 3, 24, "AMX-TILE"),
            (7, 1, 0, 17, "FRED"),
            (0xa, 0, 0, 0, "performance counters"),
            (0xd, 0, 0, 17, "XTILECFG"),
            (0xd, 1, 0, 4, "XFD"),
            (0xd, 1, 2, 11, "CET_U in XSS"),
            (0x14, 0, 1, 0, "processor trace"),
            (0x8000_0001, 0, 2, 2, "SVM"),
            (0x8000_0001, 0, 2, 29, "MWAITX"),
            (0x8000_0007, 0, 3, 8, "invariant TSC"),
            (0x8000_000a, 0, 0, 0, "SVM revision"),
            (0x8000_001f, 0, 0, 1, "SEV"),
        ];
        for (function, index, register, bit, name) in withheld {
            assert_eq!(full(function, index)[register] >> bit & 1, 0, "{name}");
        }
    }

    #[test]
    fn what_programs_are_built_for_is_given() {
        // The levels x86-64-v3 and v4 of the psABI, features that Linux needs as a guest, and the clock of KVM.
        let given: [NamedFeature; 22] = [
            (1, 0, 2, 13, "CMPXCHG16B"),
            (1, 0, 2, 20, "SSE4.2"),
            (1, 0, 2, 12, "FMA"),
            (1, 0, 2, 22, "MOVBE"),
            (1, 0, 2, 21, "x2APIC"),
            (1, 0, 2, 24, "TSC deadline"),
            (1, 0, 2, 28, "AVX"),
            (1, 0, 2, 29, "F16C"),
            (1, 0, 3, 26, "SSE2"),
            (7, 0, 1, 3, "BMI1"),
            (7, 0, 1, 5, "AVX2"),
            (7, 0, 1, 8, "BMI2"),
            (7, 0, 1, 16, "AVX512F"),
            (7, 0, 1, 31, "AVX512VL"),
            (7, 0, 3, 26, "IBRS"),
            (0xd, 1, 0, 3, "XSAVES"),
            (0x4000_0001, 0, 0, 3, "KVM_FEATURE_CLOCKSOURCE2"),
            (0x8000_0001, 0, 2, 0, "LAHF"),
            (0x8000_0001, 0, 2, 5, "LZCNT"),
            (0x8000_0001, 0, 3, 20, "NX"),
            (0x8000_0001, 0, 3, 29, "long mode"),
            (0x8000_0008, 0, 1, 12, "IBPB"),
        ];
        for (function, index, register, bit, name) in given {
            assert_eq!(full(function, index)[register] >> bit & 1, 1, "{name}");
        }
        assert_eq!(full(0x8000_0002, 0), [ALL; 4], "the processor's name");
    }

    #[test]
    fn the_xsave_area_ends_with_the_last_component_that_is_left() {
        // Sapphire Rapids: AVX, the three components of AVX-512, protection keys, and AMX after them.
        let mut entries = vec![entry(0xd, 0, [0x602e7, 576, 11_008, 0])];
        for (index, size, offset) in [
            (2, 256, 576),
            (5, 64, 1088),
            (6, 512, 1152),
            (7, 1024, 1664),
            (9, 8, 2688),
            (17, 64, 2752),
            (18, 8192, 2816),
        ] {
            entries.push(entry(0xd, index, [size, offset, 0, 0]));
        }
        restrict(&mut entries);
        assert_eq!((entries[0].eax, entries[0].ecx), (0x2e7, 2696));
        assert_eq!((entries[7].eax, entries[7].ebx), (0, 0));
        assert_eq!((entries[5].eax, entries[5].ebx), (8, 2688));
    }
}
