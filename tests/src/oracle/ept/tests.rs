//! Tables encoded by hand after the manual (28.3.2), and what Bochs makes of them.

use std::thread;
use std::time::Instant;

use super::*;
use crate::oracle::Access::{self, Execute, Read, Write};
use crate::oracle::Outcome::{Done, Misconfiguration, Other, Violation};
use crate::oracle::Probe;

const R: u64 = 1 << 0;
const W: u64 = 1 << 1;
const X: u64 = 1 << 2;
const RWX: u64 = R | W | X;
const WRITE_BACK: u64 = 6 << 3;
const LARGE: u64 = 1 << 7;
const A: u64 = 1 << 8;
const D: u64 = 1 << 9;
const LEAF: u64 = RWX | WRITE_BACK;

const MIB2: u64 = 2 << 20;
const GIB: u64 = 1 << 30;

/// Write-back, four levels, accessed and dirty flags, the root first in the tables.
const EPTP: u64 = TABLES | 1 << 6 | 3 << 3 | 6;
/// Bits 7 and 8 of an exit qualification: there was a linear address, and it is its page that was refused.
const OF_LINEAR: u64 = 3 << 7;

/// Levels as the manual numbers the structures: 1 is the page table, 4 the PML4 table.
const PT: u32 = 1;
const PD: u32 = 2;
const PDPT: u32 = 3;
const PML4: u32 = 4;

struct Tables(Vec<[u64; 512]>);

impl Tables {
    /// With the guest's own pages, and nothing else.
    fn new() -> Self {
        let mut tables = Self(vec![[0; 512]]);
        for page in GUEST_PAGES {
            tables.set(page.gpa, PT, page.hpa | LEAF);
        }
        tables
    }

    /// The entry for a guest-physical address at a level. Entries that lead there are made if they are absent.
    fn entry(&mut self, gpa: u64, level: u32) -> &mut u64 {
        let mut table = 0;
        for above in (level + 1..=PML4).rev() {
            let new = self.0.len();
            let entry = &mut self.0[table][index(gpa, above)];
            if *entry == 0 {
                *entry = (TABLES + 4096 * new as u64) | RWX;
                self.0.push([0; 512]);
                table = new;
            } else {
                table = usize::try_from(((*entry & 0xff_ffff_f000) - TABLES) / 4096).unwrap();
            }
        }
        &mut self.0[table][index(gpa, level)]
    }

    fn set(&mut self, gpa: u64, level: u32, entry: u64) {
        *self.entry(gpa, level) = entry;
    }

    fn to_bytes(&self) -> Vec<u8> {
        self.0
            .iter()
            .flatten()
            .flat_map(|entry| entry.to_le_bytes())
            .collect()
    }

    fn from_bytes(bytes: &[u8]) -> Self {
        let entries = words(bytes);
        Self(entries.as_chunks().0.to_vec())
    }
}

fn index(gpa: u64, level: u32) -> usize {
    usize::try_from(gpa >> (3 + 9 * level) & 511).unwrap()
}

fn frame(number: u64) -> u64 {
    FRAMES + 4096 * number
}

fn probe(gpa: u64, access: Access) -> Probe {
    Probe { gpa, access }
}

fn ask(control: [u64; 4], tables: &Tables, probes: &[Probe]) -> Answer {
    let probes = probes.to_vec();
    let answer = Ept
        .ask(&Scenario {
            control,
            probes,
            tables: tables.to_bytes(),
        })
        .unwrap();
    assert_eq!(answer.tables.len(), tables.0.len() * 4096);
    answer
}

/// The outcome with the bits 11:0 of its address left out.
fn paged(outcome: Outcome) -> Outcome {
    match outcome {
        Violation { gpa, syndrome } => Violation {
            gpa: gpa & !0xfff,
            syndrome,
        },
        Misconfiguration { gpa } => Misconfiguration { gpa: gpa & !0xfff },
        other => other,
    }
}

/// Tries all accesses to some pages, and compares with what should come of each.
fn check_all(tables: &Tables, cases: &[(u64, [Outcome; 3])]) -> Answer {
    let probes: Vec<_> = cases
        .iter()
        .flat_map(|(gpa, _)| [Read, Write, Execute].map(|access| probe(*gpa, access)))
        .collect();
    let answer = ask([EPTP, 0, 0, 0], tables, &probes);
    let expected = cases.iter().flat_map(|(_, outcomes)| outcomes);
    for ((probe, outcome), expected) in probes.iter().zip(&answer.outcomes).zip(expected) {
        assert_eq!(paged(*outcome), *expected, "{probe:x?}");
    }
    answer
}

fn done(hpa: u64) -> [Outcome; 3] {
    [hpa, 0, 0].map(|value| Done { value })
}

/// All accesses to a page that an entry with these rights maps to a host-physical page.
fn by_rights(gpa: u64, rights: u64, hpa: u64) -> [Outcome; 3] {
    let outcome = |access, value| {
        let syndrome = access | rights << 3 | OF_LINEAR;
        if rights & access != 0 {
            Done { value }
        } else {
            Violation { gpa, syndrome }
        }
    };
    [outcome(R, hpa), outcome(W, 0), outcome(X, 0)]
}

fn misconfigured(gpa: u64) -> [Outcome; 3] {
    [Misconfiguration { gpa }; 3]
}

#[test]
fn leaves_of_each_size_low_and_high() {
    let mut tables = Tables::new();
    let mut cases = vec![];
    for top in [0, 1 << (GPA_BITS - 1)] {
        tables.set(top | 0x5000, PT, frame(7) | LEAF);
        tables.set(top + 3 * MIB2, PD, frame(512) | LEAF | LARGE);
        tables.set(top + 2 * GIB, PDPT, FRAMES | LEAF | LARGE);
        cases.push((top | 0x5000, done(frame(7))));
        cases.push((top + 3 * MIB2 + 0x3000, done(frame(515))));
        cases.push((top + 2 * GIB + 0x123_4000, done(FRAMES | 0x123_4000)));
        cases.push((top + 2 * GIB + 0x3ff_f000, done(frame(16_383))));
    }
    tables.set((1 << GPA_BITS) - 4096, PT, frame(9) | LEAF);
    cases.push(((1 << GPA_BITS) - 4096, done(frame(9))));

    let answer = check_all(&tables, &cases);
    // The second of each three probes writes its number; the high half overwrites the low.
    let mut expected = vec![0; FRAME_COUNT];
    for (frame, writer) in [(7, 14), (515, 17), (0x1234, 20), (16_383, 23), (9, 26)] {
        expected[frame] = writer;
    }
    assert_eq!(answer.writers, expected);
    assert!(answer.log.is_empty());
}

#[test]
fn rights_of_leaves_and_of_the_entries_above() {
    let mut tables = Tables::new();
    let mut cases = vec![];
    let mut number = 1;
    // Write without read is no combination: see the misconfigured ones.
    for rights in [R, R | W, R | X, RWX, X] {
        for level in [PT, PD, PDPT] {
            let gpa = number * GIB;
            tables.set(gpa, PT, frame(number) | LEAF);
            let entry = tables.entry(gpa, level);
            *entry = *entry & !RWX | rights;
            cases.push((gpa, by_rights(gpa, rights, frame(number))));
            number += 1;
        }
        for (level, size) in [(PD, MIB2), (PDPT, GIB)] {
            let gpa = number * GIB;
            tables.set(gpa, level, FRAMES | rights | WRITE_BACK | LARGE);
            let offset = size / 64;
            cases.push((
                gpa + offset,
                by_rights(gpa + offset, rights, FRAMES + offset),
            ));
            number += 1;
        }
    }
    // The rights of all levels together: here, read and execute, and read and write.
    let gpa = 100 * GIB;
    tables.set(gpa, PT, frame(100) | R | X | WRITE_BACK);
    *tables.entry(gpa, PD) ^= X;
    cases.push((gpa, by_rights(gpa, R, frame(100))));
    check_all(&tables, &cases);
}

#[test]
fn a_pml4_entry_s_rights() {
    let mut tables = Tables::new();
    let gpa = 512 * GIB;
    tables.set(gpa, PT, frame(1) | LEAF);
    *tables.entry(gpa, PML4) ^= W;
    check_all(&tables, &[(gpa, by_rights(gpa, R | X, frame(1)))]);
}

#[test]
fn absent_at_each_level() {
    let mut tables = Tables::new();
    // What is not present may say anything else.
    for (gpa, level) in [(0x1000, PT), (MIB2, PD), (GIB, PDPT)] {
        tables.set(gpa, level, !RWX);
    }
    tables.set(0, PT, frame(1) | LEAF);
    let absent = |gpa| (gpa, by_rights(gpa, 0, 0));
    let in_other_pml4_entry = absent(512 * GIB);
    let answer = check_all(
        &tables,
        &[
            absent(0x1000),
            absent(0x2000),
            absent(MIB2),
            absent(GIB),
            in_other_pml4_entry,
            (0, done(frame(1))),
        ],
    );
    assert_eq!(answer.writers[1], 17);
}

#[test]
fn misconfigured_entries() {
    let mut tables = Tables::new();
    let mut cases = vec![];
    let table = TABLES; // any: such an entry is not followed
    let wrong = [
        (PT, frame(1) | WRITE_BACK | W),
        (PT, frame(1) | WRITE_BACK | W | X),
        (PT, frame(1) | RWX | 2 << 3),
        (PT, frame(1) | RWX | 3 << 3),
        (PT, frame(1) | RWX | 7 << 3),
        (PT, frame(1) | LEAF | 1 << 40),
        (PT, frame(1) | LEAF | 1 << 51),
        (PD, FRAMES | WRITE_BACK | LARGE | W),
        (PD, FRAMES | LEAF | LARGE | 1 << 13),
        (PD, FRAMES | LEAF | LARGE | 1 << 20),
        (PD, FRAMES | RWX | LARGE | 7 << 3),
        (PD, table | W),
        (PD, table | RWX | 1 << 3),
        (PD, table | RWX | 1 << 4),
        (PD, table | RWX | 1 << 5),
        (PD, table | RWX | 1 << 6),
        (PD, table | RWX | 1 << 40),
        (PDPT, FRAMES | WRITE_BACK | LARGE | W),
        (PDPT, FRAMES | LEAF | LARGE | 1 << 13),
        (PDPT, FRAMES | LEAF | LARGE | 1 << 29),
        (PDPT, table | W | X),
        (PDPT, table | RWX | 1 << 3),
        (PDPT, table | RWX | 1 << 51),
    ];
    for (number, (level, entry)) in (1..).zip(wrong) {
        let gpa = number * GIB;
        tables.set(gpa, level, entry);
        cases.push((gpa, misconfigured(gpa)));
    }
    tables.set(512 * GIB, PML4, table | RWX | LARGE);
    cases.push((512 * GIB, misconfigured(512 * GIB)));
    // After all that, the guest still runs.
    tables.set(0, PT, frame(1) | LEAF);
    cases.push((0, done(frame(1))));

    let answer = check_all(&tables, &cases);
    let after = Tables::from_bytes(&answer.tables);
    for (number, (level, entry)) in (1..).zip(wrong) {
        assert_eq!(*Tables(after.0.clone()).entry(number * GIB, level), entry);
    }
}

#[test]
fn what_is_ignored() {
    let mut tables = Tables::new();
    // All memory types there are; bit 6, ignore PAT; the bits 10, 11 and 52 to 63; bit 7 of a 4 KiB leaf.
    for (number, memory_type) in (1..).zip([0, 1, 4, 5, 6]) {
        tables.set(number << 12, PT, frame(number) | RWX | memory_type << 3);
    }
    tables.set(
        6 << 12,
        PT,
        frame(6) | LEAF | 1 << 6 | LARGE | 3 << 10 | 0xfff << 52,
    );
    // By the manual, bit 12 of a large leaf is reserved.
    tables.set(MIB2, PD, FRAMES | LEAF | LARGE | 1 << 12);
    tables.set(GIB, PDPT, FRAMES | LEAF | LARGE | 1 << 12);
    let mut cases: Vec<_> = (1..=6)
        .map(|number| (number << 12, done(frame(number))))
        .collect();
    cases.extend([
        (MIB2 | 0x1000, done(frame(1))),
        (GIB | 0x1000, done(frame(1))),
    ]);
    check_all(&tables, &cases);
}

/// Each kind of access to a page of its own, some of them refused.
fn tables_for_flags() -> (Tables, Vec<Probe>) {
    let mut tables = Tables::new();
    for number in 1..=5 {
        tables.set(number << 12, PT, frame(number) | LEAF);
    }
    tables.set(4 << 12, PT, frame(4) | R | WRITE_BACK);
    tables.set(GIB, PD, FRAMES | LEAF | LARGE);
    tables.set(2 * GIB, PDPT, FRAMES | LEAF | LARGE);
    tables.set(3 * GIB, PT, 0);
    let probes = vec![
        probe(1 << 12, Read),
        probe(2 << 12, Write),
        probe(3 << 12, Execute),
        probe(4 << 12, Write),
        probe(GIB, Read),
        probe(GIB | 0x7000, Write),
        probe(GIB | 0x8000, Write),
        probe(2 * GIB, Write),
        probe(3 * GIB, Write),
    ];
    (tables, probes)
}

#[test]
fn accessed_and_dirty_flags() {
    let (tables, probes) = tables_for_flags();
    let answer = ask([EPTP, 0, 0, 0], &tables, &probes);

    let mut expected = tables;
    let guest = GUEST_PAGES.map(|page| page.gpa);
    for gpa in [0, GIB, guest[0]] {
        *expected.entry(gpa, PDPT) |= A;
    }
    *expected.entry(0, PML4) |= A;
    *expected.entry(0, PD) |= A;
    *expected.entry(guest[0], PD) |= A;
    for (gpa, flags) in [(1 << 12, A), (2 << 12, A | D), (3 << 12, A)] {
        *expected.entry(gpa, PT) |= flags;
    }
    *expected.entry(GIB, PD) |= A | D;
    *expected.entry(2 * GIB, PDPT) |= A | D;
    // The guest's own: a walk of its tables is a write, its code is only fetched.
    *expected.entry(guest[0], PT) |= A | D;
    *expected.entry(guest[1], PT) |= A | D;
    *expected.entry(guest[2], PT) |= A;
    assert_eq!(Tables::from_bytes(&answer.tables).0, expected.0);
}

#[test]
fn no_flags_and_no_log_unless_switched_on() {
    let (tables, probes) = tables_for_flags();
    let answer = ask([EPTP & !(1 << 6), 0, 0, 0], &tables, &probes);
    assert_eq!(answer.tables, tables.to_bytes());
    assert!(answer.log.is_empty());
    assert_eq!(
        answer
            .outcomes
            .iter()
            .filter(|o| matches!(o, Done { .. }))
            .count(),
        7
    );
}

#[test]
fn log_of_what_was_dirtied() {
    let (mut tables, mut probes) = tables_for_flags();
    tables.set(5 << 12, PT, frame(5) | LEAF | D);
    probes.extend([probe(5 << 12, Write), probe(2 << 12, Write)]);
    let answer = ask([EPTP, 1, 0, 0], &tables, &probes);
    // Not what was dirty before, nor a large page again.
    let expected = [
        GUEST_PAGES[0].gpa,
        GUEST_PAGES[1].gpa,
        2 << 12,
        GIB | 0x7000,
        2 * GIB,
    ];
    assert_eq!(answer.log, expected);
}

#[test]
fn pointers_that_are_refused() {
    let tables = Tables::new();
    let probes = [probe(0, Read), probe(0, Write)];
    let refused = |control| {
        let answer = ask(control, &tables, &probes);
        assert_eq!(
            answer.outcomes,
            [Other {
                syndrome: 1 << 32 | 7
            }; 2],
            "{control:x?}"
        );
        assert_eq!(answer.tables, tables.to_bytes());
    };
    refused([EPTP & !(7 << 3) | 4 << 3, 0, 0, 0]); // five levels
    refused([EPTP & !(7 << 3) | 2 << 3, 0, 0, 0]); // three levels
    refused([EPTP ^ 1, 0, 0, 0]); // memory type 7
    refused([EPTP | 1 << 11, 0, 0, 0]); // reserved
    refused([EPTP | 1 << GPA_BITS, 0, 0, 0]); // beyond the physical address
}

#[test]
fn ten_thousand_probes() {
    let mut tables = Tables::new();
    // A permutation: 5 and the number of frames have no divisor in common.
    let target = |page: u64| page * 5 % FRAME_COUNT as u64;
    for page in 0..10_000 {
        let rights = if page % 7 == 0 { R | X } else { RWX };
        tables.set(page << 12, PT, frame(target(page)) | rights | WRITE_BACK);
    }
    let accesses = [Read, Write, Execute, Write].into_iter().cycle();
    let pages = (0..10_000).map(|number| number * 3 % 10_000);
    let probes: Vec<_> = pages
        .zip(accesses)
        .map(|(page, access)| probe(page << 12, access))
        .collect();

    let answer = ask([EPTP, 1, 0, 0], &tables, &probes);

    let mut after = Tables::from_bytes(&answer.tables);
    let mut writers = vec![0; FRAME_COUNT];
    let mut log = vec![GUEST_PAGES[0].gpa, GUEST_PAGES[1].gpa];
    for ((number, probe), outcome) in (1..).zip(&probes).zip(&answer.outcomes) {
        let page = probe.gpa >> 12;
        let rights = if page % 7 == 0 { R | X } else { RWX };
        let expected = by_rights(probe.gpa, rights, frame(target(page)))[probe.access as usize];
        assert_eq!(paged(*outcome), expected, "{probe:x?}");
        // Each page is probed once.
        let mut flags = A;
        if probe.access == Write && rights == RWX {
            writers[usize::try_from(target(page)).unwrap()] = number;
            log.push(probe.gpa);
            flags |= D;
        } else if probe.access == Write {
            flags = 0;
        }
        assert_eq!(
            after.entry(probe.gpa, PT),
            &(*tables.entry(probe.gpa, PT) | flags)
        );
    }
    assert_eq!(answer.writers, writers);
    // Several times as much as the processor's log holds.
    assert!(log.len() > 4000);
    assert_eq!(answer.log, log);
}

#[test]
fn what_cannot_be_asked_is_refused() {
    let good = Scenario {
        control: [EPTP, 0, 0, 0],
        probes: vec![],
        tables: vec![0; 4096],
    };
    assert!(check(&good).is_ok());
    let mut bad = vec![];
    bad.push(Scenario {
        tables: vec![0; 100],
        ..good.clone()
    });
    bad.push(Scenario {
        tables: vec![],
        ..good.clone()
    });
    bad.push(Scenario {
        control: [EPTP, 2, 0, 0],
        ..good.clone()
    });
    bad.push(Scenario {
        control: [EPTP, 0, 0, 1],
        ..good.clone()
    });
    bad.push(Scenario {
        probes: vec![probe(8, Read)],
        ..good.clone()
    });
    bad.push(Scenario {
        probes: vec![probe(1 << GPA_BITS, Read)],
        ..good.clone()
    });
    for scenario in bad {
        assert_eq!(
            Ept.ask(&scenario).unwrap_err().kind(),
            io::ErrorKind::InvalidInput
        );
    }
}

#[test]
fn half_an_answer_is_none() {
    let scenario = Scenario {
        control: [0; 4],
        probes: vec![],
        tables: vec![0; 4096],
    };
    let mut disk = encode(&scenario);
    assert_eq!(disk.len(), scenario_bytes(&scenario));
    disk.resize(disk.len() + answer_bytes(&scenario), 0);
    assert!(parse(&disk, &scenario).is_none());
    disk[END_WORD * 8..][..8].copy_from_slice(&END_MARK.to_le_bytes());
    assert!(parse(&disk, &scenario).is_some());
    assert!(parse(&disk[..disk.len() - 1], &scenario).is_none());
    assert!(parse(&[], &scenario).is_none());
}

#[test]
fn an_endless_machine_is_ended() {
    let folder = Folder::new().unwrap();
    let scenario = Scenario {
        control: [0; 4],
        probes: vec![],
        tables: vec![0; 4096],
    };
    write_inputs(&folder, &scenario).unwrap();
    let mut rom = vec![0; 65_536];
    rom[0xfff0..0xfff2].copy_from_slice(&[0xeb, 0xfe]); // jmp to itself
    fs::write(folder.file("stub"), rom).unwrap();

    let error = run_bochs(&folder, Duration::from_secs(2))
        .unwrap_err()
        .to_string();
    assert!(error.contains("still running"), "{error}");
    assert!(error.contains("Bochs connected to screen"), "{error}");
    let someone_left = || {
        let processes = fs::read_dir("/proc").unwrap().filter_map(Result::ok);
        processes
            .filter_map(|p| fs::read_link(p.path().join("cwd")).ok())
            .any(|cwd| cwd == folder.path())
    };
    let start = Instant::now();
    while someone_left() {
        assert!(
            start.elapsed() < Duration::from_secs(10),
            "Bochs outlived its terminal"
        );
        thread::sleep(Duration::from_millis(20));
    }
}

#[test]
fn a_misconfiguration_outranks_a_refusal() {
    let mut tables = Tables::new();
    tables.set(0, PT, frame(1) | WRITE_BACK | W);
    *tables.entry(0, PD) ^= RWX ^ R;
    // Above it, what is not present ends the walk first.
    tables.set(GIB, PT, frame(1) | WRITE_BACK | W);
    *tables.entry(GIB, PD) ^= RWX;
    check_all(
        &tables,
        &[(0, misconfigured(0)), (GIB, by_rights(GIB, 0, 0))],
    );
}

#[test]
fn each_probe_walks_anew() {
    let mut tables = Tables::new();
    tables.set(0x2000, PT, frame(1) | LEAF);
    let page_table = *tables.entry(0, PD) & !0xfff;
    tables.set(0x3000, PT, page_table | LEAF);
    let read = probe(0x2000, Read);
    // The second probe makes its number, 2, of the entry behind the first: write without read.
    let answer = ask(
        [EPTP, 0, 0, 0],
        &tables,
        &[read, probe(0x3000, Write), read],
    );
    let expected = [
        Done { value: frame(1) },
        Done { value: 0 },
        Misconfiguration { gpa: 0x2000 },
    ];
    assert_eq!(answer.outcomes, expected);
    assert_eq!(*Tables::from_bytes(&answer.tables).entry(0x2000, PT), 2);
}
