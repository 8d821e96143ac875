//! Hardware tables under several threads at once: disjoint ranges, and hardware that sets flags meanwhile.

mod mmu;
mod model;
mod tables;

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread;

use ept::format::{
    ArmFlags, ArmStage2, Entry, Ept, EptFeatures, EptLevels, HardwareFormat, MemoryType, Npt,
    Permissions,
};
use ept::stage2::{Attributes, Stage2};
use ept::{Hpa, Level};
use mmu::{Kind, Mmu, Touch};
use model::Pages;
use tables::{BASE, open, pages, words};

const THREADS: u64 = 4;
/// Pages of each thread: 8 MiB, so that all share the tables above those of 4 KiB entries.
const WINDOW: u64 = 2048;
const ROUNDS: u64 = 300;

/// Steele, Lea and Flood's SplitMix64.
fn random(state: &mut u64) -> u64 {
    *state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
    let mixed = (*state ^ *state >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let mixed = (mixed ^ mixed >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
    mixed ^ mixed >> 31
}

/// Random maps, protections and unmappings of a window of its own; then every page of it is what it should be.
fn churn<F: HardwareFormat>(stage2: &Stage2<'_, F>, number: u64) {
    let base = number * WINDOW;
    let mut state = number;
    let mut model = Pages::new();
    for _ in 0..ROUNDS {
        let at = random(&mut state) % WINDOW;
        let count = (1 + random(&mut state) % 700).min(WINDOW - at);
        let range = pages(base + at, count);
        let permissions = [Permissions::READ, Permissions::ALL][usize::from(state & 64 != 0)];
        if model.first(range).is_none() {
            let largest = [Level::PAGE, Level::MIB2][usize::from(state & 128 != 0)];
            let memory = MemoryType::WriteBack;
            let attributes = Attributes {
                permissions,
                memory,
                largest,
            };
            let hpa = Hpa(range.start().0);
            stage2.map(range, hpa, attributes).unwrap();
            model.set(range, permissions);
        } else if state & 256 != 0 {
            let (flush, result) = stage2.protect(range, permissions, &open());
            result.unwrap();
            flush.done();
            model.update(range, |mapped| mapped.map(|_| permissions));
        } else {
            let (flush, result) = stage2.unmap(range, &open());
            result.unwrap();
            flush.done();
            model.clear(range);
        }
    }
    for page in base..base + WINDOW {
        let expected = model.get(page);
        let (level, entry) = stage2.lookup(page);
        let found = match entry {
            Entry::Leaf(leaf) => {
                let inside = (page % level.pages()) << 12;
                assert_eq!(leaf.hpa.0 + inside, page << 12);
                Some(leaf.permissions)
            }
            _ => None,
        };
        assert_eq!(found, expected, "page {page:#x} of thread {number}");
    }
}

/// S7, S9: threads on disjoint ranges do not disturb each other, and no table is lost or used twice.
#[test]
fn disjoint_ranges_are_changed_at_once() {
    let words = words(64);
    let stage2 = Stage2::new(Npt::FourLevels, &words, BASE).unwrap();
    let all = stage2.available();
    thread::scope(|scope| {
        for number in 0..THREADS {
            let stage2 = &stage2;
            scope.spawn(move || churn(stage2, number));
        }
    });
    let (flush, result) = stage2.unmap(pages(0, 1 << 36), &open());
    result.unwrap();
    flush.done();
    assert_eq!(stage2.available(), all);
}

/// A guest that writes a page and then sets its dirty flag, as hardware does; a migration that cleans first and
/// copies after. What it has at the end is what the guest wrote last.
fn no_write_is_lost<F: HardwareFormat>(format: F, kind: Kind) {
    let words = words(64);
    let stage2 = Stage2::new(format, &words, BASE).unwrap();
    let attributes = Attributes {
        permissions: Permissions::ALL,
        memory: MemoryType::WriteBack,
        largest: Level::MIB2,
    };
    stage2.map(pages(0, WINDOW), Hpa(0), attributes).unwrap();
    let (flush, result) = stage2.split(pages(0, WINDOW / 2), Level::PAGE, &open());
    result.unwrap();
    flush.done();
    let memory: Vec<AtomicU64> = (0..WINDOW).map(|_| AtomicU64::new(0)).collect();
    let ended = AtomicBool::new(false);
    let mut copy = vec![0; memory.len()];
    let mut carry = |stage2: &Stage2<'_, F>| {
        let (flush, result) = stage2.clean(pages(0, WINDOW), &open(), |run| {
            for page in run.first_page()..run.end_page() {
                let page = usize::try_from(page).unwrap();
                copy[page] = memory[page].load(Ordering::SeqCst);
            }
        });
        result.unwrap();
        let changed = flush.tally().entries;
        flush.done();
        changed
    };
    let mut cleaned = 0;
    thread::scope(|scope| {
        scope.spawn(|| {
            let mmu = Mmu::new(kind, &words, BASE.0);
            let mut state = 7;
            for stamp in 1..=200_000 {
                let page = random(&mut state) % WINDOW;
                memory[usize::try_from(page).unwrap()].store(stamp, Ordering::SeqCst);
                mmu.touch(page << 12, Touch::Write);
            }
            ended.store(true, Ordering::SeqCst);
        });
        while !ended.load(Ordering::SeqCst) {
            cleaned += carry(&stage2);
        }
    });
    cleaned += carry(&stage2);
    assert!(cleaned > 0, "something was dirty");
    let written: Vec<u64> = memory
        .iter()
        .map(|page| page.load(Ordering::SeqCst))
        .collect();
    assert_eq!(copy, written);
}

/// S7, S16: nothing is cleaned unrecorded, whatever hardware does meanwhile.
#[test]
fn no_write_is_lost_between_hardware_and_a_harvest() {
    let ept = Ept {
        levels: EptLevels::Four,
        features: EptFeatures::ACCESSED_DIRTY,
    };
    no_write_is_lost(ept, mmu::EPT4);
    no_write_is_lost(Npt::FourLevels, mmu::NPT4);
    let arm = ArmStage2::new(40, ArmFlags::AccessedDirty).unwrap();
    no_write_is_lost(arm, mmu::ARM40);
}
