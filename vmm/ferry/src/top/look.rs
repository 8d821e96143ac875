//! One look at a monitor: everything that the view shows, asked for by calls.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::thread;
use std::time::{Duration, Instant};

use serde::de::DeserializeOwned;
use serde_json::json;

use migration::Report;
use vmm::api::{ClientError, Method, USUAL_LIMIT, call};
use vmm::monitor::{DirtyRate, VmInfo};

/// Names of counters and their values, by component.
pub(super) type Counters = BTreeMap<String, BTreeMap<String, u64>>;

/// What was seen.
#[derive(Clone, Debug)]
pub(super) struct Look {
    pub(super) at: Instant,
    /// None without a guest.
    pub(super) info: Option<VmInfo>,
    /// Empty where the guest is off.
    pub(super) counters: Counters,
    pub(super) progress: Report,
    /// None where it was not measured, because nobody asked, or the monitor said no.
    pub(super) dirty_rate: Option<DirtyRate>,
}

/// Looks at the monitor behind a socket.
pub(super) struct Watcher {
    pub(super) socket: PathBuf,
    /// From one look to the next; the dirty rate is measured for as long.
    pub(super) interval: Duration,
    pub(super) measures: bool,
}

impl Watcher {
    /// A look at once, without a dirty rate.
    ///
    /// # Errors
    /// Nobody there.
    pub(super) fn glance(&self) -> Result<Look, ClientError> {
        let info = self.get_if_any("vm.info")?;
        let counters = self.get_if_any("vm.counters")?.unwrap_or_default();
        let progress = self.get_if_any("vm.migration-progress")?;
        Ok(Look {
            at: Instant::now(),
            info,
            counters,
            progress: progress.unwrap_or_default(),
            dirty_rate: None,
        })
    }

    /// A look after an interval, for which the dirty rate is measured if it can be.
    ///
    /// # Errors
    /// Nobody there.
    pub(super) fn look(&self) -> Result<Look, ClientError> {
        let began = Instant::now();
        let measured = if self.measures {
            self.dirty_rate()
        } else {
            Ok(None)
        };
        thread::sleep(self.interval.saturating_sub(began.elapsed()));
        let dirty_rate = measured?;
        Ok(Look {
            dirty_rate,
            ..self.glance()?
        })
    }

    fn dirty_rate(&self) -> Result<Option<DirtyRate>, ClientError> {
        let interval_ms = u64::try_from(self.interval.as_millis()).unwrap_or(u64::MAX);
        let limit = USUAL_LIMIT.map(|limit| limit + self.interval);
        let wish = json!({ "interval_ms": interval_ms });
        let name = "vm.dirty-rate";
        if_any(
            name,
            call(&self.socket, Method::Put, name, Some(&wish), limit),
        )
    }

    fn get_if_any<T: DeserializeOwned>(&self, name: &str) -> Result<Option<T>, ClientError> {
        if_any(
            name,
            call(&self.socket, Method::Get, name, None, USUAL_LIMIT),
        )
    }
}

/// The answer, if the guest is there and in a state for it.
fn if_any<T: DeserializeOwned>(
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
