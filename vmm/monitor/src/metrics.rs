//! A monitor's figures in the text format of Prometheus (exposition format, version 0.0.4).
//!
//! The figures live where they are counted: in the tracker, the gates, the devices. Here they are read and named, once
//! for each question. A registry that owns metrics would be a second copy of each, so there is none.

use std::fmt::Write;

use ept::Source;

use crate::monitor::{Counters, Monitor, VmState, source_name};
use migration::{Phase, Report};

/// The content type of what [`render`] returns.
pub const CONTENT_TYPE: &str = "text/plain; version=0.0.4; charset=utf-8";

/// All figures of `monitor`.
#[must_use]
pub fn render(monitor: &Monitor) -> String {
    let mut text = Exposition::default();
    text.family("ferry_build_info", "gauge", "The version of this monitor.");
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
        "Events that their reader did not take.",
    );
    text.sample("ferry_events_lost_total", &[], monitor.events().lost());
    text.0
}

fn guest(text: &mut Exposition, monitor: &Monitor) {
    let info = monitor.info().ok();
    let now = info.as_ref().map(|info| info.state);
    text.family(
        "ferry_vm_state",
        "gauge",
        "1 for the state that the guest is in; all 0 without a guest.",
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
        text.family("ferry_vm_memory_bytes", "gauge", "Memory of the guest.");
        text.sample("ferry_vm_memory_bytes", &[], info.memory_actual_size);
        text.family("ferry_vm_vcpus", "gauge", "vCPUs of the guest.");
        text.sample(
            "ferry_vm_vcpus",
            &[],
            u64::from(info.config.cpus.boot_vcpus),
        );
    }
}

fn tracker(text: &mut Exposition, counters: &Counters) {
    let dirtied = "ferry_dirtied_pages_total";
    text.family(
        dirtied,
        "counter",
        "Pages that were clean and became dirty, by who wrote to them; vCPUs' only while the dirty log is on.",
    );
    for source in Source::ALL {
        let pages = counters.tracker.dirtied_by(source);
        text.sample(dirtied, &[("source", source_name(source))], pages);
    }
    text.family(
        "ferry_tracker_outside_pages_total",
        "counter",
        "Marked pages that lie outside of guest memory.",
    );
    text.sample(
        "ferry_tracker_outside_pages_total",
        &[],
        counters.tracker.outside,
    );
    text.family(
        "ferry_tracker_coarse_entries_total",
        "counter",
        "Entries marked whole because memory for detail was short.",
    );
    text.sample(
        "ferry_tracker_coarse_entries_total",
        &[],
        counters.tracker.coarse,
    );
    text.family(
        "ferry_tracker_memory_bytes",
        "gauge",
        "Memory that the dirty tracker takes.",
    );
    text.sample("ferry_tracker_memory_bytes", &[], counters.tracker_bytes);
}

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
    text.family(stops, "counter", "How often a vCPU was stopped.");
    for (label, vcpu) in labels.iter().zip(&counters.vcpus) {
        text.sample(stops, &[("vcpu", label)], vcpu.stops);
    }
}

fn devices(text: &mut Exposition, counters: &Counters) {
    let name = "ferry_device_counter_total";
    text.family(
        name,
        "counter",
        "What a device counted, by the names of vm.counters.",
    );
    for (device, counters) in &counters.devices {
        for (counter, value) in counters {
            text.sample(name, &[("device", device), ("counter", counter)], *value);
        }
    }
}

fn migration(text: &mut Exposition, progress: &Report) {
    text.family(
        "ferry_migration_active",
        "gauge",
        "1 while a guest is sent or received.",
    );
    text.sample(
        "ferry_migration_active",
        &[],
        u64::from(progress.phase.is_active()),
    );
    text.family(
        "ferry_migration_unconfirmed",
        "gauge",
        "1 while a person must say on which side the guest is.",
    );
    let unconfirmed = progress.phase == Phase::HandedOverUnconfirmed;
    text.sample("ferry_migration_unconfirmed", &[], u64::from(unconfirmed));
    text.family(
        "ferry_migration_sent_bytes",
        "gauge",
        "Bytes that the last migration has sent.",
    );
    text.sample("ferry_migration_sent_bytes", &[], progress.bytes_sent);
    text.family(
        "ferry_migration_rounds",
        "gauge",
        "Rounds of the last migration.",
    );
    text.sample("ferry_migration_rounds", &[], progress.rounds.len());
    text.family(
        "ferry_migration_downtime_seconds",
        "gauge",
        "How long the last migration stopped the guest.",
    );
    text.sample(
        "ferry_migration_downtime_seconds",
        &[],
        progress.downtime_ms / 1e3,
    );
}

/// The text, as it grows.
#[derive(Default)]
struct Exposition(String);

impl Exposition {
    /// Begins the samples of the metric `name`.
    fn family(&mut self, name: &str, kind: &str, help: &str) {
        // A string takes all that is written to it.
        let _endless = writeln!(self.0, "# HELP {name} {help}\n# TYPE {name} {kind}");
    }

    fn sample(&mut self, name: &str, labels: &[(&str, &str)], value: impl std::fmt::Display) {
        let labels: Vec<String> = labels
            .iter()
            .map(|(label, value)| format!("{label}=\"{}\"", escaped(value)))
            .collect();
        let labels = match labels.is_empty() {
            true => String::new(),
            false => format!("{{{}}}", labels.join(",")),
        };
        let _endless = writeln!(self.0, "{name}{labels} {value}");
    }
}

/// As the format wants label values: `\`, `"` and line ends escaped.
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
        // Each sample's family was declared before it.
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
