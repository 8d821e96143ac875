//! Memory management units that nobody here wrote, asked what they make of a stage-2 table.
//!
//! A [`Scenario`] holds a table, as bytes, and the accesses to try. A machine behind an [`Oracle`] is a small
//! program in an emulator: it takes the scenario, lets a guest try each access, and gives an [`Answer`]: what
//! became of each, and the tables as the emulated hardware left them.
//!
//! Guest memory ("frames") is a window of host-physical memory in which every 4 KiB frame says where it is:
//! bytes 0 to 7 hold the frame's own host-physical address, little endian, and from byte 8 on stands code
//! that leaves the guest. A read of a guest-physical page so tells where it is mapped to.
//!
//! | machine | tables | emulator |
//! |---------|--------|----------|
//! | [`Ept`] | Intel's extended page tables | Bochs |
//! | [`Npt`] | AMD's nested paging | QEMU |
//! | [`Arm`] | Arm's stage 2 | QEMU |
//! | [`RiscvGStage`] | RISC-V's G-stage | QEMU |
//!
//! Each needs its emulator and its architecture's assembler and linker; its module says what it takes, where
//! things are in it, and what it makes otherwise than the manual has it. A [`proof`] lets a
//! [`model`] judge what the machine makes of the tables that `ferry-ept` writes.

pub mod arm;
mod emulator;
pub mod ept;
pub mod model;
pub mod npt;
// The model of pages is shared with the suites of ept.
#[path = "../../../ept/tests/model/mod.rs"]
mod page_model;
pub mod proof;
pub mod riscv;

use std::io;

pub use arm::Arm;
pub use ept::Ept;
pub use npt::Npt;
pub use riscv::RiscvGStage;

/// What a guest does to an address.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Access {
    /// Reads eight bytes at the page's start.
    Read,
    /// Writes eight bytes at the page's byte 16: the probe's number, counted from 1.
    Write,
    /// Runs the code at the page's byte 8.
    Execute,
}

/// One access to one guest-physical page.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Probe {
    /// The page's first address.
    pub gpa: u64,
    /// What to do there.
    pub access: Access,
}

/// What became of a probe.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// It was done. A read gives what it read, others 0.
    Done {
        /// Eight bytes.
        value: u64,
    },
    /// Stage 2 refused it.
    Violation {
        /// The guest-physical address that the hardware reported, down to the page at least.
        gpa: u64,
        /// The hardware's own syndrome, unchanged.
        syndrome: u64,
    },
    /// Stage 2 said that the entry itself is invalid, where the hardware tells that apart.
    Misconfiguration {
        /// As above.
        gpa: u64,
    },
    /// Something else happened.
    Other {
        /// What, in the hardware's words.
        syndrome: u64,
    },
}

/// A guest-physical page that the machine's guest needs for itself: the scenario maps it, with all rights
/// and with 4 KiB leaves, and does not probe it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct GuestPage {
    /// Where the guest sees it.
    pub gpa: u64,
    /// Where it is.
    pub hpa: u64,
}

/// Where things are in a machine's host-physical memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Layout {
    /// First byte of the tables, 64 KiB-aligned.
    pub tables: u64,
    /// Bytes of room for tables.
    pub tables_bytes: u64,
    /// First byte of the frames, 2 MiB-aligned.
    pub frames: u64,
    /// Bytes of frames, a multiple of 2 MiB.
    pub frames_bytes: u64,
    /// What the guest needs for itself.
    pub guest_pages: &'static [GuestPage],
    /// Guest-physical addresses have at most so many bits here.
    pub gpa_bits: u32,
}

/// A table and what to try on it.
#[derive(Clone, Debug)]
pub struct Scenario {
    /// The registers that switch the table on, whatever they are called here; see the machine.
    pub control: [u64; 4],
    /// What to try, in this order.
    pub probes: Vec<Probe>,
    /// The tables, from [`Layout::tables`] on; a multiple of 4096 bytes.
    pub tables: Vec<u8>,
}

/// What a machine made of a scenario.
#[derive(Clone, Debug)]
pub struct Answer {
    /// One for each probe.
    pub outcomes: Vec<Outcome>,
    /// The tables afterwards: as long as they were.
    pub tables: Vec<u8>,
    /// Byte 16 to 23 of each frame afterwards: the number of the last probe that wrote it, or 0.
    pub writers: Vec<u64>,
    /// Guest-physical addresses that the hardware logged as dirtied, in its order, where it keeps such a log.
    pub log: Vec<u64>,
}

/// A machine that can be asked.
pub trait Oracle {
    /// Its name, for messages.
    fn name(&self) -> &'static str;

    /// Where things are in it.
    fn layout(&self) -> Layout;

    /// Lets it try everything. Each call starts the machine anew.
    ///
    /// # Errors
    /// The emulator is missing, failed, or said something that is no answer.
    fn ask(&self, scenario: &Scenario) -> io::Result<Answer>;
}
