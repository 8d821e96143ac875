//! AMD nested paging, as QEMU emulates it.
//!
//! QEMU's software CPU has SVM with nested paging, and its walker was written by people who never saw our
//! tables. Here it runs a small host (`stub.s`) that runs a small guest once for each probe and notes how the
//! guest came out. "APM" is the AMD64 Architecture Programmer's Manual, volume 2.
//!
//! # Control words
//!
//! | Word | Register                                                          | APM          |
//! |------|-------------------------------------------------------------------|--------------|
//! | 0    | `N_CR3`, the nested root, offset 0xB0 of the VMCB                 | 15.25.3, B.1 |
//! | 1    | the host's CR4: 0, or LA57 (bit 12) for five levels               | 15.25.3, 5.3 |
//! | 2    | the host's EFER.NXE: 0 or 1; with 0 bit 63 of entries is reserved | 15.25.3, 5.6 |
//! | 3    | 0                                                                 |              |
//!
//! # Host-physical memory
//!
//! | From        | Bytes   | What                                                             |
//! |-------------|---------|------------------------------------------------------------------|
//! | 0x0010_0000 | 60 KiB  | the stub: code, VMCB, host save area, the host's own page tables |
//! | 0x0010_F000 | 4 KiB   | its PVH note                                                     |
//! | 0x0011_0000 | 12 KiB  | the guest's own pages: PML4, PDPT, code                          |
//! | 0x0012_0000 | 48      | header: control words, number of probes, end mark                |
//! | 0x0100_0000 | 32 MiB  | the scenario's tables, in place                                  |
//! | 0x0400_0000 | 16 MiB  | probes: address, access                                          |
//! | 0x0600_0000 | 32 MiB  | results: EXITCODE, EXITINFO1, EXITINFO2, the guest's RAX         |
//! | 0x4000_0000 | 64 MiB  | frames                                                           |
//! | 0x8000_0000 |         | end of memory                                                    |
//!
//! A 1 GiB leaf with host address 0x4000_0000 has all frames in it, from its first byte on, and zeros behind.
//! Leaves with lower addresses let a guest overwrite the machine.
//!
//! All this memory is a file that QEMU maps shared: the scenario is written into it before the start, and the
//! answer read from it after the end. No byte passes through an emulated device. The file is in the folder for
//! temporary files; it is quickest in memory, as in `/dev/shm`.
//!
//! # The guest
//!
//! It runs in long mode, privileged, with four levels of its own. One of its 1 GiB entries is a window, which
//! the host turns to the probed GiB before each run. So every probe walks three of the guest's pages: two of
//! page tables and one of code. TLB_CONTROL has each VMRUN flush everything, so nothing is known from the probe
//! before. All exceptions are intercepted; a guest that raises one ends with [`Outcome::Other`].
//! So does one that runs zeros, which its registers turn into a general-protection fault (0x4D).
//!
//! # Outcomes
//!
//! [`Outcome::Violation`] is VMEXIT_NPF (APM 15.25.6): `syndrome` is EXITINFO1, `gpa` is EXITINFO2, with its
//! offset in the page. Reserved bits too are told that way, by bit 3; [`Outcome::Misconfiguration`] is never
//! given. [`Outcome::Other`] has the EXITCODE.
//!
//! # What a model of this walker must know
//!
//! Measured on QEMU 7.2 and held by the tests below:
//!
//! - MAXPHYADDR is 52 here, so that no address bit of an entry is reserved. With four levels QEMU ignores bits 48
//!   to 51 of a guest-physical address; no probe may have them then. Where no memory is, zeros are read, as
//!   entries too, and writes are lost.
//! - Every walk is a user's (APM 15.25.5): without U/S at every level the access is refused. R/W and U/S are
//!   needed at every level, NX at any level refuses fetches.
//! - A table's entry is marked accessed when the walk passes it, even if the access is refused later. A leaf of
//!   4 KiB or 2 MiB is marked only if the access is allowed. A leaf of 1 GiB is marked accessed like a table's
//!   entry, also if its rights refuse the access or its address is not aligned. No entry is marked that is
//!   absent or has other reserved bits set.
//! - Only leaves are marked dirty, and only by allowed writes. Walks of guest page tables count as writes even
//!   when they change nothing (APM 15.25.5): their pages' leaves are marked accessed and dirty by every probe,
//!   the leaf of the guest's code accessed only.
//! - Reserved are: bit 7 of entries at levels 4 and 5, bits 13 to 20 of a 2 MiB leaf, bits 13 to 29 of a 1 GiB
//!   leaf, and bit 63 without NXE. All others are ignored. "Absent" goes before "reserved", "reserved" before
//!   rights, and what comes first on the walk decides; but rights are looked at when the leaf has been found.
//! - EXITINFO1: bit 0 is set if a present entry refused by its rights; bit 1 for writes and for all walks of guest
//!   page tables; bit 2 always; bit 3 for reserved bits, with bit 0 clear (the manual has it set); bit 4 for
//!   fetches, if NXE is 1. Bit 32 is set for the guest's access itself, bit 33 for a walk of guest page tables.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;

use crate::oracle::emulator::{
    self, EMULATOR_LIMIT, Folder, PAGE, Stub, access_code, bytes, command, failure, unusable, words,
};
use crate::oracle::{Access, Answer, GuestPage, Layout, Oracle, Outcome, Scenario};

/// The stub's source.
const STUB: &str = include_str!("npt/stub.s");

const TEXT: u64 = 0x10_0000;
const PVH_NOTE: u64 = 0x10_F000;
const GUEST_HPA: u64 = 0x11_0000;
const HEADER: u64 = 0x12_0000;
const TABLES: u64 = 0x100_0000;
const PROBES: u64 = 0x400_0000;
const RESULTS: u64 = 0x600_0000;
const FRAMES: u64 = 0x4000_0000;
const MEMORY_BYTES: u64 = 0x8000_0000;

const TABLES_BYTES: u64 = 32 << 20;
const FRAMES_BYTES: u64 = 64 << 20;

/// Where the guest sees its own pages: out of the way, below 4 GiB.
const GUEST_GPA: u64 = 0xFFF0_0000;

/// In order: PML4, PDPT, code.
const GUEST_PAGES: [GuestPage; 3] = [guest_page(0), guest_page(1), guest_page(2)];

/// MAXPHYADDR of the emulated CPU: the most that the architecture allows (APM 5.3).
const PHYSICAL_BITS: u32 = 52;

/// What four levels translate (APM 5.3).
const FOUR_LEVEL_BITS: u32 = 48;

/// How many probes there is room for.
const MAX_PROBES: u64 = 1 << 20;

/// Words of a result.
const RESULT_WORDS: usize = 4;

/// Where the header has its end mark, and the mark.
const HEADER_DONE: u64 = HEADER + 40;
const DONE: u64 = 0x656E_6F64_7470_6E21;

/// CR4.LA57 (APM 3.1.3).
const CR4_LA57: u64 = 1 << 12;

/// Exit codes (APM appendix C).
const VMEXIT_VMMCALL: u64 = 0x081;
const VMEXIT_NPF: u64 = 0x400;

/// With what QEMU ends if the stub writes 0 to its `isa-debug-exit`.
const ENDED_BY_STUB: i32 = 1;

const fn guest_page(number: u64) -> GuestPage {
    GuestPage {
        gpa: GUEST_GPA + number * PAGE,
        hpa: GUEST_HPA + number * PAGE,
    }
}

/// Nested paging in QEMU's emulation of SVM.
#[derive(Clone, Copy, Debug, Default)]
pub struct Npt;

impl Oracle for Npt {
    fn name(&self) -> &'static str {
        "AMD nested paging (QEMU)"
    }

    fn layout(&self) -> Layout {
        Layout {
            tables: TABLES,
            tables_bytes: TABLES_BYTES,
            frames: FRAMES,
            frames_bytes: FRAMES_BYTES,
            guest_pages: &GUEST_PAGES,
            gpa_bits: PHYSICAL_BITS,
        }
    }

    fn ask(&self, scenario: &Scenario) -> io::Result<Answer> {
        check(scenario)?;
        let folder = Folder::new()?;
        build_stub(&folder)?;
        let memory = File::create_new(folder.file("memory"))?;
        memory.set_len(MEMORY_BYTES)?;
        put_scenario(&memory, scenario)?;
        run_qemu(&folder, &memory)?;
        take_answer(&memory, scenario)
    }
}

/// Refuses what the machine cannot be asked.
fn check(scenario: &Scenario) -> io::Result<()> {
    let [_, cr4, nxe, unused] = scenario.control;
    if cr4 & !CR4_LA57 != 0 || nxe > 1 || unused != 0 {
        return Err(unusable(format!("control words {:#x?}", scenario.control)));
    }
    let bits = if cr4 & CR4_LA57 == 0 {
        FOUR_LEVEL_BITS
    } else {
        PHYSICAL_BITS
    };
    emulator::check(scenario, &Npt.layout(), MAX_PROBES, bits)
}

fn build_stub(folder: &Folder) -> io::Result<()> {
    let sections = [
        (".text", TEXT),
        (".note.pvh", PVH_NOTE),
        (".guest", GUEST_HPA),
    ];
    let [text, note, guest] =
        sections.map(|(name, address)| format!("--section-start={name}={address:#x}"));
    folder.build(&Stub {
        source: STUB,
        assembler: &["as", "--64"],
        symbols: &[
            ("HEADER", HEADER),
            ("PROBES", PROBES),
            ("RESULTS", RESULTS),
            ("FRAMES", FRAMES),
            ("FRAMES_END", FRAMES + FRAMES_BYTES),
            ("GUEST", GUEST_GPA),
            ("DONE", DONE),
        ],
        linker: &[
            "ld",
            "-m",
            "elf_x86_64",
            "--nmagic",
            "-e",
            "start",
            &text,
            &note,
            &guest,
        ],
    })
}

/// Lets the machine run until its stub has ended it.
fn run_qemu(folder: &Folder, memory: &File) -> io::Result<()> {
    let mut qemu = command(&["qemu-system-x86_64"]);
    qemu.args(["-nodefaults", "-no-user-config", "-no-reboot"]);
    qemu.args(["-display", "none", "-accel", "tcg", "-smp", "1"]);
    qemu.args(["-M", "microvm,acpi=off,memory-backend=memory"]);
    qemu.arg("-m").arg(format!("{MEMORY_BYTES}B"));
    qemu.arg("-object").arg(format!(
        "memory-backend-file,id=memory,share=on,size={MEMORY_BYTES},mem-path=memory"
    ));
    // AMD's plainest: QEMU emulates all it has, and so has nothing to warn of.
    qemu.arg("-cpu").arg(format!(
        "qemu64,+svm,+npt,+la57,+pdpe1gb,phys-bits={PHYSICAL_BITS}"
    ));
    qemu.args(["-device", "isa-debug-exit,iobase=0xf4,iosize=1"]);
    qemu.args(["-kernel", "stub"]);

    let ended = folder.emulate(&mut qemu, EMULATOR_LIMIT)?;
    let mut mark = [0; 8];
    memory.read_exact_at(&mut mark, HEADER_DONE)?;
    if ended.status.code() == Some(ENDED_BY_STUB) && u64::from_le_bytes(mark) == DONE {
        return Ok(());
    }
    Err(failure("QEMU, before the stub's end", &ended))
}

/// Puts the scenario where the stub expects it.
fn put_scenario(memory: &File, scenario: &Scenario) -> io::Result<()> {
    let count = scenario.probes.len() as u64;
    let header = scenario.control.into_iter().chain([count]);
    let probes = scenario
        .probes
        .iter()
        .flat_map(|probe| [probe.gpa, access_code(probe.access)]);
    memory.write_all_at(&bytes(header), HEADER)?;
    memory.write_all_at(&bytes(probes), PROBES)?;
    memory.write_all_at(&scenario.tables, TABLES)
}

/// Takes the answer from where the stub has left it.
fn take_answer(memory: &File, scenario: &Scenario) -> io::Result<Answer> {
    let mut results = vec![0; scenario.probes.len() * RESULT_WORDS * 8];
    memory.read_exact_at(&mut results, RESULTS)?;
    let results = words(&results);
    let (results, _) = results.as_chunks::<RESULT_WORDS>();
    let outcomes = scenario
        .probes
        .iter()
        .zip(results)
        .map(|(p, r)| outcome(p.access, *r));

    let mut tables = vec![0; scenario.tables.len()];
    memory.read_exact_at(&mut tables, TABLES)?;
    let frames = (0..FRAMES_BYTES / PAGE).map(|number| FRAMES + number * PAGE);
    Ok(Answer {
        outcomes: outcomes.collect(),
        tables,
        writers: frames
            .map(|frame| writer(memory, frame))
            .collect::<io::Result<_>>()?,
        log: Vec::new(),
    })
}

/// What a result means.
fn outcome(access: Access, result: [u64; RESULT_WORDS]) -> Outcome {
    let [exit_code, info1, info2, rax] = result;
    match exit_code {
        VMEXIT_VMMCALL if access == Access::Read => Outcome::Done { value: rax },
        VMEXIT_VMMCALL => Outcome::Done { value: 0 },
        VMEXIT_NPF => Outcome::Violation {
            gpa: info2,
            syndrome: info1,
        },
        _ => Outcome::Other {
            syndrome: exit_code,
        },
    }
}

/// The last probe that wrote a frame.
fn writer(memory: &File, frame: u64) -> io::Result<u64> {
    let mut word = [0; 8];
    memory.read_exact_at(&mut word, frame + 16)?;
    Ok(u64::from_le_bytes(word))
}

#[cfg(test)]
mod tests;
