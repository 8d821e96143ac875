//! Tables of every hardware format, and what tests do with them.

#![allow(
    dead_code,
    unused_imports,
    unused_macros,
    reason = "each test program uses a part of it"
)]

use std::sync::atomic::AtomicU64;

use ept::format::{
    ArmFlags, ArmStage2, Ept, EptFeatures, EptLevels, GStage, GStageMemory, GStageMode,
    HardwareFormat, MemoryType, Permissions, Tables,
};
use ept::stage2::{Attributes, ChangeError, Flush, Stage2};
use ept::{GpaRange, Hpa, Level, Notifier, OpenRange};

/// Tables for every test.
pub(crate) const TABLES: usize = 256;
pub(crate) const BASE: Hpa = Hpa(0x10_0000_0000);
/// Pages that operations are about.
pub(crate) const WINDOW: u64 = 4096;

pub(crate) fn words(tables: usize) -> Vec<AtomicU64> {
    (0..tables * 512).map(|_| AtomicU64::new(0)).collect()
}

pub(crate) fn open() -> OpenRange {
    Notifier::new().open(GpaRange::ALL).unwrap()
}

pub(crate) fn pages(first: u64, count: u64) -> GpaRange {
    GpaRange::from_pages(first, count).unwrap()
}

pub(crate) fn attributes(permissions: Permissions, largest: Level) -> Attributes {
    Attributes {
        permissions,
        memory: MemoryType::WriteBack,
        largest,
    }
}

/// What a change is good for once it was flushed.
pub(crate) fn done<F: HardwareFormat>(
    (flush, result): (Flush<'_, '_, F>, Result<(), ChangeError>),
) {
    result.unwrap();
    flush.done();
}

/// Maps 16 MiB with leaves of 2 MiB and the second of them split.
pub(crate) fn some_huge_leaves<F: HardwareFormat>(stage2: &Stage2<'_, F>, base: u64) {
    let hpa = Hpa((base << 12) % (1 << 40));
    let largest = attributes(Permissions::ALL, Level::MIB2);
    stage2.map(pages(base, WINDOW), hpa, largest).unwrap();
    done(stage2.split(pages(base + 512, 1), Level::PAGE, &open()));
}

pub(crate) fn span<F: HardwareFormat>(stage2: &Stage2<'_, F>) -> GpaRange {
    stage2.geometry().span()
}

pub(crate) fn intel(levels: EptLevels) -> Ept {
    Ept {
        levels,
        features: EptFeatures::ACCESSED_DIRTY,
    }
}

pub(crate) fn arm(bits: u32) -> ArmStage2 {
    ArmStage2::new(bits, ArmFlags::AccessedDirty).unwrap()
}

pub(crate) fn g_stage(mode: GStageMode) -> GStage {
    GStage {
        mode,
        memory: GStageMemory::Platform,
    }
}

/// Runs `$test(format, kind, base, …)` for every format: `base` lies across a boundary of 1 GiB, or ends with the
/// space.
macro_rules! for_all_formats {
    ($test:ident $(, $argument:expr)*) => {{
        use $crate::mmu;
        use $crate::tables::{WINDOW, arm, g_stage, intel};
        use ::ept::format::{EptLevels, GStageMode, Npt};
        $test(intel(EptLevels::Four), mmu::EPT4, (1 << 18) - 2048 $(, $argument)*);
        $test(intel(EptLevels::Five), mmu::EPT5, (1 << 45) - WINDOW $(, $argument)*);
        $test(Npt::FourLevels, mmu::NPT4, (1 << 36) - WINDOW $(, $argument)*);
        $test(Npt::FiveLevels, mmu::NPT5, (1 << 27) - 2048 $(, $argument)*);
        $test(arm(40), mmu::ARM40, (1 << 28) - WINDOW $(, $argument)*);
        $test(arm(48), mmu::ARM48, (1 << 27) - 2048 $(, $argument)*);
        $test(arm(34), mmu::ARM34, (1 << 18) - 2048 $(, $argument)*);
        $test(g_stage(GStageMode::Sv39x4), mmu::SV39X4, (1 << 29) - WINDOW $(, $argument)*);
        $test(g_stage(GStageMode::Sv48x4), mmu::SV48X4, (1 << 27) - 2048 $(, $argument)*);
        $test(g_stage(GStageMode::Sv57x4), mmu::SV57X4, (1 << 47) - WINDOW $(, $argument)*);
    }};
}
pub(crate) use for_all_formats;
