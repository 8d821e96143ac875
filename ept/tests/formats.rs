//! Entries of each hardware format as the manuals write them, bit by bit.

use ept::format::{
    ArmFlags, ArmStage2, Entry, Ept, EptFeatures, EptLevels, Format, GStage, GStageMemory,
    GStageMode, HardwareFormat, Leaf, MemoryType, Npt, Permissions, TableId, Unsupported,
};
use ept::{Hpa, Level};

const HPA: Hpa = Hpa(0x1234_5000);
const HUGE: Hpa = Hpa(0x4000_0000);
const READ_ONLY: Permissions = Permissions::READ;

fn ept() -> Ept {
    Ept {
        levels: EptLevels::Four,
        features: EptFeatures::EXECUTE_ONLY.with(EptFeatures::ACCESSED_DIRTY),
    }
}

fn arm(flags: ArmFlags) -> ArmStage2 {
    ArmStage2::new(40, flags).unwrap()
}

fn g_stage() -> GStage {
    GStage {
        mode: GStageMode::Sv39x4,
        memory: GStageMemory::Svpbmt,
    }
}

fn leaf(hpa: Hpa, permissions: Permissions) -> Leaf {
    Leaf::new(hpa, permissions, MemoryType::WriteBack)
}

fn used(leaf: Leaf) -> Leaf {
    Leaf {
        accessed: true,
        dirty: true,
        ..leaf
    }
}

/// What `raw` says at `level` is `entry`, and the other way round.
fn both_ways<F: HardwareFormat>(format: F, raw: u64, entry: Entry<Leaf>, level: Level) {
    assert_eq!(format.decode(raw, level), entry, "{raw:#x} at {level}");
    assert_eq!(format.encode(entry, level), raw, "{entry:?} at {level}");
}

/// Intel SDM volume 3C, tables of EPT entries.
#[test]
fn ept_entries_are_the_manuals() {
    let (page, large) = (leaf(HPA, Permissions::ALL), leaf(HUGE, Permissions::ALL));
    let device = Leaf {
        memory: MemoryType::Uncached,
        ..leaf(HPA, READ_ONLY)
    };
    for (raw, entry, level) in [
        (0, Entry::Absent, Level::PAGE),
        (0x1234_5037, Entry::Leaf(page), Level::PAGE),
        (0x1234_5337, Entry::Leaf(used(page)), Level::PAGE),
        (0x4000_00b7, Entry::Leaf(large), Level::MIB2),
        (0x4000_03b7, Entry::Leaf(used(large)), Level::GIB),
        (0x1234_5001, Entry::Leaf(device), Level::PAGE),
        (
            0x1234_5034,
            Entry::Leaf(leaf(HPA, Permissions::EXECUTE)),
            Level::PAGE,
        ),
        (0x1007, Entry::Table(TableId(0x1000)), Level::MIB2),
    ] {
        both_ways(ept(), raw, entry, level);
    }
}

#[test]
fn bit_7_means_nothing_in_an_ept_entry_of_level_0() {
    let page = Entry::Leaf(leaf(HPA, Permissions::ALL));
    assert_eq!(ept().decode(0x1234_50b7, Level::PAGE), page);
    let table = Entry::Table(TableId(0x1000));
    assert_eq!(ept().decode(0x1087, Level::new(3).unwrap()), table);
}

#[test]
fn an_ept_pointer_has_type_walk_length_and_flags() {
    assert_eq!(ept().pointer(TableId(0x5000)), 0x505e);
    let plain = Ept {
        levels: EptLevels::Five,
        features: EptFeatures::NONE,
    };
    assert_eq!(plain.pointer(TableId(0x5000)), 0x5026);
}

/// AMD APM volume 2, 5.3 and 15.25.
#[test]
fn npt_entries_are_the_manuals() {
    let (page, large) = (leaf(HPA, Permissions::ALL), leaf(HUGE, Permissions::ALL));
    let uncached = Leaf {
        memory: MemoryType::Uncached,
        ..page
    };
    for (raw, entry, level) in [
        (0, Entry::Absent, Level::PAGE),
        (0x1234_5007, Entry::Leaf(page), Level::PAGE),
        (0x1234_5067, Entry::Leaf(used(page)), Level::PAGE),
        (0x4000_0087, Entry::Leaf(large), Level::MIB2),
        (0x4000_00e7, Entry::Leaf(used(large)), Level::GIB),
        (
            0x8000_0000_1234_5005,
            Entry::Leaf(leaf(HPA, READ_ONLY)),
            Level::PAGE,
        ),
        // Not a user's: nothing is allowed.
        (
            0x8000_0000_1234_5001,
            Entry::Leaf(leaf(HPA, Permissions::NONE)),
            Level::PAGE,
        ),
        (0x1234_501f, Entry::Leaf(uncached), Level::PAGE),
        (0x1007, Entry::Table(TableId(0x1000)), Level::MIB2),
    ] {
        both_ways(Npt::FourLevels, raw, entry, level);
    }
}

#[test]
fn the_pat_bit_of_npt_moves_with_the_level() {
    let other = Leaf {
        memory: MemoryType::Other(4),
        ..leaf(HUGE, Permissions::ALL)
    };
    both_ways(
        Npt::FourLevels,
        0x4000_0087,
        Entry::Leaf(other),
        Level::PAGE,
    );
    both_ways(Npt::FourLevels, 0x4000_1087, Entry::Leaf(other), Level::GIB);
}

/// Arm DDI 0487, D8: stage 2 descriptors of the 4 KiB granule.
#[test]
fn arm_descriptors_are_the_manuals() {
    let (page, large) = (leaf(HPA, Permissions::ALL), leaf(HUGE, Permissions::ALL));
    for (raw, entry, level) in [
        (0, Entry::Absent, Level::PAGE),
        // DBM set and S2AP[1] clear: may be written, and is clean.
        (0x0008_0000_1234_537f, Entry::Leaf(page), Level::PAGE),
        (0x0008_0000_1234_57ff, Entry::Leaf(used(page)), Level::PAGE),
        (0x0008_0000_4000_037d, Entry::Leaf(large), Level::MIB2),
        (0x0008_0000_4000_07fd, Entry::Leaf(used(large)), Level::GIB),
        (
            0x0040_0000_1234_537f,
            Entry::Leaf(leaf(HPA, READ_ONLY)),
            Level::PAGE,
        ),
        (
            0x0040_0000_1234_533f,
            Entry::Leaf(leaf(HPA, Permissions::NONE)),
            Level::PAGE,
        ),
        // May not be written any more, and was dirty: software's bit 55.
        (
            0x00c0_0000_1234_577f,
            Entry::Leaf(used(leaf(HPA, READ_ONLY))),
            Level::PAGE,
        ),
        (0x1003, Entry::Table(TableId(0x1000)), Level::MIB2),
    ] {
        both_ways(arm(ArmFlags::AccessedDirty), raw, entry, level);
    }
}

#[test]
fn without_hardware_flags_an_arm_page_has_its_access_flag_and_counts_as_dirty() {
    let page = leaf(HPA, Permissions::ALL);
    let software = arm(ArmFlags::Software);
    let raw = software.encode(Entry::Leaf(page), Level::PAGE);
    assert_eq!(raw, 0x1234_57ff);
    assert_eq!(
        software.decode(raw, Level::PAGE),
        Entry::Leaf(used(page)),
        "nobody can tell"
    );
    assert_eq!(software.dirty_bits(raw) & raw, 0);
    assert_eq!(software.accessed_bits(raw), 0);
}

#[test]
fn reserved_arm_descriptors_are_absent() {
    let arm = arm(ArmFlags::AccessedDirty);
    assert_eq!(arm.decode(0x1234_5001, Level::PAGE), Entry::Absent);
    let highest = Level::new(3).unwrap();
    assert_eq!(arm.decode(0x1234_5001, highest), Entry::Absent);
}

/// Arm DDI 0487, D8: IPA sizes, start levels and concatenated tables of stage 2, 4 KiB granule.
#[test]
fn arm_roots_are_concatenated() {
    for (bits, root_level, entries, sl0) in [
        (48, 3, 512, 2),
        (44, 3, 32, 2),
        (43, 2, 16 * 512, 1),
        (40, 2, 2 * 512, 1),
        (39, 2, 512, 1),
        (34, 1, 16 * 512, 0),
        (31, 1, 2 * 512, 0),
    ] {
        let arm = ArmStage2::new(bits, ArmFlags::AccessedDirty).unwrap();
        let geometry = arm.geometry();
        assert_eq!(geometry.root_level().number(), root_level, "{bits}");
        assert_eq!(geometry.root_entries(), entries, "{bits}");
        assert_eq!(geometry.span().bytes(), 1 << bits);
        let t0sz = u64::from(64 - bits);
        assert_eq!(arm.vtcr(), t0sz | sl0 << 6 | 0b11 << 21, "{bits}");
    }
    ArmStage2::new(30, ArmFlags::Software).unwrap_err();
    ArmStage2::new(49, ArmFlags::Software).unwrap_err();
}

/// RISC-V privileged specification, Sv39 entries, and the hypervisor extension.
#[test]
fn g_stage_entries_are_the_manuals() {
    let (page, large) = (leaf(HPA, Permissions::ALL), leaf(HUGE, Permissions::ALL));
    let device = Leaf {
        memory: MemoryType::Uncached,
        ..leaf(HPA, READ_ONLY)
    };
    for (raw, entry, level) in [
        (0, Entry::Absent, Level::PAGE),
        (0x048d_141f, Entry::Leaf(page), Level::PAGE),
        (0x048d_14df, Entry::Leaf(used(page)), Level::PAGE),
        (0x1000_001f, Entry::Leaf(large), Level::MIB2),
        (0x1000_001f, Entry::Leaf(large), Level::GIB),
        (0x4000_0000_048d_1413, Entry::Leaf(device), Level::PAGE),
        (
            0x048d_1419,
            Entry::Leaf(leaf(HPA, Permissions::EXECUTE)),
            Level::PAGE,
        ),
        (0x2000_0401, Entry::Table(TableId(0x8000_1000)), Level::MIB2),
    ] {
        both_ways(g_stage(), raw, entry, level);
    }
    let not_a_users = leaf(HPA, Permissions::NONE);
    let found = g_stage().decode(0x048d_140f, Level::PAGE);
    assert_eq!(found, Entry::Leaf(not_a_users));
}

#[test]
fn hgatp_has_mode_vmid_and_page_number() {
    assert_eq!(
        g_stage().hgatp(TableId(0x8000_4000), 5),
        8 << 60 | 5 << 44 | 0x8_0004
    );
    assert_eq!(g_stage().geometry().root_entries(), 2048);
    assert_eq!(g_stage().geometry().span().bytes(), 1 << 41);
}

#[test]
fn what_a_format_cannot_say_is_refused() {
    let write_only = leaf(HPA, Permissions::WRITE);
    let refused = Err(Unsupported::Permissions(Permissions::WRITE));
    assert_eq!(ept().check(&write_only, Level::PAGE), refused);
    assert_eq!(Npt::FourLevels.check(&write_only, Level::PAGE), refused);
    assert_eq!(g_stage().check(&write_only, Level::PAGE), refused);
    let arm = arm(ArmFlags::AccessedDirty);
    assert_eq!(arm.check(&write_only, Level::PAGE), Ok(()));

    let nothing = leaf(HPA, Permissions::NONE);
    let refused = Err(Unsupported::Permissions(Permissions::NONE));
    assert_eq!(ept().check(&nothing, Level::PAGE), refused);
    assert_eq!(g_stage().check(&nothing, Level::PAGE), refused);

    let page = leaf(HPA, Permissions::ALL);
    let misaligned = Err(Unsupported::Address(HPA));
    assert_eq!(ept().check(&page, Level::MIB2), misaligned);
    let far = Hpa(1 << 52);
    let refused = Err(Unsupported::Address(far));
    assert_eq!(ept().check(&leaf(far, READ_ONLY), Level::PAGE), refused);
    let high = Level::new(3).unwrap();
    let large = leaf(Hpa(0), Permissions::ALL);
    assert_eq!(ept().check(&large, high), Err(Unsupported::Level(high)));

    let platform = GStage {
        memory: GStageMemory::Platform,
        ..g_stage()
    };
    let device = Leaf {
        memory: MemoryType::Uncached,
        ..page
    };
    let refused = Err(Unsupported::Memory(MemoryType::Uncached));
    assert_eq!(platform.check(&device, Level::PAGE), refused);
    let reserved = Leaf {
        memory: MemoryType::Other(2),
        ..page
    };
    let refused = Err(Unsupported::Memory(MemoryType::Other(2)));
    assert_eq!(ept().check(&reserved, Level::PAGE), refused);
}
