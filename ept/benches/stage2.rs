//! P1 to P5: hardware tables, beside a plain loop over the same words.
//!
//!     cargo bench -p ferry-ept --bench stage2
//!
//! 1 GiB in 4 KiB entries of Intel's EPT: 262,144. "plain" is what a program would do that knows the shape of just
//! this table: a loop over its leaf tables, with atomics where entries are live. All of one build: release, thin
//! link-time optimisation, four codegen units.
#![allow(missing_docs, reason = "the macro makes a public function")]

use std::hint::black_box;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread;
use std::time::Duration;

use criterion::{BatchSize, Criterion, Throughput, criterion_group, criterion_main};
use ept::format::{Entry, Ept, EptFeatures, EptLevels, Leaf, MemoryType, Permissions, Tables};
use ept::stage2::{Attributes, Stage2};
use ept::walk::{Action, EachEntry, Look, Page, PageVisitor, Place, Run, Visitor, Walk};
use ept::{GpaRange, Hpa, Level, Notifier, OpenRange};

const PAGES: u64 = 1 << 18;
const BASE: Hpa = Hpa(0x10_0000_0000);
/// The root, a table each of the two levels below, and 512 leaf tables.
const TABLES: usize = 515;
/// The first leaf table: tables are given out in order, and the leaf tables of a map come one after the other.
const FIRST_LEAF: usize = 3 * 512;
const PRESENT: u64 = 7;
const WRITE: u64 = 2;
const FORMAT: Ept = Ept {
    levels: EptLevels::Four,
    features: EptFeatures::ACCESSED_DIRTY,
};
const PAGE_BY_PAGE: Attributes = Attributes {
    permissions: Permissions::ALL,
    memory: MemoryType::WriteBack,
    largest: Level::PAGE,
};

fn words() -> Vec<AtomicU64> {
    (0..TABLES * 512).map(|_| AtomicU64::new(0)).collect()
}

fn all() -> GpaRange {
    GpaRange::from_pages(0, PAGES).unwrap()
}

fn open() -> OpenRange {
    Notifier::new().open(GpaRange::ALL).unwrap()
}

fn mapped(words: &[AtomicU64]) -> Stage2<'_, Ept> {
    let stage2 = Stage2::new(FORMAT, words, BASE).unwrap();
    stage2.map(all(), Hpa(0), PAGE_BY_PAGE).unwrap();
    stage2
}

/// Adds up what is present, a leaf table at a time.
struct Sum(u64);

impl<'t, 'm> Visitor<'t, Stage2<'m, Ept>, Look> for Sum {
    type Stop = ();

    fn entry(&mut self, _: &Place<'_, 't, Stage2<'m, Ept>, Look>) -> Action<()> {
        Action::Continue
    }

    fn run(&mut self, run: &Run<'_, 't, Stage2<'m, Ept>, Look>) -> Action<()> {
        for index in 0..512 {
            let raw = run.peek(index);
            if raw & PRESENT != 0 {
                self.0 = self.0.wrapping_add(raw);
            }
        }
        Action::Continue
    }
}

/// The same by decoded entries.
struct SumOfPages(u64);

impl<'t, 'm> PageVisitor<'t, Stage2<'m, Ept>, Look> for SumOfPages {
    type Stop = ();

    fn entry(&mut self, _: &Place<'_, 't, Stage2<'m, Ept>, Look>) -> Action<()> {
        Action::Continue
    }

    fn page(&mut self, _: &Run<'_, 't, Stage2<'m, Ept>, Look>, page: Page<Leaf>) -> Action<()> {
        if let Entry::Leaf(leaf) = page.entry {
            self.0 = self.0.wrapping_add(leaf.hpa.0);
        }
        Action::Continue
    }
}

fn p1_walk(c: &mut Criterion) {
    let words = words();
    let stage2 = mapped(&words);
    let mut group = c.benchmark_group("P1 walk 1 GiB");
    group.throughput(Throughput::Elements(PAGES));
    group.bench_function("plain", |b| {
        b.iter(|| {
            let mut sum = 0_u64;
            for word in &words[FIRST_LEAF..][..512 * 512] {
                let raw = word.load(Ordering::Acquire);
                if raw & PRESENT != 0 {
                    sum = sum.wrapping_add(raw);
                }
            }
            sum
        });
    });
    group.bench_function("runs", |b| {
        b.iter(|| {
            let mut sum = Sum(0);
            let outcome = Walk::look(&stage2, all()).run(&mut sum);
            black_box(outcome);
            sum.0
        });
    });
    group.bench_function("entries", |b| {
        b.iter(|| {
            let mut sum = EachEntry(SumOfPages(0));
            let outcome = Walk::look(&stage2, all()).run(&mut sum);
            black_box(outcome);
            sum.0.0
        });
    });
    group.finish();
}

fn p2_protect(c: &mut Criterion) {
    let words = words();
    let stage2 = mapped(&words);
    let open = open();
    let mut group = c.benchmark_group("P2 write-protect and release 1 GiB, live");
    group.throughput(Throughput::Elements(2 * PAGES));
    group.bench_function("plain", |b| {
        b.iter(|| {
            for word in &words[FIRST_LEAF..][..512 * 512] {
                word.fetch_and(!WRITE, Ordering::SeqCst);
            }
            for word in &words[FIRST_LEAF..][..512 * 512] {
                word.fetch_or(WRITE, Ordering::SeqCst);
            }
        });
    });
    group.bench_function("protect", |b| {
        b.iter(|| {
            for permissions in [
                Permissions::ALL.without(Permissions::WRITE),
                Permissions::ALL,
            ] {
                let (flush, result) = stage2.protect(all(), permissions, &open);
                result.unwrap();
                flush.done();
            }
        });
    });
    group.finish();
}

fn p3_split(c: &mut Criterion) {
    let words = words();
    let stage2 = Stage2::new(FORMAT, &words, BASE).unwrap();
    let large = Attributes {
        largest: Level::MIB2,
        ..PAGE_BY_PAGE
    };
    let one = GpaRange::from_pages(0, 512).unwrap();
    stage2.map(one, Hpa(0), large).unwrap();
    let open = open();
    let mut group = c.benchmark_group("P3 split 2 MiB");
    group.bench_function("split", |b| {
        b.iter_batched(
            || {
                let (flush, result) = stage2.collapse(one, Level::MIB2, &open);
                result.unwrap();
                flush.done();
            },
            |()| {
                let (flush, result) = stage2.split(one, Level::PAGE, &open);
                result.unwrap();
                flush.done();
            },
            BatchSize::PerIteration,
        );
    });
    let table: Vec<AtomicU64> = (0..512).map(|_| AtomicU64::new(0)).collect();
    group.bench_function("plain", |b| {
        b.iter(|| {
            for (index, word) in (0..).zip(&table) {
                word.store(black_box(0x37) | index << 12, Ordering::Relaxed);
            }
        });
    });
    group.finish();
}

fn p4_map_and_unmap(c: &mut Criterion) {
    let words = words();
    let stage2 = Stage2::new(FORMAT, &words, BASE).unwrap();
    let open = open();
    let mut group = c.benchmark_group("P4 map and unmap 1 GiB");
    group.throughput(Throughput::Elements(PAGES));
    let unmap = || {
        let (flush, result) = stage2.unmap(all(), &open);
        result.unwrap();
        flush.done();
    };
    group.bench_function("map", |b| {
        b.iter_batched(
            unmap,
            |()| stage2.map(all(), Hpa(0), PAGE_BY_PAGE).unwrap(),
            BatchSize::PerIteration,
        );
    });
    unmap();
    group.bench_function("unmap", |b| {
        b.iter_batched(
            || stage2.map(all(), Hpa(0), PAGE_BY_PAGE).unwrap(),
            |()| unmap(),
            BatchSize::PerIteration,
        );
    });
    group.bench_function("plain map", |b| {
        b.iter(|| {
            for (index, word) in (0..).zip(&words[FIRST_LEAF..][..512 * 512]) {
                word.store(black_box(0x37) | index << 12, Ordering::Relaxed);
            }
        });
    });
    group.finish();
}

/// Protects and releases `range` a few times.
fn toggle(stage2: &Stage2<'_, Ept>, range: GpaRange, open: &OpenRange) {
    for permissions in [Permissions::READ, Permissions::ALL] {
        let (flush, result) = stage2.protect(range, permissions, open);
        result.unwrap();
        flush.done();
    }
}

fn p5_two_threads(c: &mut Criterion) {
    let words = words();
    let stage2 = mapped(&words);
    let open = open();
    let halves = [0, PAGES / 2].map(|first| GpaRange::from_pages(first, PAGES / 2).unwrap());
    let mut group = c.benchmark_group("P5 write-protect and release 512 MiB a thread");
    group.bench_function("one thread, both halves", |b| {
        b.iter(|| halves.map(|half| toggle(&stage2, half, &open)));
    });
    group.bench_function("two threads", |b| {
        b.iter(|| {
            thread::scope(|scope| {
                for half in halves {
                    let (stage2, open) = (&stage2, &open);
                    scope.spawn(move || toggle(stage2, half, open));
                }
            });
        });
    });
    group.finish();
    assert_eq!(stage2.geometry().root_entries(), 512);
}

criterion_group! {
    name = benches;
    config = Criterion::default()
        .sample_size(20)
        .warm_up_time(Duration::from_millis(300))
        .measurement_time(Duration::from_secs(2));
    targets = p1_walk, p2_protect, p3_split, p4_map_and_unmap, p5_two_threads
}
criterion_main!(benches);
