//! How fast a guest dirties memory: an epoch of its own and the machine's dirty logs, for a while.
//!
//! Those logs are the machine's only ones, so a measurement and a migration exclude each other. The migration is what a
//! user waits for: it, and whatever takes the machine away, ends a measurement before it begins, while a measurement
//! during a migration is refused.

use std::collections::BTreeMap;
use std::ops::RangeInclusive;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use ept::{Epoch, EpochError, GpaRange, HarvestError, PAGE_SIZE, Source, Start};
use serde::{Deserialize, Serialize};

use super::{Monitor, MonitorError, source_name};
use crate::machine::{Machine, MachineError};

/// How long a measurement may take, in milliseconds.
pub const INTERVAL_MS: RangeInclusive<u64> = 10..=60_000;
/// Pages whose log is cleared by one call: KVM holds a lock meanwhile.
const CLEAR_PAGES: u64 = 16 * 1024;

/// The body of `vm.dirty-rate`.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields, expecting = "an object")]
pub struct DirtyRateData {
    /// For how long to measure, within [`INTERVAL_MS`].
    #[serde(default = "default_interval_ms")]
    pub interval_ms: u64,
}

fn default_interval_ms() -> u64 {
    1000
}

impl Default for DirtyRateData {
    fn default() -> Self {
        Self {
            interval_ms: default_interval_ms(),
        }
    }
}

/// What was measured.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct DirtyRate {
    /// How long it was measured.
    pub interval_ms: f64,
    /// Different pages that were written to meanwhile.
    pub pages: u64,
    /// The same for each second.
    pub pages_per_s: f64,
    /// The same in bytes, which is what a migration must carry.
    pub bytes_per_s: f64,
    /// Pages a second by who wrote to them first.
    pub sources: BTreeMap<String, f64>,
}

/// Why nothing was measured.
#[derive(Debug, thiserror::Error)]
pub enum DirtyRateError {
    /// An interval that cannot be.
    #[error("interval_ms: {0} cannot be, from {min} to {max}", min = INTERVAL_MS.start(), max = INTERVAL_MS.end())]
    Interval(u64),
    /// One at a time.
    #[error("another measurement is at work; wait for its end")]
    AtWork,
    /// The guest was sent, shut down or ended meanwhile.
    #[error("a migration or the guest's end came between")]
    Interrupted,
    /// No epoch for it.
    #[error(transparent)]
    Epoch(#[from] EpochError),
    /// No memory for what was dirty.
    #[error(transparent)]
    Harvest(#[from] HarvestError),
    /// KVM's dirty log.
    #[error(transparent)]
    Machine(#[from] MachineError),
}

impl Monitor {
    /// Measures how fast the guest dirties memory. Returns after the interval; other calls are answered meanwhile.
    ///
    /// # Errors
    /// An interval out of range, no guest that is on, a migration, another measurement, what came between, and KVM's.
    pub fn dirty_rate(&self, wish: &DirtyRateData) -> Result<DirtyRate, MonitorError> {
        if !INTERVAL_MS.contains(&wish.interval_ms) {
            return Err(DirtyRateError::Interval(wish.interval_ms).into());
        }
        let (turn, machine) = {
            let guest = self.guest();
            let machine = Arc::clone(self.unless_migrating("dirty-rate", &guest)?);
            (self.measurement.begin()?, machine)
        };
        let measured = measure(&machine, Duration::from_millis(wish.interval_ms), &turn);
        // The machine goes first: whoever waits for the turn's end wants its memory back.
        drop(machine);
        drop(turn);
        Ok(measured?)
    }
}

fn measure(
    machine: &Machine,
    interval: Duration,
    turn: &Turn<'_>,
) -> Result<DirtyRate, DirtyRateError> {
    let measured = machine
        .start_log()
        .and_then(|()| forget_what_was_before(machine))
        .map_err(DirtyRateError::from)
        .and_then(|()| watch(machine, interval, turn));
    // Whatever came of it: no log stays on that nobody reads.
    machine.stop_log()?;
    measured
}

/// A log that begins all dirty says nothing of a page until it is cleared.
fn forget_what_was_before(machine: &Machine) -> Result<(), MachineError> {
    if !machine.log_mode().starts_all_dirty() {
        return Ok(());
    }
    for memory in machine.ram().ranges() {
        let mut rest = Some(memory);
        while let Some(range) = rest {
            let pages = range.pages().min(CLEAR_PAGES);
            let Ok(chunk) = GpaRange::from_pages(range.first_page(), pages) else {
                break;
            };
            machine.clear_log(chunk, &ones(pages))?;
            rest = GpaRange::from_pages(chunk.end_page(), range.pages() - pages).ok();
        }
    }
    Ok(())
}

/// A bitmap of `pages` ones.
fn ones(pages: u64) -> Vec<u64> {
    (0..pages.div_ceil(64))
        .map(|word| match pages - word * 64 {
            left @ 0..64 => (1 << left) - 1,
            _ => u64::MAX,
        })
        .collect()
}

fn watch(
    machine: &Machine,
    interval: Duration,
    turn: &Turn<'_>,
) -> Result<DirtyRate, DirtyRateError> {
    let tracker = machine.ram().tracker();
    let epoch = Epoch::begin(tracker, "dirty-rate", Start::Clean)?;
    let (before, began) = (tracker.counters(), Instant::now());
    turn.wait(interval)?;
    machine.sync_log()?;
    let (newly, took) = (tracker.counters().since(&before), began.elapsed());
    let harvest = epoch.harvest(GpaRange::ALL)?;
    let pages = harvest.pages();
    harvest.commit();
    let per_s = |count: u64| float(count) / took.as_secs_f64();
    Ok(DirtyRate {
        interval_ms: took.as_secs_f64() * 1e3,
        pages,
        pages_per_s: per_s(pages),
        bytes_per_s: per_s(pages * PAGE_SIZE),
        sources: Source::ALL
            .into_iter()
            .map(|source| {
                (
                    source_name(source).to_owned(),
                    per_s(newly.dirtied_by(source)),
                )
            })
            .collect(),
    })
}

/// Counts of pages and bytes are far below 2^52, where floating point is exact.
#[allow(clippy::cast_precision_loss)]
fn float(count: u64) -> f64 {
    count as f64
}

/// One measurement at a time, which others can end.
#[derive(Default)]
pub(super) struct Measurement {
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
enum State {
    #[default]
    Idle,
    AtWork,
    /// Whoever measures is asked to end it.
    Interrupted,
}

impl Measurement {
    /// The turn to measure, until it is dropped.
    fn begin(&self) -> Result<Turn<'_>, DirtyRateError> {
        let mut state = self.lock();
        if *state != State::Idle {
            return Err(DirtyRateError::AtWork);
        }
        *state = State::AtWork;
        Ok(Turn(self))
    }

    /// Ends a measurement, and returns when it is over. Whoever calls sees to it that no other begins.
    pub(super) fn interrupt(&self) {
        let mut state = self.lock();
        if *state == State::Idle {
            return;
        }
        *state = State::Interrupted;
        self.changed.notify_all();
        let over = self
            .changed
            .wait_while(state, |state| *state != State::Idle);
        drop(over);
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The right to measure.
struct Turn<'a>(&'a Measurement);

impl Turn<'_> {
    fn wait(&self, interval: Duration) -> Result<(), DirtyRateError> {
        let (state, _) = self
            .0
            .changed
            .wait_timeout_while(self.0.lock(), interval, |state| *state == State::AtWork)
            .unwrap_or_else(PoisonError::into_inner);
        match *state {
            State::AtWork => Ok(()),
            State::Idle | State::Interrupted => Err(DirtyRateError::Interrupted),
        }
    }
}

impl Drop for Turn<'_> {
    fn drop(&mut self) {
        *self.0.lock() = State::Idle;
        self.0.changed.notify_all();
    }
}

#[cfg(test)]
mod tests {
    use std::thread;

    use super::*;

    #[test]
    fn ones_are_as_many_as_pages() {
        for pages in [1, 63, 64, 65, 128, 1000] {
            let words = ones(pages);
            assert_eq!(words.len() as u64, pages.div_ceil(64));
            let count: u64 = words.iter().map(|word| u64::from(word.count_ones())).sum();
            assert_eq!(count, pages);
            assert_eq!(
                words.last().unwrap().trailing_ones(),
                u32::try_from((pages - 1) % 64 + 1).unwrap()
            );
        }
    }

    #[test]
    fn one_measures_at_a_time_and_an_interruption_returns_when_it_is_over() {
        let measurement = Measurement::default();
        measurement.interrupt();
        let turn = measurement.begin().unwrap();
        assert!(matches!(
            measurement.begin().err(),
            Some(DirtyRateError::AtWork)
        ));
        thread::scope(|scope| {
            let measuring = scope.spawn(move || {
                let waited = turn.wait(Duration::from_secs(600));
                assert!(matches!(waited, Err(DirtyRateError::Interrupted)));
            });
            measurement.interrupt();
            assert!(measurement.begin().is_ok());
            measuring.join().unwrap();
        });
    }
}
