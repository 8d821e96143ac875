//! Metrics of a monitor in the text format of Prometheus (exposition format, version 0.0.4).
//!
//! The counters live where they are counted: in the tracker, the gates and the devices. They are read and formatted for
//! each request. There is no metrics registry, because it would be a second copy of each counter.

use std::fmt::Write;

use ept::Source;

use crate::monitor::{Counters, Monitor, VmState, source_name};
use migration::{Phase, Report};

/// Content type of the text that [`render`] returns.
pub const CONTENT_TYPE: &str = "text/plain; version=0.0.4; charset=utf-8";

/// Returns all metrics of `monitor` as text.
#[must_use]
pub fn render(monitor: &Monitor) -> String {
    let mut text = Exposition::default();
    text.family("ferry_build_info", "gauge", "Version of this monitor.");
    text.sample(
        "ferry_build_info",
        &[("version", env!("CARGO_PKG_VERSION"))],
        1,
    );
    guest(&mut text, monitor);
    if let Ok(counters) = monitor.counters() {
        tracker(&mut text, &counters);
        vcpus(&mut text, &counters);
        devices(&mut text, &counters);
    }
    migration(&mut text, &monitor.migration_progress());
    text.family(
        "ferry_events_lost_total",
        "counter",
        "Events that were dropped because their reader stalled or disconnected.",
    );
    text.sample("ferry_events_lost_total", &[], monitor.events().lost());
    text.0
}

/// Writes the state and the size of the guest.
fn guest(text: &mut Exposition, monitor: &Monitor) {
    let info = monitor.info().ok();
    let now = info.as_ref().map(|info| info.state);
    text.family(
        "ferry_vm_state",
        "gauge",
        "1 for the state that the guest is in; 0 for all states without a guest.",
    );
    for (state, name) in [
        (VmState::Created, "created"),
        (VmState::Running, "running"),
        (VmState::Paused, "paused"),
        (VmState::Shutdown, "shutdown"),
    ] {
        text.sample(
            "ferry_vm_state",
            &[("state", name)],
            u64::from(now == Some(state)),
        );
    }
    if let Some(info) = info {
        text.family(
            "ferry_vm_memory_bytes",
            "gauge",
            "Bytes of guest memory without those in the balloon.",
        );
        text.sample("ferry_vm_memory_bytes", &[], info.memory_actual_size);
        text.family("ferry_vm_vcpus", "gauge", "Number of vCPUs of the guest.");
        text.sample(
            "ferry_vm_vcpus",
            &[],
            u64::from(info.config.cpus.boot_vcpus),
        );
    }
}

/// Writes the counters of the dirty tracker.
fn tracker(text: &mut Exposition, counters: &Counters) {
    let dirtied = "ferry_dirtied_pages_total";
    text.family(
        dirtied,
        "counter",
        "Pages that became dirty, by the source of the write. Writes of vCPUs count only while the dirty log is on.",
    );
    for source in Source::ALL {
        let pages = counters.tracker.dirtied_by(source);
        text.sample(dirtied, &[("source", source_name(source))], pages);
    }
    text.family(
        "ferry_tracker_outside_pages_total",
        "counter",
        "Pages outside of guest memory that were marked dirty.",
    );
    text.sample(
        "ferry_tracker_outside_pages_total",
        &[],
        counters.tracker.outside,
    );
    text.family(
        "ferry_tracker_coarse_entries_total",
        "counter",
        "Tracker entries that were marked dirty as a whole because memory for single pages could not be allocated.",
    );
    text.sample(
        "ferry_tracker_coarse_entries_total",
        &[],
        counters.tracker.coarse,
    );
    text.family(
        "ferry_tracker_memory_bytes",
        "gauge",
        "Bytes of memory that the dirty tracker uses.",
    );
    text.sample("ferry_tracker_memory_bytes", &[], counters.tracker_bytes);
}

/// Writes the stall time and the stops of each vCPU.
fn vcpus(text: &mut Exposition, counters: &Counters) {
    let labels: Vec<String> = (0..counters.vcpus.len())
        .map(|index| index.to_string())
        .collect();
    let stall = "ferry_vcpu_stall_seconds_total";
    text.family(
        stall,
        "counter",
        "Time in which a vCPU could not run because the monitor held it.",
    );
    for (label, vcpu) in labels.iter().zip(&counters.vcpus) {
        text.sample(stall, &[("vcpu", label)], vcpu.stall.as_secs_f64());
    }
    let stops = "ferry_vcpu_stops_total";
    text.family(stops, "counter", "Number of times that a vCPU was stopped.");
    for (label, vcpu) in labels.iter().zip(&counters.vcpus) {
        text.sample(stops, &[("vcpu", label)], vcpu.stops);
    }
}

/// Writes the counters of each device.
fn devices(text: &mut Exposition, counters: &Counters) {
    let name = "ferry_device_counter_total";
    text.family(
        name,
        "counter",
        "Counter of a device, with the names that vm.counters uses.",
    );
    for (device, counters) in &counters.devices {
        for (counter, value) in counters {
            text.sample(name, &[("device", device), ("counter", counter)], *value);
        }
    }
}

/// Writes the progress of the current or last migration.
fn migration(text: &mut Exposition, progress: &Report) {
    text.family(
        "ferry_migration_active",
        "gauge",
        "1 while a guest is being sent or received.",
    );
    text.sample(
        "ferry_migration_active",
        &[],
        u64::from(progress.phase.is_active()),
    );
    text.family(
        "ferry_migration_unconfirmed",
        "gauge",
        "1 while the hand-over of a guest is unconfirmed and vm.migration-resolve is needed.",
    );
    let unconfirmed = progress.phase == Phase::HandedOverUnconfirmed;
    text.sample("ferry_migration_unconfirmed", &[], u64::from(unconfirmed));
    text.family(
        "ferry_migration_sent_bytes",
        "gauge",
        "Bytes that the current or last migration has sent.",
    );
    text.sample("ferry_migration_sent_bytes", &[], progress.bytes_sent);
    text.family(
        "ferry_migration_rounds",
        "gauge",
        "Pre-copy rounds of the current or last migration.",
    );
    text.sample("ferry_migration_rounds", &[], progress.rounds.len());
    text.family(
        "ferry_migration_downtime_seconds",
        "gauge",
        "Downtime of the guest in the last migration.",
    );
    text.sample(
        "ferry_migration_downtime_seconds",
        &[],
        progress.downtime_ms / 1e3,
    );
}

/// Metrics in text form, built one metric after the other.
#[derive(Default)]
struct Exposition(String);

impl Exposition {
    /// Writes the help text and the type of the metric `name`. Its samples must follow.
    fn family(&mut self, name: &str, kind: &str, help: &str) {
        // Writing to a string cannot fail.
        let _infallible = writeln!(self.0, "# HELP {name} {help}\n# TYPE {name} {kind}");
    }

    /// Writes one sample of a metric.
    fn sample(&mut self, name: &str, labels: &[(&str, &str)], value: impl std::fmt::Display) {
        let labels: Vec<String> = labels
            .iter()
            .map(|(label, value)| format!("{label}=\"{}\"", escaped(value)))
            .collect();
        let labels = match labels.is_empty() {
            true => String::new(),
            false => format!("{{{}}}", labels.join(",")),
        };
        let _infallible = writeln!(self.0, "{name}{labels} {value}");
    }
}

/// Escapes `\`, `"` and line feeds in a label value.
fn escaped(value: &str) -> String {
    value
        .replace('\\', "\\\\")
        .replace('"', "\\\"")
        .replace('\n', "\\n")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::events::Events;

    #[test]
    fn a_monitor_without_a_guest_has_figures_too() {
        let text = render(&Monitor::new(None, Events::nowhere()));
        assert!(
            text.contains("\nferry_vm_state{state=\"running\"} 0\n"),
            "{text}"
        );
        assert!(text.contains("\nferry_migration_active 0\n"), "{text}");
        assert!(!text.contains("ferry_vcpu_"), "{text}");
        // Each sample must follow the declaration of its metric.
        let mut declared = Vec::new();
        for line in text.lines() {
            if let Some(rest) = line.strip_prefix("# TYPE ") {
                declared.push(rest.split(' ').next().unwrap());
            } else if !line.starts_with('#') {
                let name = line.split(['{', ' ']).next().unwrap();
                assert_eq!(declared.last(), Some(&name), "{line}");
            }
        }
    }

    #[test]
    fn label_values_are_escaped() {
        let mut text = Exposition::default();
        text.sample("x", &[("a", "\\ \"\n")], 1);
        assert_eq!(text.0, "x{a=\"\\\\ \\\"\\n\"} 1\n");
    }
}
