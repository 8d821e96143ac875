//! Measures how fast a guest dirties memory, with an epoch of its own and the dirty logs of the machine.
//!
//! A machine has one set of dirty logs, so a measurement and a migration exclude each other. A migration, or a call that
//! takes the machine away, interrupts a measurement first. A measurement during a migration is refused.

use std::collections::BTreeMap;
use std::ops::RangeInclusive;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use ept::{Epoch, EpochError, GpaRange, HarvestError, PAGE_SIZE, Source, Start};
use serde::{Deserialize, Serialize};

use super::calls::Call;
use super::state::Guest;
use super::{Monitor, MonitorError, source_name};
use crate::machine::{DirtyLogs, MachineError};

/// Allowed duration of a measurement in milliseconds.
pub const INTERVAL_MS: RangeInclusive<u64> = 10..=60_000;
/// Maximum number of pages whose log is cleared by one call, because KVM holds its MMU lock meanwhile.
const CLEAR_PAGES: u64 = 16 * 1024;

/// The body of `vm.dirty-rate`.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields, expecting = "an object")]
pub struct DirtyRateData {
    /// Duration of the measurement in milliseconds, within [`INTERVAL_MS`].
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

/// Result of a measurement.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct DirtyRate {
    /// Duration of the measurement in milliseconds.
    pub interval_ms: f64,
    /// Number of distinct pages that were written to.
    pub pages: u64,
    /// Pages dirtied a second.
    pub pages_per_s: f64,
    /// Bytes of dirty pages a second, which is the bandwidth that a migration needs.
    pub bytes_per_s: f64,
    /// Pages dirtied a second by the source that wrote to each page first.
    pub sources: BTreeMap<String, f64>,
}

/// Reasons why the dirty rate could not be measured.
#[derive(Debug, thiserror::Error)]
pub enum DirtyRateError {
    /// The interval is out of range.
    #[error("interval_ms: {0} cannot be, from {min} to {max}", min = INTERVAL_MS.start(), max = INTERVAL_MS.end())]
    Interval(u64),
    /// Another measurement is in progress.
    #[error("another measurement is at work; wait for its end")]
    AtWork,
    /// The guest was sent or switched off meanwhile.
    #[error("a migration or the guest's end came between")]
    Interrupted,
    /// The tracker has no room for another epoch.
    #[error(transparent)]
    Epoch(#[from] EpochError),
    /// There is no memory for the harvest.
    #[error(transparent)]
    Harvest(#[from] HarvestError),
    /// A dirty log failed.
    #[error(transparent)]
    Machine(#[from] MachineError),
}

impl Monitor {
    /// Measures how fast the guest dirties memory. Returns after the interval. Other calls are answered meanwhile.
    ///
    /// # Errors
    /// Returns [`MonitorError::Refused`] if the guest is off, [`MonitorError::Migrating`] during a migration, and
    /// [`MonitorError::DirtyRate`] if the interval is out of range or the measurement was interrupted.
    pub fn dirty_rate(&self, wish: &DirtyRateData) -> Result<DirtyRate, MonitorError> {
        if !INTERVAL_MS.contains(&wish.interval_ms) {
            return Err(DirtyRateError::Interval(wish.interval_ms).into());
        }
        let (running, logs) = {
            let state = self.allowed(Call::DirtyRate)?;
            let machine = state.guest().and_then(Guest::machine);
            let machine = machine.ok_or_else(|| self.refused(Call::DirtyRate, &state))?;
            (self.measurement.begin()?, Arc::clone(machine.dirty_logs()))
        };
        let measured = measure(&logs, Duration::from_millis(wish.interval_ms), &running);
        // The logs hold the guest's memory, which whoever interrupts a measurement wants back at its end.
        drop(logs);
        drop(running);
        Ok(measured?)
    }
}

fn measure(
    logs: &DirtyLogs,
    interval: Duration,
    running: &MeasurementGuard<'_>,
) -> Result<DirtyRate, DirtyRateError> {
    let measured = logs
        .start()
        .and_then(|()| clear_initial_bits(logs))
        .map_err(DirtyRateError::from)
        .and_then(|()| count_dirty(logs, interval, running));
    // The logs are stopped whether the measurement succeeded or not.
    logs.stop()?;
    measured
}

/// Clears a log that starts with every page dirty, because it does not tell which pages are written to until then.
fn clear_initial_bits(logs: &DirtyLogs) -> Result<(), MachineError> {
    if !logs.mode().starts_all_dirty() {
        return Ok(());
    }
    for memory in logs.ram().ranges() {
        let mut rest = Some(memory);
        while let Some(range) = rest {
            let pages = range.pages().min(CLEAR_PAGES);
            let Ok(chunk) = GpaRange::from_pages(range.first_page(), pages) else {
                break;
            };
            logs.clear(chunk, &ones(pages))?;
            rest = GpaRange::from_pages(chunk.end_page(), range.pages() - pages).ok();
        }
    }
    Ok(())
}

/// Returns a bitmap whose first `pages` bits are set.
fn ones(pages: u64) -> Vec<u64> {
    (0..pages.div_ceil(64))
        .map(|word| match pages - word * 64 {
            left @ 0..64 => (1 << left) - 1,
            _ => u64::MAX,
        })
        .collect()
}

fn count_dirty(
    logs: &DirtyLogs,
    interval: Duration,
    running: &MeasurementGuard<'_>,
) -> Result<DirtyRate, DirtyRateError> {
    let tracker = logs.ram().tracker();
    let epoch = Epoch::begin(tracker, "dirty-rate", Start::Clean)?;
    let (before, began) = (tracker.counters(), Instant::now());
    running.wait(interval)?;
    logs.sync()?;
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

/// Counts of pages and bytes are far below 2^52, so that the conversion is exact.
#[allow(clippy::cast_precision_loss)]
fn float(count: u64) -> f64 {
    count as f64
}

/// Allows one measurement at a time, which other threads can interrupt.
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
    /// The measuring thread is asked to end the measurement.
    Interrupted,
}

impl Measurement {
    /// Begins a measurement, which ends when the guard is dropped.
    fn begin(&self) -> Result<MeasurementGuard<'_>, DirtyRateError> {
        let mut state = self.lock();
        if *state != State::Idle {
            return Err(DirtyRateError::AtWork);
        }
        *state = State::AtWork;
        Ok(MeasurementGuard(self))
    }

    /// Interrupts the measurement in progress, and returns when it is over. The caller must hold the state of the guest,
    /// so that no other measurement begins.
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

/// A measurement in progress.
struct MeasurementGuard<'a>(&'a Measurement);

impl MeasurementGuard<'_> {
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

impl Drop for MeasurementGuard<'_> {
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
        let guard = measurement.begin().unwrap();
        assert!(matches!(
            measurement.begin().err(),
            Some(DirtyRateError::AtWork)
        ));
        thread::scope(|scope| {
            let measuring = scope.spawn(move || {
                let waited = guard.wait(Duration::from_secs(600));
                assert!(matches!(waited, Err(DirtyRateError::Interrupted)));
            });
            measurement.interrupt();
            assert!(measurement.begin().is_ok());
            measuring.join().unwrap();
        });
    }
}
