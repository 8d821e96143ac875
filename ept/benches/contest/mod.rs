//! Who is measured at what: every figure of ept (P1 to P9) with Ferry, the plain loop and the peers that can do it.
//!
//! Criterion's benches and the table of ratios both run what is here. A contestant does the same work in every
//! round and says what came of it, so that whoever does less, or something else, is found out.
#![allow(
    dead_code,
    reason = "each bench uses a part of it, and the table of ratios all"
)]
#![allow(
    clippy::cast_precision_loss,
    reason = "counts and bytes that fit 52 bits, to be divided"
)]

mod clean;
mod cold;
mod map;
mod marks;
mod memory;
mod pattern;
mod protect;
mod runs;
mod split;
mod threads;
mod walk;

use std::hint::black_box;
use std::time::Instant;

/// Sizes.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Sizes {
    /// Guest memory for P7 to P9.
    pub(crate) gib: u64,
    /// Small everywhere: checks that all contestants agree, measures little.
    pub(crate) quick: bool,
}

impl Sizes {
    pub(crate) const PAGES_PER_GIB: u64 = 1 << 18;

    pub(crate) fn pages(self) -> u64 {
        self.gib * Self::PAGES_PER_GIB
    }
}

/// Whose time it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Role {
    /// Ferry: the one that the target speaks of.
    Ferry,
    /// Ferry, asked in another way: shown, not judged.
    Variant,
    /// Ferry on one thread, where two are judged.
    Alone,
    /// What a program does that knows the shape of just this: the limit.
    Plain,
    /// The limit on one thread.
    PlainAlone,
    /// Somebody else's.
    Peer,
}

/// One round.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Round {
    /// Nanoseconds, or bytes.
    pub(crate) amount: f64,
    /// What the amount is divided by.
    pub(crate) operations: u64,
    /// What came of it; the same for all contestants of a figure.
    pub(crate) result: u64,
}

impl Round {
    pub(crate) fn each(&self) -> f64 {
        self.amount / self.operations as f64
    }
}

/// One contestant of one figure.
pub(crate) struct Contestant {
    pub(crate) role: Role,
    pub(crate) name: &'static str,
    /// Puts things in place, untimed, then does the work.
    pub(crate) round: Box<dyn FnMut() -> Round>,
}

impl Contestant {
    pub(crate) fn new(
        role: Role,
        name: &'static str,
        round: impl FnMut() -> Round + 'static,
    ) -> Self {
        let round = Box::new(round);
        Self { role, name, round }
    }
}

/// What Ferry is to reach.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Target {
    /// At most this many times the plain loop.
    TimesPlain(f64),
    /// At least `peer` times as fast as the best peer, or at most `plain` times the plain loop.
    PeerOrPlain { peer: f64, plain: f64 },
    /// At most this many nanoseconds, or bytes.
    AtMost(f64),
    /// Never slower than the best of all others.
    NotSlower,
    /// At least this many times as fast as on one thread.
    Speedup(f64),
}

/// What is counted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Unit {
    Time,
    Bytes,
}

/// One figure, ready to be measured.
pub(crate) struct Figure {
    /// `P1` to `P9`.
    pub(crate) number: &'static str,
    pub(crate) what: String,
    pub(crate) unit: Unit,
    pub(crate) target: Target,
    pub(crate) contestants: Vec<Contestant>,
}

/// Makes the contestants of one figure, which takes time and memory: one figure at a time.
pub(crate) type Maker = Box<dyn Fn(Sizes) -> Figure>;

/// A figure that can be made.
pub(crate) struct Planned {
    pub(crate) number: &'static str,
    pub(crate) make: Maker,
}

impl Planned {
    fn new(number: &'static str, make: impl Fn(Sizes) -> Figure + 'static) -> Self {
        let make = Box::new(make);
        Self { number, make }
    }
}

/// P1 to P5: tables that hardware walks.
pub(crate) fn table_figures() -> Vec<Planned> {
    vec![
        Planned::new("P1", walk::warm),
        Planned::new("P1", walk::cold),
        Planned::new("P2", protect::live),
        Planned::new("P2", protect::detached),
        Planned::new("P3", split::figure),
        Planned::new("P4", map::map),
        Planned::new("P4", map::unmap),
        Planned::new("P5", threads::figure),
    ]
}

/// P6 to P8: the tracker's time.
pub(crate) fn tracker_figures() -> Vec<Planned> {
    let mut planned = vec![
        Planned::new("P6", |sizes| clean::figure(sizes, 64, 10_000.0)),
        Planned::new("P6", |sizes| clean::figure(sizes, 1024, 50_000.0)),
    ];
    for spread in pattern::Spread::ALL {
        for tenths in pattern::DENSITIES {
            planned.push(Planned::new("P7", move |sizes| {
                runs::figure(sizes, spread, tenths)
            }));
        }
    }
    planned.extend([
        Planned::new("P8", |_| marks::pages()),
        Planned::new("P8", |_| marks::runs()),
        Planned::new("P8", |_| marks::pages_by_two()),
        Planned::new("P8", |_| marks::runs_by_two()),
    ]);
    planned
}

/// P9: the tracker's memory.
pub(crate) fn memory_figures() -> Vec<Planned> {
    vec![
        Planned::new("P9", memory::in_detail),
        Planned::new("P9", memory::undivided),
    ]
}

/// Times `work`, whose result is the round's.
pub(crate) fn timed(operations: u64, work: impl FnOnce() -> u64) -> Round {
    let start = Instant::now();
    let result = black_box(work());
    Round {
        amount: nanos_since(start),
        operations,
        result,
    }
}

fn nanos_since(start: Instant) -> f64 {
    start.elapsed().as_secs_f64() * 1e9
}
