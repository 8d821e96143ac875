//! Every hardware format, chosen by fuzzed bytes.

use arbitrary::Arbitrary;
use ept::format::{
    ArmFlags, ArmStage2, Ept, EptFeatures, EptLevels, GStage, GStageMemory, GStageMode,
    HardwareFormat, Npt,
};

use crate::mmu::{self, Kind};

/// Arm's dirty bit modifier, which means nothing to the others.
const DBM: u64 = 1 << 51;

/// A format with all that can be chosen about it.
#[derive(Arbitrary, Clone, Copy, Debug)]
pub enum Choice {
    Ept {
        levels: Levels,
        execute_only: bool,
        accessed_dirty: bool,
    },
    Npt(Levels),
    Arm(Size, Flags),
    GStage {
        mode: Mode,
        svpbmt: bool,
    },
}

#[derive(Arbitrary, Clone, Copy, Debug)]
pub enum Levels {
    Four,
    Five,
}

/// Bits of guest-physical address: every root level, one table or many.
#[derive(Arbitrary, Clone, Copy, Debug)]
pub enum Size {
    Bits31,
    Bits34,
    Bits40,
    Bits43,
    Bits44,
    Bits48,
}

#[derive(Arbitrary, Clone, Copy, Debug)]
pub enum Flags {
    Software,
    Accessed,
    AccessedDirty,
}

#[derive(Arbitrary, Clone, Copy, Debug)]
pub enum Mode {
    Sv39x4,
    Sv48x4,
    Sv57x4,
}

/// What is to be done with whatever format was chosen.
pub(crate) trait Job {
    fn run<F: HardwareFormat>(self, format: F, hardware: Hardware);
}

/// What the hardware does that walks a format.
#[derive(Clone, Copy)]
pub(crate) struct Hardware {
    pub(crate) kind: Kind,
    /// Bits of guest-physical address.
    pub(crate) gpa_bits: u32,
    /// Who sets the accessed flag; where nobody does, leaves have it set for ever or clear for ever.
    pub(crate) accessed: Kept,
    /// Who sets the dirty flag; where nobody does, leaves that may be written count as dirty, or never do.
    pub(crate) dirty: Kept,
    /// Bits of a leaf that say what is allowed, and whether it is dirty where the one hangs on the other.
    pub(crate) permission_bits: u64,
    /// A bit without which a leaf that may be written counts as dirty.
    pub(crate) dirty_needs: u64,
}

/// Who keeps a flag.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) enum Kept {
    /// The hardware.
    Hardware,
    /// Nobody: it is never set.
    Never,
    /// Nobody: it is set wherever it could be.
    Always,
}

impl Choice {
    /// Does `job` with the format.
    pub(crate) fn with(self, job: impl Job) {
        match self {
            Self::Ept {
                levels,
                execute_only,
                accessed_dirty,
            } => {
                let (levels, kind, gpa_bits) = match levels {
                    Levels::Four => (EptLevels::Four, mmu::EPT4, 48),
                    Levels::Five => (EptLevels::Five, mmu::EPT5, 57),
                };
                let on = |on, feature| if on { feature } else { EptFeatures::NONE };
                let features = on(execute_only, EptFeatures::EXECUTE_ONLY)
                    .with(on(accessed_dirty, EptFeatures::ACCESSED_DIRTY));
                // Without the flags, the dirty bit is the software's.
                let (accessed, dirty, bits) = if accessed_dirty {
                    (Kept::Hardware, Kept::Hardware, 0b111)
                } else {
                    (Kept::Never, Kept::Always, 0b111 | 1 << 9)
                };
                job.run(
                    Ept { levels, features },
                    hardware(kind, gpa_bits, accessed, dirty, bits),
                );
            }
            Self::Npt(levels) => {
                let (format, kind, gpa_bits) = match levels {
                    Levels::Four => (Npt::FourLevels, mmu::NPT4, 48),
                    Levels::Five => (Npt::FiveLevels, mmu::NPT5, 57),
                };
                let bits = 1 << 63 | 0b110;
                job.run(
                    format,
                    hardware(kind, gpa_bits, Kept::Hardware, Kept::Hardware, bits),
                );
            }
            Self::Arm(size, flags) => {
                let (bits, kind) = match size {
                    Size::Bits31 => (31, mmu::ARM31),
                    Size::Bits34 => (34, mmu::ARM34),
                    Size::Bits40 => (40, mmu::ARM40),
                    Size::Bits43 => (43, mmu::ARM43),
                    Size::Bits44 => (44, mmu::ARM44),
                    Size::Bits48 => (48, mmu::ARM48),
                };
                let (flags, accessed, dirty) = match flags {
                    Flags::Software => (ArmFlags::Software, Kept::Always, Kept::Always),
                    Flags::Accessed => (ArmFlags::Accessed, Kept::Hardware, Kept::Always),
                    Flags::AccessedDirty => {
                        (ArmFlags::AccessedDirty, Kept::Hardware, Kept::Hardware)
                    }
                };
                // S2AP, DBM, XN, and the software's dirty bit.
                let permission_bits = 0b11 << 6 | DBM | 1 << 54 | 1 << 55;
                let format = ArmStage2::new(bits, flags).expect("31 to 48 bits");
                job.run(
                    format,
                    hardware(kind, bits, accessed, dirty, permission_bits),
                );
            }
            Self::GStage { mode, svpbmt } => {
                let (mode, kind, gpa_bits) = match mode {
                    Mode::Sv39x4 => (GStageMode::Sv39x4, mmu::SV39X4, 41),
                    Mode::Sv48x4 => (GStageMode::Sv48x4, mmu::SV48X4, 50),
                    Mode::Sv57x4 => (GStageMode::Sv57x4, mmu::SV57X4, 59),
                };
                let memory = if svpbmt {
                    GStageMemory::Svpbmt
                } else {
                    GStageMemory::Platform
                };
                // U, X, W, R.
                let bits = 0b1_1110;
                job.run(
                    GStage { mode, memory },
                    hardware(kind, gpa_bits, Kept::Hardware, Kept::Hardware, bits),
                );
            }
        }
    }
}

fn hardware(
    kind: Kind,
    gpa_bits: u32,
    accessed: Kept,
    dirty: Kept,
    permission_bits: u64,
) -> Hardware {
    Hardware {
        kind,
        gpa_bits,
        accessed,
        dirty,
        permission_bits,
        dirty_needs: permission_bits & DBM,
    }
}
