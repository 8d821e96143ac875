//! The hardware formats of `ferry-ept` against memory management units that nobody here wrote: see
//! [`ferry_tests::oracle::proof`].
//!
//! What stands here about a format is from its manual, and in no case from the crate: how far addresses reach,
//! which leaves there are, what they can say, and how a processor tells why it refused an access.

use ept::format::{
    ArmFlags, ArmStage2, Entry, Ept, EptFeatures, EptLevels, Format, GStage, GStageMemory,
    GStageMode, Leaf, MemoryType, Npt, Permissions, TableId,
};
use ept::{Hpa, Level};
use ferry_tests::oracle::model::{Refusal, Shape};
use ferry_tests::oracle::proof::{Effort, Subject, prove};
use ferry_tests::oracle::{self, Access};

const NONE: Permissions = Permissions::NONE;
const R: Permissions = Permissions::READ;
const W: Permissions = Permissions::WRITE;
const X: Permissions = Permissions::EXECUTE;
const RW: Permissions = R.union(W);
const RX: Permissions = R.union(X);
const WX: Permissions = W.union(X);
const RWX: Permissions = Permissions::ALL;

/// Levels of leaves.
const MIB2: u32 = 1;
const GIB: u32 = 2;

/// For each of the formats of a machine.
const EFFORT: Effort = Effort {
    rounds: 9,
    operations: 250,
    probes: 1500,
};

/// With accessed and dirty flags, and the log of dirtied pages. Bochs has no EPT of five levels.
#[test]
fn intel_ept() {
    prove(
        &Subject {
            machine: &oracle::Ept,
            format: Ept {
                levels: EptLevels::Four,
                features: EptFeatures::EXECUTE_ONLY.with(EptFeatures::ACCESSED_DIRTY),
            },
            // SDM volume 3, 28.3.2.
            shape: Shape {
                root_level: 3,
                root_entries: 512,
                largest_leaf: GIB,
                hpa_bits: 52,
                permissions: &[R, RW, RX, RWX, X],
                memory: &[
                    MemoryType::WriteBack,
                    MemoryType::WriteCombining,
                    MemoryType::Uncached,
                    MemoryType::Other(4),
                    MemoryType::Other(5),
                ],
                no_memory: MemoryType::Other(2),
            },
            control: |format, root| [format.pointer(root), 1, 0, 0],
            syndrome: ept_qualification,
            syndrome_mask: u64::MAX,
            logs: true,
            marks_refused: None,
        },
        Effort {
            rounds: 15,
            ..EFFORT
        },
    );
}

/// The exit qualification of an EPT violation (SDM volume 3, 27.2.1): the access, the rights that the walk has
/// found, and that there was a linear address, of whose page it was.
fn ept_qualification(access: Access, refusal: Refusal) -> u64 {
    const OF_LINEAR: u64 = 3 << 7;
    let accessed = match access {
        Access::Read => 1,
        Access::Write => 1 << 1,
        Access::Execute => 1 << 2,
    };
    let rights = refusal.permissions.map_or(0, |permissions| {
        let bit = |one, bit| if permissions.allows(one) { bit } else { 0 };
        bit(R, 1) | bit(W, 1 << 1) | bit(X, 1 << 2)
    });
    accessed | rights << 3 | OF_LINEAR
}

#[test]
fn amd_npt() {
    for (format, root_level) in [(Npt::FourLevels, 3), (Npt::FiveLevels, 4)] {
        let subject = Subject {
            machine: &oracle::Npt,
            format,
            // APM volume 2, 5.3 and 15.25.
            shape: Shape {
                root_level,
                root_entries: 512,
                largest_leaf: GIB,
                hpa_bits: 52,
                permissions: &[R, RW, RX, RWX, NONE],
                memory: &[
                    MemoryType::WriteBack,
                    MemoryType::WriteCombining,
                    MemoryType::Uncached,
                    MemoryType::Other(1),
                    MemoryType::Other(4),
                    MemoryType::Other(7),
                ],
                no_memory: MemoryType::Other(8),
            },
            control: npt_control,
            syndrome: npt_exit_info,
            syndrome_mask: u64::MAX,
            logs: false,
            // QEMU marks a leaf of 1 GiB on its way, as it does with tables.
            marks_refused: Some(GIB),
        };
        prove(&subject, EFFORT);
    }
}

/// The root, the host's CR4 with LA57 for five levels, and EFER.NXE.
fn npt_control(format: &Npt, TableId(root): TableId) -> [u64; 4] {
    let cr4 = match format {
        Npt::FourLevels => 0,
        Npt::FiveLevels => 1 << 12,
    };
    [root, cr4, 1, 0]
}

/// EXITINFO1 of a nested page fault (APM volume 2, 15.25.6).
fn npt_exit_info(access: Access, refusal: Refusal) -> u64 {
    const OF_FINAL_ADDRESS: u64 = 1 << 32;
    const USER: u64 = 1 << 2;
    let access = match access {
        Access::Read => 0,
        Access::Write => 1 << 1,
        Access::Execute => 1 << 4,
    };
    OF_FINAL_ADDRESS | USER | access | u64::from(refusal.permissions.is_some())
}

/// Hardware sets the access flag and the dirty state. The roots are two tables, one, and 16.
#[test]
fn arm_stage_2() {
    for (ipa_bits, root_level, root_entries) in [(40, GIB, 1024), (48, 3, 512), (34, MIB2, 8192)] {
        let subject = Subject {
            machine: &oracle::Arm,
            format: ArmStage2::new(ipa_bits, ArmFlags::AccessedDirty).unwrap(),
            // DDI 0487, chapter D8.
            shape: Shape {
                root_level,
                root_entries,
                largest_leaf: GIB.min(root_level),
                hpa_bits: 48,
                permissions: &[RWX, RW, RX, R, WX, W, X, NONE],
                memory: &[
                    MemoryType::WriteBack,
                    MemoryType::WriteCombining,
                    MemoryType::Uncached,
                    MemoryType::Other(0b1010),
                ],
                no_memory: MemoryType::Other(16),
            },
            control: |format, TableId(root)| [root, format.vtcr() | ARM_REST_OF_VTCR, 0, 0],
            syndrome: arm_syndrome,
            syndrome_mask: 0x3f << 26 | 1 << 6 | 0x3f,
            logs: false,
            marks_refused: None,
        };
        prove(&subject, EFFORT);
    }
}

/// What is not the format's in VTCR_EL2: RES1, 48 bits of physical address (PS), and table walks through caches,
/// inner shareable (SH0, ORGN0, IRGN0).
const ARM_REST_OF_VTCR: u64 = 1 << 31 | 0b101 << 16 | 0b11 << 12 | 0b01 << 10 | 0b01 << 8;

/// ESR_EL2 of an abort: the exception class, whether it was a write, and the fault status with the level, which
/// Arm counts downwards.
fn arm_syndrome(access: Access, refusal: Refusal) -> u64 {
    const TRANSLATION_FAULT: u64 = 0b0001 << 2;
    const PERMISSION_FAULT: u64 = 0b0011 << 2;
    let class = match access {
        Access::Execute => 0x20,
        Access::Read | Access::Write => 0x24,
    };
    let fault = match refusal.permissions {
        None => TRANSLATION_FAULT,
        Some(_) => PERMISSION_FAULT,
    };
    let write = u64::from(access == Access::Write) << 6;
    class << 26 | write | fault | u64::from(3 - refusal.level)
}

/// The machine's guest runs at EL1, where XN\[1:0\] may be 0b01 as well as 0b10: that would allow EL0 to execute.
#[test]
fn arm_execute_never_is_for_everybody() {
    let format = ArmStage2::new(48, ArmFlags::AccessedDirty).unwrap();
    for (permissions, expected) in [(RW, 0b10), (RWX, 0b00)] {
        for level in [Level::PAGE, Level::MIB2, Level::GIB] {
            let leaf = Leaf::new(Hpa(0), permissions, MemoryType::WriteBack);
            let entry = format.encode(Entry::Leaf(leaf), level);
            assert_eq!(entry >> 53 & 0b11, expected, "{entry:#x}");
        }
    }
}

/// The upper half of the addresses too, which QEMU takes for negative.
#[test]
fn riscv_g_stage() {
    const VMID: u64 = 0x2a5;
    for (mode, root_level) in [
        (GStageMode::Sv39x4, 2),
        (GStageMode::Sv48x4, 3),
        (GStageMode::Sv57x4, 4),
    ] {
        let subject = Subject {
            machine: &oracle::RiscvGStage,
            format: GStage {
                mode,
                memory: GStageMemory::Platform,
            },
            // Privileged Architecture, 4.3 to 4.5 and 8.5.1.
            shape: Shape {
                root_level,
                root_entries: 2048,
                largest_leaf: root_level,
                hpa_bits: 56,
                permissions: &[R, RW, RX, RWX, X],
                memory: &[MemoryType::WriteBack],
                no_memory: MemoryType::Uncached,
            },
            control: |format, root| [format.hgatp(root, VMID), 1, 1, 0],
            syndrome: |access, _| match access {
                Access::Execute => 20,
                Access::Read => 21,
                Access::Write => 23,
            },
            syndrome_mask: u64::MAX,
            logs: false,
            marks_refused: None,
        };
        prove(&subject, EFFORT);
    }
}
