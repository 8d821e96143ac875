//! Receiving a guest from another monitor.

use std::io;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;

use migration::{Attempt, ReceiveError, ReceiveOptions, Received, receive};

use super::calls::Call;
use super::migration_events::Direction;
use super::migration_record::{MigrationRecord, WorkerGuard};
use super::state::{Guest, Stage, State};
use super::{Monitor, MonitorError};
use crate::complain::complain;
use crate::config::{CpusConfig, DevicesConfig, MemoryConfig, SerialConfig, VmConfig};
use crate::kvm::host::Host;
use crate::machine::{Live, Machine, Wiring};
use crate::memory::Backing;
use crate::migrate::{Admission, Connection, Listener, MachineDestination};
use crate::panics::panic_message;
use crate::serial::{SerialBackend, SerialBackendError};
use crate::vcpu::GuestEnd;

/// Where a guest is received, and what it gets here.
pub struct Reception {
    /// KVM of this host.
    pub host: Arc<Host>,
    /// Socket on which sources connect.
    pub listener: Arc<Listener>,
    /// Limits, and host resources of the guest's devices.
    pub admission: Admission,
    /// Host's side of the guest's serial port.
    pub serial: SerialConfig,
    /// Opens that side.
    pub serial_backend: Arc<dyn SerialBackend>,
}

/// Reasons why one attempt brought no guest.
#[derive(Debug, thiserror::Error)]
enum AttemptError {
    #[error(transparent)]
    Refused(#[from] MonitorError),
    #[error(transparent)]
    Serial(#[from] SerialBackendError),
    #[error("{0}")]
    Receive(#[from] ReceiveError),
}

impl Monitor {
    /// Waits until a guest has arrived. Attempts that fail are reported on standard error, and the next source is
    /// waited for. When the guest is here, the listener is closed.
    ///
    /// If the listener fails, the monitor ends: [`Self::wait_for_end`] returns the reason.
    pub fn receive_guest(self: &Arc<Self>, reception: &Reception) {
        let waited = catch_unwind(AssertUnwindSafe(|| self.wait_for_guest(reception)));
        let why = match waited {
            Ok(Ok(())) => return,
            Ok(Err(error)) => error.to_string(),
            Err(panic) => panic_message(&*panic),
        };
        self.end(GuestEnd::Failed(format!("waiting for a guest: {why}")));
    }

    fn wait_for_guest(self: &Arc<Self>, reception: &Reception) -> io::Result<()> {
        let url = reception.listener.url()?.to_string();
        let mut next = Attempt::arriving(url.as_str());
        loop {
            let record = self.begin_attempt(next, Direction::Receive);
            let attempt = record.attempt.clone();
            let connection = reception.listener.accept()?;
            match self.receive_from(connection, &record, reception) {
                Ok(()) => {
                    reception.listener.close();
                    return Ok(());
                }
                Err(error) => {
                    complain(format_args!(
                        "no guest was received: {error}; still waiting on {url}"
                    ));
                    attempt.fail(error.to_string());
                    self.tell_migration_end(&attempt, Direction::Receive);
                    next = Attempt::arriving(url.as_str()).with_message(error.to_string());
                }
            }
        }
    }

    fn receive_from(
        self: &Arc<Self>,
        connection: Connection,
        record: &MigrationRecord,
        reception: &Reception,
    ) -> Result<(), AttemptError> {
        let (worker, before) = self.begin_receiving(record)?;
        let attempt = worker.attempt();
        let received = self.receive_into_state(connection, attempt, reception);
        self.discard_unless_arrived(before);
        let received = received?;
        if let Some(error) = received.unconfirmed {
            complain(format_args!(
                "the guest runs here, but the source could not be told: {error}"
            ));
        }
        self.tell_migration_end(attempt, Direction::Receive);
        // The guest is here now, even if its input cannot be connected.
        let port = self
            .lock()
            .guest()
            .and_then(Guest::machine)
            .map(|machine| machine.serial().clone());
        if let Some(port) = port
            && let Err(error) = reception
                .serial_backend
                .connect_input(&reception.serial, &port)
        {
            complain(format_args!(
                "the guest's input cannot be connected: {error}"
            ));
        }
        Ok(())
    }

    /// Returns the state before, which follows if no guest arrives.
    fn begin_receiving(
        &self,
        record: &MigrationRecord,
    ) -> Result<(WorkerGuard, State), MonitorError> {
        let mut state = self.allowed(Call::Receive)?;
        let before = std::mem::replace(&mut *state, State::Arriving);
        Ok((record.begin(), before))
    }

    fn discard_unless_arrived(&self, before: State) {
        let mut state = self.lock();
        if matches!(*state, State::Arriving) {
            *state = before;
        }
    }

    fn receive_into_state(
        self: &Arc<Self>,
        connection: Connection,
        attempt: &Attempt,
        reception: &Reception,
    ) -> Result<Received, AttemptError> {
        let wiring = Wiring {
            serial_output: reception.serial_backend.open_output(&reception.serial)?,
            on_end: Arc::clone(&self.callbacks.on_end),
            on_loss: Arc::clone(&self.callbacks.on_loss),
        };
        let (monitor, serial) = (Arc::clone(self), reception.serial.clone());
        let devices = reception.admission.devices.clone();
        let arrived = Box::new(move |machine: Live| {
            let config = configuration(&machine, &serial, &devices);
            monitor.adopt(machine, config);
        });
        let mut destination = MachineDestination::new(
            Arc::clone(&reception.host),
            reception.admission.clone(),
            wiring,
            arrived,
        );
        let options = ReceiveOptions::default();
        Ok(receive(&mut destination, connection, &options, attempt)?)
    }

    /// Takes over a guest that was not launched here. It cannot be booted again. If it has a balloon, the balloon keeps
    /// the size that the source asked for, whatever `config` says.
    pub fn adopt(&self, machine: Live, mut config: VmConfig) {
        if let (Some(control), Some(balloon)) = (machine.balloon(), &mut config.balloon) {
            balloon.size = u64::from(control.target()) * ept::PAGE_SIZE;
        }
        let mut state = self.lock();
        self.report_end_again(&machine);
        *state = State::Guest(Box::new(Guest {
            config,
            _taps: Vec::new(),
            plan: None,
            stage: Stage::from(machine),
        }));
    }
}

/// Describes a guest that arrived as far as it is known.
fn configuration(machine: &Machine, serial: &SerialConfig, devices: &DevicesConfig) -> VmConfig {
    let ram = machine.ram();
    VmConfig {
        cpus: CpusConfig::of(u32::try_from(machine.vcpus().len()).unwrap_or(u32::MAX)),
        memory: MemoryConfig {
            size: ram.bytes(),
            shared: ram.backing() != Backing::Anonymous,
            hugepages: ram.backing() == Backing::Hugetlb,
        },
        serial: serial.clone(),
        ..VmConfig::default()
    }
    .with_devices(devices.clone())
}
