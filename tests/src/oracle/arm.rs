//! The Arm machine: QEMU's emulation of VMSAv8-64 stage 2, by a program at EL2 without anything around it.
//!
//! The tables of this format are made on hosts that have no Arm processor, so the only way to see them
//! walked is in an emulator. QEMU's `virt` board starts the stub (`stub.s`) at EL2. It switches stage 2 on
//! and sends a guest at EL1, whose stage 1 is off, to each address to try; what brings it back is the
//! outcome. With HCR_EL2.DC set stage 1 neither translates nor says Device, so that stage 2 alone decides.
//!
//! Chapters are those of the Arm Architecture Reference Manual for A-profile, DDI 0487; registers stand there
//! under their names.
//!
//! # Memory
//!
//! | Host-physical | What                                                                           |
//! |---------------|--------------------------------------------------------------------------------|
//! | `0x4000_0000` | Start of RAM. QEMU puts its device tree here, and the stub leaves it alone.    |
//! | `0x4020_0000` | The stub, 64 KiB; then at `0x4021_0000` the guest's page.                      |
//! | `0x4040_0000` | The blob: header of 4 KiB, probes of 16 bytes each.                            |
//! | `0x4080_0000` | Still the blob: tables, 16 MiB.                                                |
//! | `0x4200_0000` | One record of 32 bytes for each probe; from `0x4240_0000` the frames' writers. |
//! | `0x4400_0000` | Frames, 64 MiB.                                                                |
//! | `0x4800_0000` | End of RAM.                                                                    |
//!
//! A 1 GiB leaf to `0x4000_0000` contains all frames.
//!
//! The guest sees its page at guest-physical `0x10_0000`. Any address space of 21 bits or more has it, and it
//! leaves the first and the last pages for probes.
//!
//! # Control
//!
//! | Word | Register   | Fields                                                                       |
//! |------|------------|------------------------------------------------------------------------------|
//! | 0    | VTTBR_EL2  | VMID 63:48, BADDR 47:1, CnP 0                                                |
//! | 1    | VTCR_EL2   | DS 32, RES1 31, HD 22, HA 21, VS 19, PS 18:16, TG0 15:14, SH0 13:12,         |
//! |      |            | ORGN0 11:10, IRGN0 9:8, SL0 7:6, T0SZ 5:0                                    |
//! | 2, 3 |            | 0                                                                            |
//!
//! They go into the registers as they are. The emulator refuses every access, and the first is the fetch from
//! the guest's page, with a translation fault of level 0 if the guest-physical address size is above the
//! physical one (PS), if it does not suit the level to start at (1 to 13 bits must be left to index the root:
//! 9 and four more for concatenated tables), or if that is level 0 with PS below 44 bits. Its processor has
//! FEAT_HAFDBS, FEAT_XNX, FEAT_TTST and FEAT_LPA2: DS changes the descriptors and allows 52 bits, which
//! [`Layout::gpa_bits`] leaves out.
//!
//! # Outcomes
//!
//! A data or instruction abort that comes to EL2 is a violation. Its syndrome is ESR_EL2: among others the
//! exception class in bits 31:26 (0x20 instruction, 0x24 data), in bit 6 whether it was a write, and in bits
//! 5:0 the fault status, which holds the kind in 5:2 and the level of the walk in 1:0. Its address is from
//! HPFAR_EL2: the architecture leaves that register open for permission faults, but QEMU sets it for them too.
//! There is no misconfiguration here: malformed descriptors give translation faults. One of them does not in
//! QEMU 7.2, a block at level 0: it maps 512 GiB.
//!
//! Anything else is [`Outcome::Other`] with ESR_EL2, or with ESR_EL1 where the guest got the exception: an
//! address beyond the physical address size faults in stage 1, although that is off, and an access to where
//! there is no memory is an external abort.

use std::fs;
use std::io;

use crate::oracle::emulator::{
    self, EMULATOR_LIMIT, Folder, PAGE, Stub, access_code, bytes, command, failure, senseless,
    size, unusable, words,
};
use crate::oracle::{Access, Answer, GuestPage, Layout, Oracle, Outcome, Probe, Scenario};

const STUB: &str = include_str!("arm/stub.s");
const STUB_HPA: u64 = 0x4020_0000;
const GUEST: GuestPage = GuestPage {
    gpa: 0x10_0000,
    hpa: 0x4021_0000,
};
const HEADER: u64 = 0x4040_0000;
const PROBES: u64 = HEADER + PAGE;
const TABLES: u64 = 0x4080_0000;
const TABLES_BYTES: u64 = 16 << 20;
const RECORDS: u64 = 0x4200_0000;
const WRITERS: u64 = 0x4240_0000;
const FRAMES: u64 = 0x4400_0000;
const FRAMES_BYTES: u64 = 64 << 20;
const MEMORY: &str = "128M";

/// At most so many probes at once.
const MAX_PROBES: u64 = 100_000;

/// A probe may have any address: what is beyond T0SZ is refused, and a test looks at that.
const PROBE_BITS: u32 = 64;

const RECORD_BYTES: usize = 32;
const WRITER_BYTES: usize = 8;

/// ESR_EL2.EC, in bits 31:26.
const EC_SHIFT: u32 = 26;
/// EC: HVC instruction in AArch64.
const EC_HVC: u64 = 0x16;
/// EC: instruction abort from a lower exception level.
const EC_INSTRUCTION_ABORT: u64 = 0x20;
/// EC: data abort from a lower exception level.
const EC_DATA_ABORT: u64 = 0x24;
/// ESR_EL2.ISS of an HVC: its number, in bits 15:0.
const HVC_NUMBER: u64 = 0xffff;
/// The guest's HVC when the access was done.
const HVC_DONE: u64 = 0;
/// The guest's HVC when it got an exception itself.
const HVC_EXCEPTION: u64 = 1;
/// HPFAR_EL2.FIPA, in bits 47:4: the address from bit 12 on.
const FIPA_MASK: u64 = 0x0000_ffff_ffff_fff0;
const FIPA_TO_ADDRESS: u32 = 8;

/// QEMU's `virt` board with the processor `max`.
#[derive(Clone, Copy, Debug, Default)]
pub struct Arm;

impl Oracle for Arm {
    fn name(&self) -> &'static str {
        "Arm stage 2 (QEMU)"
    }

    fn layout(&self) -> Layout {
        Layout {
            tables: TABLES,
            tables_bytes: TABLES_BYTES,
            frames: FRAMES,
            frames_bytes: FRAMES_BYTES,
            guest_pages: &[GUEST],
            gpa_bits: 48,
        }
    }

    fn ask(&self, scenario: &Scenario) -> io::Result<Answer> {
        check(scenario)?;
        let folder = Folder::new()?;
        build_stub(&folder)?;
        fs::write(folder.file("blob"), blob(scenario))?;
        emulate(&folder)?;
        parse(scenario, &fs::read(folder.file("answer"))?)
    }
}

/// Refuses what does not fit into the machine.
fn check(scenario: &Scenario) -> io::Result<()> {
    emulator::check(scenario, &Arm.layout(), MAX_PROBES, PROBE_BITS)?;
    if scenario.probes.iter().any(|probe| probe.gpa == GUEST.gpa) {
        return Err(unusable("a probe of the guest's own page".to_owned()));
    }
    Ok(())
}

/// What stands from [`HEADER`] on.
fn blob(scenario: &Scenario) -> Vec<u8> {
    let [vttbr, vtcr, ..] = scenario.control;
    let counts = [scenario.probes.len() as u64, scenario.tables.len() as u64];
    let mut blob = bytes([vttbr, vtcr].into_iter().chain(counts));
    blob.resize(size(PROBES - HEADER), 0);
    for probe in &scenario.probes {
        blob.extend(bytes([probe.gpa, access_code(probe.access)]));
    }
    blob.resize(size(TABLES - HEADER), 0);
    blob.extend_from_slice(&scenario.tables);
    blob
}

fn build_stub(folder: &Folder) -> io::Result<()> {
    let text = format!("-Ttext={STUB_HPA:#x}");
    let guest = format!("--section-start=.guest={:#x}", GUEST.hpa);
    folder.build(&Stub {
        source: STUB,
        assembler: &["aarch64-linux-gnu-as"],
        symbols: &[
            ("HEADER", HEADER),
            ("PROBES", PROBES),
            ("TABLES", TABLES),
            ("RECORDS", RECORDS),
            ("WRITERS", WRITERS),
            ("FRAMES", FRAMES),
            ("FRAMES_END", FRAMES + FRAMES_BYTES),
            ("GUEST_GPA", GUEST.gpa),
        ],
        // Without -n the ELF header would be loaded too, below the code.
        linker: &["aarch64-linux-gnu-ld", "-n", "-e", "start", &text, &guest],
    })
}

/// Runs the machine until the stub has written `answer` and ended it.
fn emulate(folder: &Folder) -> io::Result<()> {
    let mut qemu = command(&["qemu-system-aarch64"]);
    qemu.args(["-M", "virt,virtualization=on", "-cpu", "max", "-m", MEMORY]);
    qemu.args(["-nodefaults", "-display", "none", "-no-reboot"]);
    qemu.args(["-semihosting-config", "enable=on,target=native"]);
    qemu.args(["-kernel", "stub", "-device"]);
    qemu.arg(format!("loader,file=blob,addr={HEADER:#x},force-raw=on"));
    let ended = folder.emulate(&mut qemu, EMULATOR_LIMIT)?;
    if ended.status.success() {
        return Ok(());
    }
    Err(failure("QEMU", &ended))
}

/// Takes apart what the stub wrote: records, tables, writers.
fn parse(scenario: &Scenario, bytes: &[u8]) -> io::Result<Answer> {
    let records_bytes = scenario.probes.len() * RECORD_BYTES;
    let tables_bytes = scenario.tables.len();
    let writers_bytes = FRAMES_BYTES / PAGE * WRITER_BYTES as u64;
    let expected = (records_bytes + tables_bytes) as u64 + writers_bytes;
    if bytes.len() as u64 != expected {
        let text = format!("{} bytes instead of {expected}", bytes.len());
        return Err(senseless(text));
    }
    let (records, rest) = bytes.split_at(records_bytes);
    let (tables, writers) = rest.split_at(tables_bytes);
    let records: Vec<Record> = words(records)
        .chunks_exact(RECORD_BYTES / 8)
        .map(Record::new)
        .collect();
    Ok(Answer {
        outcomes: scenario
            .probes
            .iter()
            .zip(&records)
            .map(|(probe, record)| record.outcome(probe))
            .collect(),
        tables: tables.to_vec(),
        writers: words(writers),
        log: Vec::new(),
    })
}

/// What the stub found when the guest came back.
struct Record {
    esr_el2: u64,
    hpfar_el2: u64,
    /// What was read.
    value: u64,
    /// Means something only if the guest got an exception.
    esr_el1: u64,
}

impl Record {
    fn new(words: &[u64]) -> Self {
        Self {
            esr_el2: words[0],
            hpfar_el2: words[1],
            value: words[2],
            esr_el1: words[3],
        }
    }

    fn outcome(&self, probe: &Probe) -> Outcome {
        let class = (self.esr_el2 >> EC_SHIFT) & 0x3f;
        match (class, self.esr_el2 & HVC_NUMBER) {
            (EC_HVC, HVC_DONE) => Outcome::Done {
                value: if probe.access == Access::Read {
                    self.value
                } else {
                    0
                },
            },
            (EC_HVC, HVC_EXCEPTION) => Outcome::Other {
                syndrome: self.esr_el1,
            },
            (EC_DATA_ABORT | EC_INSTRUCTION_ABORT, _) => Outcome::Violation {
                gpa: (self.hpfar_el2 & FIPA_MASK) << FIPA_TO_ADDRESS,
                syndrome: self.esr_el2,
            },
            _ => Outcome::Other {
                syndrome: self.esr_el2,
            },
        }
    }
}

#[cfg(test)]
mod tests;
