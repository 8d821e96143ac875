//! An empty machine as the destination of a migration.

use std::fs;
use std::sync::Arc;

use ept::{Gpa, GpaRange, Tracker};
use kvm_bindings::kvm_cpuid_entry2;

use super::Admission;
use crate::boot;
use crate::complain::complain;
use crate::kvm::host::Host;
use crate::machine::{self, EmptyMachine, Live, Paused, Shape, Wiring};
use crate::memory::{self, Backing, GuestMemory, GuestRam};
use crate::size::size_text;
use migration::{Arrival, Description, DestinationGuest, GuestError, Section};

/// Called with a guest that has arrived, after COMMIT and before the source is told.
pub type OnArrival = Box<dyn FnOnce(Live) + Send>;

/// A guest that arrives: nothing at first, then its memory, then a machine. Dropped, it discards all of it.
pub struct MachineDestination {
    host: Arc<Host>,
    admission: Admission,
    wiring: Option<Wiring>,
    on_arrival: Option<OnArrival>,
    cpuid: Vec<kvm_cpuid_entry2>,
    /// State in which the guest arrives.
    arrives: Arrival,
    ram: Option<Arc<GuestRam>>,
    stage: Stage,
}

enum Stage {
    Nothing,
    Memory(Box<EmptyMachine>),
    Restored(Paused),
}

impl MachineDestination {
    /// Prepares to receive a guest on `host`. The guest is connected as `wiring` says, and handed to `on_arrival`.
    #[must_use]
    pub fn new(
        host: Arc<Host>,
        admission: Admission,
        wiring: Wiring,
        on_arrival: OnArrival,
    ) -> Self {
        Self {
            host,
            admission,
            wiring: Some(wiring),
            on_arrival: Some(on_arrival),
            cpuid: Vec::new(),
            arrives: Arrival::StaysPaused,
            ram: None,
            stage: Stage::Nothing,
        }
    }

    fn check_memory(&self, description: &Description) -> Result<(), String> {
        let bytes = description.memory_bytes();
        let here = memory::layout(bytes, self.admission.backing).map_err(|e| e.to_string())?;
        if here != description.ranges()? {
            return Err(format!(
                "its memory is laid out as {:x?}; this monitor lays {bytes} bytes out as {here:?}",
                description.memory
            ));
        }
        if let Some(limit) = self.admission.memory_limit.filter(|limit| bytes > *limit) {
            return Err(format!(
                "its {} of memory are more than --memory-limit {} of the destination",
                size_text(bytes),
                size_text(limit)
            ));
        }
        if self.admission.backing == Backing::Hugetlb {
            // Huge pages are reserved when the memory is made, which fails if there are too few.
            return Ok(());
        }
        let free = available_bytes().map_err(|error| format!("/proc/meminfo: {error}"))?;
        if description.populated_bytes > free {
            return Err(format!(
                "{} bytes of its memory are populated, this host has {free} available",
                description.populated_bytes
            ));
        }
        Ok(())
    }

    fn take_restored(&mut self) -> Result<Paused, GuestError> {
        match std::mem::replace(&mut self.stage, Stage::Nothing) {
            Stage::Restored(machine) => Ok(machine),
            Stage::Nothing | Stage::Memory(_) => Err("no guest has been restored".into()),
        }
    }

    fn arrived(&mut self, machine: Live) {
        if let Some(on_arrival) = self.on_arrival.take() {
            on_arrival(machine);
        }
    }
}

impl DestinationGuest for MachineDestination {
    type Memory = GuestMemory;

    fn prepare(&mut self, description: &Description) -> Result<(), GuestError> {
        self.check_memory(description)?;
        let cpuid = machine::cpuid(&description.facts)?;
        let missing = boot::missing_features(self.host.kvm(), &cpuid)?;
        if !missing.is_empty() {
            return Err(format!("this host's processor lacks: {}", missing.join(", ")).into());
        }
        let shape = Shape {
            cpus: description.cpus,
            memory_bytes: description.memory_bytes(),
            backing: self.admission.backing,
            dirty_log: None,
        };
        self.admission.devices.check(shape.memory_bytes)?;
        let mut empty = EmptyMachine::new(&self.host, &shape)?;
        empty.open_devices(&self.admission.devices)?;
        let misfits = empty.misfits(description);
        if !misfits.is_empty() {
            return Err(format!("state: {}", misfits.join("; ")).into());
        }
        self.cpuid = cpuid;
        self.arrives = description.arrival;
        self.ram = Some(Arc::clone(empty.ram()));
        self.stage = Stage::Memory(Box::new(empty));
        Ok(())
    }

    fn memory(&self) -> Option<&GuestMemory> {
        self.ram.as_ref().map(|ram| ram.memory())
    }

    fn tracker(&self) -> Option<&Arc<Tracker>> {
        self.ram.as_ref().map(|ram| ram.tracker())
    }

    fn write_pages(&self, start: Gpa, bytes: &[u8]) -> Result<(), GuestError> {
        let ram = self.ram.as_ref().ok_or("there is no guest memory yet")?;
        Ok(ram.write_pages(start, bytes)?)
    }

    fn populated(&self) -> Result<Vec<GpaRange>, GuestError> {
        match &self.ram {
            Some(ram) => Ok(ram.populated()?),
            None => Ok(Vec::new()),
        }
    }

    fn restore(&mut self, sections: &[Section]) -> Result<(), GuestError> {
        let stage = std::mem::replace(&mut self.stage, Stage::Nothing);
        let (Stage::Memory(empty), Some(wiring)) = (stage, self.wiring.take()) else {
            return Err("state came before memory, or twice".into());
        };
        let (machine, refused) =
            empty.restore(sections, std::mem::take(&mut self.cpuid), wiring)?;
        if !refused.is_empty() {
            complain(format_args!(
                "not restored, because this host refuses: {}",
                refused.join(", ")
            ));
        }
        self.stage = Stage::Restored(machine);
        Ok(())
    }

    /// A guest that arrives running is handed over by [`Self::resume`], once it runs.
    fn taken_over(&mut self) {
        if self.arrives == Arrival::StaysPaused
            && let Ok(machine) = self.take_restored()
        {
            self.arrived(Live::Paused(machine));
        }
    }

    fn resume(&mut self) -> Result<(), GuestError> {
        let machine = self.take_restored()?;
        let machine = machine.resume_arrived().map_err(|failed| failed.error)?;
        self.arrived(Live::Running(machine));
        Ok(())
    }
}

/// Returns `MemAvailable` of /proc/meminfo in bytes (proc_meminfo(5)).
fn available_bytes() -> std::io::Result<u64> {
    let text = fs::read_to_string("/proc/meminfo")?;
    text.lines()
        .find_map(|line| {
            line.strip_prefix("MemAvailable:")?
                .trim()
                .strip_suffix(" kB")?
                .parse()
                .ok()
        })
        .map(|kib: u64| kib.saturating_mul(1024))
        .ok_or_else(|| std::io::Error::other("it has no MemAvailable"))
}
