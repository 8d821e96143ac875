//! Samples of a monitor: everything that the view shows, read by API calls.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::thread;
use std::time::{Duration, Instant};

use serde::de::DeserializeOwned;
use serde_json::json;

use migration::Report;
use vmm::api::{ClientError, Method, USUAL_LIMIT, call};
use vmm::monitor::{DirtyRate, VmInfo};

/// Values of counters by component and name.
pub(super) type Counters = BTreeMap<String, BTreeMap<String, u64>>;

/// State of a monitor at one time.
#[derive(Clone, Debug)]
pub(super) struct Sample {
    /// Time at which the sample was taken.
    pub(super) at: Instant,
    /// Configuration and state of the guest. `None` if there is no guest.
    pub(super) info: Option<VmInfo>,
    /// Counters of the guest. Empty if the guest is off.
    pub(super) counters: Counters,
    /// Progress of the migration.
    pub(super) progress: Report,
    /// Dirty rate in the interval before the sample. `None` if it was not measured or the monitor refused to measure it.
    pub(super) dirty_rate: Option<DirtyRate>,
}

/// Takes samples of the monitor at an API socket.
pub(super) struct Sampler {
    /// API socket of the monitor.
    pub(super) socket: PathBuf,
    /// Time between two samples, in which the dirty rate is measured.
    pub(super) interval: Duration,
    /// Whether the dirty rate is measured.
    pub(super) logging: Logging,
}

/// Whether dirty logging is enabled to measure the dirty rate.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Logging {
    On,
    Off,
}

impl Sampler {
    /// Takes a sample immediately, without a dirty rate.
    ///
    /// # Errors
    /// Returns [`ClientError`] if the monitor cannot be reached or its answer is invalid.
    pub(super) fn sample_now(&self) -> Result<Sample, ClientError> {
        let info = self.get("vm.info")?;
        let counters = self.get("vm.counters")?.unwrap_or_default();
        let progress = self.get("vm.migration-progress")?;
        Ok(Sample {
            at: Instant::now(),
            info,
            counters,
            progress: progress.unwrap_or_default(),
            dirty_rate: None,
        })
    }

    /// Waits for one interval, measures the dirty rate in it, and takes a sample.
    ///
    /// # Errors
    /// Returns [`ClientError`] if the monitor cannot be reached or its answer is invalid.
    pub(super) fn sample_interval(&self) -> Result<Sample, ClientError> {
        let began = Instant::now();
        let measured = match self.logging {
            Logging::On => self.dirty_rate(),
            Logging::Off => Ok(None),
        };
        // Waits even after an error, so that a dead monitor is not polled in a busy loop.
        thread::sleep(self.interval.saturating_sub(began.elapsed()));
        let dirty_rate = measured?;
        Ok(Sample {
            dirty_rate,
            ..self.sample_now()?
        })
    }

    fn dirty_rate(&self) -> Result<Option<DirtyRate>, ClientError> {
        let interval_ms = u64::try_from(self.interval.as_millis()).unwrap_or(u64::MAX);
        let limit = USUAL_LIMIT.map(|limit| limit + self.interval);
        let body = json!({ "interval_ms": interval_ms });
        let name = "vm.dirty-rate";
        accepted(
            name,
            call(&self.socket, Method::Put, name, Some(&body), limit),
        )
    }

    fn get<T: DeserializeOwned>(&self, name: &str) -> Result<Option<T>, ClientError> {
        accepted(
            name,
            call(&self.socket, Method::Get, name, None, USUAL_LIMIT),
        )
    }
}

/// Decodes an answer. Returns `None` if the monitor refused the call because there is no guest or its state does not allow
/// the call.
fn accepted<T: DeserializeOwned>(
    name: &str,
    answer: Result<serde_json::Value, ClientError>,
) -> Result<Option<T>, ClientError> {
    match answer {
        Ok(value) => serde_json::from_value(value)
            .map(Some)
            .map_err(|error| ClientError::Broken {
                call: name.into(),
                why: error.to_string(),
            }),
        Err(ClientError::Refused {
            status: 404 | 405 | 409,
            ..
        }) => Ok(None),
        Err(error) => Err(error),
    }
}
