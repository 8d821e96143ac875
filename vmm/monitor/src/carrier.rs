//! This monitor's side of a migration: a [`Machine`] as the engine's source, an [`EmptyMachine`] that a
//! guest is restored into as its destination.

use std::fs;
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use ept::{Gpa, GpaRange, Tracker};
use kvm_bindings::kvm_cpuid_entry2;

use crate::boot;
use crate::complain::complain;
use crate::config::DevicesConfig;
use crate::kvm::host::Host;
use crate::machine::{EmptyMachine, Machine, MachineError, Shape, Wiring};
use crate::memory::{self, Backing, GuestMemory, byte_len};
use crate::size::size_text;
use crate::vcpu::Throttle;
use migration::guest::{DestinationGuest, GuestError, Section, SourceGuest};
use migration::header::{Description, MemoryRange};

/// How long a guest that stays waits for its disks, which the destination had already.
const DISKS_BACK_LIMIT: Duration = Duration::from_secs(10);

/// A machine whose guest is sent.
pub struct Outgoing {
    machine: Arc<Machine>,
    /// Whether the guest ran when the migration began; otherwise it stays paused on both sides.
    running: bool,
    throttle: Option<Throttle>,
}

impl Outgoing {
    /// The guest of `machine`.
    #[must_use]
    pub fn new(machine: Arc<Machine>) -> Self {
        let running = machine.is_running();
        Self {
            machine,
            running,
            throttle: None,
        }
    }
}

impl Outgoing {
    /// A destination that gave up lets go of the disks when it has taken itself apart.
    fn take_disks_back(&self) -> Result<(), MachineError> {
        let began = Instant::now();
        loop {
            match self.machine.take_disks() {
                Err(_) if began.elapsed() < DISKS_BACK_LIMIT => {
                    thread::sleep(Duration::from_millis(10));
                }
                taken => return taken,
            }
        }
    }
}

impl SourceGuest for Outgoing {
    type Memory = GuestMemory;

    fn describe(&self) -> Result<Description, GuestError> {
        let populated = self.populated()?;
        Ok(Description {
            writer: format!("ferry {}", env!("CARGO_PKG_VERSION")),
            architecture: std::env::consts::ARCH.into(),
            page_size: ept::PAGE_SIZE,
            memory: self
                .machine
                .ram()
                .ranges()
                .map(|range| MemoryRange {
                    start: range.start().0,
                    bytes: byte_len(&range),
                })
                .collect(),
            populated_bytes: populated.iter().map(byte_len).sum(),
            cpus: u32::try_from(self.machine.vcpus().len())?,
            cpuid: self.machine.cpuid().to_vec(),
            sections: self.machine.section_kinds(),
            host_sides: self.machine.host_sides(),
            running: self.running,
        })
    }

    fn memory(&self) -> &GuestMemory {
        self.machine.ram().memory()
    }

    fn tracker(&self) -> &Arc<Tracker> {
        self.machine.ram().tracker()
    }

    fn populated(&self) -> Result<Vec<GpaRange>, GuestError> {
        Ok(self.machine.ram().populated()?)
    }

    fn start_log(&mut self) -> Result<(), GuestError> {
        Ok(self.machine.start_log()?)
    }

    fn sync_log(&mut self) -> Result<(), GuestError> {
        Ok(self.machine.sync_log()?)
    }

    fn clear_log(&mut self, range: GpaRange, dirty: &[u64]) -> Result<(), GuestError> {
        Ok(self.machine.clear_log(range, dirty)?)
    }

    fn throttle(&mut self, percent: u32) -> Result<(), GuestError> {
        match &self.throttle {
            Some(throttle) => throttle.set(percent),
            None => {
                let gates = self
                    .machine
                    .vcpus()
                    .iter()
                    .map(|vcpu| Arc::clone(vcpu.gate()));
                self.throttle = Some(Throttle::start(gates.collect(), percent)?);
            }
        }
        Ok(())
    }

    fn stop_log(&mut self) -> Result<(), GuestError> {
        self.throttle = None;
        Ok(self.machine.stop_log()?)
    }

    fn pause(&mut self) -> Result<(), GuestError> {
        self.machine.pause()?;
        self.throttle = None;
        if self.machine.has_ended() {
            return Err(MachineError::Ended.into());
        }
        Ok(())
    }

    fn resume(&mut self) -> Result<(), GuestError> {
        self.take_disks_back()?;
        if self.running {
            self.machine.resume()?;
        }
        Ok(())
    }

    /// The destination is about to take the disks, where both sides see the same.
    fn save(&self) -> Result<Vec<Section>, GuestError> {
        let saved = self.machine.save()?;
        self.machine.give_up_disks()?;
        Ok(saved)
    }
}

/// What a destination lets in.
#[derive(Clone, Debug)]
pub struct Admission {
    /// The most guest memory, in bytes. In any case what is populated at the beginning must be free here.
    pub memory_limit: Option<u64>,
    /// What guest RAM is made of here.
    pub backing: Backing,
    /// The host's side of the devices: those that the guest has.
    pub devices: DevicesConfig,
}

/// Told of a guest once it is this host's.
pub type OnArrival = Box<dyn Fn(&Arc<Machine>) + Send>;

/// A place for a guest that arrives.
pub struct Incoming {
    host: Arc<Host>,
    admission: Admission,
    wiring: Option<Wiring>,
    on_arrival: OnArrival,
    cpuid: Vec<kvm_cpuid_entry2>,
    state: Arrival,
}

enum Arrival {
    Nothing,
    Memory(Box<EmptyMachine>),
    Guest(Arc<Machine>),
}

impl Incoming {
    /// A place on `host`; the guest will be wired as `wiring` says, and `on_arrival` is told of it before it runs.
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
            on_arrival,
            cpuid: Vec::new(),
            state: Arrival::Nothing,
        }
    }

    /// The guest, once it was restored.
    #[must_use]
    pub fn machine(&self) -> Option<&Arc<Machine>> {
        match &self.state {
            Arrival::Guest(machine) => Some(machine),
            Arrival::Nothing | Arrival::Memory(_) => None,
        }
    }

    fn ram(&self) -> Option<&Arc<memory::GuestRam>> {
        match &self.state {
            Arrival::Nothing => None,
            Arrival::Memory(empty) => Some(empty.ram()),
            Arrival::Guest(machine) => Some(machine.ram()),
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
            // Huge pages are reserved when the memory is made: there may be too few, and that says so.
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
}

impl DestinationGuest for Incoming {
    type Memory = GuestMemory;

    fn prepare(&mut self, description: &Description) -> Result<(), GuestError> {
        self.check_memory(description)?;
        let missing = boot::missing_features(self.host.kvm(), &description.cpuid)?;
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
        self.cpuid.clone_from(&description.cpuid);
        self.state = Arrival::Memory(Box::new(empty));
        Ok(())
    }

    fn memory(&self) -> Option<&GuestMemory> {
        self.ram().map(|ram| ram.memory())
    }

    fn tracker(&self) -> Option<&Arc<Tracker>> {
        self.ram().map(|ram| ram.tracker())
    }

    fn write_pages(&self, start: Gpa, bytes: &[u8]) -> Result<(), GuestError> {
        let ram = self.ram().ok_or("there is no guest memory yet")?;
        Ok(ram.write_pages(start, bytes)?)
    }

    fn populated(&self) -> Result<Vec<GpaRange>, GuestError> {
        match self.ram() {
            Some(ram) => Ok(ram.populated()?),
            None => Ok(Vec::new()),
        }
    }

    fn restore(&mut self, sections: &[Section]) -> Result<(), GuestError> {
        let (state, wiring) = (
            std::mem::replace(&mut self.state, Arrival::Nothing),
            self.wiring.take(),
        );
        let (Arrival::Memory(empty), Some(wiring)) = (state, wiring) else {
            return Err("state before memory, or twice".into());
        };
        let (machine, left_out) =
            empty.restore(sections, std::mem::take(&mut self.cpuid), wiring)?;
        if !left_out.is_empty() {
            complain(format_args!(
                "not restored, because this host refuses: {}",
                left_out.join(", ")
            ));
        }
        self.state = Arrival::Guest(Arc::new(machine));
        Ok(())
    }

    fn taken_over(&mut self) {
        if let Some(machine) = self.machine() {
            (self.on_arrival)(machine);
        }
    }

    fn resume(&mut self) -> Result<(), GuestError> {
        let machine = self.machine().ok_or("there is no guest to resume")?;
        Ok(machine.resume_arrived()?)
    }
}

/// `MemAvailable` of /proc/meminfo, in bytes: proc_meminfo(5).
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
