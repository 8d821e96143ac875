//! Counters of a guest: pages dirtied by source, stall time of vCPUs, and what its devices count.

use std::collections::BTreeMap;

use ept::{CountersSnapshot, Source};

use super::calls::Call;
use super::state::Guest;
use super::{Monitor, MonitorError};
use crate::machine::Gauges;
use crate::vcpu::VcpuStats;

/// Counters since the guest's machine was made.
#[derive(Clone, Debug)]
pub struct Counters {
    /// Counters of the dirty tracker. Pages dirtied by vCPUs are counted only while KVM's dirty log is on: during a
    /// migration and while the dirty rate is measured.
    pub tracker: CountersSnapshot,
    /// Bytes of host memory that the dirty tracker takes.
    pub tracker_bytes: u64,
    /// Stops and stall time of each vCPU, in order of the vCPUs.
    pub vcpus: Vec<VcpuStats>,
    /// Counters of each device by device name and counter name.
    pub devices: BTreeMap<String, BTreeMap<&'static str, u64>>,
}

/// Returns the name of a source of dirty pages in the API.
#[must_use]
pub fn source_name(source: Source) -> &'static str {
    match source {
        Source::Vcpu => "vcpu",
        Source::Monitor => "monitor",
        Source::Device => "device",
        Source::VhostUser => "vhost_user",
        Source::Fault => "fault",
    }
}

impl Monitor {
    /// Reads the counters of the guest.
    ///
    /// # Errors
    /// Returns [`MonitorError::Refused`] if there is no guest, or it is off.
    pub fn counters(&self) -> Result<Counters, MonitorError> {
        let state = self.allowed(Call::Counters)?;
        let gauges = state.guest().and_then(Guest::gauges);
        let gauges = gauges.ok_or_else(|| self.refused(Call::Counters, &state))?;
        drop(state);
        Ok(Counters::read(&gauges))
    }
}

impl Counters {
    fn read(gauges: &Gauges) -> Self {
        Self {
            tracker: gauges.tracker(),
            tracker_bytes: gauges.tracker_bytes(),
            vcpus: gauges.vcpus(),
            devices: devices(gauges),
        }
    }

    /// Returns the counters by component, in the shape of the Cloud Hypervisor API: a map of names and values each.
    #[must_use]
    pub fn by_component(&self) -> BTreeMap<String, BTreeMap<String, u64>> {
        let mut all = BTreeMap::new();
        all.insert("tracker".to_owned(), self.of_tracker());
        for (index, vcpu) in self.vcpus.iter().enumerate() {
            let stall_us = u64::try_from(vcpu.stall.as_micros()).unwrap_or(u64::MAX);
            let counters = [("stall_us", stall_us), ("stops", vcpu.stops)];
            all.insert(format!("vcpu{index}"), named(counters));
        }
        for (device, counters) in &self.devices {
            let counters = counters.iter().map(|(name, value)| (*name, *value));
            all.insert(device.clone(), named(counters));
        }
        all
    }

    fn of_tracker(&self) -> BTreeMap<String, u64> {
        let mut counters = named([
            ("outside_pages", self.tracker.outside),
            ("coarse_entries", self.tracker.coarse),
            ("longest_harvest_ns", self.tracker.longest_harvest_ns),
            ("memory_bytes", self.tracker_bytes),
        ]);
        for source in Source::ALL {
            let name = format!("dirtied_by_{}_pages", source_name(source));
            counters.insert(name, self.tracker.dirtied_by(source));
        }
        counters
    }
}

fn named(counters: impl IntoIterator<Item = (&'static str, u64)>) -> BTreeMap<String, u64> {
    counters
        .into_iter()
        .map(|(name, value)| (name.to_owned(), value))
        .collect()
}

fn devices(gauges: &Gauges) -> BTreeMap<String, BTreeMap<&'static str, u64>> {
    let serial = BTreeMap::from([("lost", gauges.lost_serial_bytes())]);
    let ports = BTreeMap::from([("unclaimed_accesses", gauges.unclaimed_ports())]);
    let mmio = BTreeMap::from([("unclaimed_accesses", gauges.unclaimed_mmio())]);
    let mut all = BTreeMap::from([
        ("_serial".to_owned(), serial),
        ("_ports".to_owned(), ports),
        ("_mmio".to_owned(), mmio),
    ]);
    for (name, counters) in gauges.devices() {
        all.insert(name, counters.into_iter().collect());
    }
    all
}
