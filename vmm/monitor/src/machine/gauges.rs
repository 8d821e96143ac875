//! Read-only figures of a machine, for observers while another thread owns the machine.

use std::sync::Arc;

use devices::virtio::BalloonControl;
use devices::{MmioBus, PortBus, Serial};
use ept::CountersSnapshot;

use super::virtio::{DeviceCounters, DeviceGauge};
use crate::memory::GuestRam;
use crate::vcpu::{Gate, VcpuStats};

/// Counters of one machine. Reading them never waits for a vCPU.
#[derive(Clone)]
pub struct Gauges {
    pub(super) ram: Arc<GuestRam>,
    pub(super) gates: Vec<Arc<Gate>>,
    pub(super) serial: Serial,
    pub(super) ports: Arc<PortBus>,
    pub(super) mmio: Arc<MmioBus>,
    pub(super) devices: Vec<DeviceGauge>,
    pub(super) balloon: Option<BalloonControl>,
}

impl Gauges {
    /// Returns the counters of the dirty tracker.
    #[must_use]
    pub fn tracker(&self) -> CountersSnapshot {
        self.ram.tracker().counters()
    }

    /// Returns the bytes of host memory that the dirty tracker takes.
    #[must_use]
    pub fn tracker_bytes(&self) -> u64 {
        self.ram.tracker().memory_bytes() as u64
    }

    /// Returns the stall time and the stops of each vCPU.
    #[must_use]
    pub fn vcpus(&self) -> Vec<VcpuStats> {
        self.gates.iter().map(|gate| gate.stats()).collect()
    }

    /// Returns the number of bytes of serial output that were dropped.
    #[must_use]
    pub fn lost_serial_bytes(&self) -> u64 {
        self.serial.lost()
    }

    /// Returns the number of port accesses that no device claimed.
    #[must_use]
    pub fn unclaimed_ports(&self) -> u64 {
        self.ports.unclaimed()
    }

    /// Returns the number of MMIO accesses that no device claimed.
    #[must_use]
    pub fn unclaimed_mmio(&self) -> u64 {
        self.mmio.unclaimed()
    }

    /// Returns the counters of each virtio device.
    #[must_use]
    pub fn devices(&self) -> DeviceCounters {
        self.devices.iter().map(DeviceGauge::read).collect()
    }

    /// Returns the bytes of memory that the guest has put into its balloon.
    #[must_use]
    pub fn ballooned_bytes(&self) -> u64 {
        let balloon = self.balloon.as_ref();
        balloon.map_or(0, |balloon| u64::from(balloon.actual()) * ept::PAGE_SIZE)
    }
}
