//! Tables encoded by hand after the manual (4.4.1), and what QEMU makes of them.

use std::io::ErrorKind;

use super::*;
use crate::oracle::Access::{self, Execute, Read, Write};

// Bits of an entry (4.4.1).
const V: u64 = 1;
const R: u64 = 1 << 1;
const W: u64 = 1 << 2;
const X: u64 = 1 << 3;
const U: u64 = 1 << 4;
const G: u64 = 1 << 5;
const A: u64 = 1 << 6;
const D: u64 = 1 << 7;
/// All that a guest's leaf can allow.
const LEAF: u64 = V | R | W | X | U;

const SV39X4: u64 = 8;
const SV48X4: u64 = 9;
const SV57X4: u64 = 10;
/// Pages of a root.
const ROOT: usize = 4;
const GIB: u64 = 1 << 30;
const MIB: u64 = 1 << 20;

const ALL: [Access; 3] = [Read, Write, Execute];

/// An entry for `address`.
fn entry(address: u64, bits: u64) -> u64 {
    address >> 12 << 10 | bits
}

/// An entry that points to page `page` of the tables.
fn pointer(page: usize) -> u64 {
    entry(TABLES + PAGE * page as u64, V)
}

fn frame(number: u64) -> u64 {
    FRAMES + number * PAGE
}

/// Tables, the root being at their start.
struct Tables(Vec<u8>);

impl Tables {
    fn new(pages: usize) -> Self {
        Self(vec![0; pages * 4096])
    }

    /// Entry `index` counts from page `page` on, and may be past its end, as in a root.
    fn set(&mut self, page: usize, index: usize, entry: u64) {
        let at = page * 4096 + index * 8;
        self.0[at..at + 8].copy_from_slice(&entry.to_le_bytes());
    }

    /// A root whose entry 0 leads down to the last level, and the page of that.
    fn down_to_last(mode: u64) -> (Self, usize) {
        let levels = usize::try_from(mode - SV39X4).unwrap() + 3;
        let mut tables = Self::new(ROOT + levels - 1);
        tables.set(0, 0, pointer(ROOT));
        for page in ROOT..ROOT + levels - 2 {
            tables.set(page, 0, pointer(page + 1));
        }
        (tables, ROOT + levels - 2)
    }
}

fn get(answer: &Answer, page: usize, index: usize) -> u64 {
    words(&answer.tables)[page * 512 + index]
}

fn scenario(mode: u64, tables: Tables, probes: &[(u64, Access)]) -> Scenario {
    let probes = probes.iter().map(|&(gpa, access)| Probe { gpa, access });
    Scenario {
        control: [mode << 60 | TABLES >> 12, 0, 0, 0],
        probes: probes.collect(),
        tables: tables.0,
    }
}

fn ask_all(scenario: &Scenario) -> Answer {
    RiscvGStage.ask(scenario).unwrap()
}

fn ask(mode: u64, tables: Tables, probes: &[(u64, Access)]) -> Answer {
    ask_all(&scenario(mode, tables, probes))
}

/// Every access to each address, in this order.
fn each(gpas: &[u64]) -> Vec<(u64, Access)> {
    let all = |&gpa| ALL.map(|access| (gpa, access));
    gpas.iter().flat_map(all).collect()
}

/// That it was done, and where it is mapped to.
fn done(access: Access, hpa: u64) -> Outcome {
    let value = if access == Read { hpa } else { 0 };
    Outcome::Done { value }
}

fn refused(access: Access, gpa: u64) -> Outcome {
    let (syndrome, offset) = match access {
        Read => (21, 0),
        Write => (23, 16),
        Execute => (20, 8),
    };
    let gpa = gpa + offset;
    Outcome::Violation { gpa, syndrome }
}

fn nothing_there(access: Access) -> Outcome {
    let syndrome = match access {
        Read => 5,
        Write => 7,
        Execute => 1,
    };
    Outcome::Other { syndrome }
}

/// What these bits allow in a valid leaf, none of the reserved kinds.
fn allows(bits: u64, access: Access) -> bool {
    let needed = match access {
        Read => R,
        Write => W,
        Execute => X,
    };
    bits & needed != 0
}

/// What an access that is allowed sets.
fn sets(access: Access) -> u64 {
    if access == Write { A | D } else { A }
}

/// Each combination that is not reserved is tried with each access, in leaves of `size` that the page
/// `page` holds. As each leaf has one access only, A and D are seen as that one left them.
fn try_rights(mode: u64, mut tables: Tables, page: usize, size: u64) {
    let rights = [R, R | W, X, R | X, R | W | X];
    let cases: Vec<_> = rights
        .iter()
        .flat_map(|&rights| ALL.map(|access| (rights, access)))
        .collect();
    let hpa = |number: u64| match size {
        PAGE => frame(number),
        _ => FRAMES / size * size + if size < GIB { number * size } else { 0 },
    };
    // An address within the leaf that is mapped to a frame, for every size.
    let within = |number: u64| FRAMES % size + if size > PAGE { number * PAGE } else { 0 };
    let mut probes = Vec::new();
    for (number, &(rights, access)) in (0..).zip(&cases) {
        let index = usize::try_from(number).unwrap();
        tables.set(page, index, entry(hpa(number), V | U | rights));
        probes.push((number * size + within(number), access));
    }
    let answer = ask(mode, tables, &probes);
    for (number, &(rights, access)) in (0..).zip(&cases) {
        let index = usize::try_from(number).unwrap();
        let gpa = probes[index].0;
        let (expected, set) = if allows(rights, access) {
            (done(access, hpa(number) + within(number)), sets(access))
        } else {
            (refused(access, gpa), 0)
        };
        assert_eq!(
            answer.outcomes[index], expected,
            "{rights:#x} {access:?} {size:#x}"
        );
        assert_eq!(
            get(&answer, page, index),
            entry(hpa(number), V | U | rights | set),
            "{rights:#x} {access:?} {size:#x}"
        );
    }
}

#[test]
fn rights_of_leaves_of_4_kib() {
    for mode in [SV39X4, SV48X4, SV57X4] {
        let (tables, last) = Tables::down_to_last(mode);
        try_rights(mode, tables, last, PAGE);
    }
}

#[test]
fn rights_of_larger_leaves() {
    let (tables, last) = Tables::down_to_last(SV39X4);
    try_rights(SV39X4, tables, last - 1, 2 * MIB);
    try_rights(SV39X4, Tables::new(ROOT), 0, GIB);
    try_rights(SV48X4, Tables::new(ROOT), 0, 512 * GIB);
    try_rights(SV57X4, Tables::new(ROOT), 0, 512 * 512 * GIB);
}

#[test]
fn absent_at_each_level() {
    for mode in [SV39X4, SV48X4, SV57X4] {
        let (_, last) = Tables::down_to_last(mode);
        for page in (ROOT..=last).chain([0]) {
            let (mut tables, _) = Tables::down_to_last(mode);
            tables.set(last, 0, entry(FRAMES, LEAF));
            tables.set(page, 0, 0);
            let before = tables.0.clone();
            let answer = ask(mode, tables, &each(&[0]));
            assert_eq!(answer.outcomes, ALL.map(|access| refused(access, 0)));
            assert_eq!(answer.tables, before);
        }
    }
}

/// Tries `entries`, the leaves of 4 KiB from address 0 on, and expects all to be refused and unchanged.
fn expect_refused_leaves(entries: &[u64]) {
    let (mut tables, last) = Tables::down_to_last(SV39X4);
    for (index, &entry) in entries.iter().enumerate() {
        tables.set(last, index, entry);
    }
    let before = tables.0.clone();
    let gpas: Vec<_> = (0..entries.len() as u64)
        .map(|number| number * PAGE)
        .collect();
    let probes = each(&gpas);
    let answer = ask(SV39X4, tables, &probes);
    for (&(gpa, access), outcome) in probes.iter().zip(answer.outcomes) {
        assert_eq!(outcome, refused(access, gpa));
    }
    assert_eq!(answer.tables, before);
}

#[test]
fn reserved_leaves_are_refused() {
    let mut entries = vec![
        entry(FRAMES, V | U | W),
        entry(FRAMES, V | U | W | X),
        entry(FRAMES, LEAF & !U | A | D),
        entry(FRAMES, LEAF & !V),
        // A pointer, in the last level.
        pointer(ROOT),
    ];
    entries.extend((54..64).map(|bit| entry(FRAMES, LEAF | A | D | 1 << bit)));
    expect_refused_leaves(&entries);
}

#[test]
fn some_bits_of_leaves_are_ignored() {
    let (mut tables, last) = Tables::down_to_last(SV39X4);
    // Of the bits for software's use (9:8), and of a G that has no meaning here, nothing is lost.
    let ignored = G | 3 << 8;
    tables.set(last, 0, entry(FRAMES, LEAF | ignored));
    // D without W, and without A.
    tables.set(last, 1, entry(FRAMES, V | U | R | D));
    let answer = ask(SV39X4, tables, &[(0, Write), (PAGE, Read)]);
    assert_eq!(answer.outcomes, [done(Write, 0), done(Read, FRAMES)]);
    assert_eq!(get(&answer, last, 0), entry(FRAMES, LEAF | ignored | A | D));
    assert_eq!(get(&answer, last, 1), entry(FRAMES, V | U | R | A | D));
}

#[test]
fn reserved_bits_of_pointers() {
    let ignored = [5, 8, 9];
    let reserved = [4, 6, 7].into_iter().chain(54..64);
    // Entry `bit` of the root, and of the table that entry 0 of the root points to.
    let mut tables = Tables::new(ROOT + 2);
    let (middle, last) = (ROOT, ROOT + 1);
    tables.set(last, 0, entry(FRAMES, LEAF));
    tables.set(0, 0, pointer(middle));
    tables.set(middle, 0, pointer(last));
    let mut probes = Vec::new();
    let mut expected = Vec::new();
    for bit in ignored.into_iter().chain(reserved) {
        tables.set(0, bit, pointer(middle) | 1 << bit);
        tables.set(middle, bit, pointer(last) | 1 << bit);
        for size in [GIB, 2 * MIB] {
            let gpa = size * bit as u64;
            probes.push((gpa, Read));
            expected.push(if ignored.contains(&bit) {
                done(Read, FRAMES)
            } else {
                refused(Read, gpa)
            });
        }
    }
    assert_eq!(ask(SV39X4, tables, &probes).outcomes, expected);
}

#[test]
fn misaligned_leaves_are_refused() {
    let (mut tables, last) = Tables::down_to_last(SV39X4);
    tables.set(last - 1, 1, entry(FRAMES + PAGE, LEAF));
    tables.set(0, 1, entry(FRAMES + 2 * MIB, LEAF));
    let gpas = [2 * MIB, GIB];
    let probes = each(&gpas);
    let before = tables.0.clone();
    let answer = ask(SV39X4, tables, &probes);
    for (&(gpa, access), outcome) in probes.iter().zip(answer.outcomes) {
        assert_eq!(outcome, refused(access, gpa));
    }
    assert_eq!(answer.tables, before);
}

#[test]
fn where_nothing_is() {
    let (mut tables, last) = Tables::down_to_last(SV39X4);
    // A leaf for each access, and a pointer that is no better than an absent one.
    for index in 0..3 {
        tables.set(last, index, entry(1 << 40, LEAF));
    }
    tables.set(0, 1, entry(1 << 40, V));
    // The first page after the frames.
    tables.set(0, 3, entry(FRAMES, LEAF));
    let answer = ask(
        SV39X4,
        tables,
        &[
            (0, Read),
            (PAGE, Write),
            (2 * PAGE, Execute),
            (GIB, Read),
            (FRAMES + FRAMES_BYTES, Write),
            (FRAMES, Read),
        ],
    );
    let expected = [
        nothing_there(Read),
        nothing_there(Write),
        nothing_there(Execute),
        refused(Read, GIB),
        nothing_there(Write),
        done(Read, FRAMES),
    ];
    assert_eq!(answer.outcomes, expected);
    for (index, access) in ALL.into_iter().enumerate() {
        assert_eq!(
            get(&answer, last, index),
            entry(1 << 40, LEAF | sets(access))
        );
    }
}

/// A leaf for the root's entry `index`: of the root's own size, and so that `FRAMES` is within it.
fn high_leaf(mode: u64) -> u64 {
    let address = if mode == SV39X4 { FRAMES } else { 0 };
    entry(address, LEAF)
}

/// The guest-physical address that root entry `index` translates to `FRAMES`.
fn high_address(mode: u64, index: u64) -> u64 {
    let bits = RiscvGStage::gpa_bits(mode << 60).unwrap();
    let offset = if mode == SV39X4 { 0 } else { FRAMES };
    (index << (bits - 11)) + offset
}

/// Tries one root entry in each of its four pages.
fn ask_high(mode: u64, upper_half: u64) -> (Vec<u64>, Answer) {
    let indices = [1_u64, 511, 512, 1023, 1024, 1535, 1536, 2047];
    let mut tables = Tables::new(ROOT);
    for index in indices {
        tables.set(0, usize::try_from(index).unwrap(), high_leaf(mode));
    }
    let gpas = indices.map(|index| high_address(mode, index));
    let mut scenario = scenario(mode, tables, &each(&gpas));
    scenario.control[2] = upper_half;
    (gpas.to_vec(), ask_all(&scenario))
}

#[test]
fn high_addresses() {
    for mode in [SV39X4, SV48X4, SV57X4] {
        let (gpas, answer) = ask_high(mode, 0);
        let mut outcomes = answer.outcomes.iter();
        for (number, gpa) in gpas.into_iter().enumerate() {
            for access in ALL {
                // The emulator's own: the upper half is not reached.
                let expected = if number < 4 {
                    done(access, FRAMES)
                } else {
                    refused(access, gpa)
                };
                assert_eq!(outcomes.next(), Some(&expected), "{mode} {gpa:#x}");
            }
        }
    }
}

#[test]
fn the_upper_half() {
    for mode in [SV39X4, SV48X4, SV57X4] {
        let (gpas, answer) = ask_high(mode, 1);
        let expected: Vec<_> = each(&gpas)
            .into_iter()
            .map(|(_, access)| done(access, FRAMES))
            .collect();
        assert_eq!(answer.outcomes, expected);
        let set: Vec<_> = (0..2048)
            .filter(|&index| get(&answer, 0, index) == high_leaf(mode) | A | D)
            .collect();
        assert_eq!(set, [1, 511, 512, 1023, 1024, 1535, 1536, 2047]);
    }
}

#[test]
fn the_upper_half_is_reported_as_it_was_asked() {
    let gpa = 1 << 40;
    let mut scenario = scenario(SV39X4, Tables::new(ROOT), &each(&[gpa, gpa << 1]));
    scenario.control[2] = 1;
    let expected: Vec<_> = each(&[gpa, gpa << 1])
        .into_iter()
        .map(|(gpa, access)| refused(access, gpa))
        .collect();
    assert_eq!(ask_all(&scenario).outcomes, expected);
}

#[test]
fn past_the_last_address() {
    for mode in [SV39X4, SV48X4, SV57X4] {
        let mut tables = Tables::new(ROOT);
        for index in 0..2048 {
            tables.set(0, index, high_leaf(mode));
        }
        let bits = RiscvGStage::gpa_bits(mode << 60).unwrap();
        let gpas: Vec<_> = (bits..64)
            .map(|bit| high_address(mode, 0) | 1 << bit)
            .collect();
        let probes = each(&gpas);
        let answer = ask(mode, tables, &probes);
        for (&(gpa, access), outcome) in probes.iter().zip(answer.outcomes) {
            assert_eq!(outcome, refused(access, gpa));
        }
    }
}

#[test]
fn each_probe_walks_anew() {
    let (mut tables, last) = Tables::down_to_last(SV39X4);
    // Page 2 is a frame at first, but page 3 is the table itself: a write to it, at its byte 16, puts
    // the probe's number into the entry for page 2. That of the second has no V; that of the fourth
    // neither.
    tables.set(last, 2, entry(FRAMES, LEAF));
    tables.set(last, 3, entry(TABLES + PAGE * last as u64, LEAF));
    let (page, table) = (2 * PAGE, 3 * PAGE);
    let probes = [(page, Read), (table, Write), (page, Read), (page, Write)];
    let answer = ask(SV39X4, tables, &probes);
    let expected = [
        done(Read, FRAMES),
        done(Write, 0),
        refused(Read, page),
        refused(Write, page),
    ];
    assert_eq!(answer.outcomes, expected);
    assert_eq!(get(&answer, last, 2), 2);
}

#[test]
fn code_that_is_none_harms_nobody() {
    let (mut tables, last) = Tables::down_to_last(SV39X4);
    // An empty page of the tables: illegal instructions.
    tables.0.resize(tables.0.len() + 4096, 0);
    let empty = TABLES + PAGE * (last as u64 + 1);
    tables.set(last, 0, entry(empty, LEAF));
    tables.set(last, 1, entry(frame(9), LEAF));
    let answer = ask(
        SV39X4,
        tables,
        &[(0, Execute), (PAGE, Execute), (PAGE, Read)],
    );
    let illegal = Outcome::Other { syndrome: 2 };
    let expected = [illegal, done(Execute, 0), done(Read, frame(9))];
    assert_eq!(answer.outcomes, expected);
}

#[test]
fn a_vmid_and_adue_change_nothing() {
    let (mut tables, last) = Tables::down_to_last(SV39X4);
    tables.set(last, 0, entry(FRAMES, LEAF));
    let mut scenario = scenario(SV39X4, tables, &[(0, Write)]);
    scenario.control[0] |= 0x3fff << 44;
    scenario.control[1] = 1;
    let answer = ask_all(&scenario);
    assert_eq!(answer.outcomes, [done(Write, 0)]);
    assert_eq!(get(&answer, last, 0), entry(FRAMES, LEAF | A | D));
    assert!(answer.log.is_empty());
}

/// A small generator (xorshift64).
fn next(state: &mut u64) -> u64 {
    *state ^= *state << 13;
    *state ^= *state >> 7;
    *state ^= *state << 17;
    *state
}

/// All frames, each mapped by a leaf of 4 KiB somewhere, with rights at random; some are absent.
fn random_leaves(state: &mut u64) -> (Tables, Vec<u64>) {
    let pages = usize::try_from(FRAMES_BYTES / PAGE).unwrap();
    let mut tables = Tables::new(ROOT + 1 + pages / 512);
    tables.set(0, 0, pointer(ROOT));
    for table in 0..pages / 512 {
        tables.set(ROOT, table, pointer(ROOT + 1 + table));
    }
    let rights = [0, R, R | W, X, R | X, R | W | X];
    let mut leaves = Vec::new();
    for page in 0..pages {
        let picked = next(state);
        let number = (page as u64 ^ 0x2a5) * PAGE;
        let leaf = match rights[usize::try_from(picked % 6).unwrap()] {
            0 => 0,
            rights => entry(FRAMES + number, V | U | rights),
        };
        tables.set(ROOT + 1, page, leaf);
        leaves.push(leaf);
    }
    (tables, leaves)
}

#[test]
fn ten_thousand_probes() {
    let mut state = 0x9e37_79b9_7f4a_7c15;
    let (tables, mut leaves) = random_leaves(&mut state);
    let probes: Vec<_> = (0..10_000)
        .map(|_| {
            let page = next(&mut state) % leaves.len() as u64;
            let access = ALL[usize::try_from(next(&mut state) % 3).unwrap()];
            (page * PAGE, access)
        })
        .collect();

    let answer = ask(SV39X4, tables, &probes);

    let mut writers = vec![0; leaves.len()];
    for (number, &(gpa, access)) in (1..).zip(&probes) {
        let leaf = &mut leaves[usize::try_from(gpa / PAGE).unwrap()];
        let hpa = *leaf >> 10 << 12;
        let expected = if allows(*leaf, access) {
            *leaf |= sets(access);
            if access == Write {
                writers[usize::try_from((hpa - FRAMES) / PAGE).unwrap()] = number;
            }
            done(access, hpa)
        } else {
            refused(access, gpa)
        };
        let index = usize::try_from(number - 1).unwrap();
        assert_eq!(answer.outcomes[index], expected, "{number}: {gpa:#x}");
    }
    assert_eq!(answer.writers, writers);
    assert_eq!(&words(&answer.tables)[(ROOT + 1) * 512..], leaves);
}

#[test]
fn as_many_probes_and_tables_as_fit() {
    let layout = RiscvGStage.layout();
    let pages = usize::try_from(layout.tables_bytes / PAGE).unwrap();
    let mut tables = Tables::new(pages);
    tables.set(0, 0, entry(FRAMES, LEAF));
    let probes: Vec<_> = (0..MAX_PROBES)
        .map(|number| (number % 4096 * PAGE, Write))
        .collect();
    let answer = ask(SV39X4, tables, &probes);
    assert_eq!(answer.outcomes, vec![done(Write, 0); probes.len()]);
    assert_eq!(answer.writers[4095], MAX_PROBES / 4096 * 4096);
    assert_eq!(answer.tables.len(), pages * 4096);
}

/// The error's kind and its text.
fn error(scenario: &Scenario) -> (ErrorKind, String) {
    let error = RiscvGStage.ask(scenario).unwrap_err();
    (error.kind(), error.to_string())
}

#[test]
fn scenarios_that_do_not_fit() {
    let unusable = [
        scenario(7, Tables::new(ROOT), &[]),
        scenario(SV39X4, Tables(vec![0; 100]), &[]),
        scenario(SV39X4, Tables::new(4097), &[]),
        scenario(SV39X4, Tables::new(ROOT), &[(8, Read)]),
        scenario(
            SV39X4,
            Tables::new(ROOT),
            &vec![(0, Read); size(MAX_PROBES) + 1],
        ),
    ];
    for scenario in &unusable {
        assert_eq!(error(scenario).0, ErrorKind::InvalidInput);
    }
}

#[test]
fn nothing_to_ask() {
    let answer = ask(SV39X4, Tables::new(0), &[]);
    assert_eq!(answer.outcomes, []);
    assert!(answer.writers.iter().all(|&writer| writer == 0));
}
