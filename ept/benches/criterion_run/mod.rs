//! Contestants as criterion's benchmarks: a group a figure.
#![allow(clippy::cast_precision_loss, reason = "counts of rounds fit 52 bits")]

use std::env;
use std::time::{Duration, Instant};

use criterion::{Criterion, Throughput};

use crate::contest::{Contestant, Figure, Planned, Sizes};

/// What a sample takes, or one round.
const SAMPLE: Duration = Duration::from_millis(100);

/// GiB of guest memory for P7, where this is set.
const GIB: &str = "FERRY_BENCH_GIB";

pub(crate) fn config() -> Criterion {
    Criterion::default()
        .sample_size(10)
        .warm_up_time(Duration::from_millis(100))
        .measurement_time(Duration::from_millis(1000))
}

pub(crate) fn figures(criterion: &mut Criterion, planned: &[Planned]) {
    let gib = env::var(GIB).ok().and_then(|gib| gib.parse().ok());
    let sizes = Sizes {
        gib: gib.unwrap_or(64),
        quick: false,
    };
    for planned in planned {
        figure(criterion, (planned.make)(sizes));
    }
}

fn figure(criterion: &mut Criterion, figure: Figure) {
    let name = format!("{} {}", figure.number, figure.what);
    let mut group = criterion.benchmark_group(name);
    for mut contestant in figure.contestants {
        let operations = (contestant.round)().operations;
        group.throughput(Throughput::Elements(operations));
        let name = format!("{} ({:?})", contestant.name, contestant.role);
        group.bench_function(name, |bencher| {
            bencher.iter_custom(|rounds| total(&mut contestant, rounds));
        });
    }
    group.finish();
}

/// Of the timed part of so many rounds; of fewer, and as much longer, where what is not timed takes long.
fn total(contestant: &mut Contestant, rounds: u64) -> Duration {
    let start = Instant::now();
    let (mut nanos, mut done) = (0.0, 0_u64);
    while done < rounds && (done == 0 || start.elapsed() < SAMPLE) {
        nanos += (contestant.round)().amount;
        done += 1;
    }
    Duration::from_secs_f64(nanos / 1e9 * (rounds as f64 / done as f64))
}
