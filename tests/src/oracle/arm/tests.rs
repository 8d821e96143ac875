//! Tables encoded by hand after the manual (chapter D8), and what QEMU makes of them.

use super::*;

// Descriptors (chapter D8, "Translation table descriptor formats").
const BLOCK: u64 = 0b01;
const TABLE: u64 = 0b11;
const LEAF: u64 = 0b11;
const NORMAL: u64 = 0b1111 << 2;
const READ: u64 = 1 << 6;
const WRITE: u64 = 1 << 7;
const INNER_SHAREABLE: u64 = 0b11 << 8;
const AF: u64 = 1 << 10;
const DBM: u64 = 1 << 51;
const CONTIGUOUS: u64 = 1 << 52;
const XN_EL1: u64 = 0b01 << 53;
const XN: u64 = 0b10 << 53;
const XN_EL0: u64 = 0b11 << 53;
const ADDRESS: u64 = 0x0000_ffff_ffff_f000;
/// A leaf's bits without rights and access flag.
const PLAIN: u64 = NORMAL | INNER_SHAREABLE;
const ALL: u64 = PLAIN | AF | READ | WRITE;

// VTCR_EL2.
const RES1: u64 = 1 << 31;
const CACHEABLE_WALKS: u64 = 0b11_01_01 << 8;
const HA: u64 = 1 << 21;
const HD: u64 = 1 << 22;

// ESR_EL2.
const WNR: u64 = 1 << 6;
const FSC: u64 = 0x3f;
// Fault status, without the level.
const ADDRESS_SIZE: u64 = 0b0000 << 2;
const TRANSLATION: u64 = 0b0001 << 2;
const ACCESS_FLAG: u64 = 0b0010 << 2;
const PERMISSION: u64 = 0b0011 << 2;

const MIB: u64 = 1 << 20;
const GIB: u64 = 1 << 30;

/// VTCR_EL2 for so many address bits and the level to start at.
fn vtcr(gpa_bits: u64, root_level: u32) -> u64 {
    let sl0 = [0b10, 0b01, 0b00, 0b11][root_level as usize];
    RES1 | 0b101 << 16 | CACHEABLE_WALKS | sl0 << 6 | (64 - gpa_bits)
}

fn frame(number: u64) -> u64 {
    FRAMES + number * PAGE
}

/// Tables put together by hand.
struct Tables {
    bytes: Vec<u8>,
    root_level: u32,
}

impl Tables {
    /// With so many root tables, and the guest's page in them.
    fn new(root_level: u32, roots: usize) -> Self {
        let mut tables = Self {
            bytes: vec![0; roots * 4096],
            root_level,
        };
        tables.set(GUEST.gpa, 3, GUEST.hpa | ALL | LEAF);
        tables
    }

    fn with(mut self, gpa: u64, level: u32, descriptor: u64) -> Self {
        self.set(gpa, level, descriptor);
        self
    }

    /// Sets a descriptor; makes the tables above it.
    fn set(&mut self, gpa: u64, level: u32, descriptor: u64) {
        let mut table = 0;
        for upper in self.root_level..level {
            let at = self.at(table, gpa, upper);
            if self.word(at) == 0 {
                self.put(at, (TABLES + self.bytes.len() as u64) | TABLE);
                self.bytes.resize(self.bytes.len() + 4096, 0);
            }
            table = usize::try_from((self.word(at) & ADDRESS) - TABLES).unwrap();
        }
        self.put(self.at(table, gpa, level), descriptor);
    }

    fn get(&self, gpa: u64, level: u32) -> u64 {
        let mut table = 0;
        for upper in self.root_level..level {
            let next = self.word(self.at(table, gpa, upper));
            table = usize::try_from((next & ADDRESS) - TABLES).unwrap();
        }
        self.word(self.at(table, gpa, level))
    }

    /// Where a descriptor is. Concatenated roots are one table with more entries.
    fn at(&self, table: usize, gpa: u64, level: u32) -> usize {
        let index = gpa >> (39 - 9 * level);
        let index = if level == self.root_level {
            index
        } else {
            index % 512
        };
        table + usize::try_from(index).unwrap() * 8
    }

    fn word(&self, at: usize) -> u64 {
        u64::from_le_bytes(self.bytes[at..at + 8].try_into().unwrap())
    }

    fn put(&mut self, at: usize, word: u64) {
        self.bytes[at..at + 8].copy_from_slice(&word.to_le_bytes());
    }
}

fn ask(tables: &Tables, vtcr: u64, probes: &[(u64, Access)]) -> Answer {
    let answer = Arm
        .ask(&Scenario {
            control: [TABLES | 5 << 48, vtcr, 0, 0],
            probes: probes
                .iter()
                .map(|&(gpa, access)| Probe { gpa, access })
                .collect(),
            tables: tables.bytes.clone(),
        })
        .unwrap();
    assert_eq!(answer.outcomes.len(), probes.len());
    assert_eq!(answer.tables.len(), tables.bytes.len());
    assert_eq!(answer.writers.len() as u64, FRAMES_BYTES / PAGE);
    answer
}

/// The tables of an answer.
fn after(tables: &Tables, answer: &Answer) -> Tables {
    Tables {
        bytes: answer.tables.clone(),
        root_level: tables.root_level,
    }
}

fn done(value: u64) -> Outcome {
    Outcome::Done { value }
}

/// A violation must be of this kind, at this level, for this access.
#[track_caller]
fn assert_fault(outcome: &Outcome, gpa: u64, access: Access, kind: u64, level: u64) {
    let Outcome::Violation {
        gpa: reported,
        syndrome,
    } = *outcome
    else {
        panic!("{outcome:?}");
    };
    let class = match access {
        Access::Execute => EC_INSTRUCTION_ABORT,
        Access::Read | Access::Write => EC_DATA_ABORT,
    };
    assert_eq!(reported, gpa);
    assert_eq!(syndrome >> EC_SHIFT, class, "{syndrome:#x}");
    assert_eq!(syndrome & FSC, kind | level, "{syndrome:#x}");
    assert_eq!(syndrome & WNR != 0, access == Access::Write);
}

#[test]
fn leaves_of_every_size_lead_to_their_frames() {
    let top = (1 << 48) - PAGE;
    let tables = Tables::new(0, 1)
        .with(0, 3, frame(1) | ALL | LEAF)
        .with(2 * MIB, 2, (FRAMES + 4 * MIB) | ALL | BLOCK)
        .with(GIB, 1, 0x4000_0000 | ALL | BLOCK)
        .with(top, 3, frame(2) | ALL | LEAF);
    let gpas = [
        0,
        2 * MIB,
        4 * MIB - PAGE,
        GIB + FRAMES - 0x4000_0000,
        GIB + 128 * MIB - PAGE,
        top,
    ];
    let hpas = [
        frame(1),
        FRAMES + 4 * MIB,
        FRAMES + 6 * MIB - PAGE,
        FRAMES,
        FRAMES + FRAMES_BYTES - PAGE,
        frame(2),
    ];
    let probes: Vec<_> = [Access::Read, Access::Write, Access::Execute]
        .iter()
        .flat_map(|&access| gpas.map(|gpa| (gpa, access)))
        .collect();
    let answer = ask(&tables, vtcr(48, 0), &probes);
    assert_eq!(answer.outcomes[..6], hpas.map(done));
    assert_eq!(answer.outcomes[6..], [done(0); 12]);
    assert_eq!(answer.tables, tables.bytes);
    assert!(answer.log.is_empty());

    let written = answer.writers.iter().filter(|&&writer| writer != 0);
    assert_eq!(written.count(), 6);
    for (number, hpa) in (7..).zip(hpas) {
        let index = usize::try_from((hpa - FRAMES) / PAGE).unwrap();
        assert_eq!(answer.writers[index], number);
    }
}

#[test]
fn each_right_is_granted_and_refused_by_itself() {
    let accesses = [Access::Read, Access::Write, Access::Execute];
    for level in [1, 2, 3] {
        let (hpa, kind) = [
            (0, 0),
            (0x4000_0000, BLOCK),
            (FRAMES, BLOCK),
            (FRAMES, LEAF),
        ][level as usize];
        for rights in 0..8 {
            let allowed = [rights & 1 != 0, rights & 2 != 0, rights & 4 != 0];
            let descriptor = hpa
                | PLAIN
                | AF
                | kind
                | if allowed[0] { READ } else { 0 }
                | if allowed[1] { WRITE } else { 0 }
                | if allowed[2] { 0 } else { XN };
            let tables = Tables::new(1, 1).with(GIB, level, descriptor);
            let gpa = GIB + (FRAMES - hpa) % GIB;
            let answer = ask(&tables, vtcr(39, 1), &accesses.map(|access| (gpa, access)));
            for ((outcome, access), allowed) in answer.outcomes.iter().zip(accesses).zip(allowed) {
                match (allowed, access) {
                    (true, Access::Read) => assert_eq!(*outcome, done(FRAMES)),
                    (true, _) => assert_eq!(*outcome, done(0)),
                    (false, _) => {
                        assert_fault(outcome, gpa, access, PERMISSION, level.into());
                    }
                }
            }
            assert_eq!(answer.writers[0], if allowed[1] { 2 } else { 0 });
            assert_eq!(answer.tables, tables.bytes);
        }
    }
}

#[test]
fn execution_is_refused_by_exception_level() {
    let tables = Tables::new(1, 1)
        .with(GIB, 3, frame(0) | ALL | XN_EL1 | LEAF)
        .with(GIB + PAGE, 3, frame(1) | ALL | XN_EL0 | LEAF);
    let probes = [(GIB, Access::Execute), (GIB + PAGE, Access::Execute)];
    let answer = ask(&tables, vtcr(39, 1), &probes);
    assert_fault(&answer.outcomes[0], GIB, Access::Execute, PERMISSION, 3);
    assert_eq!(answer.outcomes[1], done(0));
}

#[test]
fn absent_and_reserved_descriptors_are_translation_faults() {
    let tables = Tables::new(0, 1)
        .with(2 * MIB, 3, 0)
        .with(4 * MIB, 2, 0)
        .with(2 * GIB, 1, 0)
        .with(1 << 40, 0, 0)
        .with(6 * MIB, 3, FRAMES | ALL | 0b01)
        .with(8 * MIB, 3, FRAMES | ALL | 0b10)
        .with(10 * MIB, 2, FRAMES | ALL | 0b10);
    let gpas = [
        (2 * MIB, 3),
        (4 * MIB, 2),
        (2 * GIB, 1),
        (1 << 40, 0),
        (6 * MIB, 3),
        (8 * MIB, 3),
        (10 * MIB, 2),
        // Beyond T0SZ there is no walk; it counts as level 0.
        (1 << 48, 0),
    ];
    for access in [Access::Read, Access::Write, Access::Execute] {
        let answer = ask(&tables, vtcr(48, 0), &gpas.map(|(gpa, _)| (gpa, access)));
        for (outcome, (gpa, level)) in answer.outcomes.iter().zip(gpas) {
            assert_fault(outcome, gpa, access, TRANSLATION, level);
        }
    }
}

/// The architecture has it with FEAT_LPA2 in use only (VTCR_EL2.DS). Should the emulator learn that, the
/// module's documentation must too.
#[test]
fn the_emulator_takes_a_block_at_level_0() {
    let tables = Tables::new(0, 1).with(1 << 39, 0, ALL | BLOCK);
    let answer = ask(
        &tables,
        vtcr(48, 0),
        &[((1 << 39) + frame(3), Access::Read)],
    );
    assert_eq!(answer.outcomes, [done(frame(3))]);
}

#[test]
fn addresses_beyond_the_physical_size_are_told_apart() {
    const PS_40_BITS: u64 = 0b010 << 16;
    let vtcr = vtcr(40, 1) & !(0b111 << 16) | PS_40_BITS;
    let tables = Tables::new(1, 2)
        .with(2 * MIB, 3, 1 << 40 | ALL | LEAF)
        .with(4 * MIB, 2, 1 << 40 | TABLE)
        .with(GIB, 1, 1 << 40 | ALL | BLOCK);
    let gpas = [(2 * MIB, 3), (4 * MIB, 2), (GIB, 1)];
    let answer = ask(&tables, vtcr, &gpas.map(|(gpa, _)| (gpa, Access::Read)));
    for (outcome, (gpa, level)) in answer.outcomes.iter().zip(gpas) {
        assert_fault(outcome, gpa, Access::Read, ADDRESS_SIZE, level);
    }
}

#[test]
fn concatenated_roots_are_one_table() {
    for (gpa_bits, root_level, roots) in [(40, 1, 2), (43, 1, 16), (34, 2, 16), (25, 3, 16)] {
        let top = (1 << gpa_bits) - PAGE;
        let middle = 1 << (gpa_bits - 1);
        let tables = Tables::new(root_level, roots)
            .with(middle, 3, frame(1) | ALL | LEAF)
            .with(top, 3, frame(2) | ALL | LEAF);
        let probes = [
            (middle, Access::Read),
            (top, Access::Read),
            (1 << gpa_bits, Access::Read),
        ];
        let answer = ask(&tables, vtcr(gpa_bits, root_level), &probes);
        assert_eq!(answer.outcomes[..2], [done(frame(1)), done(frame(2))]);
        assert_fault(
            &answer.outcomes[2],
            1 << gpa_bits,
            Access::Read,
            TRANSLATION,
            0,
        );
    }
}

#[test]
fn without_hardware_flags_the_access_flag_faults() {
    let leaf = FRAMES | PLAIN | READ | WRITE | DBM;
    let tables = Tables::new(1, 1)
        .with(2 * MIB, 3, leaf | LEAF)
        .with(4 * MIB, 2, leaf | BLOCK)
        .with(GIB, 1, leaf & !(GIB - 1) | PLAIN | READ | BLOCK);
    let gpas = [(2 * MIB, 3), (4 * MIB, 2), (GIB, 1)];
    for access in [Access::Read, Access::Write, Access::Execute] {
        // HD does nothing by itself.
        let answer = ask(
            &tables,
            vtcr(39, 1) | HD,
            &gpas.map(|(gpa, _)| (gpa, access)),
        );
        for (outcome, (gpa, level)) in answer.outcomes.iter().zip(gpas) {
            assert_fault(outcome, gpa, access, ACCESS_FLAG, level);
        }
        assert_eq!(answer.tables, tables.bytes);
    }
}

#[test]
fn the_hardware_sets_the_access_flag() {
    let leaf = PLAIN | READ;
    let tables = Tables::new(1, 1)
        .with(2 * MIB, 3, frame(1) | leaf | LEAF)
        .with(4 * MIB, 2, FRAMES | leaf | BLOCK)
        .with(GIB, 1, 0x4000_0000 | leaf | BLOCK)
        .with(6 * MIB, 3, frame(2) | leaf | LEAF)
        .with(8 * MIB, 3, frame(3) | leaf | LEAF)
        .with(10 * MIB, 3, frame(4) | leaf | XN | LEAF);
    let probes = [
        (2 * MIB, Access::Read),
        (4 * MIB, Access::Read),
        (GIB, Access::Read),
        (6 * MIB, Access::Execute),
        (8 * MIB, Access::Write),
        (10 * MIB, Access::Execute),
    ];
    let answer = ask(&tables, vtcr(39, 1) | HA, &probes);
    let after = after(&tables, &answer);
    for (gpa, level) in [(2 * MIB, 3), (4 * MIB, 2), (GIB, 1), (6 * MIB, 3)] {
        assert_eq!(after.get(gpa, level), tables.get(gpa, level) | AF);
    }
    // An access that is refused leaves nothing behind.
    for (outcome, (gpa, access)) in answer.outcomes[4..].iter().zip(&probes[4..]) {
        assert_fault(outcome, *gpa, *access, PERMISSION, 3);
        assert_eq!(after.get(*gpa, 3), tables.get(*gpa, 3));
    }
}

#[test]
fn the_hardware_sets_the_dirty_state() {
    let leaf = PLAIN | READ | DBM;
    let tables = Tables::new(1, 1)
        .with(2 * MIB, 3, frame(1) | leaf | LEAF)
        .with(4 * MIB, 2, FRAMES | leaf | BLOCK)
        .with(GIB, 1, 0x4000_0000 | leaf | BLOCK)
        .with(6 * MIB, 3, frame(2) | leaf | LEAF)
        .with(8 * MIB, 3, frame(3) | leaf | LEAF)
        .with(10 * MIB, 3, frame(4) | (leaf & !DBM) | LEAF)
        .with(12 * MIB, 3, frame(5) | leaf | CONTIGUOUS | LEAF)
        .with(12 * MIB + PAGE, 3, frame(6) | leaf | CONTIGUOUS | LEAF);
    let probes = [
        (2 * MIB, Access::Write),
        (4 * MIB, Access::Write),
        (GIB + FRAMES % GIB + PAGE, Access::Write),
        (6 * MIB, Access::Read),
        (8 * MIB, Access::Execute),
        (10 * MIB, Access::Write),
        (12 * MIB + PAGE, Access::Write),
    ];
    let answer = ask(&tables, vtcr(39, 1) | HA | HD, &probes);
    let after = after(&tables, &answer);
    for (gpa, level) in [(2 * MIB, 3), (4 * MIB, 2), (GIB, 1), (12 * MIB + PAGE, 3)] {
        assert_eq!(after.get(gpa, level), tables.get(gpa, level) | AF | WRITE);
    }
    // Neither reads nor fetches make dirty.
    for gpa in [6 * MIB, 8 * MIB] {
        assert_eq!(after.get(gpa, 3), tables.get(gpa, 3) | AF);
    }
    // Without DBM it is just not writable; a contiguous neighbour is left alone.
    assert_fault(&answer.outcomes[5], 10 * MIB, Access::Write, PERMISSION, 3);
    for gpa in [10 * MIB, 12 * MIB] {
        assert_eq!(after.get(gpa, 3), tables.get(gpa, 3));
    }
    assert_eq!(answer.writers[..8], [2, 3, 0, 0, 0, 0, 7, 0]);
}

#[test]
fn an_exception_of_the_guest_is_something_else() {
    const EC_DATA_ABORT_EL1: u64 = 0x25;
    const EXTERNAL_ABORT: u64 = 0x10;
    let tables = Tables::new(1, 1)
        .with(2 * MIB, 3, 0x5000_0000 | ALL | LEAF)
        .with(4 * MIB, 3, FRAMES | ALL | LEAF);
    let probes = [
        (2 * MIB, Access::Read),
        (1 << 52, Access::Read),
        (4 * MIB, Access::Read),
    ];
    let answer = ask(&tables, vtcr(39, 1), &probes);
    for (outcome, status) in answer.outcomes.iter().zip([EXTERNAL_ABORT, ADDRESS_SIZE]) {
        let Outcome::Other { syndrome } = *outcome else {
            panic!("{outcome:?}");
        };
        assert_eq!(syndrome >> EC_SHIFT, EC_DATA_ABORT_EL1);
        assert_eq!(syndrome & FSC, status);
    }
    assert_eq!(answer.outcomes[2], done(FRAMES));
}

#[test]
fn without_its_page_the_guest_cannot_try_anything() {
    let tables = Tables::new(1, 1).with(GUEST.gpa, 3, 0);
    let answer = ask(&tables, vtcr(39, 1), &[(2 * MIB, Access::Read)]);
    assert_fault(
        &answer.outcomes[0],
        GUEST.gpa,
        Access::Execute,
        TRANSLATION,
        3,
    );
}

#[test]
fn twenty_thousand_probes() {
    let mut tables = Tables::new(1, 1);
    let rights = [READ, WRITE, READ | WRITE].into_iter().cycle();
    for (page, right) in (0..512).zip(rights) {
        let leaf = frame(page) | PLAIN | right | DBM | LEAF;
        tables.set(GIB + page * PAGE, 3, leaf);
    }
    let accesses = [Access::Read, Access::Write, Access::Execute]
        .into_iter()
        .cycle();
    // 601 and 3 have no common factor: each page sees each access, and some pages are absent.
    let probes: Vec<_> = (0..20_000)
        .map(|number| GIB + number % 601 * PAGE)
        .zip(accesses)
        .collect();
    let answer = ask(&tables, vtcr(39, 1) | HA | HD, &probes);
    for (&(gpa, access), outcome) in probes.iter().zip(&answer.outcomes) {
        let page = (gpa - GIB) / PAGE;
        match (page, access) {
            // The next 2 MiB have no table.
            (512.., _) => assert_fault(outcome, gpa, access, TRANSLATION, 2),
            (_, Access::Read) if page % 3 == 1 => {
                assert_fault(outcome, gpa, access, PERMISSION, 3);
            }
            (_, Access::Read) => assert_eq!(*outcome, done(frame(page))),
            _ => assert_eq!(*outcome, done(0)),
        }
    }
}

#[test]
fn what_does_not_fit_is_refused() {
    let fitting = Scenario {
        control: [0; 4],
        probes: Vec::new(),
        tables: vec![0; 4096],
    };
    let probe = |gpa| Probe {
        gpa,
        access: Access::Read,
    };
    check(&fitting).unwrap();
    for (probes, tables_bytes) in [
        (vec![probe(0); size(MAX_PROBES) + 1], 4096),
        (vec![probe(8)], 4096),
        (vec![probe(GUEST.gpa)], 4096),
        (Vec::new(), 4095),
        (Vec::new(), 4096 + (16 << 20)),
    ] {
        let error = check(&Scenario {
            probes,
            tables: vec![0; tables_bytes],
            ..fitting.clone()
        })
        .unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::InvalidInput);
    }
    let error = parse(&fitting, &[0; 100]).unwrap_err();
    assert!(error.to_string().contains("100 bytes"), "{error}");
}
