//! A machine as the source of a migration.

use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use ept::{GpaRange, Tracker};

use crate::machine::{DirtyLogs, Failed, Live, MachineError, Paused, RunState};
use crate::memory::{GuestMemory, GuestRam, byte_len};
use crate::vcpu::Throttle;
use migration::{Arrival, Description, GuestError, Section, SourceGuest};

/// Name of this program in streams, for people to read.
const WRITER: &str = concat!("ferry ", env!("CARGO_PKG_VERSION"));
/// Maximum time to wait for the locks of the disk images after a failed migration. A destination that gives up
/// releases them when it has released its own machine.
const RELOCK_LIMIT: Duration = Duration::from_secs(10);

/// A machine that is sent. It owns the machine, so that no other code can reach it meanwhile.
pub struct MachineSource {
    /// Empty only if a change of the machine's state panicked, which dropped the machine.
    machine: Option<Live>,
    /// State of the guest when the migration began. The guest returns to it if it stays here.
    before: RunState,
    ram: Arc<GuestRam>,
    dirty_logs: Arc<DirtyLogs>,
    throttle: Option<Throttle>,
}

impl MachineSource {
    /// Takes over `machine` for a migration.
    #[must_use]
    pub fn new(machine: Live) -> Self {
        Self {
            before: machine.run_state(),
            ram: Arc::clone(machine.ram()),
            dirty_logs: Arc::clone(machine.dirty_logs()),
            throttle: None,
            machine: Some(machine),
        }
    }

    /// Returns the machine after the migration ended, or `None` if a panic dropped it.
    #[must_use]
    pub fn into_machine(self) -> Option<Live> {
        self.machine
    }

    /// Returns the state of the guest when the migration began.
    #[must_use]
    pub fn before(&self) -> RunState {
        self.before
    }

    fn machine(&self) -> Result<&Live, GuestError> {
        Ok(self.machine.as_ref().ok_or(LOST)?)
    }

    /// Replaces the machine by what `change` makes of it.
    fn change(
        &mut self,
        change: impl FnOnce(Live) -> (Live, Result<(), MachineError>),
    ) -> Result<(), GuestError> {
        let machine = self.machine.take().ok_or(LOST)?;
        let (machine, result) = change(machine);
        self.machine = Some(machine);
        Ok(result?)
    }
}

const LOST: &str = "the machine was lost when its state changed";

impl SourceGuest for MachineSource {
    type Memory = GuestMemory;

    fn describe(&self) -> Result<Description, GuestError> {
        let machine = self.machine()?;
        let populated = self.populated()?;
        let memory: Vec<GpaRange> = self.ram.ranges().collect();
        let cpus = u32::try_from(machine.vcpus().len())?;
        Ok(Description {
            populated_bytes: populated.iter().map(byte_len).sum(),
            facts: machine.facts(),
            sections: machine.section_kinds(),
            arrival: match self.before {
                RunState::Running => Arrival::Runs,
                RunState::Paused => Arrival::StaysPaused,
            },
            ..Description::new(WRITER, &memory, cpus)
        })
    }

    fn memory(&self) -> &GuestMemory {
        self.ram.memory()
    }

    fn tracker(&self) -> &Arc<Tracker> {
        self.ram.tracker()
    }

    fn populated(&self) -> Result<Vec<GpaRange>, GuestError> {
        Ok(self.ram.populated()?)
    }

    fn start_log(&mut self) -> Result<(), GuestError> {
        Ok(self.dirty_logs.start()?)
    }

    fn sync_log(&mut self) -> Result<(), GuestError> {
        Ok(self.dirty_logs.sync()?)
    }

    fn clear_log(&mut self, range: GpaRange, dirty: &[u64]) -> Result<(), GuestError> {
        Ok(self.dirty_logs.clear(range, dirty)?)
    }

    fn throttle(&mut self, percent: u32) -> Result<(), GuestError> {
        match &self.throttle {
            Some(throttle) => throttle.set(percent),
            None => {
                let vcpus = self.machine()?.vcpus().iter();
                let gates = vcpus.map(|vcpu| Arc::clone(vcpu.gate())).collect();
                self.throttle = Some(Throttle::start(gates, percent)?);
            }
        }
        Ok(())
    }

    fn stop_log(&mut self) -> Result<(), GuestError> {
        self.throttle = None;
        Ok(self.dirty_logs.stop()?)
    }

    fn pause(&mut self) -> Result<(), GuestError> {
        self.change(pause)?;
        self.throttle = None;
        match self.machine()?.end() {
            None => Ok(()),
            Some(_) => Err(MachineError::Ended.into()),
        }
    }

    fn resume(&mut self) -> Result<(), GuestError> {
        let before = self.before;
        self.change(|machine| go_back_to(before, machine))
    }

    /// The destination locks the disk images next, so they are unlocked here.
    fn save(&self) -> Result<Vec<Section>, GuestError> {
        let Live::Paused(machine) = self.machine()? else {
            return Err("the machine is not paused".into());
        };
        let saved = machine.save()?;
        machine.unlock_disks()?;
        Ok(saved)
    }
}

fn pause(machine: Live) -> (Live, Result<(), MachineError>) {
    let Live::Running(running) = machine else {
        return (machine, Ok(()));
    };
    match running.pause() {
        Ok(paused) => (Live::Paused(paused), Ok(())),
        Err(Failed { machine, error }) => (Live::Running(machine), Err(error)),
    }
}

/// Locks the disks of a paused machine again, and resumes it if it ran before.
fn go_back_to(before: RunState, machine: Live) -> (Live, Result<(), MachineError>) {
    let Live::Paused(paused) = machine else {
        return (machine, Ok(()));
    };
    if let Err(error) = relock_disks(&paused) {
        return (Live::Paused(paused), Err(error));
    }
    if before == RunState::Paused {
        return (Live::Paused(paused), Ok(()));
    }
    match paused.resume() {
        Ok(running) => (Live::Running(running), Ok(())),
        Err(Failed { machine, error }) => (Live::Paused(machine), Err(error)),
    }
}

fn relock_disks(machine: &Paused) -> Result<(), MachineError> {
    let began = Instant::now();
    loop {
        match machine.lock_disks() {
            Err(_) if began.elapsed() < RELOCK_LIMIT => thread::sleep(Duration::from_millis(10)),
            locked => return locked,
        }
    }
}
