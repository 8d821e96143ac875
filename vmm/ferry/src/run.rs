//! `ferry run`: launch a guest.

use std::fs;
use std::sync::{Arc, Mutex, PoisonError};

use super::Failure;
use super::arguments::RunArguments;
use super::console;
use super::service::{InputLine, Outside, Service, Terminal, end_with_parent};
use vmm::boot::Payload;
use vmm::config::{
    ConfigError, CpusConfig, DevicesConfig, MemoryConfig, PayloadConfig, SerialConfig, SerialMode,
    VmConfig,
};
use vmm::kvm::dirty_log::DirtyLogMode;
use vmm::kvm::host::Host;
use vmm::machine::{EmptyMachine, Machine, OnLoss, Shape, Wiring};
use vmm::monitor::{Launcher, Monitor, MonitorError, OnReset, Relaunch};
use vmm::vcpu::GuestEnd;

pub(super) fn run(arguments: &RunArguments) -> Result<u8, Failure> {
    let outside = Outside::open(
        arguments.api_socket.as_ref(),
        arguments.event_monitor.as_ref(),
    )?;
    let config = configuration(arguments)?;
    let host = Arc::new(Host::open()?);
    if let Some(parent) = arguments.end_with_parent {
        end_with_parent(parent)?;
    }
    let mut service = Service::start(outside)?;
    let house = Arc::new(House {
        host,
        dirty_log: arguments.dirty_log,
        monitor: Arc::clone(&service.monitor),
        terminal: service.terminal(),
        input: Mutex::new(None),
        on_end: service.on_end(),
        on_loss: service.on_loss(),
    });
    let on_reset = match arguments.no_reboot {
        true => OnReset::End,
        false => OnReset::StartAgain,
    };
    service.monitor.launch_with(launcher(house), on_reset);
    match config {
        None => service.answer()?,
        Some(config) => {
            // Created before any client could create another.
            service.monitor.create(config, Vec::new())?;
            service.answer()?;
            service.monitor.boot().map_err(plain)?;
        }
    }
    service.until_end()
}

/// Of a guest that is not there yet nobody needs to be told that it could not be started.
fn plain(error: MonitorError) -> Failure {
    match error {
        MonitorError::Launch(error) => error,
        other => other.into(),
    }
}

/// What all guests that this monitor launches have in common.
struct House {
    host: Arc<Host>,
    dirty_log: Option<DirtyLogMode>,
    monitor: Arc<Monitor>,
    terminal: Terminal,
    /// The way from standard input, once a guest's serial port led there.
    input: Mutex<Option<InputLine>>,
    on_end: Arc<dyn Fn(GuestEnd) + Send + Sync>,
    on_loss: OnLoss,
}

fn launcher(house: Arc<House>) -> Launcher {
    Box::new(move |config| {
        let launch = Launch::new(&house, config)?;
        let relaunch: Relaunch = Box::new(move || launch.machine());
        Ok(relaunch)
    })
}

/// All that it takes to launch a guest, the first time and each time after it was off.
struct Launch {
    house: Arc<House>,
    shape: Shape,
    payload: Payload,
    serial: SerialConfig,
    devices: DevicesConfig,
}

impl Launch {
    fn new(house: &Arc<House>, config: &VmConfig) -> Result<Self, ConfigError> {
        Ok(Self {
            house: Arc::clone(house),
            shape: config.shape(house.dirty_log)?,
            payload: config.boot_payload()?,
            serial: config.serial.clone(),
            devices: config.devices(),
        })
    }

    /// A machine with the guest at its beginning, and the console of the one before.
    fn machine(&self) -> Result<Arc<Machine>, Failure> {
        let house = &self.house;
        // The last words of a guest come before its first ones.
        console::flush();
        let wiring = Wiring {
            serial_output: console::output(&self.serial)?,
            on_end: Arc::clone(&house.on_end),
            on_loss: Arc::clone(&house.on_loss),
        };
        let mut empty = EmptyMachine::new(&house.host, &self.shape)?;
        empty.open_devices(&self.devices)?;
        let machine = empty.boot(&self.payload, wiring)?;
        house.terminal.take(&self.serial)?;
        if self.serial.mode == SerialMode::Tty {
            house.connect_input(&self.serial, &machine)?;
        }
        Ok(Arc::new(machine))
    }
}

impl House {
    fn connect_input(&self, serial: &SerialConfig, machine: &Machine) -> Result<(), Failure> {
        let mut input = self.input.lock().unwrap_or_else(PoisonError::into_inner);
        if input.is_none() {
            *input = Some(InputLine::start(serial, &self.monitor)?);
        }
        input.iter().try_for_each(|input| input.connect(machine))
    }
}

/// The guest that the arguments describe; none where there is no word of one.
fn configuration(arguments: &RunArguments) -> Result<Option<VmConfig>, Failure> {
    if let Some(path) = &arguments.config {
        let named = |error: &dyn std::fmt::Display| format!("--config {}: {error}", path.display());
        let json = fs::read(path).map_err(|error| named(&error))?;
        let config = VmConfig::from_json(&json).map_err(|error| named(&error))?;
        return Ok(Some(config));
    }
    if arguments.kernel.is_none() {
        return match (arguments.of_a_guest(), &arguments.api_socket) {
            (Some(given), _) => Err(format!(
                "{given} describes a guest, and there is no kernel for it: add --kernel FILE, or describe the whole guest \
                 in --config FILE or, with --api-socket alone, in vm.create"
            )
            .into()),
            (None, None) => Err(
                "there is no guest: give --kernel FILE, or --config FILE; or --api-socket PATH alone, to wait for vm.create"
                    .into(),
            ),
            (None, Some(_)) => Ok(None),
        };
    }
    let mut memory = MemoryConfig::default();
    if let Some(wanted) = arguments.memory {
        memory = MemoryConfig {
            size: wanted.size,
            shared: wanted.shared,
            hugepages: wanted.hugepages,
        };
    }
    let devices = arguments.devices.config();
    Ok(Some(VmConfig {
        cpus: CpusConfig::of(arguments.cpus.unwrap_or(1)),
        memory,
        payload: PayloadConfig {
            kernel: arguments.kernel.clone(),
            cmdline: arguments.cmdline.clone(),
            initramfs: arguments.initramfs.clone(),
        },
        serial: arguments.serial.clone().unwrap_or_default(),
        disks: devices.disks,
        net: devices.net,
        rng: devices.rng,
        vsock: devices.vsock,
        balloon: devices.balloon,
        console: devices.console,
    }))
}
