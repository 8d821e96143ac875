//! What can be counted of a guest: who dirtied its memory, how long its vCPUs stood, what its devices did.

use std::collections::BTreeMap;

use ept::{CountersSnapshot, Source};

use super::{Monitor, MonitorError};
use crate::machine::Machine;
use crate::vcpu::VcpuStats;

/// What was counted since the guest's machine was made.
#[derive(Clone, Debug)]
pub struct Counters {
    /// Of the dirty tracker. What vCPUs dirty is seen only while KVM's dirty log is on: in a migration, and while the
    /// dirty rate is measured.
    pub tracker: CountersSnapshot,
    /// Bytes of memory that the tracker takes.
    pub tracker_bytes: u64,
    /// Of each vCPU, in order.
    pub vcpus: Vec<VcpuStats>,
    /// Of each device, by its name: names of counters, and values.
    pub devices: BTreeMap<String, BTreeMap<&'static str, u64>>,
}

/// A source's name in the API.
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
    /// What was counted of the guest.
    ///
    /// # Errors
    /// No guest that is on.
    pub fn counters(&self) -> Result<Counters, MonitorError> {
        let guest = self.guest();
        let guest = guest.as_ref().ok_or(MonitorError::NoGuest)?;
        Ok(Counters::of(guest.machine("counters")?))
    }
}

impl Counters {
    fn of(machine: &Machine) -> Self {
        let tracker = machine.ram().tracker();
        let vcpus = machine.vcpus().iter().map(|vcpu| vcpu.gate().stats());
        Self {
            tracker: tracker.counters(),
            tracker_bytes: tracker.memory_bytes() as u64,
            vcpus: vcpus.collect(),
            devices: devices(machine),
        }
    }

    /// By component, as the Cloud Hypervisor API shapes them: each a map of names and values.
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

fn devices(machine: &Machine) -> BTreeMap<String, BTreeMap<&'static str, u64>> {
    let serial = BTreeMap::from([("lost", machine.serial().lost())]);
    let ports = BTreeMap::from([("unclaimed_accesses", machine.unclaimed_ports())]);
    let mmio = BTreeMap::from([("unclaimed_accesses", machine.unclaimed_mmio())]);
    let mut all = BTreeMap::from([
        ("_serial".to_owned(), serial),
        ("_ports".to_owned(), ports),
        ("_mmio".to_owned(), mmio),
    ]);
    for (name, counters) in machine.device_counters() {
        all.insert(name, counters.into_iter().collect());
    }
    all
}
