//! The hardware formats of `ferry-ept` against emulated memory management units: see [`ferry_tests::oracle::proof`].
//!
//! The properties of the formats in this file come from the manuals, and never from the crate under test: address
//! widths, leaf sizes, permissions, memory types, and fault syndromes.

use std::sync::atomic::{AtomicU64, Ordering};

use ept::format::{
    ArmFlags, ArmStage2, Entry, Ept, EptFeatures, EptLevels, Format, GStage, GStageMemory,
    GStageMode, Leaf, MemoryType, Npt, Permissions, TableId, Tables,
};
use ept::stage2::{Attributes, ChangeError, Flush, Stage2, WriteFault};
use ept::{Gpa, GpaRange, Hpa, Level, Notifier};
use ferry_tests::oracle::model::{self, Refusal, Shape};
use ferry_tests::oracle::proof::{Effort, Subject, prove};
use ferry_tests::oracle::{self, Access, Oracle, Outcome, Probe, Scenario};

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

/// Number of rounds for each format.
const EFFORT: Effort = Effort {
    rounds: 9,
    operations: 420,
    probes: 1500,
};

/// EPT with accessed and dirty flags and page-modification logging. Bochs has no five-level EPT.
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
                breaks: false,
                caches_faults: false,
            },
            control: |format, root| [format.pointer(root), 1, 0, 0],
            syndrome: ept_qualification,
            syndrome_mask: u64::MAX,
            logs: true,
            marks_refused: None,
        },
        Effort {
            rounds: 15,
            operations: 500,
            ..EFFORT
        },
    );
}

/// Returns the exit qualification of an EPT violation (SDM volume 3, 27.2.1): the access, the permissions found by the
/// walk, and that the access translated a valid linear address.
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
                breaks: false,
                caches_faults: false,
            },
            control: npt_control,
            syndrome: npt_exit_info,
            syndrome_mask: u64::MAX,
            logs: false,
            // QEMU sets the accessed flag of a 1 GiB leaf during the walk, as for tables.
            marks_refused: Some(GIB),
        };
        prove(&subject, EFFORT);
    }
}

/// Returns the control registers: the root, the host's CR4 with LA57 for five levels, and EFER.NXE.
fn npt_control(format: &Npt, TableId(root): TableId) -> [u64; 4] {
    let cr4 = match format {
        Npt::FourLevels => 0,
        Npt::FiveLevels => 1 << 12,
    };
    [root, cr4, 1, 0]
}

/// Returns EXITINFO1 of a nested page fault (APM volume 2, 15.25.6).
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

/// Hardware updates the access flag and the dirty state. The roots consist of two tables, one, and 16.
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
                // D8.16.1.
                breaks: true,
                caches_faults: true,
            },
            control: |format, TableId(root)| [root, format.vtcr() | ARM_REST_OF_VTCR, 0, 0],
            syndrome: arm_syndrome,
            syndrome_mask: ARM_SYNDROME_MASK,
            logs: false,
            marks_refused: None,
        };
        prove(&subject, EFFORT);
    }
}

/// Fields of VTCR_EL2 that the format does not determine: RES1, 48-bit physical addresses (PS), and cacheable, inner
/// shareable table walks (SH0, ORGN0, IRGN0).
const ARM_REST_OF_VTCR: u64 = 1 << 31 | 0b101 << 16 | 0b11 << 12 | 0b01 << 10 | 0b01 << 8;

/// Bits of the syndrome that [`arm_syndrome`] determines.
const ARM_SYNDROME_MASK: u64 = 0x3f << 26 | 1 << 6 | 0x3f;

/// Returns ESR_EL2 of an abort: the exception class, the write flag, and the fault status with the level, which Arm
/// counts from the root down.
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

/// The guest runs at EL1, where XN\[1:0\] can be 0b01 or 0b10 with the same effect; 0b01 would allow EL0 to execute.
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

/// Table with 2 MiB and 1 GiB leaves. The emulator accesses their pages while changes to them wait for their flush.
struct Breaking<'m> {
    stage2: &'m Stage2<'m, ArmStage2>,
    words: &'m [AtomicU64],
}

/// Leaves: level, guest-physical address and host-physical address. Both contain the frames.
const LEAVES: [(u32, u64, u64); 2] = [(MIB2, 4 << 30, 0x4400_0000), (GIB, 8 << 30, 0x4000_0000)];

/// Offset of a frame within each leaf.
const PROBED: [u64; 2] = [0x1_f000, 0x400_5000];

impl Breaking<'_> {
    fn map(&self) {
        let attributes = Attributes {
            permissions: RWX,
            memory: MemoryType::WriteBack,
            largest: Level::GIB,
        };
        let map = |gpa: u64, pages, hpa| {
            let range = GpaRange::from_pages(gpa >> 12, pages).unwrap();
            self.stage2.map(range, Hpa(hpa), attributes).unwrap();
        };
        for page in oracle::Arm.layout().guest_pages {
            map(page.gpa, 1, page.hpa);
        }
        for (level, gpa, hpa) in LEAVES {
            map(gpa, model::pages(level), hpa);
        }
    }

    /// Returns the outcome of an access to the probed page of each leaf.
    fn ask(&self, access: Access) -> Vec<Outcome> {
        let words = self.words.iter().map(|word| word.load(Ordering::SeqCst));
        let words: Vec<u64> = words.collect();
        // These bits are ignored by hardware, belong to features that are off, or are RES0.
        let odd = words.iter().find(|&&raw| raw & 1 == 1 && raw >> 57 != 0);
        assert_eq!(odd, None, "an entry says more than it should");
        let TableId(root) = self.stage2.root_id();
        let vtcr = self.stage2.format().vtcr() | ARM_REST_OF_VTCR;
        let probe = |((_, gpa, _), offset)| Probe {
            gpa: gpa + offset,
            access,
        };
        let scenario = Scenario {
            control: [root, vtcr, 0, 0],
            probes: LEAVES.into_iter().zip(PROBED).map(probe).collect(),
            tables: words.into_iter().flat_map(u64::to_le_bytes).collect(),
        };
        oracle::Arm.ask(&scenario).unwrap().outcomes
    }

    /// Asserts that both leaves are mapped.
    fn check_reads(&self, when: &str) {
        let done = |((_, _, hpa), offset)| Outcome::Done {
            value: hpa + offset,
        };
        let expected: Vec<_> = LEAVES.into_iter().zip(PROBED).map(done).collect();
        assert_eq!(self.ask(Access::Read), expected, "{when}");
    }

    /// Asserts that both leaves refuse an access, at these levels.
    fn check_refused(
        &self,
        access: Access,
        levels: [u32; 2],
        permissions: Option<Permissions>,
        when: &str,
    ) {
        let refused = |level| {
            let refusal = Refusal {
                level,
                permissions,
                withheld: false,
            };
            arm_syndrome(access, refusal)
        };
        let syndromes = self.ask(access).into_iter().map(|outcome| match outcome {
            Outcome::Violation { syndrome, .. } => syndrome & ARM_SYNDROME_MASK,
            other => panic!("{when}: {other:x?}"),
        });
        assert!(syndromes.eq(levels.map(refused)), "{when}");
    }

    /// Asserts that the hardware finds no leaves, while the crate still reports the old ones.
    fn check_broken(&self, when: &str) {
        self.check_refused(Access::Read, [MIB2, GIB], None, when);
        for ((_, gpa, hpa), offset) in LEAVES.into_iter().zip(PROBED) {
            let page = (gpa + offset) >> 12;
            let (level, Entry::Leaf(leaf)) = self.stage2.lookup(page) else {
                panic!("{when}: nothing at {page:#x}");
            };
            let found = leaf.hpa.0 + (page << 12) % level.span();
            assert_eq!(found, hpa + offset, "{when}");
        }
    }

    /// Changes both leaves without doing the flush.
    fn change<'f>(&self, how: impl Fn(GpaRange, Level) -> Changed<'f>) -> Vec<Owed<'f>> {
        let change = |(level, gpa, _): (u32, u64, u64)| {
            let range = GpaRange::from_pages(gpa >> 12, model::pages(level)).unwrap();
            let (flush, result) = how(range, Level::new(u8::try_from(level).unwrap()).unwrap());
            result.unwrap();
            flush
        };
        LEAVES.map(change).into()
    }
}

type Owed<'f> = Flush<'f, 'f, ArmStage2>;
type Changed<'f> = (Owed<'f>, Result<(), ChangeError>);

fn flushed(flushes: Vec<Owed<'_>>) {
    flushes.into_iter().for_each(Flush::done);
}

fn memory_for_arm() -> Vec<AtomicU64> {
    (0..64 * 512).map(|_| AtomicU64::new(0)).collect()
}

/// Returns an empty table for 40-bit addresses in the table memory of the machine.
fn arm_table(words: &[AtomicU64]) -> Stage2<'_, ArmStage2> {
    let format = ArmStage2::new(40, ArmFlags::AccessedDirty).unwrap();
    let base = Hpa(oracle::Arm.layout().tables);
    Stage2::new(format, words, base).unwrap()
}

/// DDI 0487, D8.16.1 (break-before-make): a split or collapsed entry stays invalid until its flush.
#[test]
fn arm_breaks_before_it_makes() {
    let words = memory_for_arm();
    let stage2 = &arm_table(&words);
    let open = &Notifier::new().open(GpaRange::ALL).unwrap();
    let breaking = Breaking {
        stage2,
        words: &words,
    };
    breaking.map();
    breaking.check_reads("mapped");
    let split = |range, level: Level| {
        let below = Level::new(level.number() - 1).unwrap();
        stage2.split(range, below, open)
    };
    let collapse = |range, level| stage2.collapse(range, level, open);
    let read_only = |range, _| stage2.protect(range, R, open);

    let owed = breaking.change(split);
    breaking.check_broken("split");
    flushed(owed);
    breaking.check_reads("split and flushed");
    let owed = breaking.change(collapse);
    breaking.check_broken("collapsed");
    flushed(owed);
    breaking.check_reads("collapsed and flushed");

    // The flush of the change that broke an entry makes it valid, even if entries below it changed in the meantime.
    let owed = breaking.change(split);
    flushed(breaking.change(read_only));
    breaking.check_broken("split, and what was changed since is flushed");
    flushed(owed);
    breaking.check_reads("split and changed");
    let below = [MIB2 - 1, GIB - 1];
    breaking.check_refused(Access::Write, below, Some(R), "split and changed");

    // The flush of the last change that broke the entry makes it valid.
    flushed(breaking.change(collapse));
    let first = breaking.change(split);
    let second = breaking.change(collapse);
    flushed(first);
    breaking.check_broken("split and collapsed, the split is flushed");
    flushed(second);
    breaking.check_reads("split and collapsed");
    breaking.check_refused(Access::Write, [MIB2, GIB], Some(R), "split and collapsed");
}

/// A write fault splits a leaf, and the split entry is invalid until its flush.
#[test]
fn arm_breaks_for_a_write_fault() {
    let words = memory_for_arm();
    let stage2 = &arm_table(&words);
    let open = &Notifier::new().open(GpaRange::ALL).unwrap();
    let breaking = Breaking {
        stage2,
        words: &words,
    };
    breaking.map();
    flushed(breaking.change(|range, _| stage2.track_writes(range, open)));
    breaking.check_reads("tracked");
    let levels = [MIB2, GIB];
    breaking.check_refused(Access::Write, levels, Some(RX), "tracked");
    let fault = |page: u64| {
        let (flush, result) = stage2.write_fault(Gpa(page), drop);
        let released = GpaRange::from_pages(page >> 12, 1).unwrap();
        assert_eq!(result, Ok(WriteFault::Released(released)));
        flush
    };
    let pages = LEAVES.into_iter().zip(PROBED);
    let pages: Vec<_> = pages.map(|((_, gpa, _), offset)| gpa + offset).collect();
    let owed: Vec<_> = pages.iter().map(|page| fault(page ^ 0x1000)).collect();
    breaking.check_broken("released a page beside");
    flushed(owed);
    breaking.check_reads("flushed");
    breaking.check_refused(Access::Write, [0, 0], Some(RX), "still tracked");
    // All leaves are split already.
    let owed: Vec<_> = pages.iter().map(|page| fault(*page)).collect();
    for (page, flush) in pages.iter().zip(&owed) {
        let released = GpaRange::from_pages(page >> 12, 1).unwrap();
        assert_eq!(flush.interval(), Some(released), "it may still fault there");
    }
    assert_eq!(breaking.ask(Access::Write), [Outcome::Done { value: 0 }; 2]);
    flushed(owed);
}

/// The upper half of the address space, which QEMU treats as negative, is included.
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
                breaks: false,
                caches_faults: true,
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
