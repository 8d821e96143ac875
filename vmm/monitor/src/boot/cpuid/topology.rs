//! CPU topology of the guest in CPUID: one package, one core for each vCPU, one thread for each core, and one
//! last-level cache that all cores share.
//!
//! Sources: Intel SDM volume 2, CPUID leaves 1, 4, 0xb and 0x1f; AMD APM volume 3, appendix E, functions 0x80000001,
//! 0x80000008, 0x8000001d and 0x8000001e.

use kvm_bindings::{KVM_CPUID_FLAG_SIGNIFCANT_INDEX, kvm_cpuid_entry2};

/// Extended topology leaves, with one topology level in each sub-leaf.
const EXTENDED: [u32; 2] = [0xb, 0x1f];
/// Leaf 1, edx, and leaf 0x80000001, ecx of AMD: there is more than one logical processor.
const HTT: u32 = 1 << 28;
const CMP_LEGACY: u32 = 1 << 1;

/// Level types of the extended topology leaves.
const THREAD: u32 = 1;
const CORE: u32 = 2;

/// Position of one vCPU in the topology. The ID of its local APIC is `index`.
#[derive(Clone, Copy, Debug)]
pub(super) struct CpuPosition {
    /// Index of the vCPU, from 0.
    pub(super) index: u32,
    /// Number of vCPUs of the guest, 1 or more.
    pub(super) count: u32,
}

impl CpuPosition {
    /// Returns the number of APIC ID bits that select the core in the package.
    fn core_bits(self) -> u32 {
        self.count.next_power_of_two().trailing_zeros()
    }

    /// Returns the highest APIC ID that the package can have.
    fn max_apic_id(self) -> u32 {
        (1 << self.core_bits()) - 1
    }

    /// Writes the topology of the vCPU into its CPUID `entries`.
    pub(super) fn write(self, entries: &mut Vec<kvm_cpuid_entry2>) {
        for entry in entries.iter_mut() {
            self.write_leaf(entry);
        }
        for function in EXTENDED {
            self.write_levels(entries, function);
        }
    }

    /// Writes the topology into the fields of a leaf that has other contents too.
    fn write_leaf(self, entry: &mut kvm_cpuid_entry2) {
        let many = self.count > 1;
        match entry.function {
            1 => {
                let ids = (self.max_apic_id() + 1) & 0xff;
                entry.ebx = (entry.ebx & 0xffff) | (ids << 16) | ((self.index & 0xff) << 24);
                entry.edx = with(entry.edx, HTT, many);
            }
            // Caches: bits 14 to 25 hold the number of APIC IDs that share the cache, minus one; bits 26 to 31 the
            // number of cores, minus one.
            4 if entry.eax & 0x1f != 0 => {
                let sharing = self.sharing(entry.eax);
                let cores = self.max_apic_id().min(0x3f);
                entry.eax = (entry.eax & 0x3fff) | (sharing << 14) | (cores << 26);
            }
            0x8000_001d if entry.eax & 0x1f != 0 => {
                entry.eax = (entry.eax & !(0xfff << 14)) | (self.sharing(entry.eax) << 14);
            }
            0x8000_0001 => entry.ecx = with(entry.ecx, CMP_LEGACY, many),
            0x8000_0008 => {
                let size = self.core_bits() << 12;
                entry.ecx = (entry.ecx & !0xf0ff) | size | ((self.count - 1) & 0xff);
            }
            // eax: APIC ID; ebx: core ID, one thread in the core; ecx: node 0.
            0x8000_001e => (entry.eax, entry.ebx, entry.ecx) = (self.index, self.index & 0xff, 0),
            _ => {}
        }
    }

    /// Returns the number of other APIC IDs that share the cache. Bits 5 to 7 of `eax` are the level of the cache;
    /// caches from level 3 on are shared by all.
    fn sharing(self, eax: u32) -> u32 {
        match (eax >> 5) & 7 {
            0..3 => 0,
            _ => self.max_apic_id(),
        }
    }

    /// Writes an extended topology leaf with the levels thread and core, and the end of the list. Does nothing if the
    /// processor does not have the leaf.
    fn write_levels(self, entries: &mut Vec<kvm_cpuid_entry2>, function: u32) {
        let max_leaf = entries.iter().find(|entry| entry.function == 0);
        if max_leaf.is_none_or(|entry| entry.eax < function) {
            return;
        }
        entries.retain(|entry| entry.function != function);
        let levels = [
            (0, 1, THREAD << 8),
            (self.core_bits(), self.count, CORE << 8),
            (0, 0, 0),
        ];
        for (index, (eax, ebx, kind)) in (0..).zip(levels) {
            entries.push(kvm_cpuid_entry2 {
                function,
                index,
                flags: KVM_CPUID_FLAG_SIGNIFCANT_INDEX,
                eax,
                ebx,
                ecx: kind | index,
                edx: self.index,
                ..Default::default()
            });
        }
    }
}

/// Returns `value` with `bit` set or cleared.
fn with(value: u32, bit: u32, set: bool) -> u32 {
    match set {
        true => value | bit,
        false => value & !bit,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// CPUID of a host with sixteen cores of two threads.
    fn host() -> Vec<kvm_cpuid_entry2> {
        let rows = [
            (0, 0, [0x1f, 0, 0, 0]),
            (1, 0, [0, 0x1f20_0800, 0, HTT]),
            (4, 1, [0x7c00_4121, 0, 0, 0]),
            (4, 3, [0x7c07_c163, 0, 0, 0]),
            (4, 4, [0; 4]),
            (0xb, 0, [1, 2, 0x100, 31]),
            (0xb, 1, [5, 32, 0x201, 31]),
            (0x8000_0001, 0, [0, 0, 0, 0]),
            (0x8000_0008, 0, [0x3030, 0, 0x501f, 0]),
            (0x8000_001d, 3, [0x0007_c163, 0, 0, 0]),
            (0x8000_001e, 0, [31, 0x10f, 0x300, 0]),
        ];
        let entry =
            |(function, index, [eax, ebx, ecx, edx]): (u32, u32, [u32; 4])| kvm_cpuid_entry2 {
                function,
                index,
                eax,
                ebx,
                ecx,
                edx,
                ..Default::default()
            };
        rows.map(entry).to_vec()
    }

    /// Returns a function that reads the CPUID of vCPU `index` by leaf and sub-leaf.
    fn seen(index: u32, count: u32) -> impl Fn(u32, u32) -> [u32; 4] {
        let mut entries = host();
        CpuPosition { index, count }.write(&mut entries);
        move |function, sub| {
            let mut found = entries
                .iter()
                .filter(|e| e.function == function && e.index == sub);
            let e = found.next().unwrap();
            assert!(found.next().is_none(), "{function:#x}.{sub} twice");
            [e.eax, e.ebx, e.ecx, e.edx]
        }
    }

    /// Reads an extended leaf as Linux does. Returns threads of a core, processors of a package, package and APIC ID.
    fn extended(seen: &impl Fn(u32, u32) -> [u32; 4], function: u32) -> (u32, u32, u32, u32) {
        let [thread_shift, threads, kind, id] = seen(function, 0);
        assert_eq!((thread_shift, kind), (0, 0x100));
        let [core_shift, processors, kind, other_id] = seen(function, 1);
        assert_eq!((kind, other_id), (0x201, id));
        assert_eq!(seen(function, 2)[2], 2, "the list ends");
        (threads, processors, id >> core_shift, id)
    }

    #[test]
    fn every_vcpu_is_a_core_of_one_package() {
        for count in [1, 2, 3, 4, 8, 64] {
            for index in [0, count - 1] {
                let seen = seen(index, count);
                for function in EXTENDED {
                    assert_eq!(extended(&seen, function), (1, count, 0, index));
                }
                let [_, ebx, _, edx] = seen(1, 0);
                assert_eq!(ebx >> 24, index);
                assert!((ebx >> 16) & 0xff >= count);
                assert_eq!((ebx & 0xffff, edx & HTT != 0), (0x0800, count > 1));
                let [_, _, ecx, _] = seen(0x8000_0008, 0);
                assert_eq!(ecx & 0xff, count - 1);
                assert!(index >> ((ecx >> 12) & 0xf) == 0, "one package");
                assert_eq!(seen(0x8000_001e, 0)[..3], [index, index, 0]);
                assert_eq!(seen(0x8000_0001, 0)[2] & CMP_LEGACY != 0, count > 1);
            }
        }
    }

    #[test]
    fn the_last_cache_is_shared_and_the_first_are_not() {
        for (count, others) in [(1, 0), (2, 1), (3, 3), (4, 3), (8, 7)] {
            let seen = seen(0, count);
            let [first, ..] = seen(4, 1);
            let [last, ..] = seen(4, 3);
            assert_eq!(((first >> 14) & 0xfff, first >> 26), (0, others));
            assert_eq!(((last >> 14) & 0xfff, last >> 26), (others, others));
            assert_eq!(last & 0x3fff, 0x0163, "the rest is the host's");
            assert_eq!(seen(4, 4), [0; 4], "the list of caches ends");
            assert_eq!((seen(0x8000_001d, 3)[0] >> 14) & 0xfff, others);
        }
    }

    #[test]
    fn a_processor_without_the_extended_leaves_gets_none() {
        let mut entries = host();
        entries[0].eax = 0xd;
        CpuPosition { index: 0, count: 2 }.write(&mut entries);
        assert!(entries.iter().all(|e| e.function != 0x1f));
        assert_eq!(entries.iter().filter(|e| e.function == 0xb).count(), 3);
    }
}
