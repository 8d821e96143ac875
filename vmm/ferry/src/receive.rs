//! `ferry receive`: wait for a guest, then be its monitor.

use std::io;
use std::sync::Arc;
use std::sync::mpsc::Sender;
use std::thread;

use super::Failure;
use super::arguments::ReceiveArguments;
use super::console;
use super::service::{InputLine, Outside, Service, Terminal, end_with_parent};
use migration::destination;
use migration::progress::Phase;
use migration::transport::{Connection, Listener};
use vmm::carrier::{Admission, Incoming};
use vmm::complain::complain;
use vmm::config::{CpusConfig, DevicesConfig, MemoryConfig, PayloadConfig, SerialConfig, VmConfig};
use vmm::kvm::host::Host;
use vmm::machine::{self, Machine, OnLoss, Wiring};
use vmm::memory::Backing;
use vmm::monitor::Monitor;
use vmm::vcpu::GuestEnd;

pub(super) fn receive(arguments: &ReceiveArguments) -> Result<u8, Failure> {
    let outside = Outside::open(
        arguments.api_socket.as_ref(),
        arguments.event_monitor.as_ref(),
    )?;
    let host = Arc::new(Host::open()?);
    if let Some(parent) = arguments.end_with_parent {
        end_with_parent(parent)?;
    }
    let mut service = Service::start(outside)?;
    service.answer()?;
    let serial = arguments.serial.clone().unwrap_or_default();
    // Opened once before anything arrives, so that a path that cannot be is told now.
    drop(console::output(&serial)?);
    let devices = arguments.devices.config();
    // What depends on the size of the guest's memory is checked when that is known.
    devices.check(u64::MAX)?;
    machine::look(&devices)?;
    let listener = Arc::new(arguments.url.listen()?);
    let reception = Reception {
        host,
        monitor: Arc::clone(&service.monitor),
        listener: Arc::clone(&listener),
        admission: Admission {
            memory_limit: arguments.memory_limit,
            backing: arguments.memory_backing.into(),
            devices,
        },
        serial,
        on_end: service.on_end(),
        on_loss: service.on_loss(),
        ender: service.ender(),
        terminal: service.terminal(),
    };
    thread::Builder::new()
        .name("_migration".into())
        .spawn(move || reception.serve())?;
    let status = service.until_end();
    listener.close();
    status
}

/// Everything that is needed to take a guest in.
struct Reception {
    host: Arc<Host>,
    monitor: Arc<Monitor>,
    listener: Arc<Listener>,
    admission: Admission,
    serial: SerialConfig,
    on_end: Arc<dyn Fn(GuestEnd) + Send + Sync>,
    on_loss: OnLoss,
    ender: Sender<GuestEnd>,
    terminal: Terminal,
}

impl Reception {
    /// Waits until a guest has arrived; attempts that fail are reported.
    fn serve(self) {
        loop {
            let connection = match self.listen() {
                Ok(connection) => connection,
                Err(error) => {
                    let why = format!("waiting for a guest: {error}");
                    // Nobody listens only when the monitor is ending already.
                    let _ending = self.ender.send(GuestEnd::Failed(why));
                    return;
                }
            };
            match self.receive(&connection) {
                Ok(()) => return,
                Err(error) => {
                    complain(format_args!("no guest was received: {error}"));
                    // The source was told so and runs it: whatever had come this far must not be resumed here.
                    self.monitor.release();
                    self.monitor
                        .progress()
                        .end(Phase::Failed, Some(error.to_string()));
                }
            }
        }
    }

    fn listen(&self) -> io::Result<Connection> {
        let url = self.listener.url()?.to_string();
        self.monitor.progress().listen(url);
        self.listener.accept()
    }

    fn receive(&self, connection: &Connection) -> Result<(), Failure> {
        let wiring = Wiring {
            serial_output: console::output(&self.serial)?,
            on_end: Arc::clone(&self.on_end),
            on_loss: Arc::clone(&self.on_loss),
        };
        let (monitor, serial) = (Arc::clone(&self.monitor), self.serial.clone());
        let devices = self.admission.devices.clone();
        let adopt = Box::new(move |machine: &Arc<Machine>| {
            let config = configuration(machine, &serial, &devices);
            monitor.adopt(Arc::clone(machine), config);
        });
        let mut incoming = Incoming::new(
            Arc::clone(&self.host),
            self.admission.clone(),
            wiring,
            adopt,
        );
        let progress = self.monitor.progress();
        let received = destination::receive(&mut incoming, connection, progress)?;
        let machine = incoming
            .machine()
            .ok_or("the engine returned without a guest")?;
        let message = received
            .unconfirmed
            .map(|error| format!("the guest runs here, but the source could not be told: {error}"));
        if let Some(message) = &message {
            complain(message);
        }
        progress.end(Phase::Completed, message);
        self.listener.close();
        // The guest is here now, whatever becomes of its input.
        if let Err(error) = self.connect(machine) {
            complain(format_args!(
                "the guest's input cannot be connected: {error}"
            ));
        }
        Ok(())
    }

    fn connect(&self, machine: &Machine) -> Result<(), Failure> {
        self.terminal.take(&self.serial)?;
        InputLine::start(&self.serial, &self.monitor)?.connect(machine)
    }
}

/// The configuration of a guest that arrived: what can be told of it.
fn configuration(machine: &Machine, serial: &SerialConfig, devices: &DevicesConfig) -> VmConfig {
    let ram = machine.ram();
    let devices = devices.clone();
    VmConfig {
        cpus: CpusConfig::of(u32::try_from(machine.vcpus().len()).unwrap_or(u32::MAX)),
        memory: MemoryConfig {
            size: ram.bytes(),
            shared: ram.backing() != Backing::Anonymous,
            hugepages: ram.backing() == Backing::Hugetlb,
        },
        payload: PayloadConfig::default(),
        serial: serial.clone(),
        disks: devices.disks,
        net: devices.net,
        rng: devices.rng,
        vsock: devices.vsock,
        balloon: devices.balloon,
        console: devices.console,
    }
}
