//! Intel's extended page tables (EPT), as Bochs emulates them.
//!
//! The stub (`ept/stub.s`) stands in for the BIOS. It enters long mode, fills the frames, sets up a 64-bit guest
//! under the scenario's EPT pointer, and enters the guest once for each probe. It reads the scenario from a disk and
//! writes the answer to the same disk. Sections are those of the Intel SDM, volume 3, in the editions whose chapter
//! 23 introduces VMX.
//!
//! # Control words
//!
//! | word | what |
//! |------|------|
//! | 0 | the EPT pointer, bit for bit as in the VMCS (24.6.11): bits 2:0 memory type (0 or 6), 5:3 walk length minus 1, 6 accessed and dirty flags, from bit 12 on the root's address |
//! | 1 | 1 switches page-modification logging on (bit 17 of the secondary controls, 24.6.2), 0 off |
//! | 2, 3 | 0 |
//!
//! # Host-physical memory
//!
//! | from | bytes | what |
//! |------|-------|------|
//! | `0x0001_0000` | 12 KiB | VMXON region, VMCS, page-modification log |
//! | `0x0001_f000` | 4 KiB | the stub's stack |
//! | `0x0002_0000` | 12 KiB | the guest's own pages |
//! | `0x0003_0000` | 512 | the disk's header |
//! | `0x0004_0000` | 128 KiB | the frames' writers, collected |
//! | `0x0100_0000` | 16 MiB | probes |
//! | `0x0200_0000` | 32 MiB | tables |
//! | `0x0400_0000` | 32 MiB | a record for each probe |
//! | `0x0600_0000` | 32 MiB | the log, collected |
//! | `0x4000_0000` | 64 MiB | frames, and the end of RAM |
//! | `0xffff_0000` | 64 KiB | the stub, in place of a BIOS |
//!
//! A 1 GiB leaf at `0x4000_0000` contains all frames, and nothing else that a guest could harm. Where there is no
//! memory, Bochs reads ones and drops what is written. [`Access::Execute`] is for frames only.
//!
//! # The guest
//!
//! It runs with 4-level paging; its tables map two linear windows of 1 GiB: one on the GiB of the probed page,
//! which the stub moves from probe to probe, one on its code. All that it maps may be read, written and run, and
//! is accessed and dirty from the start, so that EPT alone decides. Three guest-physical pages are its own:
//!
//! | page | what | what a probe does to it |
//! |------|------|-------------------------|
//! | `0x3f_c000_0000` | PML4 | walked: for EPT that is a write if accessed and dirty flags are on (28.3.5), else a read |
//! | `0x3f_c000_1000` | PDPT | as above |
//! | `0x3f_c000_2000` | code | run, except for [`Access::Execute`], which starts in the probed page itself |
//!
//! A model must therefore leave two things out when it compares: the accessed and dirty flags of all entries that
//! lead to these pages, and their addresses in the log, where the first two stand because the walk dirties them.
//! They are walked for every probe, refused or not.
//!
//! # Outcomes
//!
//! | exit reason (appendix C) | outcome |
//! |------|------|
//! | 18, VMCALL | [`Outcome::Done`] |
//! | 48, EPT violation | [`Outcome::Violation`]: the guest-physical address field, and the exit qualification (27.2.1) |
//! | 49, EPT misconfiguration | [`Outcome::Misconfiguration`]: the guest-physical address field |
//! | 62, log full | none: the stub empties the log, and the guest goes on |
//! | any other | [`Outcome::Other`]: the exit reason; an exception is reason 0 |
//! | no entry to the guest | [`Outcome::Other`]: bit 32 and the VM-instruction error (30.4); 7 is what a bad EPT pointer gives |
//!
//! # What a model must know
//!
//! - A violation's qualification is the access (bit 0 read, 1 write, 2 fetch), in bits 5:3 the rights that the
//!   entries of all levels have in common (none if one is absent), and bits 7 and 8. Nothing else is set.
//! - The walk ends at the first entry that is absent or misconfigured. Rights are looked at behind it only: a
//!   misconfigured leaf is reported even if an entry above refuses the access.
//! - A refused access sets no flag at all; a fetch or a read sets accessed flags, and no dirty flag.
//! - Addresses have 40 bits; more in an entry is a misconfiguration, in the pointer a failed entry.
//! - There is no walk of five levels: its pointer fails the entry.
//!
//! Where Bochs 2.7 is not what the manual says:
//!
//! - Bit 12 of a 2 MiB or 1 GiB leaf is ignored, not reserved (28.3.2).
//! - Logging without accessed and dirty flags is no failed entry (26.2.1.1): nothing is logged.
//! - The log holds the addresses of the accesses, not of their pages (28.3.6). [`Answer::log`] has the pages.
//!
//! [`Access::Execute`]: crate::oracle::Access::Execute

use std::fs::{self, File};
use std::io::{self, Error, Write};
use std::time::Duration;

use crate::console;
use crate::oracle::emulator::{
    self, EMULATOR_LIMIT, Folder, PAGE, Stub, access_code, bytes, command, senseless, unusable,
    words,
};
use crate::oracle::{Answer, GuestPage, Layout, Oracle, Outcome, Scenario};

const STUB: &str = include_str!("ept/stub.s");

const HEADER: u64 = 0x0003_0000;
const WRITERS: u64 = 0x0004_0000;
const PROBES: u64 = 0x0100_0000;
const TABLES: u64 = 0x0200_0000;
const TABLES_BYTES: u64 = 32 << 20;
const RECORDS: u64 = 0x0400_0000;
const LOG: u64 = 0x0600_0000;
const FRAMES: u64 = 0x4000_0000;
const FRAME_COUNT: usize = 16_384;
const FRAMES_BYTES: u64 = FRAME_COUNT as u64 * PAGE;
const RAM_MIB: u64 = (FRAMES + FRAMES_BYTES) >> 20;

/// What a probe takes on the disk: in the scenario, in the answer's records, and at most in its log. The log has its
/// own page and, should dirty flags not stay where they are set, the guest's three each time.
const PROBE_BYTES: usize = 16;
const RECORD_BYTES: usize = 24;
const LOG_BYTES: usize = 4 * 8;

/// So many find room in memory.
const MAX_PROBES: u64 = 1_000_000;

const GUEST_PAGES: [GuestPage; 3] = [
    GuestPage {
        gpa: 0x3f_c000_0000,
        hpa: 0x0002_0000,
    },
    GuestPage {
        gpa: 0x3f_c000_1000,
        hpa: 0x0002_1000,
    },
    GuestPage {
        gpa: 0x3f_c000_2000,
        hpa: 0x0002_2000,
    },
];

/// Bochs is built for so many physical address bits. The guest's page tables reach no further.
const GPA_BITS: u32 = 40;

/// The addresses that the stub leaves for this module to define.
const SYMBOLS: [(&str, u64); 18] = [
    ("VMXON_REGION", 0x0001_0000),
    ("VMCS_REGION", 0x0001_1000),
    ("PML_PAGE", 0x0001_2000),
    ("STACK_TOP", 0x0002_0000),
    ("GUEST_PML4", GUEST_PAGES[0].hpa),
    ("GUEST_PDPT", GUEST_PAGES[1].hpa),
    ("GUEST_CODE", GUEST_PAGES[2].hpa),
    ("GUEST_PML4_GPA", GUEST_PAGES[0].gpa),
    ("GUEST_PDPT_GPA", GUEST_PAGES[1].gpa),
    ("GUEST_CODE_GPA", GUEST_PAGES[2].gpa),
    ("HEADER", HEADER),
    ("WRITERS", WRITERS),
    ("PROBES", PROBES),
    ("TABLES", TABLES),
    ("RECORDS", RECORDS),
    ("LOG", LOG),
    ("FRAMES", FRAMES),
    ("FRAMES_BYTES", FRAMES_BYTES),
];

/// The last 64 KiB below 4 GiB: the processor starts 16 bytes before their end.
const ROM: &str = "0xffff0000";

const SECTOR_BYTES: usize = 512;
/// Bochs wants whole cylinders, of 16 heads and 63 sectors.
const CYLINDER_BYTES: usize = 16 * 63 * SECTOR_BYTES;

/// The header's words behind the control words and two counts: the bytes of log, and what the stub writes last.
const LOG_WORD: usize = 6;
const END_WORD: usize = 7;
const END_MARK: u64 = u64::from_le_bytes(*b"EPT done");

/// The terminal display wants a terminal, which `script` gives it.
const BOCHS: [&str; 5] = [
    "script",
    "-q",
    "-c",
    "exec bochs -q -f bochsrc -rc commands",
    "/dev/null",
];

/// What the debugger that is built into Debian's Bochs is told: to run the machine, and then to end.
const DEBUGGER_COMMANDS: &str = "c\nq\n";

/// Bochs with EPT.
#[derive(Clone, Copy, Debug, Default)]
pub struct Ept;

impl Oracle for Ept {
    fn name(&self) -> &'static str {
        "Intel EPT (Bochs)"
    }

    fn layout(&self) -> Layout {
        Layout {
            tables: TABLES,
            tables_bytes: TABLES_BYTES,
            frames: FRAMES,
            frames_bytes: FRAMES_BYTES,
            guest_pages: &GUEST_PAGES,
            gpa_bits: GPA_BITS,
        }
    }

    fn ask(&self, scenario: &Scenario) -> io::Result<Answer> {
        check(scenario)?;
        let folder = Folder::new()?;
        build_stub(&folder)?;
        write_inputs(&folder, scenario)?;
        run_bochs(&folder, EMULATOR_LIMIT)?;
        read_answer(&folder, scenario)
    }
}

/// Refuses what the machine cannot be asked.
fn check(scenario: &Scenario) -> io::Result<()> {
    emulator::check(scenario, &Ept.layout(), MAX_PROBES, GPA_BITS)?;
    if scenario.tables.is_empty() {
        return Err(unusable("no tables".to_owned()));
    }
    if scenario.control[1] > 1 || scenario.control[2..] != [0, 0] {
        return Err(unusable(format!("control words {:#x?}", scenario.control)));
    }
    Ok(())
}

fn build_stub(folder: &Folder) -> io::Result<()> {
    let place = format!("-Ttext={ROM}");
    folder.build(&Stub {
        source: STUB,
        assembler: &["as", "--64"],
        symbols: &SYMBOLS,
        linker: &["ld", &place, "-e", "0", "--oformat", "binary"],
    })
}

/// Writes what Bochs reads.
fn write_inputs(folder: &Folder, scenario: &Scenario) -> io::Result<()> {
    fs::write(folder.file("commands"), DEBUGGER_COMMANDS)?;
    fs::write(folder.file("bochsrc"), bochsrc())?;
    let size = (scenario_bytes(scenario) + answer_bytes(scenario)).next_multiple_of(CYLINDER_BYTES);
    let mut disk = File::create(folder.file("disk"))?;
    disk.write_all(&encode(scenario))?;
    disk.set_len(size as u64)
}

/// What the disk begins with: the header (control words, number of probes, bytes of tables), the probes, and the
/// tables, each from a new sector on.
fn encode(scenario: &Scenario) -> Vec<u8> {
    let counts = [scenario.probes.len() as u64, scenario.tables.len() as u64];
    let mut disk = bytes(scenario.control.into_iter().chain(counts));
    disk.resize(SECTOR_BYTES, 0);
    for probe in &scenario.probes {
        disk.extend(bytes([probe.gpa, access_code(probe.access)]));
    }
    disk.resize(disk.len().next_multiple_of(SECTOR_BYTES), 0);
    disk.extend(&scenario.tables);
    disk
}

/// How long that is: the answer begins there.
fn scenario_bytes(scenario: &Scenario) -> usize {
    let probes = (scenario.probes.len() * PROBE_BYTES).next_multiple_of(SECTOR_BYTES);
    SECTOR_BYTES + probes + scenario.tables.len()
}

/// What the answer takes at most.
fn answer_bytes(scenario: &Scenario) -> usize {
    let probes = scenario.probes.len();
    let parts = [
        probes * RECORD_BYTES,
        scenario.tables.len(),
        FRAME_COUNT * 8,
        probes * LOG_BYTES,
    ];
    parts
        .iter()
        .map(|part| part.next_multiple_of(SECTOR_BYTES))
        .sum()
}

fn bochsrc() -> String {
    format!(
        "cpu: model=corei7_skylake_x, reset_on_triple_fault=0
memory: guest={RAM_MIB}, host={RAM_MIB}
romimage: file=stub, address={ROM}
ata0-master: type=disk, path=disk, mode=flat
port_e9_hack: enabled=1
display_library: term
sound: driver=dummy
log: log
info: action=ignore
error: action=ignore
panic: action=fatal
"
    )
}

/// Runs Bochs until it ends. How it ended shows in its answer only: it has one exit code for everything.
fn run_bochs(folder: &Folder, limit: Duration) -> io::Result<()> {
    let mut bochs = command(&BOCHS);
    bochs.env("TERM", "xterm").env("SHELL", "/bin/sh");
    match folder.emulate(&mut bochs, limit) {
        Ok(_) => Ok(()),
        // Bochs has gone with its terminal.
        Err(error) => Err(with_log(folder, &error)),
    }
}

/// The error with the last of what Bochs has logged.
fn with_log(folder: &Folder, error: &Error) -> Error {
    let log = fs::read(folder.file("log")).unwrap_or_default();
    let text = format!("{error}\n--- log\n{}", console::tail(&log));
    Error::new(error.kind(), text)
}

fn read_answer(folder: &Folder, scenario: &Scenario) -> io::Result<Answer> {
    let disk = fs::read(folder.file("disk"))?;
    let none = || senseless("Bochs ended before the stub did".to_owned());
    parse(&disk, scenario).ok_or_else(|| with_log(folder, &none()))
}

/// Reads the answer: records, tables, writers, log, each from a new sector on. `None` if there is none.
fn parse(disk: &[u8], scenario: &Scenario) -> Option<Answer> {
    let header = words(disk.get(..SECTOR_BYTES)?);
    if header[END_WORD] != END_MARK {
        return None;
    }
    let log_bytes = usize::try_from(header[LOG_WORD]).ok()?;
    let mut rest = disk.get(scenario_bytes(scenario)..)?;
    let mut next = |bytes: usize| {
        let part = rest.get(..bytes)?;
        rest = rest.get(bytes.next_multiple_of(SECTOR_BYTES)..)?;
        Some(part)
    };
    let records = words(next(scenario.probes.len() * RECORD_BYTES)?);
    let tables = next(scenario.tables.len())?.to_vec();
    let writers = words(next(FRAME_COUNT * 8)?);
    let log = words(next(log_bytes)?);
    Some(Answer {
        outcomes: records
            .chunks_exact(RECORD_BYTES / 8)
            .map(outcome)
            .collect::<Option<_>>()?,
        tables,
        writers,
        log: log.iter().map(|address| address & !(PAGE - 1)).collect(),
    })
}

fn outcome(record: &[u64]) -> Option<Outcome> {
    match *record {
        [0, value, _] => Some(Outcome::Done { value }),
        [1, gpa, syndrome] => Some(Outcome::Violation { gpa, syndrome }),
        [2, gpa, _] => Some(Outcome::Misconfiguration { gpa }),
        [3, _, syndrome] => Some(Outcome::Other { syndrome }),
        _ => None,
    }
}

#[cfg(test)]
mod tests;
