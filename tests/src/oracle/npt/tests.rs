//! Tables encoded by hand after the manual (APM 5.4.1), and what QEMU makes of them.

use std::io::ErrorKind;

use super::*;
use crate::oracle::Probe;
use Access::{Execute, Read, Write};

// Entries (APM 5.4.1).
const P: u64 = 1 << 0;
const RW: u64 = 1 << 1;
const US: u64 = 1 << 2;
const A: u64 = 1 << 5;
const D: u64 = 1 << 6;
const PS: u64 = 1 << 7;
const NX: u64 = 1 << 63;
const ALL: u64 = P | RW | US;

// EXITINFO1 (APM 15.25.6).
const PRESENT: u64 = 1 << 0;
const WRITE: u64 = 1 << 1;
const USER: u64 = 1 << 2;
const RESERVED: u64 = 1 << 3;
const FETCH: u64 = 1 << 4;
const FINAL: u64 = 1 << 32;
const WALK: u64 = 1 << 33;

const ACCESSES: [Access; 3] = [Read, Write, Execute];
const LEVELS: [u32; 2] = [4, 5];

/// Rights of an entry, and the accesses that they refuse.
const RIGHTS: [(u64, &[Access]); 5] = [
    (ALL, &[]),
    (P | US, &[Write]),
    (ALL | NX, &[Execute]),
    (P | US | NX, &[Write, Execute]),
    (P | RW, &[Read, Write, Execute]),
];

/// A table in the making, with the guest's own pages in it.
struct Tables {
    bytes: Vec<u8>,
    levels: u32,
    nxe: u64,
}

impl Tables {
    fn new(levels: u32) -> Tables {
        let mut tables = Tables {
            bytes: vec![0; 4096],
            levels,
            nxe: 1,
        };
        for page in GUEST_PAGES {
            tables.set(page.gpa, 1, page.hpa | ALL);
        }
        tables
    }

    /// Sets the entry for an address at a level, and makes the tables above that are missing.
    fn set(&mut self, gpa: u64, level: u32, entry: u64) {
        let mut table = 0;
        for above in (level + 1..=self.levels).rev() {
            let at = table + index(gpa, above);
            if word(&self.bytes, at) == 0 {
                self.put(at, (TABLES + self.bytes.len() as u64) | ALL);
                self.bytes.resize(self.bytes.len() + 4096, 0);
            }
            table = offset(word(&self.bytes, at));
        }
        self.put(table + index(gpa, level), entry);
    }

    /// Changes an entry that is there.
    fn change(&mut self, gpa: u64, level: u32, how: impl FnOnce(u64) -> u64) {
        let at = entry_offset(&self.bytes, self.levels, gpa, level);
        self.put(at, how(word(&self.bytes, at)));
    }

    fn put(&mut self, at: usize, entry: u64) {
        self.bytes[at..at + 8].copy_from_slice(&entry.to_le_bytes());
    }

    fn ask(&self, probes: &[(u64, Access)]) -> Said {
        let cr4 = if self.levels == 5 { CR4_LA57 } else { 0 };
        let probes = probes
            .iter()
            .map(|&(gpa, access)| Probe { gpa, access })
            .collect();
        let control = [TABLES, cr4, self.nxe, 0];
        let scenario = Scenario {
            control,
            probes,
            tables: self.bytes.clone(),
        };
        Said {
            answer: Npt.ask(&scenario).unwrap(),
            levels: self.levels,
        }
    }
}

/// An answer, and how to walk it.
struct Said {
    answer: Answer,
    levels: u32,
}

impl Said {
    fn outcomes(&self) -> &[Outcome] {
        &self.answer.outcomes
    }

    /// The accessed and dirty bits that the entry for an address at a level has now.
    fn marks(&self, gpa: u64, level: u32) -> u64 {
        let tables = &self.answer.tables;
        word(tables, entry_offset(tables, self.levels, gpa, level)) & (A | D)
    }
}

fn entry_offset(tables: &[u8], levels: u32, gpa: u64, level: u32) -> usize {
    let table = (level + 1..=levels).rev().fold(0, |table, above| {
        offset(word(tables, table + index(gpa, above)))
    });
    table + index(gpa, level)
}

fn index(gpa: u64, level: u32) -> usize {
    usize::try_from((gpa >> (12 + 9 * (level - 1))) & 511).unwrap() * 8
}

fn offset(entry: u64) -> usize {
    usize::try_from((entry & 0x000F_FFFF_FFFF_F000) - TABLES).unwrap()
}

fn word(bytes: &[u8], at: usize) -> u64 {
    u64::from_le_bytes(bytes[at..at + 8].try_into().unwrap())
}

fn frame(number: u64) -> u64 {
    FRAMES + number * PAGE
}

/// A leaf of a level's size, without rights.
fn leaf(level: u32) -> u64 {
    match level {
        1 => frame(3),
        2 => frame(1024) | PS,
        _ => FRAMES | PS,
    }
}

fn done(access: Access, frame: u64) -> Outcome {
    Outcome::Done {
        value: if access == Read { frame } else { 0 },
    }
}

fn refused(gpa: u64, access: Access, cause: u64) -> Outcome {
    let (offset, kind) = match access {
        Read => (0, 0),
        Write => (16, WRITE),
        Execute => (8, FETCH),
    };
    Outcome::Violation {
        gpa: gpa + offset,
        syndrome: FINAL | USER | kind | cause,
    }
}

/// What an allowed access leaves in a leaf.
fn marks_of(access: Access) -> u64 {
    if access == Write { A | D } else { A }
}

/// An address for each of up to 15 cases, with entries of its own at all levels.
fn place(levels: u32, number: u64) -> u64 {
    (number + 1) << if levels == 5 { 48 } else { 39 }
}

#[test]
fn leaves_of_each_size_allow_what_they_say() {
    for levels in LEVELS {
        let mut tables = Tables::new(levels);
        let mut cases = Vec::new();
        for level in 1..=3 {
            for (rights, refuses) in RIGHTS {
                for access in ACCESSES {
                    let gpa = (cases.len() as u64 + 4) << 30;
                    tables.set(gpa, level, leaf(level) | rights);
                    cases.push((gpa, access, level, refuses.contains(&access)));
                }
            }
        }
        let probes: Vec<_> = cases.iter().map(|case| (case.0, case.1)).collect();
        let said = tables.ask(&probes);
        for ((gpa, access, level, is_refused), outcome) in cases.iter().zip(said.outcomes()) {
            let (expected, marks) = if *is_refused {
                let marks = if *level == 3 { A } else { 0 };
                (refused(*gpa, *access, PRESENT), marks)
            } else {
                (done(*access, leaf(*level) & !PS), marks_of(*access))
            };
            assert_eq!(*outcome, expected, "{access:?} {gpa:#x}, level {level}");
            assert_eq!(
                said.marks(*gpa, *level),
                marks,
                "{access:?} {gpa:#x}, level {level}"
            );
            for above in level + 1..=levels {
                assert_eq!(
                    said.marks(*gpa, above),
                    A,
                    "{access:?} {gpa:#x}, above: {above}"
                );
            }
        }
    }
}

#[test]
fn rights_of_tables_count_too() {
    for levels in LEVELS {
        for level in 2..=levels {
            let mut tables = Tables::new(levels);
            let mut cases = Vec::new();
            for (rights, refuses) in RIGHTS {
                for access in ACCESSES {
                    let gpa = place(levels, cases.len() as u64);
                    tables.set(gpa, 1, frame(7) | ALL);
                    tables.change(gpa, level, |entry| (entry & !ALL) | rights);
                    cases.push((gpa, access, refuses.contains(&access)));
                }
            }
            let probes: Vec<_> = cases.iter().map(|case| (case.0, case.1)).collect();
            let said = tables.ask(&probes);
            for ((gpa, access, is_refused), outcome) in cases.iter().zip(said.outcomes()) {
                let (expected, marks) = if *is_refused {
                    (refused(*gpa, *access, PRESENT), 0)
                } else {
                    (done(*access, frame(7)), marks_of(*access))
                };
                assert_eq!(*outcome, expected, "{access:?} {gpa:#x}, level {level}");
                assert_eq!(
                    said.marks(*gpa, 1),
                    marks,
                    "{access:?} {gpa:#x}, level {level}"
                );
                assert_eq!(
                    said.marks(*gpa, level),
                    A,
                    "{access:?} {gpa:#x}, level {level}"
                );
            }
        }
    }
}

/// Entries that end the walk where they stand: change one for each access and level, see that all above
/// are marked, and it and all below are not.
fn ends_the_walk(from_level: u32, cause: u64, how: impl Fn(u64) -> u64) {
    for levels in LEVELS {
        let mut tables = Tables::new(levels);
        let mut cases = Vec::new();
        for level in from_level..=levels {
            for access in ACCESSES {
                let gpa = place(levels, cases.len() as u64);
                tables.set(gpa, 1, frame(9) | ALL);
                tables.change(gpa, level, &how);
                cases.push((gpa, access, level));
            }
        }
        let probes: Vec<_> = cases.iter().map(|case| (case.0, case.1)).collect();
        let said = tables.ask(&probes);
        for ((gpa, access, level), outcome) in cases.iter().zip(said.outcomes()) {
            assert_eq!(
                *outcome,
                refused(*gpa, *access, cause),
                "level {level} of {levels}"
            );
            for other in 1..=levels {
                let marks = if other > *level { A } else { 0 };
                assert_eq!(
                    said.marks(*gpa, other),
                    marks,
                    "{access:?} {gpa:#x}, {other}"
                );
            }
        }
    }
}

#[test]
fn absent_entries_end_the_walk() {
    ends_the_walk(1, 0, |entry| entry & !P);
}

#[test]
fn absent_goes_before_reserved() {
    ends_the_walk(4, 0, |entry| (entry & !P) | PS);
}

#[test]
fn large_leaves_at_the_upper_levels_are_reserved() {
    ends_the_walk(4, RESERVED, |entry| entry | PS);
}

#[test]
fn reserved_goes_before_rights() {
    ends_the_walk(4, RESERVED, |entry| (entry & !(RW | US)) | NX | PS);
}

#[test]
fn rights_are_looked_at_last() {
    let mut tables = Tables::new(4);
    tables.set(0, 1, 0);
    tables.change(0, 3, |entry| (entry & !ALL) | P | NX);
    tables.set(1 << 39, 2, leaf(2) | ALL | 1 << 13);
    tables.change(1 << 39, 3, |entry| (entry & !ALL) | P | NX);
    for access in ACCESSES {
        let said = tables.ask(&[(0, access), (1 << 39, access)]);
        let expected = [refused(0, access, 0), refused(1 << 39, access, RESERVED)];
        assert_eq!(said.outcomes(), expected);
    }
}

#[test]
fn large_leaves_must_be_aligned() {
    let mut tables = Tables::new(4);
    let cases = [(2, 13), (2, 20), (3, 13), (3, 29)];
    let gpa = |case: usize| (case as u64 + 4) << 30;
    for (case, (level, bit)) in cases.into_iter().enumerate() {
        tables.set(gpa(case), level, leaf(level) | ALL | 1 << bit);
    }
    for access in ACCESSES {
        let said = tables.ask(&[0, 1, 2, 3].map(|case| (gpa(case), access)));
        for (case, (level, _)) in cases.into_iter().enumerate() {
            assert_eq!(said.outcomes()[case], refused(gpa(case), access, RESERVED));
            let marks = if level == 3 { A } else { 0 };
            assert_eq!(said.marks(gpa(case), level), marks, "level {level}");
        }
    }
}

#[test]
fn other_bits_are_ignored() {
    let mut tables = Tables::new(4);
    // PWT, PCD, G, available bits, and PAT, which is elsewhere in large leaves.
    let bits = 0x7FF << 52 | 0xF18;
    for level in 1..=3 {
        let pat = if level == 1 { 1 << 7 } else { 1 << 12 };
        tables.set(
            u64::from(level) << 39,
            level,
            leaf(level) | ALL | bits | pat,
        );
    }
    // In tables' entries also D, and G again.
    tables.set(4 << 39, 1, frame(3) | ALL);
    for level in 2..=4 {
        tables.change(4 << 39, level, |entry| entry | bits | D);
    }
    for access in ACCESSES {
        let said = tables.ask(&[1, 2, 3, 4].map(|case| (case << 39, access)));
        let frames = [leaf(1), leaf(2) & !PS, leaf(3) & !PS, leaf(1)];
        assert_eq!(said.outcomes(), frames.map(|frame| done(access, frame)));
    }
}

#[test]
fn without_nxe_bit_63_is_reserved() {
    let mut tables = Tables::new(4);
    tables.nxe = 0;
    for level in 1..=4 {
        let gpa = u64::from(level) << 39;
        tables.set(gpa, level.min(3), leaf(level) | ALL);
        tables.change(gpa, level, |entry| entry | NX);
    }
    tables.set(5 << 39, 1, 0);
    for access in ACCESSES {
        let said = tables.ask(&[1, 2, 3, 4, 5].map(|case| (case << 39, access)));
        // Fetches are not told from reads then.
        let told_as = |cause| match access {
            Execute => FINAL | USER | cause,
            Write => FINAL | USER | WRITE | cause,
            Read => FINAL | USER | cause,
        };
        for (outcome, case) in said.outcomes().iter().zip(1..=5) {
            let cause = if case == 5 { 0 } else { RESERVED };
            let Outcome::Violation { gpa, syndrome } = *outcome else {
                panic!("{outcome:?}");
            };
            assert_eq!((gpa & !0xFFF, syndrome), (case << 39, told_as(cause)));
        }
        for level in 1..=4 {
            assert_eq!(said.marks(u64::from(level) << 39, level), 0);
        }
    }
}

#[test]
fn walks_of_guest_page_tables_are_writes() {
    let [pml4, pdpt, code] = GUEST_PAGES;
    let probe = [(0, Read)];
    let mut tables = Tables::new(4);
    tables.set(0, 1, frame(1) | ALL);
    let said = tables.ask(&probe);
    let marks = |said: &Said| GUEST_PAGES.map(|page| said.marks(page.gpa, 1));
    assert_eq!(marks(&said), [A | D, A | D, A]);

    for (rights, cause) in [(P | US, PRESENT), (P | RW, PRESENT), (0, 0)] {
        tables.set(pml4.gpa, 1, pml4.hpa | rights);
        let said = tables.ask(&probe);
        let syndrome = WALK | USER | WRITE | cause;
        assert_eq!(
            said.outcomes(),
            [Outcome::Violation {
                gpa: pml4.gpa,
                syndrome
            }]
        );
        assert_eq!(marks(&said), [0, 0, 0]);
    }
    // Nothing is fetched from page tables, and nothing written to code.
    tables.set(pml4.gpa, 1, pml4.hpa | ALL | NX);
    tables.set(pdpt.gpa, 1, pdpt.hpa | ALL | NX);
    tables.set(code.gpa, 1, code.hpa | P | US);
    assert_eq!(tables.ask(&probe).outcomes(), [done(Read, frame(1))]);

    tables.set(code.gpa, 1, code.hpa | ALL | NX);
    let said = tables.ask(&probe);
    let syndrome = FINAL | USER | FETCH | PRESENT;
    assert_eq!(
        said.outcomes(),
        [Outcome::Violation {
            gpa: code.gpa,
            syndrome
        }]
    );
    assert_eq!(marks(&said), [A | D, A | D, 0]);
}

#[test]
fn marks_that_are_set_stay() {
    let mut tables = Tables::new(4);
    tables.set(0, 1, frame(1) | P | US | A | D);
    tables.set(PAGE, 1, frame(2) | ALL | D);
    let said = tables.ask(&[(0, Write), (PAGE, Read)]);
    assert_eq!(
        said.outcomes(),
        [refused(0, Write, PRESENT), done(Read, frame(2))]
    );
    assert_eq!((said.marks(0, 1), said.marks(PAGE, 1)), (A | D, A | D));
}

#[test]
fn the_last_writer_is_known_and_refusals_disturb_nothing() {
    let mut tables = Tables::new(4);
    let (one, two, read_only, absent) = (0, PAGE, 2 * PAGE, 3 * PAGE);
    tables.set(one, 1, frame(5) | ALL);
    tables.set(two, 1, frame(5) | ALL);
    tables.set(read_only, 1, frame(6) | P | US);
    tables.set(1 << 30, 3, FRAMES | ALL | PS);
    let last_frame = FRAMES_BYTES / PAGE - 1;
    let said = tables.ask(&[
        (one, Execute),
        (one, Write),
        (absent, Execute),
        (two, Execute),
        (read_only, Write),
        (two, Write),
        (absent, Write),
        (two, Read),
        (one, Execute),
        ((1 << 30) + last_frame * PAGE, Write),
    ]);
    let expected = [
        done(Execute, 0),
        done(Write, 0),
        refused(absent, Execute, 0),
        done(Execute, 0),
        refused(read_only, Write, PRESENT),
        done(Write, 0),
        refused(absent, Write, 0),
        done(Read, frame(5)),
        done(Execute, 0),
        done(Write, 0),
    ];
    assert_eq!(said.outcomes(), expected);
    let mut writers = vec![0; usize::try_from(FRAMES_BYTES / PAGE).unwrap()];
    writers[5] = 6;
    *writers.last_mut().unwrap() = 10;
    assert_eq!(said.answer.writers, writers);
    assert_eq!((said.marks(one, 1), said.marks(two, 1)), (A | D, A | D));
}

#[test]
fn addresses_go_up_to_the_last() {
    for (levels, bits) in [(4, FOUR_LEVEL_BITS), (5, PHYSICAL_BITS)] {
        let end = 1 << bits;
        let small = end - PAGE;
        let large = end - (1 << 30);
        let largest = end - (1 << 31);
        let half = 1 << (bits - 1);
        let mut tables = Tables::new(levels);
        tables.set(small, 1, frame(70) | ALL);
        tables.set(large, 2, leaf(2) | ALL);
        tables.set(largest, 3, leaf(3) | ALL);
        tables.set(half, 1, frame(71) | ALL);
        let said = tables.ask(&[
            (small, Read),
            (large + 511 * PAGE, Read),
            (largest + 16383 * PAGE, Read),
            (half, Read),
            (half, Execute),
            (half - PAGE, Read),
        ]);
        let expected = [
            done(Read, frame(70)),
            done(Read, frame(1024 + 511)),
            done(Read, frame(16383)),
            done(Read, frame(71)),
            done(Execute, 0),
            refused(half - PAGE, Read, 0),
        ];
        assert_eq!(said.outcomes(), expected, "{levels} levels");
    }
}

#[test]
fn where_no_memory_is_zeros_are_read() {
    let nowhere = 1 << 51;
    let mut tables = Tables::new(4);
    tables.set(0, 1, nowhere | ALL);
    tables.set(1 << 39, 2, nowhere | ALL);
    let said = tables.ask(&[(0, Read), (0, Write), (0, Execute), (1 << 39, Read)]);
    let general_protection = Outcome::Other { syndrome: 0x4D };
    let absent = refused(1 << 39, Read, 0);
    let expected = [done(Read, 0), done(Write, 0), general_protection, absent];
    assert_eq!(said.outcomes(), expected);
}

#[test]
fn ten_thousand_probes() {
    const COUNT: u64 = 10_000;
    let mut tables = Tables::new(4);
    for number in 0..COUNT {
        tables.set(number * PAGE, 1, frame(number) | ALL);
    }
    let access = |number: u64| ACCESSES[usize::try_from(number % 3).unwrap()];
    let probes: Vec<_> = (0..COUNT)
        .map(|number| (number * PAGE, access(number)))
        .collect();
    let said = tables.ask(&probes);
    // Told, not judged: on a busy machine only the time limit counts.
    for (number, outcome) in (0..).zip(said.outcomes()) {
        assert_eq!(*outcome, done(access(number), frame(number)));
        assert_eq!(said.marks(number * PAGE, 1), marks_of(access(number)));
    }
    for (number, writer) in (0..COUNT).zip(&said.answer.writers) {
        let expected = if access(number) == Write {
            number + 1
        } else {
            0
        };
        assert_eq!(*writer, expected, "frame {number}");
    }
}

#[test]
fn all_its_room_can_be_used() {
    let mut tables = Tables::new(4);
    tables.set(0, 3, leaf(3) | ALL);
    let table_bytes = tables.bytes.len();
    tables
        .bytes
        .resize(usize::try_from(TABLES_BYTES).unwrap(), 0xA5);
    let said = tables.ask(&vec![(0, Read); 1 << 15]);
    assert!(
        said.outcomes()
            .iter()
            .all(|outcome| *outcome == done(Read, FRAMES))
    );
    assert_eq!(said.answer.tables.len(), tables.bytes.len());
    assert!(
        said.answer.tables[table_bytes..]
            .iter()
            .all(|byte| *byte == 0xA5)
    );
}

#[test]
fn what_cannot_be_asked_is_refused() {
    let scenario = |control, gpa, tables| Scenario {
        control,
        probes: vec![Probe { gpa, access: Read }],
        tables: vec![0; tables],
    };
    let five_levels = [TABLES, CR4_LA57, 1, 0];
    let four_levels = [TABLES, 0, 1, 0];
    for wrong in [
        scenario([TABLES, 1 << 20, 1, 0], 0, 4096),
        scenario([TABLES, 0, 2, 0], 0, 4096),
        scenario([TABLES, 0, 1, 1], 0, 4096),
        scenario(four_levels, 8, 4096),
        scenario(four_levels, 1 << 48, 4096),
        scenario(five_levels, 1 << 52, 4096),
        scenario(four_levels, 0, 4095),
        scenario(four_levels, 0, (32 << 20) + 4096),
    ] {
        let error = Npt.ask(&wrong).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::InvalidInput, "{error}");
    }
}
