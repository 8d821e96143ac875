//! Figures that the view shows: rates between the last two samples, formatted as lines of text.

use ept::{PAGE_SIZE, Source};

use super::sample::{Counters, Sample};
use migration::{Phase, Report};
use vmm::monitor::source_name;

const MIB: f64 = 1024.0 * 1024.0;

/// The last two samples of a monitor.
#[derive(Default)]
pub(super) struct Figures {
    now: Option<Sample>,
    before: Option<Sample>,
}

/// Dirty pages per second.
pub(super) struct Dirty {
    /// Rate of each source: the vCPUs, and each kind of device.
    sources: Vec<(&'static str, f64)>,
    /// Suffix of the title that says where the rates come from, if they were not measured for the view.
    pub(super) note: &'static str,
}

impl Figures {
    /// Adds a sample. Returns true if there are two, so that there are rates.
    pub(super) fn push(&mut self, sample: Sample) -> bool {
        self.before = self.now.replace(sample);
        self.before.is_some()
    }

    /// Returns one line about the state and the size of the guest.
    pub(super) fn headline(&self) -> String {
        match self.now.as_ref().and_then(|sample| sample.info.as_ref()) {
            None => "no guest".to_owned(),
            Some(info) => format!(
                "{:?}, {} vCPUs, {:.0} MiB",
                info.state,
                info.config.cpus.boot_vcpus,
                float(info.memory_actual_size) / MIB
            ),
        }
    }

    /// Returns the progress of the migration.
    pub(super) fn progress(&self) -> Option<&Report> {
        self.now.as_ref().map(|sample| &sample.progress)
    }

    fn counters(&self) -> Option<&Counters> {
        self.now.as_ref().map(|sample| &sample.counters)
    }

    /// Returns the time between the two samples in seconds.
    fn seconds(&self) -> Option<f64> {
        let (now, before) = (self.now.as_ref()?, self.before.as_ref()?);
        Some(now.at.duration_since(before.at).as_secs_f64()).filter(|seconds| *seconds > 0.0)
    }

    /// Returns the growth of a counter per second between the two samples. Returns `None` if the counter decreased, which it
    /// does when the guest is booted again.
    fn growth(&self, component: &str, counter: &str) -> Option<f64> {
        let of = |sample: &Sample| sample.counters.get(component)?.get(counter).copied();
        let (now, before) = (of(self.now.as_ref()?)?, of(self.before.as_ref()?)?);
        Some(float(now.checked_sub(before)?) / self.seconds()?)
    }

    /// Returns the dirty rates.
    pub(super) fn dirty(&self) -> Dirty {
        let measured = self
            .now
            .as_ref()
            .and_then(|sample| sample.dirty_rate.as_ref());
        let active = self
            .progress()
            .is_some_and(|progress| progress.phase.is_active());
        let rate = |name: &str| match measured {
            Some(rate) => rate.sources.get(name).copied(),
            None => self.growth("tracker", &format!("dirtied_by_{name}_pages")),
        };
        let sources = Source::ALL
            .into_iter()
            .map(|source| source_name(source))
            .map(|name| (name, rate(name).unwrap_or_default()));
        let note = match (measured, active) {
            (Some(_), _) => "",
            (None, true) => " (migration log)",
            (None, false) => " (vCPUs not logged)",
        };
        Dirty {
            sources: sources.collect(),
            note,
        }
    }

    /// Returns a table of the vCPUs. vCPUs with the largest share of stall time come first, because a terminal may not have
    /// room for all.
    pub(super) fn vcpu_lines(&self) -> Vec<String> {
        let mut vcpus: Vec<(u32, f64, u64, u64)> = self
            .counters()
            .into_iter()
            .flatten()
            .filter_map(|(name, counters)| {
                let index = name.strip_prefix("vcpu")?.parse().ok()?;
                let stalled = self.growth(name, "stall_us").unwrap_or_default() / 1e6;
                let counter = |of: &str| counters.get(of).copied().unwrap_or_default();
                Some((index, stalled, counter("stall_us"), counter("stops")))
            })
            .collect();
        vcpus.sort_by(|a, b| b.1.total_cmp(&a.1).then(a.0.cmp(&b.0)));
        if vcpus.is_empty() {
            return vec!["off".to_owned()];
        }
        let mut lines = vec![format!(
            "{:<8}{:>7}{:>11}{:>8}",
            "", "stalled", "stall ms", "stops"
        )];
        lines.extend(vcpus.into_iter().map(|(index, stalled, stall_us, stops)| {
            let name = format!("vcpu{index}");
            let percent = stalled.min(1.0) * 100.0;
            let stall_ms = float(stall_us) / 1e3;
            format!("{name:<8}{percent:>5.1} %{stall_ms:>11.1}{stops:>8}")
        }));
        lines
    }

    /// Returns a table of the device counters.
    pub(super) fn device_lines(&self) -> Vec<String> {
        let devices = self.counters().into_iter().flatten();
        let counters = devices
            .filter(|(name, _)| name.starts_with('_'))
            .flat_map(|(device, counters)| counters.iter().map(move |of| (device, of)));
        let lines: Vec<String> = counters
            .map(|(device, (counter, value))| {
                let per_s = self.growth(device, counter).unwrap_or_default();
                format!("{device:<12}{counter:<24}{value:>16}{per_s:>14.0}/s")
            })
            .collect();
        match lines.is_empty() {
            true => vec!["none".to_owned()],
            false => lines,
        }
    }

    /// Returns the phase and the figures of the migration.
    pub(super) fn migration_lines(&self) -> Vec<String> {
        let Some(progress) = self
            .progress()
            .filter(|progress| progress.phase != Phase::None)
        else {
            return vec!["none".to_owned()];
        };
        let url = progress.url.as_deref().unwrap_or_default();
        let mut lines = vec![
            format!("{}  {url}", progress.phase),
            format!(
                "{} rounds, {:.0} MiB sent, {:.1} s, throttled {} %, downtime {:.1} ms",
                progress.rounds.len(),
                float(progress.bytes_sent) / MIB,
                progress.total_ms / 1e3,
                progress.throttle_percent,
                progress.downtime_ms,
            ),
        ];
        lines.extend(progress.message.clone());
        lines
    }
}

impl Dirty {
    /// Returns the sum over all sources.
    pub(super) fn total(&self) -> f64 {
        self.sources.iter().map(|(_, rate)| rate).sum()
    }

    /// Returns a table of the sources.
    pub(super) fn lines(&self) -> Vec<String> {
        let all = [("all", self.total())];
        let rows = self.sources.iter().chain(&all);
        rows.map(|(name, rate)| {
            let mib = rate * float(PAGE_SIZE) / MIB;
            format!("{name:<12}{rate:>12.0}{mib:>12.1} MiB/s")
        })
        .collect()
    }
}

#[allow(clippy::cast_precision_loss, reason = "counts are far below 2^52")]
pub(super) fn float(count: u64) -> f64 {
    count as f64
}
