//! RISC-V's G-stage translation, as QEMU's `rv64` processor does it.
//!
//! The walks are QEMU's (`target/riscv/cpu_helper.c`); a small program in M-mode, `stub.s`, prompts them. No
//! guest is needed for data: the hypervisor's loads and stores HLV.D and HSV.D act as the guest's would, and
//! as `vsatp` is bare their addresses are guest-physical. To execute, the stub does enter VS-mode, at the
//! page's byte 8, where an ECALL leads back. HLVX, which is to check the right to execute, will not do: QEMU
//! 7.2 lets it check the right to read.
//!
//! Section numbers are those of "The RISC-V Instruction Set Manual, Volume II: Privileged Architecture",
//! version 20211203, where the hypervisor extension is chapter 8.
//!
//! # Control words
//! - `control[0]`: `hgatp` (8.2.10). MODE in bits 63:60: 8 is Sv39x4, 9 is Sv48x4, 10 is Sv57x4; VMID in bits
//!   57:44; in bits 43:0 the page number of the root, which is 16 KiB long and aligned.
//! - `control[1]`: 1 sets `menvcfg.ADUE` (the Svadu extension), 0 clears it. QEMU 7.2 has no such bit: it
//!   always updates A and D.
//! - `control[2]`: 1 reaches the upper half of the guest-physical addresses: see below.
//! - `control[3]`: 0.
//!
//! # Memory
//!
//! | Host-physical | Size | What |
//! |---|---|---|
//! | `0x8000_0000` | 1 MiB | start of RAM: the stub |
//! | `0x8010_0000` | 4 KiB | header |
//! | `0x8010_1000` | 1020 KiB | probes, each replaced by its outcome |
//! | `0x8020_0000` | 16 MiB | tables |
//! | `0x8120_0000` | 128 KiB | writers |
//! | `0xbfe0_0000` | 2 MiB | QEMU's device tree |
//! | `0xc000_0000` | 64 MiB | frames, up to the end of RAM |
//!
//! A 1 GiB leaf to `0xc000_0000` contains the frames and no other RAM: past them are access faults, so a
//! wrong probe cannot harm the stub. One of 512 GiB or 256 TiB to address 0 contains everything, and then
//! the guest can write the tables and the stub too. PMP does not guard them, as QEMU 7.2 makes its refusals
//! guest-page faults and so would hide where a wrong leaf leads.
//!
//! [`Layout::gpa_bits`] is that of Sv57x4, the widest mode; [`RiscvGStage::gpa_bits`] tells that of any.
//!
//! Header and probes are little-endian words of 64 bits. Header: the control words, the number of probes,
//! the bytes of tables. Probe: address, access. The tables follow in place, so that a scenario is one file.
//!
//! # What QEMU 7.2 does
//! A guest-page fault (20 instruction, 21 load, 23 store) is a [`Outcome::Violation`] with that cause as its
//! syndrome. Anything else is [`Outcome::Other`] with `mcause`. There is no misconfiguration: an entry that
//! the manual reserves is a guest-page fault too. The reported address is that of the access, not of the page:
//! a write's ends in `0x10`, a fetch's in `0x8`.
//!
//! As the manual has it:
//! - Leaves must have U set (8.5.1) and be aligned to their size; W without R is reserved; a pointer in the
//!   last level is refused (4.3.2).
//! - Bits 63:54 must be zero in every entry, as neither Svnapot nor Svpbmt is on (4.4.1); U, A and D must be
//!   zero in pointers (4.3.1). G and bits 9:8 are ignored.
//! - Any access that is allowed sets A, a write also D, in the leaf alone and whatever its size. One that is
//!   refused sets nothing. A leaf without W may have D.
//! - A leaf to where nothing is leads to an access fault: 5 for a read, 7 for a write, 1 for a fetch. A and
//!   D are set nonetheless.
//!
//! Otherwise than the manual has it:
//! - The highest bit of a guest-physical address is taken for a sign, as if it were a virtual one. So Sv39x4
//!   refuses `1 << 40` to `(1 << 41) - 1`, but accepts the 24 high bits all ones, and finds the entries 1024
//!   to 2047 of the root there. Likewise bit 49 in Sv48x4 and bit 58 in Sv57x4. With `control[2]` set, a
//!   probe that has this bit and none above is tried at the address so extended, and what is reported is cut
//!   to size again.
//! - A pointer to where nothing is leads to a guest-page fault, not to an access fault.
//! - `hgatp` takes a root that is not aligned to 16 KiB, and uses it.

use std::fs;
use std::io;

use crate::oracle::emulator::{
    self, EMULATOR_LIMIT, Folder, PAGE, Stub, access_code, bytes, command, failure, senseless,
    size, unusable, words,
};
use crate::oracle::{Answer, Layout, Oracle, Outcome, Probe, Scenario};

/// What the machine runs.
const STUB: &str = include_str!("riscv/stub.s");

// The memory map; see above.
const RAM: u64 = 0x8000_0000;
const HEADER: u64 = 0x8010_0000;
const PROBES: u64 = HEADER + PAGE;
const TABLES: u64 = 0x8020_0000;
const WRITERS: u64 = 0x8120_0000;
const FRAMES: u64 = 0xc000_0000;
const FRAMES_BYTES: u64 = 64 << 20;
const TABLES_BYTES: u64 = WRITERS - TABLES;
const RAM_BYTES: u64 = FRAMES + FRAMES_BYTES - RAM;

/// Bytes of a probe, and of its outcome.
const RECORD: u64 = 16;
/// The most probes that fit.
const MAX_PROBES: u64 = (TABLES - PROBES) / RECORD;

/// In place of a cause: no trap.
const DONE: u64 = u64::MAX;
/// Last word that the stub puts into the header.
const FINISHED: u64 = 0x79_7272_6566;

/// Bits of a guest-physical address in Sv57x4, the widest mode (8.5.1).
const MAX_GPA_BITS: u32 = 59;

/// A probe may have any address: what is beyond the mode's is refused, and a test looks at that.
const PROBE_BITS: u32 = 64;

/// Guest-page faults (8.6.1): instruction, load, store.
const GUEST_PAGE_FAULTS: [u64; 3] = [20, 21, 23];

/// QEMU's `virt` machine with one `rv64` hart.
#[derive(Clone, Copy, Debug, Default)]
pub struct RiscvGStage;

impl RiscvGStage {
    /// Bits of a guest-physical address in the mode of `hgatp` (8.2.10 and 8.5.1); `None` if the processor
    /// has no such mode.
    #[must_use]
    pub const fn gpa_bits(hgatp: u64) -> Option<u32> {
        match hgatp >> 60 {
            8 => Some(41),
            9 => Some(50),
            10 => Some(MAX_GPA_BITS),
            _ => None,
        }
    }
}

impl Oracle for RiscvGStage {
    fn name(&self) -> &'static str {
        "RISC-V G-stage (QEMU)"
    }

    fn layout(&self) -> Layout {
        Layout {
            tables: TABLES,
            tables_bytes: TABLES_BYTES,
            frames: FRAMES,
            frames_bytes: FRAMES_BYTES,
            guest_pages: &[],
            gpa_bits: MAX_GPA_BITS,
        }
    }

    fn ask(&self, scenario: &Scenario) -> io::Result<Answer> {
        let extension = Extension::new(scenario)?;
        emulator::check(scenario, &RiscvGStage.layout(), MAX_PROBES, PROBE_BITS)?;
        let folder = Folder::new()?;
        fs::write(folder.file("scenario"), encode(scenario, extension))?;
        build_stub(&folder)?;
        emulate(&folder)?;
        decode(&fs::read(folder.file("answer"))?, scenario, extension)
    }
}

/// How a probe's address becomes the one that is tried, and back.
#[derive(Clone, Copy)]
struct Extension {
    /// Bits of a guest-physical address.
    bits: u32,
    /// Whether the highest of them is extended.
    on: bool,
}

impl Extension {
    fn new(scenario: &Scenario) -> io::Result<Self> {
        let [hgatp, _, extend, _] = scenario.control;
        let bits = RiscvGStage::gpa_bits(hgatp).ok_or_else(|| {
            unusable(format!(
                "hgatp {hgatp:#x}, whose MODE is none of 8, 9 and 10"
            ))
        })?;
        Ok(Self {
            bits,
            on: extend == 1,
        })
    }

    fn applies(self, gpa: u64) -> bool {
        self.on && gpa >> (self.bits - 1) == 1
    }

    fn tried(self, gpa: u64) -> u64 {
        if self.applies(gpa) {
            gpa | u64::MAX << self.bits
        } else {
            gpa
        }
    }

    /// What was reported for a probe at `gpa`.
    fn reported(self, gpa: u64, reported: u64) -> u64 {
        if self.applies(gpa) {
            reported & !(u64::MAX << self.bits)
        } else {
            reported
        }
    }
}

/// The file that is loaded at [`HEADER`].
fn encode(scenario: &Scenario, extension: Extension) -> Vec<u8> {
    let counts = [scenario.probes.len() as u64, scenario.tables.len() as u64];
    let mut file = bytes(scenario.control.into_iter().chain(counts));
    file.resize(size(PROBES - HEADER), 0);
    for probe in &scenario.probes {
        let tried = extension.tried(probe.gpa);
        file.extend(bytes([tried, access_code(probe.access)]));
    }
    file.resize(size(TABLES - HEADER), 0);
    file.extend(&scenario.tables);
    file
}

fn build_stub(folder: &Folder) -> io::Result<()> {
    // The machine starts at the first byte of RAM, so there the stub's first byte must be.
    let text = format!("-Ttext={RAM:#x}");
    folder.build(&Stub {
        source: STUB,
        assembler: &["riscv64-linux-gnu-as", "-march=rv64gch"],
        symbols: &[
            ("HEADER", HEADER),
            ("PROBES", PROBES),
            ("TABLES", TABLES),
            ("WRITERS", WRITERS),
            ("FRAMES", FRAMES),
            ("FRAMES_BYTES", FRAMES_BYTES),
        ],
        linker: &["riscv64-linux-gnu-ld", &text],
    })
}

/// Runs the machine, which reads `scenario`, until the stub has written `answer` and ended it.
fn emulate(folder: &Folder) -> io::Result<()> {
    let mut qemu = command(&["qemu-system-riscv64"]);
    qemu.args(["-M", "virt", "-cpu", "rv64", "-smp", "1", "-m"]);
    qemu.arg(format!("{}M", RAM_BYTES >> 20));
    qemu.args(["-nodefaults", "-display", "none"]);
    qemu.args(["-bios", "none", "-kernel", "stub", "-device"]);
    qemu.arg(format!(
        "loader,file=scenario,addr={HEADER:#x},force-raw=on"
    ));
    qemu.args(["-semihosting-config", "enable=on,target=native"]);
    let ended = folder.emulate(&mut qemu, EMULATOR_LIMIT)?;
    if ended.status.success() {
        return Ok(());
    }
    Err(failure("QEMU", &ended))
}

/// Takes the stub's file apart: header, outcomes, tables, writers.
fn decode(file: &[u8], scenario: &Scenario, extension: Extension) -> io::Result<Answer> {
    let sizes = [
        size(PROBES - HEADER),
        size(RECORD) * scenario.probes.len(),
        scenario.tables.len(),
        size(FRAMES_BYTES / PAGE * 8),
    ];
    if file.len() != sizes.iter().sum::<usize>() {
        return Err(senseless(format!("{} bytes of it", file.len())));
    }
    let (header, rest) = file.split_at(sizes[0]);
    let (outcomes, rest) = rest.split_at(sizes[1]);
    let (tables, writers) = rest.split_at(sizes[2]);
    check_header(header, scenario)?;
    Ok(Answer {
        outcomes: words(outcomes)
            .chunks_exact(2)
            .zip(&scenario.probes)
            .map(|(record, probe)| outcome(record[0], record[1], *probe, extension))
            .collect(),
        tables: tables.to_vec(),
        writers: words(writers),
        log: Vec::new(),
    })
}

fn check_header(header: &[u8], scenario: &Scenario) -> io::Result<()> {
    let words = words(header);
    if words[6] != FINISHED {
        return Err(senseless("the stub did not finish".to_owned()));
    }
    // Its fields are WARL (8.2.10): what the processor does not have does not stay.
    let (asked, kept) = (scenario.control[0], words[0]);
    if kept != asked {
        return Err(senseless(format!("hgatp {asked:#x} became {kept:#x}")));
    }
    Ok(())
}

fn outcome(cause: u64, value: u64, probe: Probe, extension: Extension) -> Outcome {
    match cause {
        DONE => Outcome::Done { value },
        fault if GUEST_PAGE_FAULTS.contains(&fault) => Outcome::Violation {
            gpa: extension.reported(probe.gpa, value),
            syndrome: fault,
        },
        other => Outcome::Other { syndrome: other },
    }
}

#[cfg(test)]
mod tests;
