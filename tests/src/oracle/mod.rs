//! Emulated memory management units as oracles for stage-2 tables.
//!
//! A [`Scenario`] holds a table, as bytes, and accesses to try. The machine behind an [`Oracle`] is a small program in
//! an emulator. It loads the scenario, lets a guest try each access, and returns an [`Answer`]: the outcome of each
//! access, and the tables as the emulated hardware left them.
//!
//! Guest memory ("frames") is a window of host-physical memory. Bytes 0 to 7 of every 4 KiB frame hold the
//! host-physical address of the frame, little endian, and byte 8 begins code that exits from the guest. So a read of a
//! guest-physical page returns the address that it is mapped to.
//!
//! | machine | tables | emulator |
//! |---------|--------|----------|
//! | [`Ept`] | Intel's extended page tables | Bochs |
//! | [`Npt`] | AMD's nested paging | QEMU |
//! | [`Arm`] | Arm's stage 2 | QEMU |
//! | [`RiscvGStage`] | RISC-V's G-stage | QEMU |
//!
//! Each machine needs its emulator and the assembler and linker of its architecture. Its module documents its input,
//! its memory layout, and where the emulator deviates from the manual. A [`proof`] compares what the machine does with
//! the tables of `ferry-ept` with a [`model`].

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

/// Access of a guest to an address.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Access {
    /// Reads eight bytes at the start of the page.
    Read,
    /// Writes the number of the probe, counted from 1, as eight bytes at byte 16 of the page.
    Write,
    /// Executes the code at byte 8 of the page.
    Execute,
}

/// One access to one guest-physical page.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Probe {
    /// Guest-physical address of the page.
    pub gpa: u64,
    /// Access to try.
    pub access: Access,
}

/// Outcome of a probe.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// The access was done.
    Done {
        /// The eight bytes that were read; 0 for other accesses.
        value: u64,
    },
    /// Stage 2 refused the access.
    Violation {
        /// Guest-physical address that the hardware reported, exact to the page at least.
        gpa: u64,
        /// Syndrome of the hardware, unchanged.
        syndrome: u64,
    },
    /// Stage 2 found an invalid entry, if the hardware distinguishes that from a refusal.
    Misconfiguration {
        /// Guest-physical address that the hardware reported.
        gpa: u64,
    },
    /// Something else happened.
    Other {
        /// Syndrome or exit reason of the hardware.
        syndrome: u64,
    },
}

/// Guest-physical page that the guest of the machine needs for its code and data. The scenario must map it with all
/// permissions by a 4 KiB leaf, and must not probe it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct GuestPage {
    /// Guest-physical address.
    pub gpa: u64,
    /// Host-physical address.
    pub hpa: u64,
}

/// Layout of the host-physical memory of a machine.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Layout {
    /// Address of the tables, aligned to 64 KiB.
    pub tables: u64,
    /// Size of the memory for tables in bytes.
    pub tables_bytes: u64,
    /// Address of the frames, aligned to 2 MiB.
    pub frames: u64,
    /// Size of all frames in bytes, a multiple of 2 MiB.
    pub frames_bytes: u64,
    /// Pages that the guest needs for its code and data.
    pub guest_pages: &'static [GuestPage],
    /// Width of guest-physical addresses in bits.
    pub gpa_bits: u32,
}

/// Table and accesses to try with it.
#[derive(Clone, Debug)]
pub struct Scenario {
    /// Values of the registers that enable the table. The machine documents which ones.
    pub control: [u64; 4],
    /// Accesses to try, in order.
    pub probes: Vec<Probe>,
    /// Contents of the table memory from [`Layout::tables`] on, a multiple of 4096 bytes.
    pub tables: Vec<u8>,
}

/// Answer of a machine to a scenario.
#[derive(Clone, Debug)]
pub struct Answer {
    /// Outcomes of the probes, in order.
    pub outcomes: Vec<Outcome>,
    /// Contents of the table memory after all probes, of the same length.
    pub tables: Vec<u8>,
    /// Bytes 16 to 23 of each frame after all probes: the number of the last probe that wrote to it, or 0.
    pub writers: Vec<u64>,
    /// Guest-physical addresses in the dirty log of the hardware, in its order, if it has such a log.
    pub log: Vec<u64>,
}

/// Machine that answers scenarios.
pub trait Oracle {
    /// Returns the name of the machine, for messages.
    fn name(&self) -> &'static str;

    /// Returns the memory layout of the machine.
    fn layout(&self) -> Layout;

    /// Runs a scenario on a newly started machine.
    ///
    /// # Errors
    /// Returns an error if the emulator is missing or fails, or if its output is not an answer.
    fn ask(&self, scenario: &Scenario) -> io::Result<Answer>;
}
