//! Leaf tables full of words that the crate never wrote: the embedder can, through the entries that a walk lends.
//!
//! Nothing may panic, and no table may be lost. What is above leaf tables is left alone: a pointer to a table that
//! the store did not give out may panic ([`ept::format::Tables`]).

use std::sync::atomic::{AtomicU64, Ordering};

use arbitrary::Arbitrary;
use ept::apply::{Existing, apply_to_pfn_range};
use ept::format::{Entry, HardwareFormat, MemoryType, Permissions};
use ept::stage2::{Attributes, ChangeError, Flush, Stage2};
use ept::{Gpa, GpaRange, Hpa, Level, Notifier};

use crate::decode::permissions;
use crate::formats::{Hardware, Job};
use crate::pages::pages;

const TABLES: usize = 8;
const BASE: Hpa = Hpa(0x10_0000_0000);
/// Two leaf tables.
const WINDOW: GpaRange = match GpaRange::from_pages(0, 1024) {
    Ok(range) => range,
    Err(_) => panic!("two tables"),
};

/// Words for leaf tables, repeated, and what is done to them.
pub(crate) struct Hostile<'a> {
    pub(crate) words: &'a [u64],
    pub(crate) steps: [Step; 4],
}

/// One thing that is done.
#[derive(Arbitrary, Clone, Copy, Debug)]
pub enum Step {
    Unmap(u16, u16),
    Protect(u16, u16, u8),
    Clean,
    Age,
    Split,
    Collapse,
    Map(u16, u16),
}

impl Job for Hostile<'_> {
    fn run<F: HardwareFormat>(self, format: F, _: Hardware) {
        let root = format.geometry().root_entries().div_ceil(512);
        let words: Vec<AtomicU64> = (0..(root + TABLES) * 512)
            .map(|_| AtomicU64::new(0))
            .collect();
        let stage2 = Stage2::new(format, &words, BASE).expect("room for the root");
        map(&stage2, WINDOW);
        scribble(&stage2, format, self.words);
        for step in self.steps {
            act(&stage2, step);
            let pages = WINDOW.first_page()..WINDOW.end_page();
            let mapped = pages
                .filter(|page| matches!(stage2.lookup(*page).1, Entry::Leaf(_)))
                .count();
            let dump = stage2.dump(WINDOW).to_string();
            assert_eq!(dump.is_empty(), mapped == 0, "{dump}");
        }
        act(&stage2, Step::Unmap(0, 1023));
        let whole = Notifier::new().open(GpaRange::ALL).expect("nobody objects");
        let (flush, result) = stage2.unmap(format.geometry().span(), &whole);
        result.expect("nothing is to be split");
        flush.done();
        assert_eq!(stage2.available(), TABLES, "tables were lost");
    }
}

fn map<F: HardwareFormat>(stage2: &Stage2<'_, F>, range: GpaRange) {
    let attributes = Attributes {
        permissions: Permissions::ALL,
        memory: MemoryType::WriteBack,
        largest: Level::PAGE,
    };
    // What is not absent is in the way.
    let _ = stage2.map(range, Hpa(0), attributes);
}

fn scribble<F: HardwareFormat>(stage2: &Stage2<'_, F>, format: F, words: &[u64]) {
    let open = Notifier::new().open(WINDOW).expect("nobody objects");
    // An entry that the format itself calls a table has none below it here, and none is promised.
    let mut words = words
        .iter()
        .filter(|raw| !matches!(format.decode(**raw, Level::PAGE), Entry::Table(_)))
        .cycle();
    let write = |entry: &AtomicU64, _: Gpa| {
        if let Some(raw) = words.next() {
            entry.store(*raw, Ordering::SeqCst);
        }
        Ok::<(), ()>(())
    };
    let (flush, result) = apply_to_pfn_range(stage2, WINDOW, &open, Existing::Refuse, write);
    result.expect("small pages");
    flush.done();
}

/// Pages between the two, in any order.
fn between(one: u16, other: u16) -> GpaRange {
    let (one, other) = (u64::from(one % 1024), u64::from(other % 1024));
    pages(one.min(other), one.max(other) + 1)
}

fn act<F: HardwareFormat>(stage2: &Stage2<'_, F>, step: Step) {
    let open = Notifier::new().open(WINDOW).expect("nobody objects");
    let record = |run: GpaRange| assert!(WINDOW.covers(&run));
    let (flush, result): (Flush<'_, '_, F>, _) = match step {
        Step::Unmap(one, other) => stage2.unmap(between(one, other), &open),
        Step::Protect(one, other, bits) => {
            stage2.protect(between(one, other), permissions(bits), &open)
        }
        Step::Clean => stage2.clean(WINDOW, &open, record),
        Step::Age => stage2.age(WINDOW, &open, record),
        Step::Split => stage2.split(WINDOW, Level::PAGE, &open),
        Step::Collapse => stage2.collapse(WINDOW, Level::MIB2, &open),
        Step::Map(one, other) => return map(stage2, between(one, other)),
    };
    assert!(matches!(result, Ok(()) | Err(ChangeError::Unsupported(_))));
    flush.done();
}
